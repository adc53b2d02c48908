"""Opening by name, what a loaded model must be, and one clear line for everything that is not."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from loopmdm.analysis import cut
from loopmdm.model import LoopMDM, UsageError, open_model, sample, sites
from loopmdm.model.adapters import FAMILIES, Family, hook_model, loading
from loopmdm.model.adapters.families import PATHS
from loopmdm.model.errors import UnknownNameError
from tests.conftest import toy_model
from tests.loopmdm_model.adapters import natives, standins


@pytest.fixture
def folder(tmp_path):
    """A saved BERT in two shards."""
    natives.native("Bert").save_pretrained(tmp_path / "bert", max_shard_size="20kB")
    return tmp_path / "bert"


def edited(folder, **changes):
    """The folder with other entries in config.json; None takes one out."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return folder


# --- what works ---


@pytest.mark.parametrize("name", natives.CONFIGS)
def test_every_class_of_transformers_is_taken_in(name):
    how = {"Esm": {}}.get(name, {"mask_token_id": 103})
    m = hook_model(natives.native(name), **how)
    tokens = natives.tokens()
    assert m.record["checks"]["logits"] == 0.0
    assert m.record["family"] == ("guessed" if name in natives.GUESSED else name.lower())
    unknown = {*natives.CAUSAL, *natives.GUESSED}
    assert m.facts.trained_to == (0.3 if name == "ModernBert" else 1.0 if name in unknown else 0.15)
    assert m.facts.linear_heads == (name not in ("BitNet", "HrmText"))
    assert m.facts.causal == (name in (*natives.CAUSAL, "GPT2"))
    assert m(tokens).shape == (*tokens.shape, natives.V)


def test_a_model_whose_attention_is_nobodys_to_hear_has_all_other_hooks():
    native = transformers.RoFormerForMaskedLM(
        transformers.RoFormerConfig(**natives.SIZES, embedding_size=32, attn_implementation="eager")
    ).eval()
    with pytest.raises(UsageError, match=r"transformers has no other for it: give hears=False"):
        hook_model(native, mask_token_id=103)
    m = hook_model(native, mask_token_id=103, hears=False, loop=(1, 2))
    tokens = natives.tokens()
    logits, cache = m.run_with_cache(tokens, 2)
    assert torch.equal(m(tokens, 1)[..., :100], native(tokens).logits[..., :100])
    assert torch.isfinite(logits[..., :100]).all() and "loop.1.blocks.2.hook_attn_out" in cache
    assert not [name for name in cache if "pattern" in name]
    with pytest.raises(UsageError, match=r"this model offers no attn\.hook_attn_scores"):
        cut(m, "masked->masked").__enter__()


def test_experts_that_the_config_does_not_count_are_named():
    native = natives.native("Qwen3")
    native.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(UsageError, match=r'give sizes=\{"n_experts": \.\., "n_chosen": \.\.\}'):
        hook_model(native)


def test_an_encoder_with_a_decoder_is_refused():
    config = transformers.BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2
    )
    with pytest.raises(UsageError, match=r"is an encoder and a decoder; give a model of one stack"):
        hook_model(transformers.BartForConditionalGeneration(config))


def test_a_head_that_is_not_all_is_named():
    with pytest.raises(UsageError, match=r"the head gives \[2, 8, 32\], the native forward \[2, 8, 120\]"):
        hook_model(natives.native("Llama"), head=("model.norm",))


def test_blocks_that_do_not_run_by_themselves_are_named():
    native = natives.native("Llama")
    block, forward, seen = native.model.layers[1].forward, native.model.forward, []

    def within(*args, **kwargs):
        seen.append(1.0)
        try:
            return forward(*args, **kwargs)
        finally:
            seen.clear()

    native.model.forward, native.model.layers[1].forward = within, lambda *a, **k: block(*a, **k) * seen[0]
    with pytest.raises(UsageError, match=r"its blocks do not run one by one \(list index out of range\)"):
        hook_model(native)


def test_a_gate_before_the_output_projection_is_named():
    with pytest.raises(UsageError, match=r"more than W_O stands between its heads and the stream .* linear_heads"):
        hook_model(natives.native("HrmText"), linear_heads=True)


def test_the_two_states_of_hrm_text():
    native, eager = natives.native("HrmText"), natives.native("HrmText", "eager")
    m, tokens = hook_model(native), natives.tokens()
    _, cache = m.run_with_cache(tokens)
    patterns = eager(tokens, output_attentions=True, use_cache=False).attentions
    ours = [cache[name] for name in cache if name.endswith("hook_pattern")]
    assert len(ours) == len(patterns) == 2 * 3 * 2  # high cycles, stacks, layers
    for one, other in zip(ours, patterns, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-6)
    for cycles in (1, 2, 3):
        deeper = natives.native("HrmText", H_cycles=cycles)
        assert torch.equal(m(tokens, cycles), deeper(tokens, use_cache=False).logits)
    both_ways = hook_model(native, bidirectional=True)
    whole = native(tokens, token_type_ids=torch.ones_like(tokens), use_cache=False).logits
    assert torch.equal(both_ways(tokens), whole)


def test_a_folder_is_opened_with_its_provenance(folder):
    m = open_model(folder, mask_token_id=103, loop=(1, 2), max_loops=2, dtype=torch.float64)
    assert m.model_name == "bert" and m.model.dtype == torch.float64
    assert m.record["source"] == str(folder) and m.record["transformers"] == transformers.__version__
    assert m.record["checks"]["logits"] <= 1e-6
    tokens = natives.tokens()
    logits = m(tokens, 1).float()
    wanted = natives.native("Bert")(tokens).logits
    wanted[..., 103] = float("-inf")
    torch.testing.assert_close(logits, wanted, rtol=0.0, atol=1e-5)


def test_ours_are_opened_too(tmp_path):
    toy_model().save_pretrained(tmp_path)
    assert isinstance(open_model(tmp_path).model, LoopMDM)
    assert isinstance(open_model("sotu-loop").model, LoopMDM)
    with pytest.raises(UsageError, match=r"is a LoopMDM"):
        open_model(tmp_path, mask_token_id=3)
    with pytest.raises(UnknownNameError, match=r"did you mean sotu-loop"):
        open_model("sotu-lop")


def test_text_by_a_tokenizer_of_transformers():
    words = {f"w{i}": i for i in range(118)} | {"<pad>": 118, "<mask>": 119}
    inside = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inside.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inside, mask_token="<mask>", pad_token="<pad>"
    )
    m = hook_model(natives.native("Bert"), tokenizer=tokenizer, loop=(1, 2))
    assert m.cfg.mask_token_id == 119
    logits = m(["w45 w46 w47", "w48"])
    torch.testing.assert_close(logits[1, :1], m("w48")[0], rtol=0.0, atol=1e-5)
    batch = m.mask("w45 w46 w47 w48", ratio=0.5)
    assert int(batch.masked.sum()) == 2 and m.to_str_tokens(batch.clean)[0] == "w45"


def framed_tokenizer(mask: str, lstrip: bool) -> Tokenizer:
    """Bytes, and special tokens around every text; texts are cut and filled up, as a saved tokenizer may say."""
    begin, end, pad = "<s>", "</s>", "<pad>"
    letters = [*map(chr, range(33, 127)), "\u0120"]
    words = {word: number for number, word in enumerate([begin, end, pad, mask, *letters])}
    found = Tokenizer(models.BPE(words, [], unk_token=letters[0]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([begin, end, pad, AddedToken(mask, lstrip=lstrip, special=True)])
    found.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(word, words[word]) for word in (begin, end)]
    )
    found.enable_padding(pad_id=2, pad_token=pad, length=60)
    found.enable_truncation(60)
    return found


@pytest.mark.parametrize(("mask", "lstrip"), [("[MASK]", False), ("<mask>", True)])
def test_text_is_text_to_other_peoples_tokenizers_but_where_gaps_are_asked_for(mask, lstrip):
    given = framed_tokenizer(mask, lstrip)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=given, mask_token=mask, pad_token="<pad>")
    m = hook_model(natives.native("Bert"), tokenizer=theirs, loop=(1, 2))
    text = f"the {mask} state{mask}."
    wanted = [token for token in given.encode(text).ids if token != 2]
    for ids in (m.to_tokens(text)[0], hook_model(natives.native("Bert"), tokenizer=given).to_tokens(text)[0]):
        assert 3 not in ids and m.to_string(ids) == f"<s>{text}</s>" and wanted.count(3) == 2
    spelled = m.to_tokens("a</s><pad>")[0].tolist()
    assert (spelled[0], spelled[-1]) == (0, 1) and not {0, 1, 2} & set(spelled[1:-1])
    for written in (text, text.replace(mask, "[MASK]")):
        for b in (m.with_gaps(written), m.mask(written)):
            assert b.tokens.tolist() == [wanted]
        assert sample(m, infill=written, steps=1).start.tolist() == [wanted]
    assert m.mask(text, 0.5).masked.sum() == round((len(m.to_tokens(text)[0]) - 2) / 2)
    assert m.to_tokens("a" * 70).shape == (1, 72)
    assert given.encode(mask).ids[1] == 3 and theirs(mask)["input_ids"][1] == 3  # theirs reads as it did


def test_what_stands_around_a_text_is_looked_up_once_and_for_texts_only(monkeypatch):
    m = hook_model(natives.native("Bert"), tokenizer=framed_tokenizer("[MASK]", False), loop=(1, 2))
    looked, around = [], m.around
    monkeypatch.setattr(m, "around", lambda: looked.append(1) or around())
    begin, end = around()
    found = sample(m, prompt=["ab", "c", "de"], length=3, steps=1).start
    assert len(looked) == 1 and found[:, :1].tolist() == [begin] * 3 and found[:, -1:].tolist() == [end] * 3
    assert found[1, 1] != 3 and found[1, 2] == 3  # where a text ends it goes on
    sample(m, prompt=[[5, 6]], length=3, steps=1)
    assert len(looked) == 1
    sample(m, prompt="ab", clues=torch.full((4,), -1), steps=1)
    assert len(looked) == 2


def test_flops_are_those_that_torch_counts():
    for name in ("Llama", "Bert", "ModernBert"):
        m = hook_model(natives.native(name), mask_token_id=103)
        tokens = natives.tokens(batch=1)
        with FlopCounterMode(display=False) as counter:
            m(tokens, 1, attn_path="eager")
        length = tokens.shape[1]
        counted = m.cfg.n_layers * m.model.layer_flops(length) + m.cfg.unembedding_flops(length)
        rotary = counter.get_total_flops() - counted  # tables made by a product, which nobody counts
        assert 0 <= rotary < 0.005 * counted, name
    layer = natives.native("Llama").model.layers[0]
    kept = 2 * 12 * (layer.self_attn.k_proj.weight.numel() + layer.self_attn.v_proj.weight.numel())
    assert hook_model(natives.native("Llama")).model.layer_flops(12, 0) == kept  # held tokens give keys and values


def test_a_model_without_a_record_by_its_six_paths():
    class Plain(nn.Module):
        """Somebody's own model: no config, no transformers."""

        def __init__(self):
            super().__init__()
            self.words, self.stack = nn.Embedding(30, 16), nn.ModuleList(standins.Decoder() for _ in range(2))
            self.read = nn.Linear(16, 30)

        def forward(self, ids, attention_mask=None):
            x = self.words(ids)
            for layer in self.stack:
                x = layer(x, attention_mask=None)[0]
            return self.read(x)

    native = standins.prepared(Plain())
    paths = {"blocks": "stack", "embed": "words", "head": "read", "attn": "self_attn"}
    paths |= {"attn_out": "self_attn.o_proj", "mlp": "mlp"}
    sizes = {"d_vocab": 30, "d_model": 16, "n_heads": 2, "n_ctx": 12}
    m = hook_model(native, loop=(0, 2), max_loops=2, sizes=sizes, mask_token_id=7, options={}, **paths)
    assert m.record["family"] == "given" and m.record["checks"]["logits"] == 0.0
    with pytest.raises(UsageError, match=r"attn_out missing; a model without a record needs blocks"):
        hook_model(native, **{name: path for name, path in paths.items() if name != "attn_out"})
    with pytest.raises(
        UsageError, match=r"has no record, and its head could not be found; give the paths blocks=, embed="
    ):
        hook_model(native)
    with pytest.raises(UsageError, match=r'none of vocab_size; give sizes={"d_vocab"'):
        hook_model(native, **paths)
    with pytest.raises(UsageError, match=r"attends with 2 heads of 8, its config says 4 of 4"):
        hook_model(native, sizes=sizes | {"n_heads": 4}, options={}, **paths)
    lost = hook_model(native, sizes=sizes, options={}, mask_token_id=7, **(paths | {"embed": "word"})).model
    with pytest.raises(UsageError, match=r"has no 'word'; give embed= the path that holds it"):
        lost.mask_vector.norm()


def test_an_eight_billion_parameter_model_without_weights():
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    with torch.device("meta"):
        native = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation="sdpa"))
    m = hook_model(native, loop=(12, 8), max_loops=4)
    assert "12 + 8 x S + 12 layers" in repr(m) and m.model.n_parameters > 8e9
    shapes = {name: sites.shape(m.cfg, name, 1, 100) for name in sites.all_names(m.cfg, 4)}
    assert shapes["loop.3.blocks.19.attn.hook_pattern"] == (1, 32, 100, 100)
    assert shapes["loop.0.blocks.12.attn.hook_k"] == (1, 100, 8, 128)
    assert m.model.layer_flops(100) > 0


def test_eight_billion_by_a_config_alone(tmp_path):
    sizes = {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
    transformers.Qwen3Config(**sizes, architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
    m = open_model(tmp_path, device="meta", bidirectional=True, mask_token_id=151662)
    assert m.model.n_parameters > 8e9 and not m.facts.causal and m.facts.mask_token_id == 151662
    assert "blocks.35.attn.hook_pattern" in sites.all_names(m.cfg, 1)


def test_no_tokenizer_is_made_up_where_none_was_saved(tmp_path):
    natives.native("Bert", vocab_size=30522, hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    m = open_model(tmp_path)
    assert m.tokenizer is None and m.cfg.mask_token_id == 103  # an empty tokenizer would say 4


def test_the_meta_device_by_name(folder):
    m = open_model(folder, device="meta", mask_token_id=103)
    assert m.model.device.type == "meta" and "meta" in m.record["checks"]["none"]


# --- what is refused ---


def test_ours_does_not_read_anothers_config(folder):
    with pytest.raises(
        UsageError, match=r"describes another model \(bert\), not a LoopMDM; open it with open_model"
    ):
        LoopMDM.from_pretrained(folder)


def test_no_network(monkeypatch):
    def nowhere(*args, **kwargs):
        raise OSError("no route to the hub")

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", nowhere)
    with pytest.raises(OSError, match=r"none was to be had from the hub .*; check the name and the network"):
        open_model("hf:nobody-here/no-such-model")


@pytest.mark.parametrize(
    ("kind", "sizes", "says"),
    [
        ("BertModel", {}, r"lacks cls.*it was saved as BertModel; open a checkpoint of BertForMaskedLM"),
        ("LlamaForSequenceClassification", {}, r"open a checkpoint of LlamaForCausalLM, which has the head"),
        ("RoFormerForMaskedLM", {"embedding_size": 32}, r"attends by code of its own; give hears=False"),
        ("ViTModel", {"image_size": 8, "patch_size": 4}, r"\(vit\) is no language model of one stack"),
    ],
)
def test_a_checkpoint_of_another_kind(kind, sizes, says, tmp_path):
    make = getattr(transformers, kind)
    make(make.config_class(**natives.SIZES, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=says):
        open_model(tmp_path, mask_token_id=103)


def test_a_hub_without_a_name():
    with pytest.raises(UsageError, match=r"opened by name or folder, got 'hf:'"):
        open_model("hf:")


@pytest.mark.parametrize("version", ["4.40.1", "6.0.0"])
def test_a_transformers_too_old_or_new(folder, monkeypatch, version):
    monkeypatch.setattr(loading, "version", lambda name: version)
    with pytest.raises(UsageError, match=f"transformers {version} is too (old|new) .* pip install"):
        open_model(folder)


def test_no_transformers(folder, monkeypatch):
    monkeypatch.setattr(loading, "version", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(UsageError, match=r"need transformers: pip install"):
        open_model(folder)


def test_a_missing_shard(folder):
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(UsageError, match=rf"lacks {shards[1].name} \(1 of {len(shards)} shards\)"):
        open_model(folder)


def test_half_a_shard(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(UsageError, match=r"does not load with transformers"):
        open_model(folder)


def test_missing_weights(folder):
    native = natives.native("Bert")
    shutil.rmtree(folder)
    native.bert.save_pretrained(folder)  # an encoder without its head
    edited(folder, architectures=["BertForMaskedLM"])
    with pytest.raises(UsageError, match=r"lacks cls.*more weights"):
        open_model(folder, mask_token_id=103)


def test_quantised_weights(folder):
    edited(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UsageError, match=r"is quantised \(gptq\); open the unquantised"):
        open_model(folder)
    native = natives.native("Bert")
    native.is_quantized = True
    with pytest.raises(UsageError, match=r"is quantised; load it without"):
        hook_model(native)


def test_its_own_code_only_where_that_is_said(folder):
    edited(
        folder,
        model_type="novel",
        auto_map={"AutoModelForMaskedLM": "modeling.Novel"},
        architectures=["DreamModel"],
    )
    with pytest.raises(
        UsageError, match=r"\(dream\) brings its own code; read it, then pass trust_remote_code=True"
    ):
        open_model(folder)


def test_an_unknown_family(folder):
    with pytest.raises(UnknownNameError, match=r"unknown family 'bertt'; did you mean bert"):
        open_model(folder, family="bertt")
    edited(folder, architectures=None, model_type=None)
    with pytest.raises(UsageError, match=r"unknown key in config"):  # then it can only be ours
        open_model(folder)


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_that_nobody_can_listen_to(attention):
    native = natives.native("Bert")
    native.config._attn_implementation = attention
    with pytest.raises(
        UsageError, match=f"attn_implementation='{attention}'.*load it with attn_implementation='sdpa'"
    ):
        hook_model(native, mask_token_id=103)


def test_attention_of_its_own_making():
    class Soft(standins.SelfAttention):
        def forward(self, x, mask=None, causal=False):
            return self.o_proj(self.q_proj(x))

    native = standins.prepared(standins.DreamModel())
    for layer in native.model.layers:
        layer.self_attn.__class__ = Soft
    with pytest.raises(
        UsageError, match=r"made no call of scaled_dot_product_attention.*load the model with attn"
    ):
        hook_model(native)
    m = hook_model(standins.prepared(standins.MDLM()), hears=False)
    assert not any("pattern" in leaf for leaf in m.cfg.leaves) and m.record["checks"]["logits"] == 0.0


def test_a_mask_that_does_not_exist():
    with pytest.raises(
        UsageError, match=r"mask_token_id 500 is outside the vocabulary 0..119; give mask_token_id="
    ):
        hook_model(natives.native("Bert"), mask_token_id=500)
    with pytest.raises(
        UsageError, match=r"has a .MASK., but neither config nor tokenizer names its id.*give mask_token_id="
    ):
        hook_model(natives.native("Bert"))
    words = {f"w{i}": i for i in range(119)} | {"[MASK]": 119}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    assert hook_model(natives.native("Bert"), tokenizer=tokenizer).cfg.mask_token_id == 119


def test_a_config_attribute_that_nobody_knows():
    native = natives.native("Bert", twisted=True)
    with pytest.raises(UsageError, match=r"the config has twisted = True.*give ignores=\('twisted',\)"):
        hook_model(native, mask_token_id=103)
    hook_model(native, mask_token_id=103, ignores=(*FAMILIES["bert"].ignores, "twisted"))
    with pytest.raises(UsageError, match=r"position_embedding_type = 'relative_key'"):
        hook_model(natives.native("Bert", position_embedding_type="relative_key"), mask_token_id=103)
    hook_model(natives.native("Bert", position_embedding_type="absolute"), mask_token_id=103)


def test_what_a_message_says_to_ignore_is_ignored_beside_what_the_record_knows():
    native = natives.native("Bert", twisted=True, pooler_fc_size=768)
    assert hook_model(native, mask_token_id=103, ignores="twisted").record["family"] == "bert"
    with pytest.raises(UsageError, match=r"\Athe config has twisted = 3.*give ignores"):
        hook_model(natives.native("GPT2", twisted=3))  # not as if a guess had failed


CONFIGS = {
    "XLMRobertaForMaskedLM": {"model_type": "xlm-roberta", "output_past": True, "vocab_size": 250002},
    "EsmForMaskedLM": {
        "model_type": "esm",
        "hidden_act": "gelu",
        "vocab_size": 33,
        "mask_token_id": 32,
        "pad_token_id": 1,
    },
    "Qwen2ForCausalLM": {"model_type": "qwen2", "use_mrope": False},
    "Qwen3MoeForCausalLM": {"model_type": "qwen3_moe", "head_dim": 16, "rope_theta": 1e6, "max_window_layers": 2},
    "GPT2LMHeadModel": {"model_type": "gpt2", "n_ctx": 64, "n_positions": 64, "summary_type": "cls_index"},
    "GemmaForCausalLM": {"model_type": "gemma", "hidden_activation": None, "rope_scaling": None},
    "OPTForCausalLM": {"model_type": "opt", "activation_dropout": 0.0, "prefix": "</s>"},
    "EuroBertForMaskedLM": {"model_type": "eurobert", "bos_token": "<s>", "pad_token_id": 1, "mask_token_id": 5},
}
"""What config.json of published models has beside what transformers' classes know today."""


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_as_they_are_published(name, tmp_path):
    sizes = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"architectures": [name]} | sizes | CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    m = open_model(tmp_path, device="meta")
    assert m.facts.causal == name.endswith(("CausalLM", "LMHeadModel"))
    assert type(m.model.native).__name__ == name


def test_a_causal_model_without_a_record_opens_by_its_folder(tmp_path):
    native = natives.native("GPT2")
    native.save_pretrained(tmp_path)
    m, tokens = open_model(tmp_path), natives.tokens()
    assert m.record["family"] == "guessed" and m.facts.causal
    assert torch.equal(m(tokens), native(tokens).logits)


BAD = ("", "x", 5, -1, 2.5, True, None, (), [], {}, {"a": 1}, (1, 2), ("a", "b", "c"), b"x", float("nan"))


@pytest.mark.parametrize("name", [*PATHS, *(each.name for each in fields(Family)), "loop", "max_loops"])
def test_a_wrong_value_of_anything_is_one_line(name):
    native = natives.native("Bert")
    for value in BAD:
        try:
            hook_model(native, **({"mask_token_id": 103} | {name: value}))
        except UsageError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"loop": 0}, r"loop must be \(first, n\).*got 0"),
        ({"loop": (1,)}, r"loop must be \(first, n\)"),
        ({"loop": (1, 2.0)}, r"loop\[1\] must be an integer"),
        ({"mask_token_id": "103"}, r"mask_token_id must be an integer, got '103'"),
        ({"sizes": {"heads": 4}}, r"unknown key in sizes 'heads'; did you mean n_heads"),
        ({"sizes": {"n_heads": 0}}, r"sizes.n_heads must be at least 1"),
        ({"causal": "no"}, r"causal must be True or False, got 'no'"),
        ({"parts": {"query": "q"}}, r"unknown key in parts 'query'"),
        ({"head": "nowhere"}, r"has no 'nowhere'; give head="),
        ({"times": (1, 2)}, r"times must have a number for each of bert.encoder.layer"),
        ({"times": "cycles"}, r"has no 'cycles'; give a number"),
        ({"blocks": ()}, r"blocks must be a path, or several"),
        ({"blocks": "cls.predictions.decoder"}, r"has no blocks in cls.predictions.decoder"),
        ({"cycle": "Injected"}, r"cycle must be a Cycle's class"),
        ({"trained_to": 15}, r"trained_to must be a number in 0..1, got 15"),
    ],
)
def test_a_wrong_value_says_what_is_wanted(given, says):
    with pytest.raises(UsageError, match=says):
        hook_model(natives.native("Bert"), **({"mask_token_id": 103} | given))


def test_parts_by_their_own_names():
    changed = {"parts": {"q": "attention.self.value"}, "attn_out": "attention.output.dense"}
    m = hook_model(natives.native("Bert"), mask_token_id=103, **changed)
    assert m.model.family.parts["q"] == "attention.self.value" and m.model.family.parts["k"].endswith("key")


def test_facts_that_are_not_true():
    with pytest.raises(
        UsageError, match=r"is declared causal, but later tokens move earlier logits; give causal=False"
    ):
        hook_model(natives.native("Bert"), mask_token_id=103, causal=True)
    with pytest.raises(
        UsageError, match=r"lets no later token move earlier logits; give causal=True, or bidirectional"
    ):
        hook_model(natives.native("Llama"), causal=False)
    with pytest.raises(UsageError, match=r"not the sum of what attention and MLP add.*give additive=False"):
        hook_model(natives.native("Bert"), mask_token_id=103, additive=True)


def test_a_forward_that_fails_says_so():
    native = natives.native("Llama", num_attention_heads=4, num_key_value_heads=2)
    native.model.norm = nn.LayerNorm(7)
    with pytest.raises(UsageError, match=r"its own forward fails on 8 random tokens .*; give family="):
        hook_model(native)


def test_a_record_of_another_model():
    with pytest.raises(UsageError, match=r"logits differ from the native forward's.*give family="):
        hook_model(natives.native("Llama"), head=("lm_head",))
    with pytest.raises(UsageError, match=r"has no 'bert.encoder.layer'; give blocks= the path"):
        hook_model(natives.native("Llama"), family="bert", mask_token_id=3)
    with pytest.raises(UsageError, match=r"never offers hook_mlp_out; the record names a part that is not called"):
        parts = {**FAMILIES["bert"].parts, "mlp": "attention.self.unused"}
        native = natives.native("Bert")
        for layer in native.bert.encoder.layer:
            layer.attention.self.unused = nn.Linear(32, 32)
        hook_model(native, family=replace(FAMILIES["bert"], parts=parts), mask_token_id=103)


def test_other_slips():
    with pytest.raises(UsageError, match=r"hook_model takes a torch module, got str; open_model takes names"):
        hook_model("bert")
    with pytest.raises(
        UnknownNameError, match=r"unknown key in hook_model 'mask_token'; did you mean mask_token_id"
    ):
        hook_model(natives.native("Bert"), mask_token=3)
    with pytest.raises(UsageError, match=r"loop=\(3, 2\) does not fit into the 4 layers"):
        hook_model(natives.native("Llama"), loop=(3, 2))
    with pytest.raises(UsageError, match=r"holds no fast tokenizer"):
        hook_model(natives.native("Llama"), tokenizer=object())


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_asked_for():
    code = (
        "import sys, loopmdm.model.adapters as a; a.FAMILIES; "
        "heavy = {'transformers', 'transformer_lens'} & sys.modules.keys(); assert not heavy, heavy; "
        "import loopmdm.model; loopmdm.model.hook_model, loopmdm.model.open_model; "
    )
    subprocess.run([sys.executable, "-c", code], check=True)
