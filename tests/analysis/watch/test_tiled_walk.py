"""Sums from tiles are sums over patterns: by hand, for every measure, on our models and on others'."""

from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loopmdm.analysis.measures.attention import (
    ChangeSums,
    attention_shape,
    mask_attention,
    received_attention,
    sink_attention,
)
from loopmdm.analysis.measures.attention.heads import head_growth
from loopmdm.analysis.measures.attention.masses import AttentionSums
from loopmdm.analysis.measures.attention.shape import ShapeSums
from loopmdm.analysis.measures.interventions import cut
from loopmdm.analysis.watch.sums import Asks, Moved, PatternSums
from loopmdm.analysis.watch.walk import walk
from loopmdm.model import tiles
from loopmdm.model.adapters import hook_model
from loopmdm.model.errors import NotFiniteError, UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.sites import at
from loopmdm.model.tiles import Asked, attend, tiles_of
from tests.conftest import toy_model
from tests.loopmdm_model.adapters import natives, standins

MEASURES = {
    "masses": lambda m, b: mask_attention(m, b, 2, batch_size=3),
    "pooled": lambda m, b: mask_attention(m, b, 2, content=False, by_head=False),
    "shape": lambda m, b: attention_shape(m, b, 2),
    "sinks": lambda m, b: sink_attention(m, b, 2, factors=(1.2, 3.0), content=True),
    "growth": lambda m, b: head_growth(m, b, 2),
}
LOGARITHMS = r"log_odds|growth|p_value|p_holm"


def agree(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    """Alike to 5e-6; logarithms of small masses, and what is tested on them, to 1e-4."""
    assert list(found) == list(wanted)
    for name in found:
        near = 1e-4 if pd.Series(name).str.contains(LOGARITHMS).all() else 5e-6
        pd.testing.assert_series_equal(found[name], wanted[name], rtol=near, atol=near)


@pytest.fixture(params=[None, 40], ids=["one tile", "many tiles"])
def size(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(tiles, "IN_CACHE", request.param)


def both(m, measure, b):
    """A measure as it is, and with patterns made."""
    with m.attention_path("eager"):
        wanted = measure(m, b)
    return measure(m, b), wanted


# --- sums by hand ---


def naive(pattern, weights, value, keys, gram):
    """All sums of one head of one sequence in float64, by loops."""
    n = len(pattern)
    apart = pattern * (1 - torch.eye(n))
    distance = [sum(float(pattern[q, k]) * abs(q - k) for k in range(n)) for q in range(n)]
    entropy = [-sum(float(a * a.log()) for a in row if a > 0) for row in pattern]
    content = torch.zeros(n, keys.shape[-1])
    for q in range(n):
        for group in range(keys.shape[-1]):
            rest = [k for k in range(n) if keys[k, group] and k != q]
            if rest:
                mean = value[rest].mean(0)
                moved = sum(apart[q, k] * (value[k] - mean) for k in rest)
                content[q, group] = (moved @ gram @ moved).sqrt()
    return pattern.diagonal(), weights.T @ apart, torch.tensor(entropy), torch.tensor(distance), content


def test_sums_are_what_loops_over_the_pattern_give(size):
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(2, 3, 6, 6, generator=generator).mul(3).softmax(-1)
    pattern[0, 0, 2] = torch.eye(6)[2]  # all to itself
    pattern[0, 0, 3] = torch.eye(6)[1]  # nothing to itself
    weights = torch.rand(2, 6, 2, generator=generator)
    value, gram = torch.randn(2, 3, 6, 4, generator=generator), torch.eye(4).repeat(3, 1, 1)
    keys = torch.tensor([[1.0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]]).T.expand(2, 1, 6, 2)
    asks = [Asks(), Asks(shape=True, moved=Moved(keys, gram))]
    sums = PatternSums(weights, 3, asks, value, torch.float32)
    for tile in tiles_of(pattern):
        sums.see(tile)
    nothing, content = sums.contents
    assert nothing is None and content is not None
    for row in range(2):
        for head in range(3):
            wanted = naive(pattern[row, head], weights[row], value[row, head], keys[row, 0], gram[head])
            found = (sums.own, sums.others, sums.row_entropy, sums.distance, content)
            for whole, one in zip(found, wanted, strict=True):
                torch.testing.assert_close(whole[row, head], one.float(), rtol=1e-5, atol=1e-6)
    with_self = torch.einsum("bqg,bhqk->bhgk", weights, pattern)
    torch.testing.assert_close(sums.received, with_self, rtol=1e-5, atol=1e-6)


def test_masses_beside_an_own_mass_near_one_keep_their_digits():
    """What others get, 1e-9 in all, would be lost in a difference of float32 sums."""
    row = torch.full((1, 1, 4, 4), 3e-10)
    row.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    sums = PatternSums(torch.full((1, 4, 2), 0.25), 1, [Asks()], None, torch.float32)
    for tile in tiles_of(row):
        sums.see(tile)
    torch.testing.assert_close(sums.others, torch.full((1, 1, 2, 4), 0.25 * 9e-10), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("strength", [1.0, 6.0, 40.0])
def test_own_masses_near_one_and_near_nothing(sign, strength):
    """Against float64; scores of up to 1600 mean own masses of e^-1600."""
    q = torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(3)) * strength**0.5
    k, v = sign * q, torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(4))
    exact = (q.double() @ k.double().mT * 8**-0.5).softmax(-1)
    sums = PatternSums(torch.full((1, 50, 2), 0.02), 2, [Asks(shape=True)], None, torch.float32)
    z = attend(Asked(q, k, v), sums.see)
    near = {"rtol": 1e-4, "atol": 1e-5}  # scores of 100 and more are rounded at the fifth digit
    torch.testing.assert_close(z.double(), exact @ v.double(), **near)
    torch.testing.assert_close(sums.own.double(), exact.diagonal(dim1=-2, dim2=-1), **near)
    torch.testing.assert_close(sums.received.double(), exact.mean(2, keepdim=True).expand(-1, -1, 2, -1), **near)
    assert bool(sums.distance.isfinite().all()) and bool((sums.row_entropy >= 0).all())


# --- measures, ours ---

OURS = {
    "plain": ({}, 12),
    "long": ({"n_ctx": 200, "max_loops": 2}, 200),
    "short": ({}, 5),
    "no edges from masked to masked": ({"forbid_mask_to_mask": ("loop",)}, 12),
    "no masked keys": ({"forbid_masked_keys": ("prelude", "loop", "coda")}, 12),
}


LONG = pytest.param("long", marks=pytest.mark.slow)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", [LONG if name == "long" else name for name in OURS])
def test_measures_of_ours_with_and_without_patterns(name, measure, size):
    changes, length = OURS[name]
    m = HookedLoopMDM(toy_model(**changes))
    clean = torch.randint(0, 22, (4, length), generator=torch.Generator().manual_seed(1))
    agree(*both(m, MEASURES[measure], mask_tokens(clean, 22, mask_ratio=0.5, seed=0)))


@pytest.mark.parametrize("masked", ["padding", "one", "all", "none"])
def test_padding_and_extreme_masks(hooked, clean, masked, size):
    given = None
    if masked == "padding":
        given = torch.ones_like(clean)
        given[0, 6:] = given[2, 1:] = 0  # of one sequence a single token is left
    b = mask_tokens(clean, 22, mask_ratio={"padding": 0.5, "one": 0.1, "all": 1.0, "none": 0.0}[masked], seed=0,
                    attention_mask=given)  # fmt: skip
    for name in ("masses", "shape"):
        agree(*both(hooked, MEASURES[name], b))


def test_masses_sum_to_one_in_bfloat16_where_rounded_patterns_do_not(batch):
    m = HookedLoopMDM(toy_model())
    wanted = mask_attention(m, batch, 2, content=False)
    narrow = HookedLoopMDM(toy_model().bfloat16())
    found, rounded = both(narrow, lambda m, b: mask_attention(m, b, 2, content=False), batch)
    sums = [frame.groupby(["depth", "head", "query_group"])["mass"].sum() for frame in (found, rounded)]
    off = [(one - 1).abs().max() for one in sums]
    assert off[0] < 1e-5 < off[1]
    # The weights and states are rounded all the same: to 8 bits, twice for a score of order 10.
    first = wanted["layer"] == 0
    assert (found["mass"] - wanted["mass"])[first].abs().max() < 2e-2


def test_float64_is_measured_in_float64(batch):
    m = HookedLoopMDM(toy_model().double())
    found, wanted = both(m, MEASURES["masses"], batch)
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-12, atol=1e-12)


# --- measures, other people's ---

FOREIGN = {
    "BERT": lambda: hook_model(natives.native("Bert"), mask_token_id=103, loop=(1, 2), max_loops=2),
    "Llama both ways, grouped": lambda: hook_model(
        natives.native("Llama"), mask_token_id=103, bidirectional=True, loop=(1, 2)
    ),
    "shifted": lambda: hook_model(standins.prepared(standins.DreamModel()), loop=(1, 1), max_loops=2),
    "bias of distances": lambda: hook_model(standins.prepared(standins.MDLM()), loop=(1, 1), max_loops=2),
    "windows": lambda: hook_model(natives.native("ModernBert"), mask_token_id=103, loop=(1, 2)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_measures_of_others_with_and_without_patterns(name, size):
    m = FOREIGN[name]()
    given = torch.ones(3, natives.LENGTH, dtype=torch.long)
    clean = natives.tokens() % m.cfg.mask_token_id
    if name == "BERT":
        given[0, 7:] = 0
    b = mask_tokens(clean, m.cfg.mask_token_id, mask_ratio=0.5, seed=0, attention_mask=given)
    for measure in ("masses", "shape"):
        agree(*both(m, MEASURES[measure], b))
    if m.facts.shifted:
        agree(*both(m, lambda m, b: mask_attention(m, b, 2, by="predicts"), b))


def test_a_causal_model_has_a_shape(size):
    m = hook_model(natives.native("Llama"), loop=(1, 2), max_loops=2)
    tokens = natives.tokens()
    b = mask_tokens(tokens, 103, mask_ratio=0.5, seed=0)
    found, wanted = both(m, MEASURES["shape"], b)
    agree(found, wanted)
    assert (found[found["query_group"] == "clean"]["entropy"] > 0.01).all()  # nothing is masked here


# --- when patterns are made, and when not ---


class NoPattern(TorchDispatchMode):
    """Fails on any tensor that is length by length or more."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and one.ndim > 1:
                assert min(one.shape[-2:]) < self.length, f"{func} makes {list(one.shape)}"
        return out


def everything(m, b):
    sums = [AttentionSums(m, 2), ShapeSums(m, 2)]
    walk(m, b, 2, [*sums, received_attention(m, b, 2)])


def test_no_pattern_is_made(monkeypatch):
    monkeypatch.setattr(tiles, "IN_CACHE", 2**14)
    m = HookedLoopMDM(toy_model(n_ctx=300, d_model=16, d_vocab=23))
    clean = torch.randint(0, 22, (2, 300), generator=torch.Generator().manual_seed(1))
    given = torch.ones_like(clean)
    given[0, 250:] = 0
    b = mask_tokens(clean, 22, mask_ratio=0.5, seed=0, attention_mask=given)
    with NoPattern(300):
        everything(m, b)
    foreign = hook_model(natives.native("Bert", max_position_embeddings=300), mask_token_id=103, loop=(1, 2))
    with NoPattern(300):
        everything(foreign, mask_tokens(clean + 40, 103, mask_ratio=0.5, seed=0))
    with pytest.raises(AssertionError, match="makes"), NoPattern(300), m.attention_path("eager"):
        everything(m, b)


def made(m, b, reducers):
    """How many layer applications of a walk make a pattern."""
    count = []
    softmax = torch.Tensor.softmax
    torch.Tensor.softmax = lambda *args, **kwargs: count.append(1) or softmax(*args, **kwargs)
    try:
        walk(m, b, 2, reducers)
    finally:
        torch.Tensor.softmax = softmax
    return len(count)


def test_patterns_are_made_where_someone_needs_them(hooked, batch):
    n_applications = 2 + 2 * 2
    assert made(hooked, batch, [AttentionSums(hooked, 2), ShapeSums(hooked, 2)]) == 0
    assert made(hooked, batch, [AttentionSums(hooked, 2), ChangeSums(hooked, 2)]) == n_applications
    with hooked.hooks([(at(loop=1, leaf="attn_scores"), lambda scores, hook: None)]):
        assert made(hooked, batch, [AttentionSums(hooked, 2)]) == 2
    with hooked.attention_path("eager"):
        assert made(hooked, batch, [AttentionSums(hooked, 2)]) == n_applications
    hooked.add_hook("blocks.0.attn.hook_pattern", lambda pattern, hook: None)
    assert made(hooked, batch, [AttentionSums(hooked, 2)]) == 1


def test_an_open_cut_is_measured_as_it_was(hooked, batch):
    with cut(hooked, "masked->masked"):
        found, wanted = both(hooked, MEASURES["masses"], batch)
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-5, atol=2e-6)
    looped = found[(found["segment"] == "loop") & (found["query_group"] == "masked")]
    assert (looped[looped["key_group"] == "masked"]["mass"] == 0).all()


def test_a_hook_inside_attention_reaches_the_tiles(hooked, batch):
    """Values, rotated queries and z are offered as ever."""
    for leaf in ("v", "rot_q", "z"):
        with hooked.hooks([(at(loop=0, leaf=leaf), lambda x, hook: x * 1.5)]):
            found, wanted = both(hooked, MEASURES["masses"], batch)
        agree(found, wanted)
        assert not (found["mass"] - mask_attention(hooked, batch, 2)["mass"]).abs().max() < 1e-4


def test_a_pin_to_fused_attention_holds_but_where_patterns_are_needed(hooked, batch):
    with hooked.attention_path("sdpa"):
        found = MEASURES["masses"](hooked, batch)
        with pytest.raises(UsageError, match='does not exist on attn_path="sdpa"'):
            walk(hooked, batch, 2, [ChangeSums(hooked, 2)])
    pd.testing.assert_frame_equal(found, MEASURES["masses"](hooked, batch))


class Instead:
    """A hook that can attend, and counts how it was asked."""

    def __init__(self):
        self.asked: list[str] = []

    def __call__(self, pattern, hook):
        self.asked.append("pattern")

    def attend(self, asked, hook):
        self.asked.append("attend")
        return attend(asked, lambda tile: None)


@pytest.mark.parametrize("gradients", [False, True])
def test_who_can_attend_does_so_alone_and_without_gradients(hooked, batch, gradients):
    one, other, place = Instead(), Instead(), at(layer=0, leaf="pattern")
    with torch.set_grad_enabled(gradients), hooked.hooks([(place, one)]):
        hooked(batch.tokens)
        assert one.asked == (["pattern"] if gradients else ["attend"])
        with hooked.hooks([(place, other)]):
            hooked(batch.tokens)
    assert one.asked[1:] == other.asked == ["pattern"]


def test_a_model_of_others_that_nobody_hears_is_not_attended_for(batch):
    m = FOREIGN["BERT"]()
    one = Instead()
    with m.hooks([(at(layer=0, leaf="pattern"), one)]):
        plain = m(natives.tokens())
    assert one.asked == ["attend"]
    torch.testing.assert_close(plain, m(natives.tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(hooked, batch, bad):
    def spoil(x, hook):
        x[1, 3, 0] = bad
        return x

    with (
        hooked.hooks([("loop.1.blocks.1.attn.hook_rot_q", spoil)]),
        pytest.raises(NotFiniteError, match=r"loop\.1\.blocks\.1\.attn\.hook_pattern is not finite at 1 of 40"),
    ):
        everything(hooked, batch)
    with nullcontext(), pytest.raises(AssertionError, match="needs_pattern = True"):
        _ = _unpatterned(hooked, batch).pattern


def _unpatterned(m, b):
    kept = []

    class Keeps(ShapeSums):
        def see(self, seen):
            kept.append(seen)

    walk(m, b, 1, [Keeps(m, 1)])
    return kept[0]
