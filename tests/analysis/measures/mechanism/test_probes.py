"""Linear probes: exact where answers are linear, at chance where there are none."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, models, pre_tokenizers

from loopmdm.analysis.measures import measure
from loopmdm.analysis.measures.mechanism.labels import Labelled, sudoku_labels, text_labels
from loopmdm.analysis.measures.mechanism.probes import (
    HELD_OUT,
    PENALTIES,
    _ridge,
    auc_and_influence,
    fit_probe,
    probe,
    states_at,
)
from loopmdm.model.adapters import hook_model
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import hide
from loopmdm.model.planted import naked_singles
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.propagation import candidates_by_round, propagate
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.conftest import toy_model
from tests.loopmdm_model.adapters import natives, standins

SIX = BOARDS["sudoku6"]
WORDS = ["the", "Cat", "12", "cat", "##s", "dog", ",", "and", "Bird", "of", "run", ".", "7", "zoo", "at"]


@pytest.fixture(scope="module")
def two():
    """Boards to fit on and to test on."""
    return tuple(puzzles(SIX, SIX.sample_grids(split, 40), 18) for split in ("validation", "test"))


@pytest.fixture(scope="module")
def frame(two):
    with torch.no_grad():
        return probe(naked_singles(SIX), *(sudoku_labels(b, 3) for b in two), n_loops=4)


def value(frame, metric="auc", labels="true", **where):
    part = frame[(frame["metric"] == metric) & (frame["labels"] == labels)]
    for name, wanted in where.items():
        part = part[part[name] == wanted]
    return part


# --- the planted mechanism ---


def test_candidates_after_round_i_are_read_perfectly_after_loop_i(frame):
    table = value(frame, target="candidate").pivot(index="loop", columns="round", values="value")
    assert [table.loc[loop, loop] for loop in range(4)] == [1.0] * 4
    assert (table.loc[-1] < 0.9).all()  # no attention yet: only where a cell stands
    assert table.loc[0, 2] < 0.999 and table.loc[3, 0] < 0.999  # another round's are not what is there


def test_how_many_units_hold_a_symbol_is_linear_in_the_stream(two):
    """The stream holds the three units' sum, not each: the sum is read exactly, a unit's part of it is not."""
    m, (fit, test) = naked_singles(SIX), two
    some, other = sudoku_labels(fit, 0), sudoku_labels(test, 0)
    counts = [
        sum(one.answers[kind, 0].astype(float) for kind in ("row", "column", "box")) for one in (some, other)
    ]
    x, z = (states_at(m, one, 1)[1] for one in (some, other))
    assert np.abs(fit_probe(x, counts[0]).scores(z) - counts[1]).max() < 1e-3
    alone = fit_probe(x, some.answers["row", 0]).scores(z)
    assert np.abs(alone - other.answers["row", 0]).max() > 0.3


def test_a_cells_symbol_is_read_where_it_is_filled(two):
    m, (fit, test) = naked_singles(SIX), two
    some, other = sudoku_labels(fit, 0), sudoku_labels(test, 0)
    depth = propagate(SIX, test.tokens, hidden_singles=False).depth[test.masked].numpy()
    for loop, (x, z) in enumerate(zip(states_at(m, some, 3)[1:], states_at(m, other, 3)[1:], strict=True)):
        right = fit_probe(x, some.answers["symbol", None]).scores(z).argmax(1) == other.answers[
            "symbol", None
        ].argmax(1)
        filled = (depth > 0) & (depth <= loop + 1)
        assert filled.any() and right[filled].all() and not right[~filled].all()


# --- nulls ---


def test_shuffled_answers_are_at_chance_at_the_stated_rate(frame):
    part = value(frame, labels="shuffled")
    held = part["low"].le(0.5) & part["high"].ge(0.5)
    assert len(part) == 5 * 17 and held.mean() > 0.8  # 95%, of places that share their rows
    assert (part["value"] - 0.5).abs().max() < 0.1


def test_a_control_task_is_learnt_by_heart_where_the_type_can_be_read():
    """A state that says which cell it is answers the control task, not a coin: selectivity falls below 0."""
    generator = np.random.default_rng(0)
    b = puzzles(SIX, SIX.sample_grids("test", 60), 12)
    some = Labelled(b, b.masked, {("coin", None): generator.random((int(b.masked.sum()), 1)) < 0.5},
                    b.masked.nonzero()[:, 1].numpy())  # fmt: skip

    m = naked_singles(SIX)  # tells cells by their row, column and box
    frame = probe(m, some, some, 1)
    assert value(frame, labels="true", loop=-1)["value"].iloc[0] < 0.62
    assert value(frame, labels="control", loop=-1)["value"].iloc[0] > 0.7
    row = value(frame, "selectivity", "true - control", loop=-1).iloc[0]
    assert row["value"] < -0.1 and row["high"] < 0


def test_what_no_loop_had_a_part_in_is_the_same_at_every_loop_count(two):
    labels = [sudoku_labels(b, 0) for b in two]
    one, two_loops = (probe(HookedLoopMDM(toy_model(d_vocab=7, n_ctx=36)), *labels, n) for n in (1, 2))
    same = two_loops[two_loops["loop"] < 1].drop(columns="n_loops").reset_index(drop=True)
    np.testing.assert_allclose(same["value"], one["value"], atol=1e-6)
    base = value(one, "base", target="symbol")["value"]
    assert base.nunique() == 1 and 0.1 < base.iloc[0] < 0.3


# --- third parties ---


def test_a_probe_solves_the_normal_equations():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(50, 7)) * [1, 2, 3, 4, 5, 6, 0] + 5, generator.random((50, 3)) < 0.4
    spread = np.where(x.std(0) > 0, x.std(0), 1)
    z, said = (x - x.mean(0)) / spread, y.astype(float)
    for penalty in PENALTIES:
        found = _ridge(x, said, np.full(y.shape[1], penalty))
        weight = np.linalg.solve(z.T @ z + penalty * len(x) * np.eye(z.shape[1]), z.T @ (said - said.mean(0)))
        np.testing.assert_allclose(found.scores(x), z @ weight + said.mean(0), atol=1e-8)
    found = fit_probe(x, y)
    np.testing.assert_allclose(found.scores(x), x @ found.weight + found.bias)
    wide_x = generator.normal(size=(20, 90))
    assert fit_probe(wide_x, generator.random((20, 1)) < 0.5).weight.shape == (90, 1)


def test_each_question_gets_the_penalty_that_is_best_where_it_was_held_out():
    generator = np.random.default_rng(2)
    x = generator.normal(size=(60, 12))
    y = np.stack([generator.random(60) < 0.5, x[:, 0] > 0, x[:, :6].sum(1) > 0], 1).astype(float)
    owner = np.arange(60)
    lots = row_uniforms(3, "order", 1, 60)[0].argsort().argsort().numpy()
    held = lots < HELD_OUT * 60
    tried = [_ridge(x[~held], y[~held], np.full(3, penalty)) for penalty in PENALTIES]
    errors = [((one.scores(x[held]) - y[held]) ** 2).mean(0) for one in tried]
    best = np.array(PENALTIES)[np.argmin(errors, 0)]
    assert len(set(best)) > 1
    np.testing.assert_array_equal(fit_probe(x, y, owner, seed=3).weight, _ridge(x, y, best).weight)


def test_the_area_is_scikit_learns_and_its_error_a_jackknifes():
    generator = np.random.default_rng(1)
    unit = np.repeat(np.arange(40), 10)
    shift = generator.normal(size=40)[unit]
    yes = generator.random(400) < 0.3 + 0.4 * (shift > 0)
    score = np.round(yes + shift + generator.normal(size=400), 1)  # with ties
    area, influence = auc_and_influence(score, yes, unit, 40)
    assert area == pytest.approx(roc_auc_score(yes, score))
    left_out = [roc_auc_score(yes[unit != one], score[unit != one]) for one in range(40)]
    jackknife = np.sqrt(39 / 40 * ((left_out - np.mean(left_out)) ** 2).sum())
    assert np.sqrt(40 / 39 * (influence**2).sum()) / 40 == pytest.approx(jackknife, rel=0.05)
    assert influence.sum() == pytest.approx(0, abs=1e-9)
    assert np.isnan(auc_and_influence(score, np.ones(400, bool), unit, 40)[0])


# --- questions ---


def test_questions_about_cells_are_those_counted_by_hand(two):
    b = two[1].rows(slice(0, 3))
    some = sudoku_labels(b, 2)
    depth, symbols = (part.tolist() for part in dataclasses.astuple(propagate(SIX, b.tokens, False))[:2])
    rounds = candidates_by_round(SIX, b.tokens, 2, False)
    for index, (board, cell) in enumerate(b.masked.nonzero().tolist()):
        place = lambda c: (c // 6, c % 6, c // 12 * 2 + c % 6 // 3)  # noqa: E731
        for step in range(3):
            known = [c for c in range(36) if 0 <= depth[board][c] <= step]
            for number, kind in enumerate(("row", "column", "box")):
                held = {symbols[board][c] for c in known if place(c)[number] == place(cell)[number]}
                assert set(np.flatnonzero(some.answers[kind, step][index])) == held
            assert np.array_equal(some.answers["candidate", step][index], rounds[step, board, cell].numpy())
        assert some.answers["symbol", None][index].nonzero()[0].tolist() == [int(b.clean[board, cell])]


def worded(native, **how):
    words = {word: index for index, word in enumerate(WORDS)} | {f"x{n}": n for n in range(len(WORDS), 40)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hook_model(native, tokenizer=tokenizer, **how)


def text_batch(mask=30, n=12, seed=0):
    tokens = torch.randint(0, len(WORDS), (n, 9), generator=torch.Generator().manual_seed(seed))
    return hide(tokens, torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed + 9)) < 0.6, mask)


def test_questions_about_tokens_go_by_their_letters():
    m = worded(standins.prepared(standins.DreamModel()), loop=(1, 1), max_loops=2)
    b = text_batch()
    some = text_labels(m, b)
    assert torch.equal(some.rows, b.masked & (torch.arange(9) < 8))
    asked = [WORDS[int(token)] for token in b.clean[some.rows]]
    wanted = {
        "digit": [word.isdigit() for word in asked],
        "punctuation": [word in ",." for word in asked],
        "capitalised": [word in ("Cat", "Bird") for word in asked],
        "starts a word": [word != "##s" for word in asked],
        "function word": [word in ("the", "and", "of", "at") for word in asked],
    }
    for name, answers in wanted.items():
        assert some.answers[name, None][:, 0].tolist() == answers, name
    letters = some.answers["first letter", None]
    told = ["".join(np.array(list("abcdefghijklmnopqrstuvwxyz"))[row]) for row in letters]
    assert told == [word[0].lower() if word[0].isalpha() else "" for word in asked]
    after = [WORDS[int(t)] for t in b.clean.roll(-1, 1)[some.rows]]
    assert (some.answers["next first letter", None].any(1) == [word[0].isalpha() for word in after]).all()


@pytest.mark.parametrize("name", ["shifted", "causal"])
def test_other_peoples_models_are_probed_by_their_tokenizers(name):
    if name == "shifted":
        m = worded(standins.prepared(standins.DreamModel()), loop=(1, 1), max_loops=2)
    else:
        m = worded(natives.native("Llama", vocab_size=40), loop=(1, 2), max_loops=2)
    batches = [text_batch(30 if name == "shifted" else 0, 30, seed) for seed in (0, 5)]
    if name == "causal":
        batches = [MaskedBatch(b.clean, b.clean, torch.zeros_like(b.masked)) for b in batches]
    labels = [text_labels(m, b) for b in batches]
    if name == "causal":  # the token that is asked is the next one, and that has one after it
        assert torch.equal(labels[0].rows, (torch.arange(9) < 7).expand(30, -1))
        assert labels[0].types.tolist() == batches[0].clean[:, 1:8].flatten().tolist()
    frame = probe(m, *labels)
    auc = value(frame)
    assert set(auc["loop"]) == {-1, 0, 1} and auc["value"].between(0, 1).all() and (auc["n"] == 30).all()
    assert value(frame, labels="shuffled")["value"].mean() == pytest.approx(0.5, abs=0.1)


def test_few_rows_are_some_of_all(two):
    some = sudoku_labels(two[0], 0)
    few = some.some(50, 1)
    assert int(few.rows.sum()) == 50 == len(few.types) and not bool((few.rows & ~some.rows).any())
    kept = few.rows[some.rows].numpy()
    for target, answers in few.answers.items():
        assert np.array_equal(answers, some.answers[target][kept])
    assert some.some(10**6, 1) is some


# --- refusals ---


def test_misuse_is_named(two):
    m, labels = naked_singles(SIX), [sudoku_labels(b, 0) for b in two]
    with pytest.raises(UsageError, match="asked different questions; label both alike"):
        probe(m, labels[0], sudoku_labels(two[1], 1))
    with pytest.raises(UsageError, match=r"answers and types go by the .* rows; those of row do not"):
        Labelled(two[0], two[0].masked, {("row", 0): np.zeros((3, 6), bool)}, labels[0].types)
    with pytest.raises(UsageError, match="a probe needs rows of two sequences"):
        alone = sudoku_labels(two[0].rows(slice(0, 1)), 0)
        probe(m, alone, labels[1])
    nothing = Labelled(two[0], torch.zeros_like(two[0].masked), {}, np.zeros(0, int))
    with pytest.raises(UsageError, match="no position to look at; mask some"):
        probe(m, nothing, nothing)
    with pytest.raises(UsageError, match="probes of text need a tokenizer"):
        text_labels(hook_model(natives.native("Bert"), mask_token_id=103), text_batch(103))
    with pytest.raises(UsageError, match="n_loops must be at least 1"):
        probe(m, *labels, n_loops=0)
    with pytest.raises(UsageError, match="probes: n_rows takes an integer"):
        measure("probes", "sudoku-loop-s4", n_rows=0.5)


def test_the_measure_has_both_models_and_all_controls():
    frame = measure("probes", "sudoku-loop-s4", 1, n=24, n_rows=200, n_rounds=0)
    assert set(frame["weights"]) == {"trained", "untrained"}
    assert set(frame["labels"]) == {"true", "control", "shuffled", "true - control"}
    assert (frame["n_rows"] == 200).all() and frame["loop"].min() == -1
