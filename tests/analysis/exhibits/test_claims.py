"""Verdicts follow intervals, answers recover planted truths, and every entry can be answered."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats as distributions

from loopmdm.analysis import exhibits as figures
from loopmdm.analysis.exhibits import answers, inference, known, tables
from loopmdm.analysis.exhibits import verdicts as claims
from loopmdm.analysis.exhibits.answers import Answer, NotRun, answer_of, between_arms, by_t
from loopmdm.analysis.exhibits.declared import deciding, load_declared, two_by_two
from loopmdm.analysis.exhibits.verdicts import load_claims, verdict
from loopmdm.analysis.numbers import contrasts
from loopmdm.model.errors import UsageError
from loopmdm.model.zoo.runs import Zoo


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
        found = by_t(*contrasts.contrast(groups, (1, -1, -1, 1)), 5, 5)
        hits += found.low <= -0.5 <= found.high
    assert found.estimate == pytest.approx(
        groups[0].mean() - groups[1].mean() - groups[2].mean() + groups[3].mean()
    )
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
            for asked in (claim.reading.answer, claim.reading.gate):
                with contextlib.suppress(NotRun):
                    _ = asked and asked(task)
        assert read == set(claim.reading.reads), claim.name
        union |= read
    assert union == set(figures.EXHIBITS["claims"].tables)


def test_the_table_has_a_line_for_every_claim_and_task():
    table = claims.claims_table()
    assert len(table) == sum(len(claim.tasks) for claim in load_claims())
    assert set(table["verdict"]) <= set(claims.VERDICTS)
    tested = table[table["low"].notna() & (table["verdict"] != "not testable here")]
    for row in tested.itertuples():
        beyond = row.low > row.margin if row.direction == "above" else row.high < row.margin
        assert (row.verdict == "supported") == beyond, row.claim
        if np.isfinite(row.p) and row.verdict in ("supported", "not supported"):
            assert row.p < 0.05, row.claim  # interval and test are of one kind
    assert (table.loc[table["verdict"] == "not run", "n_seeds"] == 0).all()


def test_no_cell_is_without_a_number_or_a_reason():
    table = claims.claims_table()
    for row in table.itertuples():
        assert np.isfinite(row.estimate) or row.why, row.claim
        if row.verdict == "undecided":
            assert "what would decide it" in row.why, (row.claim, row.task)
        if row.verdict == "not testable here":
            assert row.why, row.claim
    decided = table["verdict"].isin(["supported", "not supported", "equivalent", "not testable here"])
    assert decided.sum() >= 30


def test_an_interval_within_the_slack_is_equivalent_and_says_nothing_else():
    inside, wide = Answer(0.001, -0.002, 0.004, 5, 10), Answer(0.001, -0.02, 0.022, 5, 10)
    assert verdict(inside, 0.0, "above", 0.005) == "equivalent"
    assert verdict(inside, 0.0, "above", 0.003) == verdict(wide, 0.0, "above", 0.005) == "undecided"
    assert verdict(Answer(0.001, 0.0005, 0.0015, 5, 10), 0.0, "above", 0.005) == "supported"


def test_a_failed_gate_makes_a_claim_untestable_and_keeps_its_number():
    table = claims.claims_table().set_index(["claim", "task"])
    cell = table.loc[("better-at-equal-flops", "sotu")]
    assert cell["verdict"] == "not testable here" and np.isfinite(cell["estimate"]) and np.isnan(cell["p_holm"])
    assert "deep less base" in cell["why"]


def test_holm_is_over_all_cells_with_a_test():
    table = claims.claims_table()
    tested = table.dropna(subset=["p_holm"]).sort_values("p")
    assert (
        len(tested) > 20 and (tested["p_holm"] >= tested["p"]).all() and tested["p_holm"].is_monotonic_increasing
    )
    first = tested.iloc[0]
    assert first["p_holm"] == pytest.approx(min(1.0, first["p"] * len(tested)))


def test_a_declared_set_answers_once_it_is_whole():
    sets, zoo = load_declared(), Zoo.shipped()
    s4 = sets["sudoku-s4"]
    assert s4.whole(zoo) and len(s4.of(zoo)) == 17
    runs = deciding("sudoku", zoo)
    assert {role: len(found) for role, found in runs.items()} == {"loop": 7, "base": 5, "deep": 5}
    assert min(run.seed for run in runs["base"]) == 5 and {run.arm for run in runs["loop"]} == {"loop-s4"}
    short = Zoo(tuple(run for run in zoo if run.name != "sudoku-base-seed7"), zoo.listed)
    assert not s4.whole(short)
    assert {run.arm for run in deciding("sudoku", short)["loop"]} == {"loop"}


def test_a_two_by_two_is_of_the_same_seeds_once_both_sets_are_whole():
    zoo = Zoo.shipped()
    template, there = zoo.select(task="sudoku", arm="base")[0], {run.name for run in zoo}
    added = [
        replace(
            template,
            arm=spec.removeprefix("sudoku-"),
            file=spec,
            seed=seed,
            spec=replace(template.spec, name=name),
        )
        for spec in ("sudoku-loop-s4-closed", "sudoku-base-closed")
        for seed in range(5, 10)
        if (name := f"{spec}-seed{seed}") not in there
    ]
    whole = Zoo((*zoo, *added), zoo.listed)
    arms = two_by_two("sudoku", whole)
    assert list(arms) == ["loop-s4", "base", "loop-s4-closed", "base-closed"]
    assert all([run.seed for run in runs] == [5, 6, 7, 8, 9] for runs in arms.values())
    short = Zoo(tuple(run for run in whole if run.name != "sudoku-base-closed-seed9"), zoo.listed)
    assert two_by_two("sudoku", short) is None and two_by_two("sotu", whole) is None


def test_seeds_read_on_the_same_few_documents_share_their_error():
    """Effects of 5 seeds and 8 documents, crossed: the interval covers, that over seeds alone does not."""
    generator, trials = np.random.default_rng(0), 2000
    crossed = alone = 0
    for _ in range(trials):
        seeds, documents = 0.02 * generator.normal(size=(5, 1)), 0.05 * generator.normal(size=8)
        values = seeds + documents + 0.01 * generator.normal(size=(5, 8))
        errors = values.std(axis=1, ddof=1) / 8**0.5
        found, blind = (answer_of(values.mean(axis=1), errors, 8, n_units) for n_units in (8, 1000))
        crossed += found.low < 0 < found.high
        alone += blind.low < 0 < blind.high
    assert crossed / trials > 0.94 and alone / trials < 0.85


def test_a_document_that_alone_carries_a_difference_does_not_decide(monkeypatch):
    known = planted(base={1: 1.0}, loop={1: 1.3, 2: 0.9, 4: 0.9})
    rows = known["nll-by-loops"].assign(task="sotu", n_units=8)
    monkeypatch.setattr(inference, "looped", lambda task: 2)
    gain = {0: -3.2, **dict.fromkeys(range(1, 8), 0.0)}
    documents = pd.DataFrame(
        [
            row | {"document": number, "nll": 1.3 + (change if row["n_loops"] == 2 else 0.0), "n": 5}
            for row in rows.to_dict("records") for number, change in gain.items()
        ]
    )  # fmt: skip
    loaded = {"nll-by-loops": rows, "nll-by-document": documents}
    monkeypatch.setattr(tables, "load", loaded.__getitem__)
    found = answered("more-loops-are-better", "sotu")
    assert found.estimate == pytest.approx(-0.4) and found.high > 0
    loaded["nll-by-document"] = documents.assign(nll=1.3 - 0.4 * (documents["n_loops"] == 2))
    assert answered("more-loops-are-better", "sotu").high < 0


def test_p_values_agree_with_intervals():
    values = np.array([1.0, 1.4, 0.9, 1.2])
    found = answer_of(values, np.zeros(4), 10, 10)
    assert found.p(found.low) == pytest.approx(0.05) and found.p(found.estimate) == pytest.approx(1.0)
    arms = [pd.DataFrame({"nll": values + shift, "n": 10}) for shift in (0.0, 0.6)]
    found = between_arms(*arms, "nll")
    assert found.p(found.high) == pytest.approx(0.05)


def test_blocks_of_one_speech_are_not_independent():
    assert answers.units("sotu") == 8 and answers.units("sudoku") == 1000


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


def planted(**levels):
    """Two tables: test NELBO by S of two seeds an arm, all of which left the plateau."""
    rows = [
        {"model": f"sudoku-{arm}{'' if seed == 0 else f'-seed{seed}'}", "task": "sudoku", "arm": arm, "seed": seed,
         "n_loops": s, "nll": level + 0.01 * seed, "n": 10, "n_units": 90, "max_loops": 2 if arm == "loop" else 1}
        for arm, by_s in levels.items() for s, level in by_s.items() for seed in (0, 1, 2, 3, 4)
    ]  # fmt: skip
    curves = [row | {"nelbo": 0.1, "point": 1, "tokens": 9.0, "flops": 9.0} for row in rows]
    return {"nll-by-loops": pd.DataFrame(rows), "learning-curves": pd.DataFrame(curves)}


def test_answers_recover_planted_tables(monkeypatch):
    """S_max 2: looped models are better by 0.5 and gain 0.8 from S = 1."""
    known = planted(base={1: 1.0, 2: 3.0, 4: 3.0}, loop={1: 1.3, 2: 0.5, 4: 0.6})
    monkeypatch.setattr(tables, "load", known.__getitem__)
    monkeypatch.setattr(inference, "looped", lambda task: 2)
    runs = {role: [SimpleNamespace(name=name) for name in sorted(set(part["model"]))]
            for role, part in known["nll-by-loops"].groupby("arm")}  # fmt: skip
    monkeypatch.setattr(answers, "deciding", lambda task: runs | {"deep": []})
    found = answered("better-at-equal-flops", "sudoku")
    assert found.estimate == pytest.approx(-0.5) and found.note.startswith("left the plateau: 5 of 5, 5 of 5")
    assert answered("one-loop-is-worse", "sudoku").estimate == pytest.approx(0.3)
    assert answered("more-loops-are-better", "sudoku").estimate == pytest.approx(-0.8)
    assert answered("monotone-in-loops", "sudoku").estimate == pytest.approx(-0.8)
    assert answered("better-beyond-s-max", "sudoku").estimate == pytest.approx(0.1)
    assert answered("most-by-half", "sudoku").estimate == pytest.approx(-0.4)  # S_max / 2 is S = 1: nothing yet
    assert answered("needs-many-loops-to-beat-base", "sudoku").estimate == pytest.approx(1.0)
    with pytest.raises(NotRun):
        answered("better-than-deeper", "sudoku")


def test_runs_on_the_plateau_stand_apart(monkeypatch):
    known = planted(base={1: 0.6}, loop={2: 0.5})
    curves = known["learning-curves"]
    curves.loc[curves["model"] == "sudoku-loop-seed3", "nelbo"] = 0.9
    known["nll-by-loops"].loc[known["nll-by-loops"]["model"] == "sudoku-loop-seed3", "nll"] = 0.9
    monkeypatch.setattr(tables, "load", known.__getitem__)
    ours, theirs = (part for _, part in known["nll-by-loops"].groupby("arm", sort=False))
    found = answers.given_break("sudoku", theirs, ours)
    assert found.estimate == pytest.approx(-0.1025) and "4 of 5, 5 of 5" in found.note and found.n_seeds == 4


def test_a_placement_is_compared_with_all_others_of_one_layer_at_its_own_s_max(monkeypatch):
    levels = {"early": 0.5, "first": 0.7, "middle": 0.4, "late": 0.6, "two": 0.8, "whole": 0.55}
    rows = [
        {"task": "sudoku", "arm": f"loop-{place}", "seed": seed, "n_loops": s, "max_loops": 2, "n": 10,
         "nll": level + 0.001 * seed + (s != 2)}
        for place, level in levels.items() for seed in (0, 1, 2) for s in (1, 2, 3)
    ]  # fmt: skip
    monkeypatch.setattr(tables, "load", lambda name: pd.DataFrame(rows))
    found = answered("placement", "sudoku")
    assert found.estimate == pytest.approx(-0.1) and found.low < -0.1 < found.high
    assert answered("few-layers-suffice", "sudoku").estimate == pytest.approx(-0.3)
    rows = [row for row in rows if row["arm"] != "loop-late"]
    with pytest.raises(NotRun):
        answered("placement", "sudoku")


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0, 1.25])
def test_steps_in_reach_recover_planted_rates(rate):
    """What is missing rises straight over four steps, to half of a guess at 2 + rate (S - 1) steps."""
    rows = [
        ("a", "loop", 1, loops, hop, np.clip((hop - rate * (loops - 1)) / 4, 0, 1) * np.log(7))
        for loops in (1, 2, 3, 4)
        for hop in range(1, 12)
    ]
    df = pd.DataFrame(rows, columns=["model", "arm", "seed", "n_loops", "hops", "excess_kl"])
    steps = known.steps_in_reach(df.sample(frac=1, random_state=0)).set_index("n_loops")["steps"]
    assert steps[1] == pytest.approx(2.0)
    assert (steps[4] - steps[1]) / 3 == pytest.approx(rate)


def test_steps_in_reach_start_at_none_and_end_at_the_most():
    df = pd.DataFrame({"model": "a", "arm": "loop", "seed": 1, "n_loops": [1] * 2 + [2] * 2, "hops": [1, 2] * 2,
                       "excess_kl": [np.log(7), np.log(7), 0.0, 0.1]})  # fmt: skip
    assert known.steps_in_reach(df)["steps"].tolist() == pytest.approx([0.5, 2.0])


def test_only_fresh_runs_say_how_far_a_loop_carries(monkeypatch):
    """Seed 0 was seen when the estimand was written."""
    planted, names = [(0, 9), (1, 1), (2, 2)], ("arithmetic-loop", "run-1", "run-2")
    rows = [
        (
            "arithmetic",
            names[seed],
            "loop",
            seed,
            loops,
            hop,
            float(hop > 2 + rate * (loops - 1)) * np.log(7),
            10,
        )
        for seed, rate in planted
        for loops in (1, 4)
        for hop in range(1, 40)
    ]
    df = pd.DataFrame(rows, columns=["task", "model", "arm", "seed", "n_loops", "hops", "excess_kl", "n"])
    monkeypatch.setattr(answers.tables, "load", lambda _: df)
    monkeypatch.setattr(answers, "of_arm", lambda frame, *_: frame)
    monkeypatch.setattr(known, "looped", lambda _: 4)
    found = answered("one-step-a-loop", "arithmetic")
    assert found.n_seeds == 2 and found.estimate == pytest.approx(1.5)


@pytest.mark.parametrize(("gained", "passes"), [(0.4, False), (0.9, True)])
def test_what_comes_by_masked_keys_is_weighed_over_the_declared_steps(gained, passes, monkeypatch):
    names = ("arithmetic-loop", "run-1", "run-2")
    missing = {("none", 1): 1.0, ("none", 4): 1.0 - gained, ("masked->masked", 4): 1.6, ("masked->clean", 4): 1.1}
    rows = [
        (names[seed], seed, edges, n_loops, hop, value + 0.1 * seed if 4 <= hop <= 7 else 50.0, 12 - hop, 99)
        for seed in (0, 1, 2)
        for (edges, n_loops), value in missing.items()
        for hop in range(1, 11)
    ]
    df = pd.DataFrame(rows, columns=["model", "seed", "edges", "n_loops", "hops", "excess_kl", "n_nodes", "n"])
    df.loc[df["seed"] == 0, "excess_kl"] = 1e3  # was seen
    df.loc[(df["edges"] == "masked->masked") & (df["model"] == "run-2"), "excess_kl"] += 0.2
    monkeypatch.setattr(answers.tables, "load", lambda _: df)
    monkeypatch.setattr(answers, "of_arm", lambda frame, *_: frame)
    monkeypatch.setattr(known, "looped", lambda _: 4)
    found = answered("later-steps-come-by-masked", "arithmetic")
    assert (found.n_seeds, found.estimate) == (2, pytest.approx(0.6))
    reading = next(item for item in load_claims() if item.name == "later-steps-come-by-masked").reading
    assert reading.gate("arithmetic").passed is passes
