"""Verdicts follow intervals, answers recover planted truths, and every entry can be answered."""

import contextlib

import numpy as np
import pandas as pd
import pytest
from scipy import stats as distributions

from loopmdm.analysis import exhibits as figures
from loopmdm.analysis.exhibits import answers, causal, inference, tables
from loopmdm.analysis.exhibits import verdicts as claims
from loopmdm.analysis.exhibits.answers import Answer, NotRun, answer_of, between_arms
from loopmdm.analysis.exhibits.verdicts import load_claims, verdict
from loopmdm.analysis.numbers import stats
from loopmdm.model.errors import UsageError


def answered(claim: str, task: str) -> Answer:
    return next(item for item in load_claims() if item.name == claim).reading.answer(task)


@pytest.mark.parametrize(
    ("low", "high", "direction", "says"),
    [
        (0.1, 0.2, "above", "supported"),
        (-0.1, 0.2, "above", "undecided"),
        (-0.2, -0.1, "above", "not supported"),
        (-0.2, -0.1, "below", "supported"),
        (0.1, 0.2, "below", "not supported"),
        (float("nan"), 0.2, "below", "undecided"),
    ],
)
def test_verdicts_follow_the_interval(low, high, direction, says):
    assert verdict(Answer(0.0, low, high, 2, 10), 0.0, direction) == says


def test_margins_move_the_verdict():
    answer = Answer(0.15, 0.1, 0.2, 2, 10)
    assert [verdict(answer, margin, "above") for margin in (0.05, 0.15, 0.25)] == [
        "supported", "undecided", "not supported",
    ]  # fmt: skip


def test_seeds_give_students_interval_and_one_seed_its_units():
    values = np.array([1.0, 2.0, 6.0])
    found = answer_of(values, np.zeros(3), 100, 8)
    low, high = distributions.t.interval(0.95, 2, loc=3.0, scale=distributions.sem(values))
    assert (found.low, found.high, found.n_seeds) == pytest.approx((low, high, 3))
    one = answer_of(np.array([2.0]), np.array([0.5]), 100, 8)
    assert one.high - one.estimate == pytest.approx(0.5 * distributions.t.ppf(0.975, 7))
    unknown = answer_of(np.array([2.0]), np.array([np.nan]), 100, 8)
    assert verdict(unknown, 0.0, "above") == "undecided"
    with pytest.raises(NotRun):
        answer_of(np.array([]), np.array([]), 0, 0)


def test_arms_are_compared_over_seeds_or_paired_in_one():
    ours = pd.DataFrame({"nll": [1.0, 1.1, 0.9], "change": 0.5, "change_se": 0.1, "n": 50})
    theirs = ours.assign(nll=ours["nll"] + 0.3)
    assert between_arms(ours, theirs, "nll").estimate == pytest.approx(-0.3)
    single = between_arms(ours[:1], theirs[:1], "nll", "change")
    assert single.estimate == 0.5 and single.n_seeds == 1
    alone = between_arms(ours[:1], theirs[:1], "nll")
    assert alone.estimate == pytest.approx(-0.3) and verdict(alone, 0.0, "below") == "undecided"
    with pytest.raises(NotRun):
        between_arms(ours[:0], theirs, "nll")


def test_interactions_are_estimated_and_covered():
    generator, hits, runs = np.random.default_rng(0), 0, 2000
    for _ in range(runs):
        groups = [generator.normal(mean, 1.0, 5) for mean in (1.0, 2.0, 3.0, 3.5)]
        estimate, low, high = stats.interaction(*groups)
        hits += low <= -0.5 <= high
    assert estimate == pytest.approx(groups[0].mean() - groups[1].mean() - groups[2].mean() + groups[3].mean())
    assert 0.93 <= hits / runs <= 0.97


def test_intervals_over_seeds_cover_the_truth():
    generator, hits, runs = np.random.default_rng(1), 0, 4000
    for _ in range(runs):
        found = answer_of(generator.normal(1.0, 1.0, 5), np.zeros(5), 100, 100)
        hits += found.low <= 1.0 <= found.high
    assert 0.93 <= hits / runs <= 0.97


def test_every_claim_has_an_answer_and_a_figure():
    listed = load_claims()
    assert len(listed) >= 10 and len({claim.name for claim in listed}) == len(listed)
    read = [reading.claim for exhibit in figures.EXHIBITS.values() for reading in exhibit.answers]
    assert sorted(read) == sorted(claim.name for claim in listed)
    assert all(claim.reading.claim == claim.name for claim in listed)


def test_every_answer_reads_the_tables_that_it_names(monkeypatch):
    """Each on its own; and the figure of the claims is drawn from all of them."""
    load, union = tables.load, set()
    for claim in load_claims():
        read: set[str] = set()
        monkeypatch.setattr(tables, "load", lambda name, read=read: read.add(name) or load(name))
        for task in claim.tasks:
            with contextlib.suppress(NotRun):
                claim.reading.answer(task)
        assert read == set(claim.reading.reads), claim.name
        union |= read
    assert union == set(figures.EXHIBITS["claims"].tables)


def test_the_table_has_a_line_for_every_claim_and_task():
    table = claims.claims_table()
    assert len(table) == sum(len(claim.tasks) for claim in load_claims())
    assert set(table["verdict"]) <= {"supported", "not supported", "undecided", "not run"}
    for row in table[table["low"].notna()].itertuples():
        beyond = row.low > row.margin if row.direction == "above" else row.high < row.margin
        assert (row.verdict == "supported") == beyond, row.claim
    assert (table.loc[table["verdict"] == "not run", "n_seeds"] == 0).all()


def test_one_text_model_is_judged_by_its_documents():
    """Blocks of one speech are not independent: Student's t has as many units as speeches."""
    assert answers.units("sotu") == 8 and answers.units("sudoku") == 1000
    shares = causal._shares("sotu", "stale", False)
    if len(shares) == 1:
        found = answered("update-matters", "sotu")
        half = distributions.t.ppf(0.975, 7) * shares["share_se"].iloc[0]
        assert found.high - found.estimate == pytest.approx(half)


def test_a_damaged_list_of_claims_is_named(tmp_path):
    path = tmp_path / "claims.toml"
    with pytest.raises(UsageError, match="missing"):
        load_claims(path)
    path.write_text('[[claim]]\nname = "x"\n')
    with pytest.raises(UsageError, match=r"\[x\]: missing key 'tasks'"):
        load_claims(path)
    path.write_text('[[claim]]\nname = "x"\ncolour = 1\n')
    with pytest.raises(UsageError, match="colour"):
        load_claims(path)


def test_answers_recover_planted_tables(monkeypatch):
    """Two looped and two base models, S_max 2: the looped ones are better by 0.5 and gain 0.8 from S = 1."""
    rows = [
        {"model": f"sudoku-{arm}{'' if seed == 0 else f'-seed{seed}'}", "task": "sudoku", "arm": arm, "seed": seed,
         "n_loops": s, "nll": level + 0.01 * seed, "change_from_s1_se": 0.1, "change_from_base": -0.5,
         "change_from_base_se": 0.1, "n": 10, "n_units": 10}
        for arm, levels in (("base", {1: 1.0, 2: 3.0, 4: 3.0}), ("loop", {1: 1.3, 2: 0.5, 4: 0.6}))
        for s, level in levels.items() for seed in (0, 1)
    ]  # fmt: skip
    monkeypatch.setattr(tables, "load", lambda name: pd.DataFrame(rows))
    monkeypatch.setattr(inference, "looped", lambda task: 2)
    assert answered("better-at-equal-flops", "sudoku").estimate == pytest.approx(-0.5)
    assert answered("one-loop-is-worse", "sudoku").estimate == pytest.approx(0.3)
    assert answered("more-loops-are-better", "sudoku").estimate == pytest.approx(-0.8)
    assert answered("better-beyond-s-max", "sudoku").estimate == pytest.approx(0.1)
    with pytest.raises(NotRun):
        answered("better-than-deeper", "sudoku")


def test_a_placement_is_compared_with_the_best_of_the_others_at_its_own_s_max(monkeypatch):
    levels = {"early": 0.5, "first": 0.7, "middle": 0.4, "late": 0.6, "two": 0.8, "whole": 0.55}
    rows = [
        {"task": "sudoku", "arm": f"loop-{place}", "seed": seed, "n_loops": s, "max_loops": 2, "n": 10,
         "nll": level + 0.01 * seed + (s != 2)}
        for place, level in levels.items() for seed in (0, 1) for s in (1, 2, 3)
    ]  # fmt: skip
    monkeypatch.setattr(tables, "load", lambda name: pd.DataFrame(rows))
    found = answered("placement", "sudoku")
    assert found.estimate == pytest.approx(0.1) and found.low < 0.1 < found.high and found.n_seeds == 2
    rows = [row for row in rows if row["arm"] != "loop-late"]
    with pytest.raises(NotRun):
        answered("placement", "sudoku")
