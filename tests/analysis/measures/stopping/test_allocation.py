"""A predictor that can know beats the schedule, one that cannot does not; pairs of loops and steps cost alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from loopmdm.analysis.measures.stopping import (
    GainPredictor,
    PredictedGain,
    equal_flops_pairs,
    feature_rules,
    judge_usefulness,
    loops_against_steps,
    prediction_quality,
    predictor_frontier,
    record_loops,
    schedule_frontier,
    schedules_by_noise,
)
from loopmdm.analysis.measures.stopping.controls import best_schedules, fitted_schedules
from loopmdm.analysis.measures.stopping.frontier import frontier
from loopmdm.analysis.measures.stopping.predictor import _Ridge, features_at
from loopmdm.analysis.measures.stopping.record import LoopRecord
from loopmdm.model.diffusion.likelihood import nelbo
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.errors import UsageError
from loopmdm.model.masking import mask_tokens
from loopmdm.model.stopping.rules import FixedLoops
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.conftest import toy_config, toy_model


def planted(seed: int, knows: bool, rows: int = 400, loops: int = 4, noise: float = 0.05) -> LoopRecord:
    """Every row needs a number of loops of its own; the entropy says how many are left, or is noise."""
    generator = np.random.default_rng(seed)
    needed = generator.integers(1, loops + 1, rows)
    left = np.maximum(needed - np.arange(1, loops + 1)[:, None], 0).astype(float)
    losses = left + noise * generator.normal(size=(1, rows))
    hint = left if knows else generator.permuted(left, axis=1)
    criteria = {name: torch.from_numpy(generator.random((loops, rows))) for name in ("state-delta", "DirectBest")}
    criteria["second-difference"] = torch.full((loops, rows), float("nan")).double()
    criteria["DirectEntropy"] = torch.from_numpy(hint + 0.01 * generator.random((loops, rows)))
    rules = {"state-delta": feature_rules(loops)[0]}
    ratio = torch.from_numpy(generator.random(rows) * 0.99 + 0.01)
    return LoopRecord(
        torch.from_numpy(losses), torch.zeros(loops, rows).double(), criteria, rules, torch.full((rows,), 5),
        ratio, ratio, np.arange(rows), toy_config(), 10,
    )  # fmt: skip


def test_a_predictor_beats_the_schedule_where_there_is_something_to_know():
    for knows in (True, False):
        test, validation = planted(0, knows), planted(1, knows)
        table = predictor_frontier(test, validation, 8, ["lens"])
        rows = table[table["mask_ratio"].isna() & table["mean_loops"].between(1.5, 3.2)]
        assert len(rows) and ((rows["against_schedule"] + 3 * rows["against_schedule_se"] < 0) == knows).all()
        quality = prediction_quality(test, validation, ["lens"])
        assert (quality["r2"][:2] > 0.9).all() if knows else (quality["r2"] < 0.05).all()
        verdict = judge_usefulness(table, predictor_frontier(validation, validation, 8, ["lens"]))["verdict"][0]
        assert (verdict == "useful") == knows
    blind = predictor_frontier(planted(0, True), planted(1, True), 8, ["state"])  # cannot see the entropy
    rows = blind[blind["mask_ratio"].isna() & blind["mean_loops"].between(1.5, 3.2)]
    assert len(rows) and (rows["against_schedule"] + 3 * rows["against_schedule_se"] > -1e-9).all()


def test_free_gain_is_taken_and_dear_flops_are_not():
    test, validation = planted(0, True), planted(1, True)
    predictor = GainPredictor.fit(validation)
    assert predictor.loops(test, 1e9).unique().tolist() == [1]
    used, needed = predictor.loops(test, 1e-9), (test.losses > test.losses[-1] + 0.5).sum(0) + 1
    assert (used >= needed).double().mean() > 0.97  # at no price nobody stops early


@pytest.mark.parametrize("features", ["state", "lens"])
def test_the_predictor_as_a_rule_is_its_replay_and_pays_for_what_it_reads(features):
    m = toy_model(max_loops=4, seed=5)
    tokens = torch.randint(0, m.cfg.d_vocab - 1, (64, 10), generator=torch.Generator().manual_seed(1))
    b = mask_tokens(tokens, m.cfg.mask_token_id, t=torch.linspace(0.45, 0.95, 64), seed=0)
    record = record_loops(m, b, feature_rules(4))
    needed = (torch.arange(64) % 4)[None]  # planted: a row gains until its own loop
    losses = (needed - torch.arange(4)[:, None]).clamp(min=0).double() + 0.3 * record.criteria["DirectEntropy"]
    predictor = GainPredictor.fit(replace(record, losses=losses), features)
    step = float(record.flops()[1, 0] - record.flops()[0, 0])
    counts = set()
    for price in np.linspace(0.05, 1.0, 8) / step:
        rule = PredictedGain.of(predictor, record, price)
        run = m.run(b.tokens, stop=rule)
        counts |= set(run.loops_used.tolist())
        if features == "state":  # reading costs differ between rows, the rule knows their mean
            assert run.loops_used.tolist() == predictor.loops(record, price).tolist()
    assert len(counts) >= 3
    short = PredictedGain.of(predictor, record, -1.0, max_loops=2)  # paid for looping: to the end
    run = m.run(b.tokens, stop=short)
    assert run.loops_used.unique().tolist() == [2]
    plain = m.run(b.tokens, stop=FixedLoops(max_loops=2)).flops
    assert bool((run.flops > plain).all()) == (features == "lens")
    with pytest.raises(UsageError, match="4 at most"):
        PredictedGain.of(predictor, record, 0.0, max_loops=9)


def test_ridge_is_the_normal_equations():
    generator = np.random.default_rng(3)
    x, truth = generator.normal(size=(60, 4)), generator.normal(size=(4, 2))
    x[:, 3] = np.nan  # does not exist at this loop
    y = x[:, :3] @ truth[:3] + 1 + 0.1 * generator.normal(size=(60, 2))
    ridge = _Ridge.fit(x, y)
    z = (x[:, :3] - x[:, :3].mean(0)) / x[:, :3].std(0)
    errors = {}
    for penalty in (10.0**k for k in range(-2, 5)):
        total = 0.0
        for out in range(60):  # naive leave-one-out at the same centre and scale
            kept = np.arange(60) != out
            a = np.column_stack([np.ones(59), z[kept]])
            w = np.linalg.solve(a.T @ a + np.diag([0, *[penalty] * 3]), a.T @ y[kept])
            total += ((y[out] - np.append(1, z[out]) @ w) ** 2).mean() / 60
        errors[penalty] = total
    best = min(errors, key=errors.__getitem__)
    weights = np.linalg.solve(z.T @ z + best * np.eye(3), z.T @ (y - y.mean(0)))
    np.testing.assert_allclose(ridge.weights, weights, atol=1e-9)
    np.testing.assert_allclose(ridge(x), z @ weights + y.mean(0), atol=1e-9)


def test_the_lens_is_paid_for_and_the_state_is_free(model, clean):
    record = record_loops(model, clean.repeat(3, 1), feature_rules(3), max_loops=3, n_samples=2)
    lens, state = GainPredictor.fit(record), GainPredictor.fit(record, "state")
    extra = lens.cost(record) - state.cost(record)
    unembedding = record.n_masked * 2 * 16 * 23
    torch.testing.assert_close(extra, torch.arange(1, 4)[:, None] * unembedding.double())
    torch.testing.assert_close(state.cost(record), record.flops())
    x = features_at(record, 0)
    assert x.shape == (24, 14) and np.isnan(x[:, 2:8]).all() and np.isfinite(x[:, 8:]).all()


def test_features_are_what_the_direct_lens_says(model, batch):
    record = record_loops(model, batch, feature_rules(2), max_loops=2)
    for loop, (state, _) in enumerate(model.states(batch.tokens, 2)):
        p = model.unembedding(state).softmax(-1)
        entropy, best = torch.special.entr(p).sum(-1), p.amax(-1)
        for name, values in (("DirectEntropy", entropy), ("DirectBest", best)):
            mean = (values * batch.masked).sum(-1) / batch.masked.sum(-1)
            torch.testing.assert_close(record.criteria[name][loop], mean, rtol=1e-4, atol=1e-6)


def test_schedules_are_those_of_the_frontier():
    test, validation = planted(0, True), planted(1, True)
    ours = schedule_frontier(test, validation, 6)
    theirs = frontier(test, validation, 6).query("rule == 'noise-schedule'")
    assert ours["nll"].to_numpy() == pytest.approx(theirs["nll"].to_numpy(), nan_ok=True)
    assert ours["against_schedule"].abs().max() < 1e-12
    path = best_schedules(validation, 5)
    assert path[0] == (1,) * 5 and path[-1] == (4,) * 5 and len(path) == len(set(path)) == 16  # one bin a step
    assert set(path) >= {plan.loops for _, plan in fitted_schedules(validation, 40, 5)}
    plan = schedules_by_noise(validation, 6)
    assert len(plan) == 30 and plan.groupby("threshold")["n"].sum().unique().tolist() == [400]
    dear = plan[plan["threshold"] == plan["threshold"].max()]
    assert (dear["n_loops"] == 1).all() and plan["n_loops"].max() == 4


def test_pairs_cost_what_the_budget_allows():
    model = toy_model()
    budget = sample(model, 4, steps=8, n_loops=2, order="confidence").flops / 4
    pairs = equal_flops_pairs(model.cfg, 16, [budget], (1, 2, 4), 16)
    for given, loops, steps in pairs:
        spent = sample(model, 4, steps=steps, n_loops=loops, order="confidence").flops / 4
        assert given == budget and spent == pytest.approx(budget, rel=0.2)
    steps = [number for _, _, number in pairs]
    assert steps == sorted(steps, reverse=True) and len(set(steps)) == 3
    assert [s for _, s, _ in equal_flops_pairs(model.cfg, 16, [budget], (1, 2, 4), steps[1])] == [2, 4]
    with pytest.raises(UsageError, match="fits these budgets"):
        equal_flops_pairs(model.cfg, 16, [1.0], (1,), 16)


def test_marginal_and_joint_are_told_apart(model, clean):
    frame = loops_against_steps(model, [(1, 4), (2, 4), (2, 2)], n=5, test=clean, n_samples=3, seed=1)
    assert set(frame["measure"]) == {"unigram-entropy", "distinct-2", "marginal-nll"}
    for (loops, steps), part in frame.groupby(["n_loops", "steps"]):
        r = sample(model, 5, steps=steps, n_loops=loops, seed=1)
        assert part["flops"].unique() == pytest.approx(r.flops / 5)
        marginal = part[part["measure"] == "marginal-nll"].iloc[0]
        expected = nelbo(model, clean, loops, n_samples=3, seed=1)
        assert (marginal["quality"], marginal["quality_se"]) == pytest.approx(
            (expected.mean, expected.standard_error), rel=1e-5
        )
    first = frame[(frame["n_loops"] == 1)]
    assert (first["against_first"] == 0).all()
    same = frame[(frame["measure"] == "marginal-nll") & (frame["n_loops"] == 2)]
    assert same["quality"].nunique() == 1 and same["steps"].tolist() == [4, 2]  # it cannot see the steps


def test_boards_by_budget():
    board, model = BOARDS["sudoku4"], toy_model(d_vocab=5)
    b = puzzles(board, board.sample_grids("test", 5), 10)
    budget = sample(model, clues=b, steps=3, n_loops=2, order="confidence", temperature=0).flops / 5
    frame = loops_against_steps(model, budgets=[budget, 2 * budget], n_loops=(1, 3), clues=b, board=board)
    assert set(frame["measure"]) == {"solve-rate"} and (frame["n"] == 5).all()
    assert (frame["flops"] <= 1.2 * frame["budget"]).all() and frame["budget"].nunique() == 2
    assert frame.groupby("budget")["against_first"].first().tolist() == [0, 0]


def test_misuse_is_named(model, clean):
    with pytest.raises(UsageError, match="either grid="):
        loops_against_steps(model)
    with pytest.raises(UsageError, match="as clues"):
        loops_against_steps(model, [(1, 1)], board=BOARDS["sudoku4"])
    with pytest.raises(UsageError, match="steps must be at least 1"):
        loops_against_steps(model, [(1, 0)])
    small = record_loops(model, clean, feature_rules(3), max_loops=3)
    with pytest.raises(UsageError, match="at least 20"):
        predictor_frontier(small, small)
    with pytest.raises(UsageError, match="nothing to gain"):
        GainPredictor.fit(record_loops(model, clean, feature_rules(1), max_loops=1))
    bare = record_loops(model, clean.repeat(6, 1), max_loops=3)
    with pytest.raises(UsageError, match="the record lacks DirectEntropy"):
        GainPredictor.fit(bare)
    with pytest.raises(UsageError, match='"state" or "lens"'):
        features_at(bare, 0, "all")
    with pytest.raises(UsageError, match="differ"):
        schedule_frontier(small, bare)
    alone = record_loops(model, mask_tokens(clean[:1], 22, mask_ratio=0.5), feature_rules(3), max_loops=3)
    table = schedule_frontier(alone, alone, 3)
    whole = table[table["mask_ratio"].isna()]
    assert whole["nll_se"].isna().all() and (whole["n"] == 1).all()
