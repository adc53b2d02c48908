"""Families of other people's models as records: where each keeps its parts, how it is called, what it is.

Paths are torch's (`get_submodule`), those of parts inside a block. Module trees were read in transformers 5.23;
for code that lives beside its weights, in copies of what `home` names. To add a family, add a record; what lies
between loops is a `Cycle`. Another package joins by an entry point of the group "loopmdm.models" that names a
`Family` with a `name`, or a list of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from loopmdm.model.adapters.cycles import Cycle, Injected, InjectedNormed, NormedGated, TwoStacks, TwoStates
from loopmdm.model.adapters.kinds import checked
from loopmdm.model.errors import UsageError, check_count, check_keys, unknown_name
from loopmdm.model.layout import Facts
from loopmdm.model.registry import Registry

PATHS = ("blocks", "embed", "head", "attn", "attn_out", "mlp")
"""What a user gives for a model without a record."""
PARTS = ("attn", "attn_out", "mlp", "ln1", "ln2", "q", "k")
"""Parts of a block."""

Arguments = Callable[[Tensor, Tensor | None], dict[str, Any]]


# --- how models are told who is padding ---


def by_keys(tokens: Tensor, keys: Tensor | None) -> dict[str, Any]:  # noqa: ARG001
    """One entry a token."""
    return {"attention_mask": None if keys is None else keys.long()}


def by_edges(tokens: Tensor, keys: Tensor | None) -> dict[str, Any]:
    """One entry an edge, [batch, 1, query, key]: all queries see all real keys, whatever the model was before."""
    real = torch.ones_like(tokens, dtype=torch.bool) if keys is None else keys
    return {"attention_mask": real[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)}


def by_pairs(tokens: Tensor, keys: Tensor | None) -> dict[str, Any]:  # noqa: ARG001
    """The word "full", or edges between real tokens only: padded queries see nothing."""
    return {"attention_mask": "full" if keys is None else keys[:, None, :, None] & keys[:, None, None, :]}


def by_nothing(tokens: Tensor, keys: Tensor | None) -> dict[str, Any]:  # noqa: ARG001
    """No way to say it."""
    if keys is not None and not bool(keys.all()):
        raise UsageError("this model knows no padding; give sequences of one length, without attention_mask")
    return {}


def at_time_zero(tokens: Tensor, keys: Tensor | None) -> dict[str, Any]:
    """A model with a time input that it does not use."""
    return by_nothing(tokens, keys) | {"timesteps": torch.zeros(len(tokens), device=tokens.device)}


def clean_half(tokens: Tensor, keys: Tensor | None) -> dict[str, Any]:
    """At time zero, the noised half of the training mask aside."""
    return at_time_zero(tokens, keys) | {"sample_mode": True}


def under_time_zero(native: nn.Module, x: Tensor) -> Tensor:
    """The head of a model whose norms are conditioned on a time that is always zero."""
    backbone: Any = native.get_submodule("backbone")
    return backbone.output_layer(x, torch.nn.functional.silu(backbone.sigma_map(x.new_zeros(len(x)))))


# --- records ---


@dataclass(frozen=True, kw_only=True)
class Family(Facts):
    """Where a family keeps its parts and what it is.

    Where: `name` is what it goes by here; `classes` names its model classes; `blocks` are module lists, in running
    order, each run `times` in a row (numbers, or names in the config; by default once); `embed` the token table,
    `lift` what takes its vectors to d_model, if they differ; `head` leads from the last state to logits, by paths
    or functions of (native, x); `parts` of a block are attn (where attention is computed; without it, the block
    itself), attn_out, mlp, ln1, ln2, q, k.

    How: `sizes` has names in the config where they are uncommon, numbers, or functions of the config; `loop` the
    layers that the model itself loops, as (first, n), numbers or names in the config, n None for all; `call` and
    `options` are the keywords of the forward; `masks` the id of [MASK] by vocabulary, where neither config nor
    tokenizer names it; `once` parts of a block that run once a sequence; `ignores` config attributes beyond the
    class's own that change nothing here, "name" or "name=value"; `hears` says that attention is torch's fused
    function; `auto` and `home` are where transformers and the hub have it. The rest are `Facts`.
    """

    name: str = ""
    classes: tuple[str, ...] = ()
    blocks: tuple[str, ...]
    times: tuple[int | str, ...] = ()
    embed: str
    head: tuple[str | Callable[[nn.Module, Tensor], Tensor], ...]
    parts: Mapping[str, str]
    lift: str = ""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    loop: tuple[int | str, int | str | None] | None = None
    cycle: type[Cycle] = Cycle
    call: Arguments = by_keys
    options: Mapping[str, Any] = field(default_factory=dict)
    bidirectional: bool = False
    masks: Mapping[int, int] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    auto: str = "AutoModelForMaskedLM"
    home: str = ""
    hears: bool = True
    pre_norm: bool = True

    def __post_init__(self):
        """Every field of its kind."""
        for each in fields(self):
            object.__setattr__(self, each.name, checked(each.name, getattr(self, each.name)))
        check_keys(self.parts, PARTS, "parts")
        if self.times and len(self.times) != len(self.blocks):
            raise UsageError(f"times must have a number for each of {', '.join(self.blocks)}, got {self.times}")

    def find_blocks(self, native: nn.Module) -> list[nn.Module]:
        """The blocks of a model, in order, those that run several times named as often."""
        lists = [list(at(native, path, "blocks").children()) for path in self.blocks]
        if not all(lists):
            raise UsageError(f"{type(native).__name__} has no blocks in {', '.join(self.blocks)}; give blocks=")
        times = [number(native, each) for each in self.times] or [1] * len(lists)
        return [block for several, n in zip(lists, times, strict=True) for block in several * n]

    def part(self, block: nn.Module, name: str) -> nn.Module:
        """A part of a block."""
        return at(block, self.parts[name], name)

    def unembed(self, native: nn.Module, x: Tensor) -> Tensor:
        """Logits of states [batch, pos, d_model]."""
        for step in self.head:
            x = at(native, step, "head")(x) if isinstance(step, str) else step(native, x)
        return x

    def embedded(self, native: nn.Module, token: Tensor) -> Tensor:
        """The embedding of a token id, in d_model."""
        x = at(native, self.embed, "embed")(token.reshape(1, 1))
        return (at(native, self.lift, "lift")(x) if self.lift else x)[0, 0]

    def arguments(self, tokens: Tensor, keys: Tensor | None) -> dict[str, Any]:
        """Keywords of a native call."""
        call = by_edges if self.bidirectional else self.call
        return call(tokens, keys) | dict(self.options)

    def facts(self, mask_token_id: int | None) -> Facts:
        """What kind of model it is; one made bidirectional is causal no longer."""
        stated = {each.name: getattr(self, each.name) for each in fields(Facts)}
        causal = self.causal and not self.bidirectional
        return Facts(**stated | {"mask_token_id": mask_token_id, "causal": causal})


def number(native: nn.Module, said: int | str) -> int:
    """A number as it is, or as the config has it under that name."""
    found = getattr(getattr(native, "config", None), said, None) if isinstance(said, str) else said
    if found is None:
        raise UsageError(f"the config of {type(native).__name__} has no {said!r}; give a number instead")
    return check_count(said if isinstance(said, str) else "times", found, least=0)


def at(module: nn.Module, path: str, role: str) -> nn.Module:
    """The part at a path; UsageError that names its role."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise UsageError(f"{type(module).__name__} has no {path!r}; give {role}= the path that holds it") from None


# fmt: off
HEADS_OF_OTHERS = (
    "classifier_dropout", "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
    "pooler_size_per_head", "pooler_type", "summary_activation", "summary_last_dropout", "summary_type",
    "summary_use_proj", "qa_dropout", "seq_classif_dropout", "tie_weights_", "num_memory_blocks",
    "net_structure_type", "gap_size", "down_scale_factor", "layers_to_keep", "is_folding_model", "esmfold_config",
    "vocab_list", "position_embedding_type=absolute",
)
"""Config attributes of published checkpoints that no masked-LM forward reads."""
MLM = "trained with 15% of tokens masked: likelihoods at higher mask ratios are extrapolation"

BERT = Family(
    classes=("BertForMaskedLM",),
    blocks=("bert.encoder.layer",), embed="bert.embeddings.word_embeddings", head=("cls",),
    parts={"attn": "attention.self", "attn_out": "attention.output.dense", "mlp": "output.dense",
           "q": "attention.self.query", "k": "attention.self.key"},
    masks={30522: 103, 28996: 103, 119547: 103, 105879: 103}, ignores=HEADS_OF_OTHERS,
    pre_norm=False, additive=False, trained_to=0.15, remarks=(MLM,),
)
ROBERTA = replace(
    BERT, classes=("RobertaForMaskedLM", "XLMRobertaForMaskedLM", "CamembertForMaskedLM"),
    blocks=("roberta.encoder.layer",), embed="roberta.embeddings.word_embeddings", head=("lm_head",),
    sizes={"n_ctx": lambda config: config.max_position_embeddings - config.pad_token_id - 1},
    masks={50265: 50264, 250002: 250001, 32005: 32004},
)
ALBERT = replace(
    BERT, classes=("AlbertForMaskedLM",),
    blocks=("albert.encoder.albert_layer_groups.0.albert_layers",), embed="albert.embeddings.word_embeddings",
    lift="albert.encoder.embedding_hidden_mapping_in", head=("predictions",),
    parts={"attn": "attention", "attn_out": "attention.dense", "mlp": "ffn_output",
           "q": "attention.query", "k": "attention.key"},
    loop=(0, None), sizes={"native_loops": "num_hidden_layers"}, masks={30000: 4},
)
DISTILBERT = replace(
    BERT, classes=("DistilBertForMaskedLM",),
    blocks=("distilbert.transformer.layer",), embed="distilbert.embeddings.word_embeddings",
    head=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    parts={"attn": "attention", "attn_out": "attention.out_lin", "mlp": "ffn",
           "q": "attention.q_lin", "k": "attention.k_lin"},
    sizes={"d_mlp": "hidden_dim"},
)
ELECTRA = replace(
    BERT, classes=("ElectraForMaskedLM",),
    blocks=("electra.encoder.layer",), embed="electra.embeddings.word_embeddings",
    lift="electra.embeddings_project", head=("generator_predictions", "generator_lm_head"),
)
ESM = replace(
    BERT, classes=("EsmForMaskedLM",),
    blocks=("esm.encoder.layer",), embed="esm.embeddings.word_embeddings",
    head=("esm.encoder.emb_layer_norm_after", "lm_head"),
    parts={**BERT.parts, "ln1": "attention.LayerNorm", "ln2": "LayerNorm"},
    sizes={"n_ctx": lambda config: config.max_position_embeddings - config.pad_token_id - 1},
    masks={33: 32}, pre_norm=True, additive=True, ignores=(*HEADS_OF_OTHERS, "hidden_act=gelu"),
    remarks=(MLM, "with token_dropout [MASK]'s embedding is zero, the others grow with the share of masks",
             "masks alone have no logits with it (0 / 0)"),
)
MODERNBERT = Family(
    classes=("ModernBertForMaskedLM",),
    blocks=("model.layers",), embed="model.embeddings.tok_embeddings",
    head=("model.final_norm", "head", "decoder"),
    parts={"attn": "attn", "attn_out": "attn.Wo", "mlp": "mlp", "ln1": "attn_norm", "ln2": "mlp_norm"},
    masks={50368: 50284},
    ignores=("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta", "layer_norm_eps",
             "position_embedding_type", "reference_compile", "repad_logits_with_grad"),
    trained_to=0.3, remarks=(MLM.replace("15%", "30%"),),
)
LLAMA = Family(
    classes=("LlamaForCausalLM",),
    blocks=("model.layers",), embed="model.embed_tokens", head=("model.norm", "lm_head"),
    parts={"attn": "self_attn", "attn_out": "self_attn.o_proj", "mlp": "mlp", "ln1": "input_layernorm",
           "ln2": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj"},
    options={"use_cache": False}, ignores=("rope_theta", "rope_scaling", "pretraining_tp=1"),
    auto="AutoModelForCausalLM", causal=True,
)
A2D = replace(
    LLAMA, classes=("A2DLlamaLMHeadModel", "A2DQwen2LMHeadModel", "A2DQwen3LMHeadModel"),
    causal=False, auto="AutoModelForMaskedLM", home="dllm-hub",
)
LLADA = Family(
    classes=("LLaDAModelLM",),
    blocks=("model.transformer.blocks",), embed="model.transformer.wte",
    head=("model.transformer.ln_f", "model.transformer.ff_out"),
    parts={"attn_out": "attn_out", "mlp": "ff_out", "ln1": "attn_norm", "ln2": "ff_norm",
           "q": "q_proj", "k": "k_proj"},
    sizes={"d_vocab": lambda config: config.embedding_size or config.vocab_size},
    masks={126464: 126336}, auto="AutoModel", home="GSAI-ML/LLaDA-8B-Base",
)
LLADA2 = replace(
    LLAMA, classes=("LLaDA2MoeModelLM",), embed="model.word_embeddings",
    parts={"attn": "attention", "attn_out": "attention.dense", "mlp": "mlp", "ln1": "input_layernorm",
           "ln2": "post_attention_layernorm"},
    call=by_edges, masks={157184: 156895}, causal=False, home="inclusionAI/LLaDA2.0-mini",
    remarks=("decodes by blocks; here every position sees every other",),
)
DREAM = replace(
    LLAMA, classes=("DreamModel",),
    call=by_pairs, masks={152064: 151666}, causal=False, shifted=True, auto="AutoModel",
    home="Dream-org/Dream-v0-Base-7B", remarks=("the state before a position predicts it",),
)
MDLM = Family(
    classes=("MDLM",),
    blocks=("backbone.blocks",), embed="backbone.vocab_embed", head=(under_time_zero,),
    parts={"attn_out": "attn_out", "mlp": "mlp"}, once=("adaLN_modulation",),
    sizes={"d_model": "hidden_dim", "n_ctx": "model_length"},
    call=at_time_zero, masks={50258: 50257}, pre_norm=False, additive=False, home="kuleshov-group/mdlm-owt",
    remarks=("hook_attn_out and hook_mlp_out come before a constant gate",),
)
BD3LM = replace(MDLM, classes=("BD3LM",), call=clean_half, home="kuleshov-group/bd3lm-owt-block_size4")
RAVEN = Family(
    classes=("RavenForCausalLM",),
    blocks=("transformer.prelude", "transformer.core_block", "transformer.coda"),
    embed="transformer.wte", head=("transformer.ln_f", "lm_head"),
    parts={"attn": "attn", "attn_out": "attn.proj", "mlp": "mlp.proj"},
    sizes={"n_ctx": "block_size", "native_loops": "mean_recurrence"},
    loop=("n_layers_in_prelude", "n_layers_in_recurrent_block"), cycle=InjectedNormed, call=by_nothing,
    pre_norm=False, additive=False, causal=True, random_start=True,
    auto="AutoModelForCausalLM", home="tomg-group-umd/huginn-0125",
    remarks=("sublayers are normed together with the stream that they are added to",),
)
RETROFITTED = replace(RAVEN, classes=(), cycle=Injected, home="smcleish")  # by name: its class is called Raven's
OURO = replace(
    LLAMA, classes=("OuroForCausalLM",), head=("lm_head",),
    loop=(0, None), sizes={"native_loops": "total_ut_steps"}, cycle=NormedGated,
    additive=False, gated=True, home="ByteDance/Ouro-1.4B",
    remarks=("the final norm follows every loop; sublayers are normed once more before they are added",),
)
TRM = Family(
    blocks=("inner.L_level.layers",), embed="inner.embed_tokens", head=("inner.lm_head",),
    parts={"attn": "self_attn", "attn_out": "self_attn.o_proj", "mlp": "mlp"},
    loop=(0, None), sizes={"native_loops": lambda config: config.H_cycles * (config.L_cycles + 1)},
    cycle=TwoStates, call=by_nothing, pre_norm=False, additive=False,
    home="SamsungSAILMontreal/TinyRecursiveModels",
    remarks=("two states: only every (L_cycles + 1)th loop moves the one that is read",),
)
HRM_TEXT = replace(
    LLAMA, classes=("HrmTextForCausalLM",),
    blocks=("model.L_module.layers", "model.H_module.layers"), times=("L_cycles", 1), head=("lm_head",),
    loop=(0, None), sizes={"native_loops": "H_cycles"}, cycle=TwoStacks,
    additive=False, linear_heads=False, home="sapientinc/HRM-Text-1B",
    remarks=("one loop is L_cycles runs of the low stack and one of the high stack", "heads are gated before W_O",
             "the prompt that it reads both ways is read as causal here; bidirectional=True opens all"),
)
# fmt: on

RECORDS = {
    "bert": BERT,
    "roberta": ROBERTA,
    "albert": ALBERT,
    "distilbert": DISTILBERT,
    "electra": ELECTRA,
    "esm": ESM,
    "modernbert": MODERNBERT,
    "llama": LLAMA,
    **{name.lower(): replace(LLAMA, classes=(f"{name}ForCausalLM",)) for name in ("Qwen2", "Qwen3", "Mistral")},
    "a2d": A2D,
    "llada": LLADA,
    "llada2": LLADA2,
    "dream": DREAM,
    "mdlm": MDLM,
    "bd3lm": BD3LM,
    "raven": RAVEN,
    "retrofitted": RETROFITTED,
    "ouro": OURO,
    "trm": TRM,
    "hrmtext": HRM_TEXT,
}

FAMILIES: Registry[Family] = Registry(
    "family", Family, "loopmdm.models", (replace(record, name=name) for name, record in RECORDS.items())
)


def family_named(name: str) -> Family:
    """A record by name, or UsageError with near matches."""
    if name not in FAMILIES:
        raise unknown_name("family", name, FAMILIES, f"For another model give the paths {', '.join(PATHS)}.")
    return FAMILIES[name]


def name_of_class(*classes: str) -> str | None:
    """The family of the first of these model classes that has one."""
    families = {each: name for name, family in FAMILIES.items() for each in family.classes}
    return next((families[each] for each in classes if isinstance(each, str) and each in families), None)


def looks_like(config: Mapping[str, Any]) -> str | None:
    """What a config.json of somebody else's says it is, for messages: a family, or its class; None: it is ours."""
    if not isinstance(config, Mapping):
        return None  # who reads it as ours says what is wrong with it
    classes = config.get("architectures") or ()
    classes = classes if isinstance(classes, list | tuple) else [classes]
    if not classes and not config.get("model_type"):
        return None
    return name_of_class(*classes) or (classes[0] if classes else config["model_type"])
