"""What cells still consider: a planted solver's loops are rounds exactly, and what has no relation shows none."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from loopmdm.analysis.measures import measure
from loopmdm.analysis.measures.known.candidates import candidates
from loopmdm.analysis.measures.known.considered import RULES, allowed, considered
from loopmdm.analysis.measures.known.example_board import example_board
from loopmdm.analysis.measures.twins import untrained
from loopmdm.analysis.plots.candidates import plot_candidates, plot_deaths, plot_live
from loopmdm.model.adapters import hook_model
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.planted import naked_singles
from loopmdm.model.tasks.propagation import propagate, units
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.conftest import toy_model
from tests.loopmdm_model.adapters import natives

SIX = BOARDS["sudoku6"]
NAKED, BOTH = RULES


@pytest.fixture(scope="module")
def boards():
    return puzzles(SIX, SIX.sample_grids("test", 40), 18, unique=True)


@pytest.fixture(scope="module")
def planted():
    return naked_singles(SIX)


@pytest.fixture(scope="module")
def frame(planted, boards):
    with torch.no_grad():
        return candidates(planted, boards, 8)


def part(frame, metric, arm="observed", rule=NAKED):
    chosen = frame[(frame["metric"] == metric) & (frame["arm"] == arm)]
    return chosen[chosen["rule"].isna() | (chosen["rule"] == rule)]


# --- the planted mechanism ---


def test_live_symbols_are_the_candidates_of_the_same_round(planted, boards):
    found = considered(planted, boards, 8)
    sets = allowed(found, NAKED)
    assert len(sets.sets) > 3
    for loop in range(8):
        now = sets.sets[min(loop, len(sets.sets) - 1)]
        assert np.array_equal(found.live[loop], now)
        assert found.p[loop][now].min() > 0.15 and found.p[loop][~now].max() < 0.03


def test_loop_i_is_round_i(frame):
    last = int(frame["round"].max())
    for metric in ("precision", "recall", "jaccard", "auc"):
        value = part(frame, metric).pivot(index="loop", columns="round", values="value")
        diagonal = [value.loc[loop, min(loop, value.columns.max())] for loop in value.index]
        assert diagonal == [1.0] * 8, metric
    assert (part(frame, "lead")["value"] == 0).all() and (part(frame, "lead")["standard_error"] == 0).all()
    assert last >= 3


def test_what_round_r_excludes_dies_in_loop_r(frame):
    deaths = part(frame, "death").dropna(subset=["round"])
    assert (deaths["value"] == (deaths["loop"] == deaths["round"]).fillna(False).astype(float)).all()
    assert (part(frame, "death_loop").dropna(subset=["round"]).eval("value == round")).all()
    assert (part(frame, "death_median").dropna(subset=["round"]).eval("value == round")).all()
    slope = part(frame, "slope").iloc[0]
    assert slope["value"] == pytest.approx(1, abs=1e-12) and slope["standard_error"] < 1e-12


def test_nothing_is_undone_or_given_up(frame, boards):
    assert (part(frame, "newly_undone")["value"] == 0).all() and (part(frame, "true_dead")["value"] == 0).all()
    depth = propagate(SIX, boards.tokens, hidden_singles=False)
    reached = depth.depth.max(-1).values
    for loop, solved in part(frame, "solved").set_index("loop")["value"].items():
        lowest = float((depth.solved & (reached <= loop + 1)).double().mean())
        assert solved >= lowest - 1e-12  # a guess among what is left may be right, too
    undone = part(frame, "undone").iloc[0]
    assert undone["value"] == 0 and undone["n"] > 0


def test_hidden_singles_are_no_part_of_it(frame):
    """By the stronger rule the model falls behind: it does not know hidden singles."""
    assert part(frame, "lead", rule=BOTH)["value"].iloc[1:4].sum() < 0
    assert part(frame, "slope", rule=BOTH)["value"].iloc[0] > 1.05


# --- nulls ---


def test_candidates_of_other_boards_say_nothing_of_symbols(frame):
    auc = part(frame, "auc", "shuffled").dropna(subset=["value"])
    assert ((auc["value"] - 0.5).abs() < 4 * auc["standard_error"] + 0.02).all()
    assert part(frame, "slope", "shuffled")["value"].iloc[0] < 0.35  # the places of the clues alone


def test_an_untrained_model_is_at_chance(frame):
    auc = part(frame, "auc", "untrained")
    assert ((auc["value"] - 0.5).abs() < 4 * auc["standard_error"] + 0.02).all()
    assert (part(frame, "mass", "untrained")["value"] < part(frame, "mass")["value"].max()).all()
    assert abs(part(frame, "slope", "untrained")["value"].iloc[0]) < 0.1


def test_an_untrained_model_is_fresh_or_scrambled():
    m = HookedLoopMDM(toy_model())
    fresh, again, other = untrained(m, 1), untrained(m, 1), untrained(m, 2)
    assert fresh.cfg == m.cfg and fresh is not m
    weights = [x.model.embed.weight for x in (fresh, again, other, m)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])
    foreign = hook_model(natives.native("Bert"), mask_token_id=103)
    before = [weight.clone() for weight in foreign.model.parameters()]
    scrambled = list(untrained(foreign).model.parameters())
    moved = [not torch.equal(w, b) for w, b in zip(scrambled, before, strict=True)]
    assert sum(moved) >= len([w for w in before if w.ndim > 1]) - 2
    for now, then in zip(scrambled, before, strict=True):
        torch.testing.assert_close(now.flatten().sort().values, then.flatten().sort().values, rtol=0, atol=0)
    assert all(torch.equal(w, b) for w, b in zip(foreign.model.parameters(), before, strict=True))


# --- identities and twins ---


@pytest.fixture(scope="module")
def noisy(boards):
    m = HookedLoopMDM(toy_model(d_vocab=7, n_ctx=36))
    with torch.no_grad():
        return m, candidates(m, boards, 3)


def test_metrics_are_those_counted_cell_by_cell(noisy, boards):
    m, frame = noisy
    found = considered(m, boards, 3)
    sets = allowed(found, NAKED).sets
    assert np.allclose(found.p.sum(-1), 1)
    for loop, step in ((0, 0), (2, 1), (1, 3)):
        aucs, jaccards, divergences, masses = [], [], [], []
        for p, may in zip(found.p[loop], sets[step], strict=True):
            live = {v for v in range(6) if p[v] > 1 / 12}
            may = set(np.flatnonzero(may))
            pairs = [np.sign(p[v] - p[w]) for v in may for w in range(6) if w not in may]
            aucs += [np.mean(pairs) / 2 + 0.5] if pairs else []
            jaccards.append(len(live & may) / len(live | may))
            divergences.append(sum(np.log(1 / len(may) / p[v]) / len(may) for v in may))
            masses.append(sum(p[v] for v in may))
        seen = [row for row in range(20) if len(sets[step][row].nonzero()[0]) < 6]
        theirs = [roc_auc_score(sets[step][row], found.p[loop][row]) for row in seen]
        np.testing.assert_allclose(theirs, aucs[: len(seen)])
        wanted = {"auc": aucs, "jaccard": jaccards, "kl": divergences, "mass": masses}
        for metric, values in wanted.items():
            row = part(frame, metric).query("loop == @loop and round == @step").iloc[0]
            assert row["value"] == pytest.approx(np.mean(values)), metric


def test_shares_add_up(noisy):
    _, frame = noisy
    for rule in RULES:
        total = part(frame, "death", rule=rule).groupby("round", dropna=False)["value"].sum()
        assert np.allclose(total, 1)
        live = part(frame, "live", rule=rule).query("loop == 2").set_index("round")["value"]
        never = part(frame, "death", rule=rule)
        never = never[never["loop"].isna()].set_index("round")["value"]
        assert np.allclose(live.sort_index(), never.sort_index())
    value = {
        name: part(frame, name).set_index("loop")["value"] for name in ("solved", "newly_solved", "newly_undone")
    }
    steps = value["newly_solved"] - value["newly_undone"]
    assert np.allclose(value["solved"], steps.cumsum())
    known = frame.dropna(subset=["standard_error", "low"])
    assert (known["low"] <= known["value"]).all() and (known["value"] <= known["high"]).all()


def test_a_board_by_itself_has_its_own_numbers(noisy, boards):
    m, _ = noisy
    alone = candidates(m, boards.rows(slice(3, 4)), 2)
    assert "shuffled" not in set(alone["arm"]) and alone["low"].isna().all()
    found = considered(m, boards.rows(slice(3, 4)), 2)
    whole = considered(m, boards, 2)
    np.testing.assert_allclose(found.p, whole.p[:, whole.owner == 3], atol=1e-6)


# --- other models, and refusals ---


def test_somebody_elses_model_is_asked_in_the_same_way(boards):
    native = natives.native("Bert", vocab_size=7)
    m = hook_model(native, mask_token_id=6, loop=(1, 2), max_loops=2)
    frame = candidates(m, boards, 2)
    auc = part(frame, "auc")
    assert set(frame["arm"]) == {"observed", "shuffled", "untrained"} and auc["value"].between(0.4, 0.6).all()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"n_loops": 0}, "n_loops must be at least 1"),
        ({"threshold": 0.3}, "threshold must be a number in 0..0.16"),
        ({"threshold": "half"}, "threshold must be a number"),
    ],
)
def test_misuse_is_named(planted, boards, how, says):
    with pytest.raises(UsageError, match=says):
        considered(planted, boards, **how)


def test_boards_without_one_solution_are_left_out(planted, boards):
    many = dataclasses.replace(
        boards, tokens=torch.full_like(boards.tokens, 6), masked=torch.ones_like(boards.masked)
    )
    with pytest.raises(UsageError, match=r"no puzzle has exactly one solution; make them with puzzles\("):
        candidates(planted, many, 2)
    with pytest.raises(UsageError, match="rule must be one of naked singles, naked and hidden singles"):
        allowed(considered(planted, boards, 2), "x-wing")
    with pytest.raises(UsageError, match=r"\[MASK\] of a sudoku6 model is 6, this one's is 22"):
        considered(HookedLoopMDM(toy_model(n_ctx=36)), boards)
    with pytest.raises(UsageError, match="candidates needs a model of sudoku"):
        measure("candidates", "sotu-loop", n=4)


# --- one board, drawn ---


def test_the_example_is_the_longest_chain_solved_late(planted, boards):
    table = example_board(planted, boards, 8)
    found = considered(planted, boards, 8)
    late = found.solved[-1] & ~found.solved[0]
    chain = propagate(SIX, boards.tokens).depth.max(-1).values.numpy()
    assert table.attrs["depth"] == chain[late].max() and late[table.attrs["board"]]
    assert table.attrs["board"] == min(np.flatnonzero(late & (chain == chain[late].max())))
    assert len(table) == 9 * 36 * 6 and table["loop"].isna().sum() == 36 * 6
    last, propagated = table[table["loop"] == 7], table[table["loop"].isna()]
    assert np.array_equal(last["live"], propagated["live"])  # what propagation has after as many rounds
    assert last["right"].all() and np.allclose(table.groupby(["panel", "cell"])["p"].sum(), 1)
    box = table.drop_duplicates("cell").set_index("cell")["box"]
    member = units(SIX)[12:]
    assert all(bool(member[box[cell], cell]) for cell in range(36))
    for kind in ("undone", "wrong"):
        with pytest.raises(UsageError, match=f"none of .* boards is {kind}; give more puzzles"):
            example_board(planted, boards.rows(late.nonzero()[0]), 12, kind)
    with pytest.raises(UsageError, match='kind must be "solved late", "undone" or "wrong"'):
        example_board(planted, boards, 8, "hard")


def test_a_board_is_drawn_numeral_by_numeral(noisy, boards):
    m, _ = noisy
    table = example_board(m, boards, 2, "wrong")
    table.loc[(table["cell"] == table[~table["clue"]]["cell"].min()), ["settled", "right"]] = [True, False]
    figure, ax = plt.subplots()
    assert plot_candidates(table, ax=ax) is ax
    cells = table.drop_duplicates(["panel", "cell"])
    marks = table[~table["clue"] & ~table["settled"] & (table["p"] > 0.03)]
    drawn = sorted(len(found.get_paths()) for found in ax.collections)
    large = int((cells["clue"] | cells["settled"]).sum())
    wrong = int((~cells["clue"] & ~cells["right"] & cells["settled"]).sum())
    assert {len(cells), len(marks), large, wrong, int(cells["changed"].sum())} <= set(drawn)
    assert [text.get_text() for text in ax.texts] == ["after 1 loop", "after 2 loops", "propagation, 2 rounds"]
    figure.canvas.draw()
    plt.close(figure)


def test_deaths_and_shares_are_drawn_as_they_stand(frame):
    figure, (left, right) = plt.subplots(1, 2)
    plot_deaths(part(frame, "death"), ax=left)
    assert left.get_xticklabels()[-1].get_text() == "never" and left.get_yticklabels()[0].get_text() == "clues"
    shown = np.asarray(left.images[0].get_array())
    assert np.array_equal(shown, np.eye(len(shown), 9))
    plot_live(part(frame, "live"), ax=right)
    lines = {line.get_label(): line.get_ydata() for line in right.lines}
    assert list(lines["round 2"]) == [1, 1, 0, 0, 0, 0, 0, 0] and lines["clues"].max() == 0
    plt.close(figure)
    for plot in (plot_candidates, plot_deaths, plot_live):
        with pytest.raises(ValueError, match=f"{plot.__name__}: the frame has no"):
            plot(frame.iloc[:0])
