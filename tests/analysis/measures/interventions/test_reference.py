"""What stands in: own values change nothing, zero is what it was, a mean of one is that one."""

import pytest
import torch

from loopmdm.analysis.measures.interventions import (
    EdgeSet,
    Reference,
    ablate,
    choice,
    cut,
    freeze,
    record_values,
    replace_values,
    skip,
)
from loopmdm.analysis.measures.interventions.reference import other_tokens
from loopmdm.analysis.measures.interventions.values import donors
from loopmdm.model.adapters import hook_model
from loopmdm.model.errors import UsageError
from loopmdm.model.planted import HEADS, naked_singles
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.loopmdm_model.adapters import natives

ARMS = {
    "heads": lambda m, by: ablate(m, 1, by=by),
    "all heads": lambda m, by: ablate(m, by=by),
    "prelude": lambda m, by: ablate(m, [0], layers=0, by=by),
    "layers": lambda m, by: skip(m, by=by),
    "mlp": lambda m, by: skip(m, layers=2, loops=1, by=by, parts=["mlp"]),
    "states": lambda m, by: freeze(m, "masked", slice(1, None), by=by),
    "edges": lambda m, by: cut(m, "masked->masked", by=by),
    "edges of a layer": lambda m, by: cut(m, "any->clean", loops=1, layers=[0, 1], heads=0, by=by),
}


@pytest.mark.parametrize("name", ARMS)
def test_own_values_change_nothing(hooked, batch, name):
    with hooked.attention_path("eager"):
        own, expected = Reference.record(hooked, batch.tokens, 3), hooked(batch.tokens, n_loops=3)
        with ARMS[name](hooked, own):
            torch.testing.assert_close(hooked(batch.tokens, n_loops=3), expected, atol=1e-5, rtol=1e-5)
        other = Reference.resample(hooked, batch, 3)
        with ARMS[name](hooked, other):
            assert not torch.allclose(hooked(batch.tokens, n_loops=3), expected, atol=1e-3)


@pytest.mark.parametrize("name", ARMS)
def test_the_mean_of_one_other_is_that_other(hooked, batch, name):
    one, mean = Reference.resample(hooked, batch, 3, seed=5), Reference.mean(hooked, batch, 3, seed=5, n_draws=1)
    with ARMS[name](hooked, one):
        expected = hooked(batch.tokens, n_loops=3)
    with ARMS[name](hooked, mean):
        assert torch.equal(hooked(batch.tokens, n_loops=3), expected)


def test_zero_is_what_it_was(hooked, batch):
    def silence(x, hook):
        return torch.zeros_like(x)

    def one_head(z, hook):
        z[:, :, 1] = 0
        return z

    outs = lambda name: name.startswith("loop") and name.endswith(("attn_out", "mlp_out"))  # noqa: E731
    z = lambda name: name.startswith("loop") and name.endswith("hook_z")  # noqa: E731
    for arm, plain in ((skip(hooked), (outs, silence)), (ablate(hooked, 1), (z, one_head))):
        expected = hooked.run_with_hooks(batch.tokens, n_loops=3, fwd_hooks=[plain])
        with arm:
            assert torch.equal(hooked(batch.tokens, n_loops=3), expected)


def test_cut_by_a_reference_is_replace_values(hooked, batch):
    tokens = other_tokens(hooked, batch, 2)
    with hooked.attention_path("eager"):
        values, by = record_values(hooked, tokens, 3), Reference.resample(hooked, batch, 3, seed=2)
    edges = choice(hooked, EdgeSet("masked->masked", share=0.5))
    with replace_values(hooked, values, edges, None, heads=1):
        expected = hooked(batch.tokens, n_loops=3)
    with cut(hooked, edges, heads=1, by=by):
        assert torch.equal(hooked(batch.tokens, n_loops=3), expected)


def test_means_add_up_and_donors_are_others(hooked, batch):
    parts = [Reference.resample(hooked, batch, 2, seed=1, draw=draw) for draw in range(3)]
    mean = Reference.mean(hooked, batch, 2, seed=1, n_draws=3)
    assert mean.n_draws == 3
    for name, found in mean.held.items():
        torch.testing.assert_close(found, torch.stack([part.held[name] for part in parts]).mean(0))
    tokens = other_tokens(hooked, batch, 1)
    assert torch.equal(tokens == 22, batch.masked)
    source = donors(batch.sequences, 1, 0)
    assert torch.equal(tokens[~batch.masked], batch.clean[torch.from_numpy(source)][~batch.masked])


def test_of_the_planted_model_a_heads_loss_is_that_of_its_unit():
    """Another board's counts of a row mislead; where both boards are one, nothing is lost; "renew" is own."""
    board = BOARDS["sudoku6"]
    m, b = naked_singles(board), puzzles(board, board.sample_grids("test", 12), 20, unique=True)
    expected = m(b.tokens, n_loops=4)
    own = Reference.record(m, b.tokens, 4)
    other = Reference.resample(m, b, 4)
    for number, _ in enumerate(HEADS):
        with ablate(m, number, layers=0, by=own):
            torch.testing.assert_close(m(b.tokens, n_loops=4), expected, atol=1e-4, rtol=0)
        with ablate(m, number, layers=0, by=other):
            lost = (m(b.tokens, n_loops=4) - expected)[..., :-1].abs().amax(-1)[b.masked]
        assert float(lost.max()) > 1.0
    with skip(m, layers=1, by=other, parts=["attn"]):  # layer 1 has no attention to lose
        assert torch.equal(m(b.tokens, n_loops=4), expected)


def test_on_other_peoples_models():
    m = hook_model(natives.native("Bert"), mask_token_id=103, loop=(1, 2), max_loops=2)
    tokens = torch.randint(3, 90, (4, 10), generator=torch.Generator().manual_seed(0))
    b = m.mask(tokens, ratio=0.4)
    own, other = Reference.record(m, b.tokens, 2), Reference.mean(m, b, 2, n_draws=2)
    expected = m(b.tokens, n_loops=2)
    for arm in ("heads", "layers", "states"):
        with ARMS[arm](m, own):
            torch.testing.assert_close(m(b.tokens, n_loops=2), expected, atol=1e-4, rtol=1e-4)
        with ARMS[arm](m, other):
            assert not torch.allclose(m(b.tokens, n_loops=2), expected, atol=1e-4)


def test_what_is_wrong_is_said_in_a_line(hooked, batch):
    short = Reference.record(hooked, batch.tokens, 1)
    few = Reference.record(hooked, batch.tokens[:2], 3)
    for arm, said in (
        (lambda: skip(hooked, by="mean"), 'by must be "zero" or a Reference'),
        (lambda: freeze(hooked, by="zero"), 'by must be "own" or a Reference'),
        (lambda: cut(hooked, matched=True, by=short), 'matched goes with by="zero"'),
        (lambda: skip(hooked, by=short), "the reference holds nothing at loop.1.blocks.1"),
        (lambda: ablate(hooked, 0, by=few), "the reference is of another batch"),
        (lambda: ablate(hooked, 7), r"head must be 0..1, got 7"),
        (lambda: skip(hooked, parts=["norm"]), 'part must be "attn" or "mlp"'),
    ):
        with pytest.raises(UsageError, match=said), arm():
            hooked(batch.tokens, n_loops=2)
    with pytest.raises(UsageError, match="needs one at least"):
        Reference.averaged([])
    with pytest.raises(UsageError, match="the same places in each"):
        Reference.averaged([short, few])
