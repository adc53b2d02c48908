"""Other people's models unrolled: the native model's numbers, TransformerLens' patching, and sums that close."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import patching
from transformer_lens.tools.analysis import direct_logit_attribution, logit_lens

from loopmdm.model import UsageError, sites
from loopmdm.model.adapters import hook_model
from loopmdm.model.adapters.norms import read_norm
from loopmdm.model.sites import applications
from tests.loopmdm_model.adapters import natives, standins

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LOOPED = {"loop": (1, 2), "max_loops": 3}
ADDITIVE = {
    "Llama": LOOPED,
    "Qwen3": LOOPED | {"mask_token_id": 119, "bidirectional": True},
    "LLaDAModelLM": {"loop": (1, 1), "max_loops": 3},
    "LLaDA2MoeModelLM": {"loop": (1, 1), "max_loops": 3},
}
POST_NORM = {"Albert": {"mask_token_id": 4}, "Bert": LOOPED | {"mask_token_id": 103}}
OTHERS = {
    "Esm": (LOOPED, "EsmLMHead"),
    "ModernBert": (LOOPED | {"mask_token_id": 117}, "ModernBertPredictionHead"),
    "DreamModel": ({"loop": (1, 1)}, r"facts\.shifted = True"),
}
THE_REST = {
    **dict.fromkeys(("Roberta", "DistilBert", "Electra"), LOOPED | {"mask_token_id": 103}),
    **dict.fromkeys(("Qwen2", "Mistral"), LOOPED),
    "MDLM": {"loop": (1, 1)},
    "BD3LM": {"loop": (1, 1)},
    "RavenForCausalLM": {},
    "Retrofitted": {"family": "retrofitted"},
    "OuroForCausalLM": {},
    "TwoStates": {"family": "trm"},
}


def native(name):
    return standins.prepared(getattr(standins, name)()) if hasattr(standins, name) else natives.native(name)


def made(name, how):
    return hook_model(native(name), **how)


def tokens(m, seed=1):
    low, high = (4, 20) if m.cfg.d_vocab < 100 else (40, 100)
    return torch.randint(low, high, (2, 8), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=ADDITIVE)
def m(request):
    return made(request.param, ADDITIVE[request.param])


EVERY = ADDITIVE | POST_NORM | THE_REST | {name: how for name, (how, _) in OTHERS.items()}


@pytest.mark.parametrize("name", EVERY)
def test_values_are_those_of_the_looped_model_bit_for_bit(name):
    m = made(name, EVERY[name])
    u, ids = m.unrolled(3), tokens(m)
    last = m.cfg.mask_token_id == m.cfg.d_vocab - 1
    wanted = m(ids, 3, mask_logit=not last)
    assert torch.equal(u(ids), wanted) and u.d_vocab_out == wanted.shape[-1] == m.cfg.d_vocab - last
    _, ours = u.run_with_cache(ids)
    _, theirs = m.run_with_cache(ids, 3)
    again = theirs.unrolled()
    assert set(ours) == set(again)
    for depth, (prefix, layer) in enumerate(applications(m.cfg, 3)):
        assert u.places[depth][1] == layer
        for leaf in set(m.cfg.leaves) - set(sites.ON_DEMAND):
            name = f"blocks.{depth}.{leaf}"
            assert torch.equal(ours[name], theirs[prefix + leaf]) and torch.equal(again[name], ours[name]), name


@pytest.mark.parametrize(("name", "n_loops"), [("Albert", 3), ("Bert", 1), ("Llama", 1)])
def test_unrolled_as_often_as_natively_it_is_the_native_model(name, n_loops):
    plain = native(name)
    m = hook_model(plain, **(POST_NORM | ADDITIVE)[name])
    assert m.cfg.native_loops == n_loops
    ids, mask = tokens(m), m.cfg.mask_token_id
    wanted = plain(ids, use_cache=False).logits if name == "Llama" else plain(ids).logits
    found = m.unrolled(n_loops)(ids)
    if mask is not None:
        assert bool((found[..., mask] == float("-inf")).all())
        found, wanted = (x.index_fill(-1, torch.tensor(mask), 0.0) for x in (found, wanted))
    assert torch.equal(found, wanted)


def test_padded_texts_are_read_as_by_the_looped_model():
    words = {f"w{i}": i for i in range(118)} | {"<pad>": 118, "<mask>": 119}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    m = hook_model(native("Bert"), tokenizer=tokenizer, **LOOPED)
    m.special, m.gap_words = frozenset({118}), ("_",)
    texts = ["w45 w46 w47", "w48"]
    logits, (_, cache) = m(texts, 2), m.run_with_cache(texts, 2)
    unpadded = m(m.to_tokens(texts), 2, attention_mask=torch.ones(2, 3).bool())
    assert not torch.allclose(unpadded[1, 0, :118], logits[1, 0, :118])
    for u in (m.unrolled(2), cache.unrolled().model):
        assert torch.equal(u(texts), logits[..., : u.d_vocab_out])
        assert (u.tokenizer, u.pad, u.special, u.gap_words) == (m.tokenizer, "<pad>", {118}, ("_",))


def test_attributions_close(m):
    ids, u = tokens(m), m.unrolled(3)
    logits, ours = u.run_with_cache(ids)
    _, looped = m.run_with_cache(ids, 3)
    for cache in (ours, looped.unrolled()):
        parts = cache.decompose_resid()
        torch.testing.assert_close(parts.sum(0), cache["resid_post", -1], **CLOSE)
        for stream in (cache.decompose_resid(apply_ln=True).sum(0), cache.accumulated_resid(apply_ln=True)[-1]):
            torch.testing.assert_close(stream @ u.W_U + u.b_U, logits, **CLOSE)
        whole = cache.get_full_resid_decomposition(expand_neurons=False)
        answers = torch.full_like(ids, 7)
        total = cache.logit_attrs(whole, tokens=answers).sum(0) + u.b_U[7]
        torch.testing.assert_close(total, logits[..., 7], **CLOSE)
    torch.testing.assert_close(u.unembed(u.ln_final(ours["resid_post", -1])), logits, **CLOSE)


def test_heads_write_what_attention_gives(m):
    _, cache = m.unrolled(3).run_with_cache(tokens(m))
    for depth in range(cache.model.cfg.n_layers):
        attn = cache.model.blocks[depth].attn
        written = torch.einsum("bphd,hdm->bpm", cache["z", depth], attn.W_O) + attn.b_O
        torch.testing.assert_close(written, cache["attn_out", depth], **CLOSE)


def metric(logits):
    return logits.log_softmax(-1)[:, 4, 5].mean()


SWEEPS = [
    ("get_act_patch_resid_pre", "hook_resid_pre", lambda i: (slice(None), i[1])),
    ("get_act_patch_attn_out", "hook_attn_out", lambda i: (slice(None), i[1])),
    ("get_act_patch_mlp_out", "hook_mlp_out", lambda i: (slice(None), i[1])),
    ("get_act_patch_attn_head_out_by_pos", "attn.hook_z", lambda i: (slice(None), i[1], i[2])),
    ("get_act_patch_attn_head_pattern_all_pos", "attn.hook_pattern", lambda i: (slice(None), i[1])),
]


@pytest.mark.parametrize(("sweep", "leaf", "where"), SWEEPS, ids=[sweep[0] for sweep in SWEEPS])
@pytest.mark.parametrize("name", [*ADDITIVE, *POST_NORM])
def test_patching_equals_a_patch_by_hand(name, sweep, leaf, where):
    m = made(name, (ADDITIVE | POST_NORM)[name])
    u, corrupted, done = m.unrolled(3), tokens(m, seed=2), applications(m.cfg, 3)
    _, clean = u.run_with_cache(tokens(m))
    found = getattr(patching, sweep)(u, corrupted, clean, metric)
    assert found.shape[0] == len(done) and found.std() > 1e-5
    for pick in torch.randint(0, found.numel(), (4,), generator=torch.Generator().manual_seed(0)).tolist():
        index = [int(i) for i in torch.unravel_index(torch.tensor(pick), found.shape)]

        def put(x, hook, index=index):
            x[where(index)] = clean[f"blocks.{index[0]}.{leaf}"][where(index)]
            return x

        by_hand = m.run_with_hooks(corrupted, n_loops=3, fwd_hooks=[(done[index[0]][0] + leaf, put)])
        torch.testing.assert_close(found[tuple(index)], metric(by_hand), atol=1e-5, rtol=1e-4)


def test_tools_of_the_analysis_run(m):
    u, ids = m.unrolled(3), tokens(m)
    logits, cache = u.run_with_cache(ids)
    torch.testing.assert_close(logit_lens(u, cache=cache, positions=None).values[-1], logits, **CLOSE)
    found = direct_logit_attribution(u, ids, 7, 9, unit="component", pos=4)
    wanted = logits[:, 4, 7] - logits[:, 4, 9] - (u.b_U[7] - u.b_U[9])
    torch.testing.assert_close(found.attribution.sum(0), wanted, **CLOSE)


@pytest.mark.parametrize("name", POST_NORM)
def test_a_stream_that_is_no_sum_is_not_taken_apart(name):
    m = made(name, POST_NORM[name])
    _, cache = m.unrolled(3).run_with_cache(tokens(m))
    for ask in (
        cache.decompose_resid,
        cache.stack_head_results,
        cache.get_full_resid_decomposition,
        cache.apply_slice_to_batch_dim(0).decompose_resid,
    ):
        with pytest.raises(UsageError, match=r"needs an additive residual stream.*facts\.additive = False"):
            ask()
    with pytest.raises(UsageError, match="needs a head of a norm and a linear map"):
        cache.accumulated_resid(apply_ln=True)


@pytest.mark.parametrize("name", OTHERS)
def test_a_readout_that_is_no_matrix_is_named(name):
    how, says = OTHERS[name]
    m = made(name, how)
    _, cache = m.unrolled(3).run_with_cache(tokens(m))
    torch.testing.assert_close(cache.decompose_resid().sum(0), cache["resid_post", -1], **CLOSE)
    for ask in (lambda: m.W_U, lambda: cache.model.ln_final, lambda: cache.decompose_resid(apply_ln=True)):
        with pytest.raises(UsageError, match=says):
            ask()


def test_what_is_not_shown_says_where_it_lies(m):
    u = m.unrolled(2)
    _, cache = u.run_with_cache(tokens(m))
    for ask in (
        lambda: m.W_Q,
        lambda: u.W_in,
        lambda: m.W_E,
        lambda: u.blocks[0].mlp,
        lambda: u.blocks[0].attn.W_V,
    ):
        with pytest.raises(AttributeError, match=r"under its own names in m\.model\.native"):
            ask()
    assert not hasattr(m, "W_Q") and m.W_O.shape == (m.cfg.n_layers, m.cfg.n_heads, m.cfg.d_head, m.cfg.d_model)
    if m.cfg.n_kv_heads != m.cfg.n_heads:
        with pytest.raises(UsageError, match="share 2 heads of keys"):
            patching.get_act_patch_attn_head_k_all_pos(u, tokens(m), cache, metric)


def test_leaving_out_the_mask_is_refused_where_it_is_not_last():
    m = made("Bert", POST_NORM["Bert"])
    for call in (m, m.run_with_cache):
        with pytest.raises(UsageError, match=r"it is id 103 of 120 here"):
            call(tokens(m), mask_logit=False)
    last = made("Qwen3", ADDITIVE["Qwen3"])
    assert torch.equal(last(tokens(last), mask_logit=False), last(tokens(last))[..., :-1])


# --- one layer applied again and again: a looped masked LM ---


def test_albert_attends_with_all_it_has_at_every_application():
    from loopmdm.analysis import mask_attention

    m = made("Albert", POST_NORM["Albert"])
    assert (m.cfg.n_prelude_layers, m.cfg.n_loop_layers, m.cfg.n_coda_layers, m.cfg.native_loops) == (0, 1, 0, 3)
    ids = tokens(m)
    batch = m.mask(ids, ratio=0.5, seed=0)
    _, cache = m.unrolled(3).run_with_cache(batch.tokens)
    patterns = cache.stack_activation("pattern")
    torch.testing.assert_close(patterns.sum(-1), torch.ones(patterns.shape[:-1]))
    table = mask_attention(m, batch, n_loops=3)
    masses = table.groupby(["loop", "head", "query_group"], dropna=False)["mass"].sum()
    assert len(masses) == 3 * m.cfg.n_heads * 2 and masses.sub(1).abs().max() < 1e-6


class OneMore(torch.nn.RMSNorm):
    """Keeps its weight less one, as some do."""

    def forward(self, x):
        return super().forward(x) + x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize(
    ("norm", "centred"),
    [
        (torch.nn.LayerNorm(8), True),
        (torch.nn.LayerNorm(8, bias=False, eps=0.1), True),
        (torch.nn.RMSNorm(8), False),
        (torch.nn.LayerNorm(8, dtype=torch.bfloat16), True),
        (torch.nn.RMSNorm(8, dtype=torch.bfloat16), False),
        (torch.nn.RMSNorm(8, dtype=torch.float64), False),
    ],
)
def test_norms_are_told_by_what_they_compute(norm, centred):
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    found = read_norm(norm)
    assert (found.centred, found.weight is norm.weight) == (centred, True)
    own = torch.float64 if norm.weight.dtype == torch.float64 else torch.float32
    assert found.eps == (torch.finfo(own).eps if norm.eps is None else norm.eps)


class Renamed(torch.nn.Module):
    """An RMSNorm that calls its epsilon otherwise."""

    def __init__(self, least):
        super().__init__()
        self.weight, self.least = torch.nn.Parameter(torch.ones(8)), least

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, (8,), self.weight, self.least)


@pytest.mark.parametrize(
    "norm",
    [
        OneMore(8),
        torch.nn.LayerNorm(8, elementwise_affine=False),
        torch.nn.Identity(),
        Renamed(1e-6),
        Renamed(1e-4),
    ],
)
def test_a_norm_of_another_kind_is_refused(norm):
    with pytest.raises(UsageError, match=f"{type(norm).__name__} is neither"):
        read_norm(norm)
