"""Other people's weights as a LoopMDM, where it computes the same: dense LLaDA, and MDLM.

A converted model runs faster than a foreign core, can be trained and saved, and shows all its weights. Two things
are folded:

    [MASK] is the last id of a LoopMDM: it and the last id trade places (`traded` moves ids there and back).
    MDLM's norms and sublayers are shifted, scaled and gated by a condition on a time that is always zero: weight
    w (1 + scale) and bias shift instead of w LN(x) (1 + scale) + shift, weight gate W instead of gate (W h).

Whatever a recipe does not take up is refused, and the result is tried against the model it was made from.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopmdm.model.adapters.checks import apart, tolerance
from loopmdm.model.adapters.core import ForeignCore
from loopmdm.model.adapters.norms import eps_of
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM, LoopRuns
from loopmdm.model.layout import Layout
from loopmdm.model.network.checkpoints import Uninitialised
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.network.layers import rotary_tables
from loopmdm.model.network.model import LoopMDM

Weights = dict[str, Tensor]
SIZES = (
    "d_vocab", "n_ctx", "d_model", "n_heads", "d_head", "d_mlp",
    "n_prelude_layers", "n_loop_layers", "n_coda_layers", "max_loops",
)  # fmt: skip


@torch.no_grad()
def to_loopmdm(model: LoopRuns | ForeignCore) -> HookedLoopMDM:
    """A LoopMDM that gives the logits of an opened LLaDA or MDLM, looping the same layers; weights are copied.

    Its ids are those of `model`, but for [MASK] and the last id; if these differ it has no tokenizer. UsageError
    in one line if it cannot be.
    """
    core = model.model if isinstance(model, LoopRuns) else model
    if not isinstance(core, ForeignCore):
        raise UsageError(f"{type(core).__name__} is no model of somebody else's; nothing to convert")
    recipe = RECIPES.get(core.family.name)
    if recipe is None:
        known = ", ".join(RECIPES)
        raise UsageError(f"{_name(core)} ({core.family.name or 'own record'}) is no LoopMDM; {known} convert")
    if core.device.type == "meta":
        raise UsageError(f"{_name(core)} has no weights on the meta device; open it on another")
    made = _made(core, recipe(core))
    _check(core, made)
    hooked = HookedLoopMDM(made)
    if isinstance(model, LoopRuns):
        hooked.reads_as(model)
        hooked.model_name, hooked.record = model.model_name, model.record | {"converted": core.family.name}
        hooked.special = frozenset(traded(torch.tensor(sorted(model.special)), core.cfg).tolist())
        if core.cfg.mask_token_id != core.cfg.d_vocab - 1:
            hooked.tokenizer = None
    return hooked


def traded(ids: Tensor, layout: Layout) -> Tensor:
    """Ids of a model with that layout as its conversion has them, or back: [MASK] and the last trade places."""
    mask, last = int(layout.mask_token_id), layout.d_vocab - 1
    return torch.where(ids == mask, last, torch.where(ids == last, mask, ids))


@dataclass(frozen=True)
class Recipe:
    """What a family's conversion gives: fields of the config beside sizes, and weights by LoopMDM's names."""

    fields: dict[str, Any]
    weights: Weights = field(repr=False)


def _made(core: ForeignCore, recipe: Recipe) -> LoopMDM:
    cfg = LoopMDMConfig(**{name: getattr(core.cfg, name) for name in SIZES}, **recipe.fields)
    with torch.device("meta"), Uninitialised():
        model = LoopMDM(cfg)
    order = traded(torch.arange(cfg.d_vocab, device=core.device), core.cfg)
    weights = {
        name: weight[order] if name.startswith(("embed.", "unembed.")) else weight.clone()
        for name, weight in recipe.weights.items()
    }
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise UsageError(f"{_name(core)} has {name} of {tuple(weights[name].shape)}, a LoopMDM {shape}")
    model.load_state_dict(weights, assign=True)
    cos, sin = rotary_tables(cfg)
    model.rotary_cos, model.rotary_sin = cos.to(core.device), sin.to(core.device)
    return model.eval()


def _check(core: ForeignCore, made: LoopMDM) -> None:
    """Logits on random tokens, a third of them masked, after one loop and after all."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(core.cfg.d_vocab, (2, min(16, core.cfg.n_ctx)), generator=generator)
    hidden, mask = torch.rand(tokens.shape, generator=generator) < 1 / 3, core.cfg.mask_token_id
    assert mask is not None, core.family.name
    tokens = tokens.masked_fill(hidden, mask).to(core.device)
    order = traded(torch.arange(core.cfg.d_vocab, device=core.device), core.cfg)
    for n_loops in {1, core.cfg.max_loops}:
        wanted = core(tokens, n_loops)
        off = apart(core, made(traded(tokens, core.cfg), n_loops)[..., order], wanted)
        allowed = tolerance(wanted.masked_fill(wanted.isinf(), 0.0).float())  # rotary tables are float32 in both
        if not off <= allowed:
            raise UsageError(
                f"{_name(core)} computes something else than a LoopMDM with its weights (logits differ by "
                f"{off:.2g}, expected at most {allowed:.0e}); use it as it was opened"
            )


# --- families ---

LLADA_NEEDS = {
    "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True, "alibi": False,
    "attention_layer_norm": False, "input_emb_norm": False, "scale_logits": False, "clip_qkv": None,
}  # fmt: skip
"""What LLaDA's config may say where it says anything."""


def _llada(core: ForeignCore) -> Recipe:
    config: Any = core.native.config  # pyright: ignore[reportAttributeAccessIssue]
    for name, wanted in LLADA_NEEDS.items():
        if getattr(config, name, wanted) != wanted:
            raise UsageError(f"{_name(core)} has {name} = {getattr(config, name)}, a LoopMDM {wanted}")
    if core.cfg.n_kv_heads != core.cfg.n_heads:
        raise UsageError(
            f"{_name(core)} has {core.cfg.n_kv_heads} heads of keys for {core.cfg.n_heads} of queries; "
            "in a LoopMDM each has its own"
        )
    transformer = core.native.get_submodule("model.transformer")
    weights = {"embed.weight": _only(transformer.get_submodule("wte"), ["weight"])["weight"]}
    for layer, block in enumerate(core.blocks):
        weights |= _prefixed(f"blocks.{layer}.", _llada_block(block))
    ln_f, head = transformer.get_submodule("ln_f"), transformer.get_submodule("ff_out")
    weights |= _prefixed("ln_final.", _only(ln_f, ["weight"])) | _prefixed("unembed.", _only(head, ["weight"]))
    fields = {"normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu", "mlp_bias": False}
    fields |= {"unembed_bias": False, "rotary_base": float(getattr(config, "rope_theta", 10000.0))}
    return Recipe(fields | {"eps": eps_of(ln_f)}, weights)


def _llada_block(block: nn.Module) -> Weights:
    names = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out", "attn_norm", "ff_norm")
    found = _only(block, [f"{name}.weight" for name in names])
    parts = {name: found[f"{name}.weight"] for name in names}
    return {
        "ln1.weight": parts["attn_norm"],
        "attn.qkv.weight": torch.cat([parts["q_proj"], parts["k_proj"], parts["v_proj"]]),
        "attn.out.weight": parts["attn_out"],
        "ln2.weight": parts["ff_norm"],
        "mlp.gate.weight": parts["ff_proj"],
        "mlp.up.weight": parts["up_proj"],
        "mlp.out.weight": parts["ff_out"],
    }


def _mdlm(core: ForeignCore) -> Recipe:
    backbone: Any = core.native.get_submodule("backbone")
    condition = F.silu(backbone.sigma_map(torch.zeros(1, device=core.device)))
    weights = {"embed.weight": backbone.vocab_embed.embedding}
    for layer, block in enumerate(core.blocks):
        weights |= _prefixed(f"blocks.{layer}.", _dit_block(block, condition))
    head = backbone.output_layer
    names = (
        "norm_final.weight",
        "linear.weight",
        "linear.bias",
        "adaLN_modulation.weight",
        "adaLN_modulation.bias",
    )
    found = _only(head, names)
    shift, scale = head.adaLN_modulation(condition)[0].chunk(2)
    weights |= {"ln_final.weight": found["norm_final.weight"] * (1 + scale), "ln_final.bias": shift}
    weights |= {"unembed.weight": found["linear.weight"], "unembed.bias": found["linear.bias"]}
    act = {"tanh": "gelu_new", "none": "gelu"}.get(getattr(core.blocks[0].mlp[1], "approximate", ""))  # pyright: ignore
    if act is None:
        raise UsageError(f"{_name(core)} has an MLP with {core.blocks[0].mlp[1]}, a LoopMDM GELU")  # pyright: ignore
    return Recipe({"act_fn": act, "eps": eps_of(head.norm_final)}, weights)


def _dit_block(block: Any, condition: Tensor) -> Weights:
    linear = [f"{name}.{kind}" for name in ("mlp.0", "mlp.2", "adaLN_modulation") for kind in ("weight", "bias")]
    found = _only(block, ["norm1.weight", "norm2.weight", "attn_qkv.weight", "attn_out.weight", *linear])
    shift, scale, gate, shift_2, scale_2, gate_2 = block.adaLN_modulation(condition)[0].chunk(6)
    return {
        "ln1.weight": found["norm1.weight"] * (1 + scale),
        "ln1.bias": shift,
        "attn.qkv.weight": found["attn_qkv.weight"],
        "attn.out.weight": gate[:, None] * found["attn_out.weight"],
        "ln2.weight": found["norm2.weight"] * (1 + scale_2),
        "ln2.bias": shift_2,
        "mlp.up.weight": found["mlp.0.weight"],
        "mlp.up.bias": found["mlp.0.bias"],
        "mlp.out.weight": gate_2[:, None] * found["mlp.2.weight"],
        "mlp.out.bias": gate_2 * found["mlp.2.bias"],
    }


RECIPES: dict[str, Callable[[ForeignCore], Recipe]] = {"llada": _llada, "mdlm": _mdlm}


# --- parts ---


def _only(module: nn.Module, names: Iterable[str]) -> Weights:
    """The weights `names` of a module, which must have these and no others."""
    found, names = dict(module.named_parameters()), set(names)
    for name in sorted(names ^ set(found)):
        has = "has" if name in found else "lacks"
        raise UsageError(f"{type(module).__name__} {has} {name}, unlike what a LoopMDM can hold; use it as it is")
    return {name: weight.detach() for name, weight in found.items()}


def _prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: weight for name, weight in weights.items()}


def _name(core: ForeignCore) -> str:
    return type(core.native).__name__
