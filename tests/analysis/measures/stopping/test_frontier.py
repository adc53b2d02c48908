"""Replay equals running, controls are what they say, and verdicts find planted truths."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis.measures.stopping import (
    calibration,
    default_rules,
    judge_usefulness,
    noninferiority,
    record_loops,
    stopping_frontier,
    usefulness,
)
from loopmdm.analysis.measures.stopping.controls import Ladder, fixed_loops, shuffled
from loopmdm.analysis.measures.stopping.frontier import frontier, stopped_at, thresholds
from loopmdm.analysis.measures.stopping.record import LoopRecord, noise_bins, noise_schedule, rule_name
from loopmdm.model.diffusion.likelihood import nelbo, nelbo_by_loop, row_cross_entropy, row_sums
from loopmdm.model.errors import UsageError
from loopmdm.model.masking import mask_tokens
from loopmdm.model.stopping.rules import ArgmaxStable, EntropyDelta, KLDelta, StateDelta
from tests.conftest import toy_config

MOST = 5


@pytest.fixture
def record(model, clean) -> LoopRecord:
    return record_loops(model, clean, max_loops=MOST, n_samples=3)


def planted(losses, criterion, ratio=None, clusters=None) -> LoopRecord:
    """A record with one rule, "state-delta", whose criterion is given."""
    loops, rows = np.shape(losses)
    ratio = torch.full((rows,), 0.5).double() if ratio is None else torch.as_tensor(ratio)
    return LoopRecord(
        torch.as_tensor(losses).double(), torch.zeros(loops, rows).double(),
        {"state-delta": torch.as_tensor(criterion).double()}, {"state-delta": StateDelta(max_loops=loops)},
        torch.full((rows,), 5), ratio, ratio, np.arange(rows) if clusters is None else clusters, toy_config(), 10,
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
    chance = shuffled(record, used, place).numpy()
    assert chance[:3] == pytest.approx(losses[[0, 1, 3], :3].mean(0)) and chance[3:] == pytest.approx(
        losses[2, 3:]
    )
    assert noise_bins(record, 5).tolist() == place.tolist()
    assert noise_schedule(record, 0.0).loops[0] == losses[:, :3].mean(1).argmin() + 1
    assert noise_schedule(record, 1.0).loops == (1,) * 5


def test_a_ladder_mixes_the_two_rungs_of_equal_cost():
    losses = np.array([[3.0, 5.0], [1.0, 2.0], [0.0, 0.5]])  # three rungs, two rows
    ladder = Ladder(losses, np.array([[1.0, 3.0], [3.0, 5.0], [8.0, 8.0]]))  # mean cost 2, 4, 8
    zero = np.zeros(2)
    assert (-ladder.against(zero, np.array([2.0, 2.0]))).tolist() == [3, 5]  # on a rung
    # cost 3 = half of rung 0 and half of rung 1: mixed loss (2, 3.5), mixed cost (2, 4), slope (1.5 - 4) / 2
    assert ladder.against(zero, np.array([1.0, 5.0])) == pytest.approx([-2 - 1.25, -3.5 + 1.25])
    assert ladder.against(zero, np.array([99.0, 99.0])) == pytest.approx([0, -0.5])  # beyond: the last rung
    assert ladder.against(zero, np.array([0.0, 0.0])) == pytest.approx([-3, -5])
    idle = Ladder(losses, np.array([[1.0, 3.0], [1.0, 3.0], [8.0, 8.0]]))  # a rung that costs nothing more
    assert idle.losses.tolist() == losses[[0, 2]].tolist()
    with pytest.raises(AssertionError):
        Ladder(losses, np.zeros((2, 2)))


def test_intervals_of_the_contrast_cover_the_truth():
    """The mixture's share is estimated, too: without its part of the error the interval would be wrong."""
    covered, trials, rows = 0, 400, 120
    for seed in range(trials):
        generator = np.random.default_rng(seed)
        needed = generator.random(rows)
        costs = np.stack([np.full(rows, 1.0), np.full(rows, 2.0)])
        losses = np.stack([1 + needed, np.ones(rows)])  # the second loop gains `needed`
        goes_on = needed > 0.5
        spent, loss = np.where(goes_on, 2.0, 1.0), np.where(goes_on, 1.0, 1 + needed)
        influence = Ladder(losses, costs).against(loss, spent)
        half = 1.98 * influence.std(ddof=1) / rows**0.5
        covered += abs(influence.mean() + 0.125) < half  # E[min part] - E[needed] / 2 = 1/8 - 1/4
    assert 0.92 < covered / trials < 0.98


def test_the_schedule_is_a_control_of_its_own():
    """A rule that only knows the mask ratio beats fixed S and ties with the schedule and its shuffled counts."""
    generator, rows = np.random.default_rng(4), 600
    ratio = generator.choice([0.1, 0.9], rows)
    needed = np.where(ratio > 0.5, 4, 1)
    losses = (np.arange(1, 5)[:, None] < needed) * (1.0 + 0.1 * generator.normal(size=rows))
    criterion = np.where(np.arange(1, 5)[:, None] < needed, 1.0, 0.1) + 1e-3 * generator.random((4, rows))
    record = planted(losses, criterion, ratio)
    table = frontier(record, record, 8).query("rule == 'state-delta' and mask_ratio != mask_ratio")
    row = table[table["nll"] < 0.01].iloc[0]
    assert row["against_fixed"] + 5 * row["against_fixed_se"] < 0
    assert abs(row["against_schedule"]) < 1e-9 and abs(row["against_shuffled"]) < 1e-9
    assert usefulness(record, record, 8)["verdict"].tolist() == ["not useful"]
    both = usefulness(record, record, 8, schedule=True).set_index("rule")
    assert both["verdict"].to_dict() == {"state-delta": "not useful", "noise-schedule": "useful"}
    assert both.loc["noise-schedule", "against_fixed"] < -0.1
    parts = frontier(record, record, 8)
    empty = parts[parts["mask_ratio"] == 0.5]
    assert (
        len(empty) and (empty["n"] == 0).all() and empty["nll"].isna().all() and empty["mean_loops"].isna().all()
    )


def test_a_schedule_is_no_use_where_noise_says_nothing():
    generator, rows = np.random.default_rng(5), 600
    needed = generator.integers(1, 5, rows)
    losses = (np.arange(1, 5)[:, None] < needed).astype(float)
    record, other = (planted(losses, losses + 0.5, generator.choice([0.1, 0.9], rows)) for _ in range(2))
    judged = usefulness(record, other, 8, schedule=True).set_index("rule")
    assert judged.loc["noise-schedule", "verdict"] != "useful"


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
        for control in ("against_fixed", "against_schedule", "against_shuffled"):
            assert (row[control] + 3 * row[f"{control}_se"] < 0) == useful
    chosen, judged = (usefulness(record, other, 8) for record, other in ((knows, knows), (guesses, guesses)))
    assert chosen["verdict"].tolist() == ["useful"] and chosen["n_useful"][0] > 0
    assert judged["verdict"][0] != "useful" and judged["n_useful"][0] == 0
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


def test_a_threshold_is_chosen_on_validation_and_judged_on_test():
    contrast = {f"against_{name}{end}": 0.0 for name in ("fixed", "schedule", "shuffled") for end in ("", "_se")}
    row = {"rule": "r", "mask_ratio": np.nan, "mean_loops": 2.0, "flops": 1.0, "nll": 1.0, "n": 50, "n_units": 50}
    better = {key: -1.0 for key in contrast if not key.endswith("_se")}
    errors = {key: 0.3 for key in contrast if key.endswith("_se")}
    test = pd.DataFrame([row | contrast | errors | {"threshold": 1.0}, row | better | errors | {"threshold": 2.0}])
    first = pd.DataFrame(
        [row | better | errors | {"threshold": 1.0}, row | contrast | errors | {"threshold": 2.0}]
    )
    found = judge_usefulness(test, first)
    assert (
        found["threshold"][0] == 1.0 and found["verdict"][0] == "undecided"
    )  # the luck of the other is not taken
    assert judge_usefulness(test, first, least=2.0)["verdict"][0] == "not useful"
    assert judge_usefulness(test, test)["verdict"][0] == "useful" and found["n_useful"][0] == 1
    assert judge_usefulness(test, test, least=1.0)["verdict"][0] == "useful"  # may be large enough
    assert judge_usefulness(test, test, least=2.0)["verdict"][0] == "not useful"  # real, but shown to be small
    wide = pd.DataFrame([row | better | errors | {"threshold": float(k)} for k in range(400)])
    assert judge_usefulness(wide)["verdict"][0] == "undecided"  # Bonferroni over thresholds tried on one set
    alone = judge_usefulness(test.assign(n=1, n_units=1))
    assert alone["verdict"][0] == "undecided" and np.isnan(alone["against_fixed_low"][0])
    with pytest.raises(UsageError, match="share no threshold"):
        judge_usefulness(test, first.assign(threshold=[8.0, 9.0]))


def test_noninferiority_reads_its_interval():
    generator = np.random.default_rng(6)
    gains = np.concatenate([np.ones(100), np.zeros(100)])
    losses = np.stack([gains, np.zeros(200)]) + generator.normal(size=200)  # a second loop gains 1 in half of rows
    stops = np.stack([np.where(gains > 0, 1.0, 0.5) + 1e-3 * generator.random(200), np.zeros(200)])
    good = planted(losses, stops)
    found = noninferiority(good, good, "state-delta", n_thresholds=40)
    assert found["verdict"] == "supported" and found["mean_loops"] == pytest.approx(1.5, abs=0.05)
    one, two = good.flops()[:, 0].tolist()
    share = (one * (2 - found["mean_loops"]) + two * (found["mean_loops"] - 1)) / two
    assert found["flops_share"] == pytest.approx(share) and found["gain"] == pytest.approx(0.5)
    assert found["low"] < found["slack"] < found["bound"] < 0
    bad = planted(losses, np.where(np.arange(2)[:, None] < 1, 0.1, 0.1) + 1e-3 * generator.random((2, 200)))
    wrong = noninferiority(bad, bad, "state-delta", n_thresholds=1)  # half of the rows at random lose half of all
    assert wrong["verdict"] == "not supported" and wrong["low"] > 0 and not wrong["passed_validation"]
    one = planted(losses[:, :1], stops[:, :1])
    alone = noninferiority(one, one, "state-delta")
    assert alone["verdict"] == "undecided" and np.isnan(alone["bound"]) and alone["n"] == 1


def test_padding_and_prompts_are_told_apart(hooked, clean):
    real = torch.ones_like(clean)
    real[:, 8:] = 0
    allowed = torch.ones(4, 10, dtype=torch.bool)
    allowed[:, :4] = False
    b = mask_tokens(clean, 22, mask_ratio=0.5, maskable=allowed, attention_mask=real)  # 2 of 4, of 8 real
    record = record_loops(hooked, b, max_loops=2)
    assert record.mask_ratio.tolist() == [0.5] * 4 and record.noise.tolist() == [0.25] * 4
    bare = dataclasses.replace(b, maskable=None)
    assert record_loops(hooked, bare, max_loops=2).mask_ratio.tolist() == [0.25] * 4
    schedule = noise_schedule(record, 0.0, 4)
    ran = hooked.run(b.tokens, stop=schedule, attention_mask=real)
    assert ran.loops_used.tolist() == torch.tensor(schedule.loops)[noise_bins(record, 4)].tolist()


def test_rules_that_share_a_read_out_see_what_they_would_alone(model, batch):
    """A subclass goes the general way; shared probabilities must give the same numbers."""

    class Own(KLDelta):
        pass

    class OwnEntropy(EntropyDelta):
        pass

    for lens in ("coda", "direct"):
        for shared, alone in ((KLDelta, Own), (EntropyDelta, OwnEntropy)):
            pair = [kind(max_loops=3, lens=lens) for kind in (shared, alone)]
            first, second = record_loops(model, batch, pair, max_loops=3).criteria.values()
            torch.testing.assert_close(first, second, equal_nan=True, rtol=1e-5, atol=1e-7)
    everywhere = KLDelta(max_loops=3, positions="all")
    record = record_loops(model, batch, [everywhere], max_loops=3)
    online = model.run(batch.tokens, stop=dataclasses.replace(everywhere, threshold=0.0)).criterion
    torch.testing.assert_close(record.criteria["kl-delta"], online, equal_nan=True, rtol=1e-5, atol=1e-7)


def test_thresholds_lie_between_what_occurred():
    record = planted(np.zeros((2, 3)), [[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    found = thresholds(record, "state-delta", 50)
    assert found == pytest.approx([1.5, 3.0, 4.0], rel=1e-5) and found[-1] > 4
    nobody = stopped_at(record, "state-delta", 0.5)
    assert nobody.tolist() == [2, 2, 2] and fixed_loops(record).costs.shape == (2, 3)


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
