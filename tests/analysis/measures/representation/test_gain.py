"""A change is followed: derivative and difference agree, shares sum to 1, planted readers pass one unit a loop."""

import numpy as np
import pytest
import torch

from loopmdm.analysis.measures import measure
from loopmdm.analysis.measures.representation.fixed_points import LoopMap
from loopmdm.analysis.measures.representation.gain import (
    Places,
    Push,
    Trace,
    follow_push,
    perturbation_gain,
)
from loopmdm.analysis.measures.twins import untrained
from loopmdm.model.adapters import hook_model
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import hide
from loopmdm.model.planted import naked_singles
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.analysis.measures.representation.test_change import planted
from tests.loopmdm_model.adapters import natives, standins

SIX = BOARDS["sudoku6"]


def foreign(name: str) -> tuple[HookedLoopMDM, MaskedBatch]:
    """A small model of somebody else's and sequences for it."""
    made = {
        "bidirectional": lambda: hook_model(natives.native("Bert"), mask_token_id=103, loop=(1, 2), max_loops=3),
        "causal": lambda: hook_model(natives.native("Llama"), loop=(1, 2), max_loops=3),
        "shifted": lambda: hook_model(standins.prepared(standins.DreamModel()), loop=(1, 1), max_loops=3),
    }
    m = made[name]()
    tokens = torch.randint(4, 20, (4, 9), generator=torch.Generator().manual_seed(3))
    if m.cfg.mask_token_id is None:
        return m, MaskedBatch(tokens, tokens, torch.zeros_like(tokens).bool())
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4)) < 0.5
    masked[:, 0] = False
    return m, hide(tokens, masked, m.cfg.mask_token_id)


FOREIGN = ("bidirectional", "causal", "shifted")


def rows(frame, **where):
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    return frame


# --- identities ---


@pytest.mark.parametrize("name", FOREIGN)
def test_the_derivative_is_the_limit_of_the_difference(name):
    m, b = foreign(name)
    frame = perturbation_gain(m, b, 3, Push(sizes=(0.0, 1e-3, 3e-1)))
    gain = rows(frame, metric="gain", receiver="any").dropna(subset="value")
    values = gain.pivot_table(index=["direction", "source", "distance", "loop"], columns="size", values="value")
    assert len(values) >= 2 * 4 * 4
    near, far = ((values[size] - values[0.0]).abs().max() for size in (1e-3, 3e-1))
    assert near < 6e-3 and far > 5 * near  # float32 norms inside some models leave 1e-7 / 1e-3


def test_the_push_is_one_forward_through_the_dense_jacobian(hooked, batch):
    trace = Trace.of(hooked, batch.rows(slice(1, 2)), 3, 0)
    step = torch.zeros_like(trace.states[0])
    step[0, 4] = torch.randn(step.shape[-1], generator=torch.Generator().manual_seed(0))
    change, wanted = step.flatten(), [step.norm(dim=-1)]
    for number, x in enumerate(trace.states[:-1]):
        with torch.enable_grad():
            jacobian = torch.autograd.functional.jacobian(LoopMap(hooked, trace.context, number + 1), x)
        change = jacobian.reshape(x.numel(), x.numel()) @ change
        wanted.append(change.view_as(step).norm(dim=-1))
    found = follow_push(hooked, trace, step, 0.0)
    torch.testing.assert_close(found, torch.stack(wanted, 1) / step.norm(), rtol=1e-4, atol=1e-5)


def test_reverse_mode_twice_gives_what_forward_mode_does(hooked, batch, monkeypatch):
    trace = Trace.of(hooked, batch, 2, 0)
    loop_map, x = LoopMap(hooked, trace.context, 1), trace.states[0]
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    expected = loop_map.push(x, v)

    def refuse(*given):
        raise NotImplementedError("no forward AD for this operation")

    monkeypatch.setattr(torch.func, "jvp", refuse)
    for one, other in zip(loop_map.push(x, v), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_shares_sum_to_one_and_distances_part_all_pairs(hooked, batch):
    frame = perturbation_gain(hooked, batch, 3)
    total = (
        rows(frame, metric="share", receiver="any").groupby(["loop", "direction", "size", "source"])["value"].sum()
    )
    np.testing.assert_allclose(total, 1.0, atol=1e-6)
    split = rows(frame, metric="share").groupby(["receiver", "loop", "direction", "size", "source"])["value"].sum()
    np.testing.assert_allclose(split["masked"] + split["clean"], split["any"], atol=1e-6)
    for m in (hooked, naked_singles("sudoku6")):
        places = Places.of(m, m.cfg.n_ctx)
        assert (places.member.sum(0) == 1).all() and len(places.distance) == len(places.relation)


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_a_linear_loop_grows_by_its_factor(hooked, batch, factor):
    m = planted(hooked, lambda loop, x: factor * x)
    frame = rows(perturbation_gain(m, batch, 4, Push(sizes=(0.0, 0.5))), metric="growth")
    frame = frame[frame["loop"] >= 0]
    np.testing.assert_allclose(frame["value"], np.log(factor), atol=1e-4)
    assert (frame["n"] == len(batch)).all()


# --- the planted mechanism ---


@pytest.fixture(scope="module")
def by_loop():
    b = puzzles(SIX, SIX.sample_grids("test", 24), 16, unique=True)
    frame = perturbation_gain(naked_singles(SIX), b, 3, Push(sizes=(0.0, 1.0)))
    return rows(frame, metric="share", receiver="any")


def test_a_changed_symbol_reaches_its_units_in_one_loop_and_the_rest_in_two(by_loop):
    swap = rows(by_loop, direction="token", size=1.0, source="clean").set_index(["relation", "loop"])["value"]
    assert swap["none", 0] == 0.0  # exactly
    assert swap["none", 1] > 0.1 and swap["none", 2] > swap["none", 1]
    assert all(swap[relation, 0] > 0.05 for relation in ("box", "row", "column"))


def test_steps_are_flat_so_the_derivative_stays_within_the_units(by_loop):
    slope = rows(by_loop, size=0.0, relation="none").set_index(["direction", "loop"])["value"]
    assert (slope.xs(0, level="loop") == 0.0).all()
    assert slope[slope.index.get_level_values("loop") > 0].max() < 1e-8


# --- the null ---


def test_an_untrained_twin_knows_no_units():
    """Per cell a change goes everywhere alike, within a tenth; the planted model's does not."""
    b = puzzles(SIX, SIX.sample_grids("test", 24), 16)
    m = untrained(HookedLoopMDM.from_pretrained("sudoku-loop-s4"))
    frame = rows(perturbation_gain(m, b, 2), metric="gain", receiver="any", loop=0)
    frame = frame[frame["relation"] != "self"]
    for _, part in frame.groupby(["direction", "size", "source"]):
        value = part.set_index("relation")["value"]
        assert value.max() / value.min() < 1.1


# --- other people's models, and what is refused ---


def test_nothing_travels_back_in_a_causal_model():
    m, b = foreign("causal")
    trace = Trace.of(m, b, 3, -1)
    step = torch.zeros_like(trace.states[0])
    step[:, 4] = 1.0
    change = follow_push(m, trace, step, 0.0)
    assert (change[:, :, :4] == 0).all() and (change[:, 1:, 4:] > 0).all()


def test_the_measure_runs_with_its_twin():
    frame = measure("perturbation-gain", "sudoku-loop-s4", 2, mask_ratios=(0.5,), n=8, n_sequences=6)
    assert set(frame["weights"]) == {"trained", "untrained 0"} and (frame["n_units"] == 6).all()
    assert frame["value"].notna().any()
    alone = measure("perturbation-gain", "sudoku-loop-s4", 2, mask_ratios=(0.5,), n=8, n_sequences=6, twins=0)
    assert set(alone["weights"]) == {"trained"}


def test_a_batch_is_its_parts(hooked, batch):
    whole, parts = (perturbation_gain(hooked, batch, 2, batch_size=size) for size in (4, 3))
    same = whole["direction"] == "random"  # other tokens are those of a batch
    np.testing.assert_allclose(whole[same]["value"], parts[same]["value"], rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("push", "says"),
    [
        ({"start": 2}, r"follows H\(2\) over later loops; there are only 3"),
        ({"directions": ("up",)}, 'direction must be "random" or "token"'),
        ({"directions": ()}, "must name one at least"),
        ({"sizes": (-1.0,)}, "size must be a number of at least 0"),
        ({"n_draws": 0}, "n_draws must be at least 1"),
    ],
)
def test_what_cannot_be_pushed_is_refused_in_a_line(hooked, batch, push, says):
    with pytest.raises(UsageError, match=says) as said:
        perturbation_gain(hooked, batch, 3, Push(**push))
    assert "\n" not in str(said.value)
    with pytest.raises(UsageError, match="takes a MaskedBatch"):
        perturbation_gain(hooked, batch.tokens)
