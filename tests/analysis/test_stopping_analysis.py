"""Replay equals running, controls are what they say, and verdicts find planted truths."""

import dataclasses

import numpy as np
import pytest
import torch

from analysis.stopping import calibration, default_rules, noninferiority, record_loops, stopping_frontier
from analysis.stopping.frontier import _fixed_at, _shuffled, frontier, stopped_at, thresholds
from analysis.stopping.record import LoopRecord, noise_schedule, rule_name
from loopmdm_model.errors import UsageError
from loopmdm_model.likelihood import nelbo, nelbo_by_loop, row_cross_entropy, row_sums
from loopmdm_model.masking import mask_tokens
from loopmdm_model.stopping import ArgmaxStable, KLDelta, StateDelta
from tests.conftest import toy_config

MOST = 5


@pytest.fixture
def record(model, clean) -> LoopRecord:
    return record_loops(model, clean, max_loops=MOST, n_samples=3)


def planted(losses, criterion, ratio=None, clusters=None) -> LoopRecord:
    """A record with one rule, "state-delta", whose criterion is given."""
    loops, rows = np.shape(losses)
    return LoopRecord(
        torch.as_tensor(losses).double(), torch.zeros(loops, rows).double(),
        {"state-delta": torch.as_tensor(criterion).double()}, {"state-delta": StateDelta(max_loops=loops)},
        torch.full((rows,), 5), torch.full((rows,), 0.5).double() if ratio is None else torch.as_tensor(ratio),
        np.arange(rows) if clusters is None else clusters, toy_config(), 10,
    )  # fmt: skip


def test_the_record_holds_the_nelbo_at_every_loop(model, clean, record):
    by_loop = nelbo_by_loop(model, clean, MOST, n_samples=3)
    for loop, result in enumerate(by_loop):
        assert float(record.losses[loop].mean()) == pytest.approx(result.mean, rel=1e-6)
        cost = float(record.flops()[loop].sum())
        assert (
            cost == pytest.approx(result.flops) == pytest.approx(nelbo(model, clean, loop + 1, n_samples=3).flops)
        )


@pytest.mark.parametrize("rule", default_rules(MOST), ids=rule_name)
def test_replaying_a_rule_is_running_it(model, clean, record, rule):
    name = rule_name(rule)
    for threshold in thresholds(record, name, 4):
        used = stopped_at(record, name, threshold)
        online = dataclasses.replace(rule, threshold=threshold)
        ran = nelbo(model, clean, stop=online, n_samples=3)
        assert float(used.double().mean()) == pytest.approx(ran.mean_loops)
        assert float(record.at(record.losses, used).mean()) == pytest.approx(ran.mean, rel=1e-6)
        assert float(record.at(record.flops(rule), used).sum()) == pytest.approx(ran.flops)
    assert len({tuple(stopped_at(record, name, t).tolist()) for t in thresholds(record, name, 9)}) > 1


def test_a_masked_batch_is_taken_as_it_is(model, batch):
    record = record_loops(model, batch, [KLDelta(max_loops=2), StateDelta(max_loops=2)], max_loops=2, batch_size=3)
    run = model.run(batch.tokens, 2, rows=batch.masked)
    losses = row_sums(row_cross_entropy(run.logits, batch), batch) / batch.masked.sum(-1)
    torch.testing.assert_close(record.losses[1], losses)
    assert record.mask_ratio.tolist() == [0.5] * 4 and torch.isnan(record.criteria["state-delta"][0]).all()
    online = model.run(batch.tokens, stop=KLDelta(max_loops=2, threshold=0.0)).criterion
    torch.testing.assert_close(record.criteria["kl-delta"].float(), online, equal_nan=True)


def test_controls_are_exact():
    generator = np.random.default_rng(0)
    losses, ratio = generator.random((4, 6)), np.array([0.1, 0.1, 0.1, 0.9, 0.9, 0.9])
    record = planted(losses, losses, ratio)
    used, place = torch.tensor([1, 2, 4, 3, 3, 3]), torch.tensor([0, 0, 0, 4, 4, 4])
    shuffled = _shuffled(record, used, place).numpy()
    assert shuffled[:3] == pytest.approx(losses[[0, 1, 3], :3].mean(0)) and shuffled[3:] == pytest.approx(
        losses[2, 3:]
    )
    every, cost = torch.ones(6, dtype=torch.bool), record.flops().mean(1)
    assert _fixed_at(record, float(cost[1]), every).numpy() == pytest.approx(losses[1])
    between = float(0.25 * cost[1] + 0.75 * cost[2])
    assert _fixed_at(record, between, every).numpy() == pytest.approx(0.25 * losses[1] + 0.75 * losses[2])
    assert _fixed_at(record, float(cost[-1]) * 9, every).numpy() == pytest.approx(losses[-1])
    assert noise_schedule(record, 0.0).loops[0] == losses[:, :3].mean(1).argmin() + 1
    assert noise_schedule(record, 1.0).loops == (1,) * 5


def test_a_rule_that_knows_beats_its_controls_and_one_that_guesses_does_not():
    generator, rows = np.random.default_rng(1), 400
    needed = generator.integers(1, 5, rows)  # loops until the loss drops from 1 to 0
    losses = (np.arange(1, 5)[:, None] < needed).astype(float)
    knows = planted(losses, losses + 0.5)
    guesses = planted(losses, generator.permuted(losses, axis=1) + 0.5)
    for record, useful in ((knows, True), (guesses, False)):
        table = frontier(record, record, n_thresholds=8)
        table = table[(table["rule"] == "state-delta") & table["mask_ratio"].isna()]
        row = table[(table["mean_loops"] > 1.5) & (table["mean_loops"] < 3.5)].iloc[0]
        for control in ("against_fixed", "against_shuffled"):
            assert (row[control] + 3 * row[f"{control}_se"] < 0) == useful
    oracle = frontier(knows, knows, 8).query("rule == 'oracle' and mask_ratio != mask_ratio")
    assert oracle["nll"].min() == 0 and (oracle["mean_loops"] <= needed.mean() + 1e-9).all()


def test_the_frontier_has_every_rule_and_bin(model, clean):
    table = stopping_frontier(model, clean, max_loops=3, n_thresholds=4, validation=clean.roll(1, 1))
    names = {rule_name(rule) for rule in default_rules(3)} | {"fixed", "noise-schedule", "oracle"}
    assert set(table["rule"]) == names
    fixed = table[(table["rule"] == "fixed") & table["mask_ratio"].isna()]
    assert fixed["mean_loops"].tolist() == [1, 2, 3]
    assert fixed["against_fixed"].abs().max() < 1e-12 and fixed["against_shuffled"].abs().max() < 1e-12
    whole, parts = (table[(table["rule"] == "fixed") & (table["threshold"] == 2) & mask] for mask in
                    (table["mask_ratio"].isna(), table["mask_ratio"].notna()))  # fmt: skip
    assert (parts["nll"] * parts["n"]).sum() == pytest.approx((whole["nll"] * 8).sum())


def test_verdicts_find_planted_truths():
    generator = np.random.default_rng(2)
    curve = np.array([1.0, 0.5, 0.2, 0.01, 0.0, 0.0])[:, None]
    losses = curve + generator.normal(0, 0.05, (1, 500)) + generator.normal(0, 0.001, (6, 500))
    record = planted(losses, np.broadcast_to(curve, (6, 500)) + generator.random((6, 500)) * 1e-3)
    found = noninferiority(record, record, "state-delta")
    assert found["verdict"] == "supported" and found["mean_loops"] <= 5 and found["of_loops"] == 6
    strict = noninferiority(record, record, "state-delta", margin=1e-6)
    assert strict["mean_loops"] > found["mean_loops"]
    flat = planted(np.zeros((4, 50)) + generator.normal(0, 1, (4, 50)), np.ones((4, 50)))
    assert noninferiority(flat, flat, "state-delta")["verdict"] == "undecided"


def test_calibration_tells_a_criterion_that_knows_from_one_that_does_not():
    generator = np.random.default_rng(3)
    losses = generator.random((3, 300))
    remaining = losses - losses[-1]
    knows = calibration(planted(losses, remaining), "state-delta")
    assert (knows["rank_correlation"] > 0.99).all() and knows["n"].sum() == 600
    first = knows[knows["loop"] == 0]
    assert first["remaining"].is_monotonic_increasing
    guesses = calibration(planted(losses, generator.random((3, 300))), "state-delta")
    assert guesses["rank_correlation"].abs().max() < 0.25
    nothing = calibration(planted(losses, np.full((3, 300), np.nan)), "state-delta")
    assert len(nothing) == 0


def test_wrong_input_is_named(model, clean, batch, record):
    with pytest.raises(UsageError, match="changes the trajectory"):
        record_loops(model, clean, [StateDelta(max_loops=3, scope="token")])
    with pytest.raises(UsageError, match="raise max_loops"):
        record_loops(model, clean, [StateDelta(max_loops=9)], max_loops=3)
    with pytest.raises(UsageError, match="one name"):
        record_loops(model, clean, [ArgmaxStable(max_loops=3), ArgmaxStable(max_loops=3, patience=2)])
    with pytest.raises(UsageError, match="no masked position"):
        record_loops(model, mask_tokens(clean, 22, mask_ratio=0.0))
    with pytest.raises(UsageError, match="exists nowhere"):
        frontier(*[record_loops(model, clean, [StateDelta(max_loops=1)], max_loops=1)] * 2)
    with pytest.raises(UsageError, match="differ"):
        frontier(record, record_loops(model, clean, max_loops=3))
