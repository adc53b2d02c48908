"""A dictionary is scored right: what must change nothing does not, and what is planted is found."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis.activations import Wanted, gather
from loopmdm.analysis.activations.catching import Given
from loopmdm.analysis.measures import measure
from loopmdm.analysis.measures.interventions import patch
from loopmdm.analysis.measures.mechanism.dictionaries import (
    Dictionary,
    Origin,
    Shape,
    Training,
    Variables,
    coverage,
    dictionary_scores,
    feature_lives,
    feature_page,
    feature_pages,
    known_variables,
    matches,
    splice,
    splice_losses,
    train_dictionary,
    untrained,
)
from loopmdm.analysis.measures.mechanism.dictionaries.meaning import auc
from loopmdm.analysis.plots.dictionaries import plot_lives, plot_profiles, plot_recovered
from loopmdm.model import HookedLoopMDM, UsageError
from loopmdm.model.adapters import hook_model
from loopmdm.model.planted import naked_singles
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.conftest import toy_model
from tests.loopmdm_model.adapters import natives

SITES = tuple(f"loop.{loop}.hook_out" for loop in range(3))


def made(m, b, kind="crosscoder", n_features=24, steps=20, **settings):
    rows = gather(Given(m, 3, b))
    shape = Shape(kind, n_features, settings.pop("activation", "batchtopk"), 4)
    return train_dictionary(rows, shape, Training(steps=steps, batch_size=16, **settings))


def losses(m, b, **how) -> np.ndarray:
    log_p = m.run(b.tokens, 3, rows=b.masked).logits.log_softmax(-1)
    values = -log_p.gather(-1, b.clean[b.masked][:, None])[:, 0]
    return np.array([values[b.masked.nonzero()[:, 0] == row].mean() for row in range(len(b))])


# --- splicing ---


@pytest.mark.parametrize("kind", ["crosscoder", "sae"])
def test_a_perfect_reconstruction_changes_nothing_and_an_empty_one_is_the_mean(hooked, batch, kind, monkeypatch):
    dictionary = made(hooked, batch, kind)
    dictionary.threshold.fill_(1e9)  # nothing is active: what is given back is the mean
    empty = splice_losses(hooked, batch, dictionary)
    np.testing.assert_allclose(empty.intact, losses(hooked, batch), rtol=1e-6)
    if kind == "crosscoder":
        np.testing.assert_array_equal(empty.losses[0], empty.losses[1])
        found = [empty.loss_recovered(site)[0] for site in range(3)]
        assert all(value == 0 or np.isnan(value) for value in found)
    monkeypatch.setattr(Dictionary, "forward", lambda self, x: x)
    perfect = splice_losses(hooked, batch, dictionary)
    np.testing.assert_allclose(perfect.losses[0], np.tile(perfect.intact, (3, 1)), rtol=1e-6)
    assert np.abs(perfect.divergences[0]).max() < 1e-6
    assert [perfect.explained(site)[0] for site in range(3)] == [1, 1, 1]
    assert all(perfect.kl_recovered(site)[0] == pytest.approx(1, abs=1e-6) for site in range(3))


def test_zero_is_zero_ablation_by_another_way(hooked, batch):
    found = splice_losses(hooked, batch, made(hooked, batch))
    rows = batch.masked
    for loop in range(3):
        with patch(hooked, loop, torch.zeros(*batch.tokens.shape, 16), rows):
            np.testing.assert_allclose(found.losses[2, loop], losses(hooked, batch), rtol=1e-6)
    with splice(hooked, SITES[1], torch.zeros(3, 16), rows), pytest.raises(UsageError, match="do not fit a site"):
        hooked.run(batch.tokens, 3)


# --- lives, sparsity ---


def blank(kind, n_sites, n_features, m=None) -> Dictionary:
    from loopmdm.analysis.activations import Identity, identity

    origin = Origin(Identity("", "", {}) if m is None else identity(m), SITES[:n_sites], "masked", 3)
    return Dictionary(Shape(kind, n_features, "relu", 1), origin, 16).requires_grad_(False)


def test_lives_are_those_of_the_profile():
    dictionary = blank("crosscoder", 3, 4)
    norms = torch.tensor([[1.0, 0.2, 0.6, 1.0], [0.4, 1.0, 1.0, 1.0], [0.1, 0.9, 0.6, 1.0]])  # [site, feature]
    dictionary.decoder[..., 0] = norms
    dictionary.decoder[2, 2] = torch.eye(16)[1] * 0.6  # turns by a right angle
    codes = torch.ones(5, 1, 4)
    codes[:, :, 3] = 0
    frame = feature_lives(dictionary, codes).frame()
    assert frame["alive"].tolist() == [True, True, True, False]
    assert frame["birth"][:3].tolist() == [0, 1, 0] and frame["death"][:3].tolist() == [0, 2, 2]
    assert frame["peak"][:3].tolist() == [0, 1, 1] and frame["n_present"].tolist() == [1, 2, 3, 0]
    assert frame["birth"].isna().tolist() == [False, False, False, True]
    np.testing.assert_allclose(frame["turn"], [np.nan, 1.0, 0.5, np.nan], atol=1e-6)
    by_use = feature_lives(
        blank("sae", 3, 2), torch.tensor([[[0, 1.0], [1, 0], [1, 0]], [[0, 1.0], [1, 0], [0, 0]]])
    )
    assert by_use.birth.tolist() == [1, 0] and by_use.death.tolist() == [1, 0]
    # 0.5 is not above half of 1


def test_dead_features_and_active_ones_are_counted(hooked, batch):
    dictionary = blank("sae", 3, 10, hooked)
    dictionary.bias[:] = torch.tensor([1.0] * 3 + [-1.0] * 7)  # three are always active, seven never
    scores = dictionary_scores(hooked, batch, dictionary, meanings=False)
    assert scores.loc[scores["metric"] == "dead", "value"].tolist() == [0.7]
    assert scores.loc[scores["metric"] == "l0", "value"].tolist() == [3, 3, 3]


# --- meaning ---


def test_auc_is_the_share_of_pairs_in_order():
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (40, 3), generator=draw).float()
    true = torch.rand(40, 2, generator=draw) < 0.4
    for feature in range(3):
        for variable in range(2):
            above, below = codes[true[:, variable], feature], codes[~true[:, variable], feature]
            gap = above[:, None] - below
            share = ((gap > 0).double() + (gap == 0).double() / 2).mean()
            assert auc(codes, true)[feature, variable] == pytest.approx(float(share))


def by_hand(n=400) -> tuple[torch.Tensor, Variables]:
    draw = torch.Generator().manual_seed(1)
    true = torch.rand(n, 3, generator=draw) < 0.3
    codes = torch.stack([true[:, 2] * 2.0, torch.rand(n, generator=draw), torch.zeros(n), true[:, 0] * 1.0], 1)
    sample, position = np.arange(n) // 4, np.arange(n) % 4
    return codes, Variables(true, ["a", "b", "c"], ["x", "x", "y"], sample, position)


def test_features_find_their_variables_and_nothing_in_shuffled_ones():
    codes, variables = by_hand()
    found = matches(codes, variables)
    assert found["feature"].tolist() == [0, 1, 3]  # 2 is dead
    assert found["variable"].tolist()[::2] == ["c", "a"] and found["auc"].tolist()[::2] == [1, 1]
    assert 0.3 < found["auc"][1] < 0.7
    covered = coverage(codes, variables).set_index("variable")
    assert covered.loc[["a", "c"], "f1"].tolist() == [1, 1] and covered.loc[["a", "c"], "feature"].tolist() == [
        3,
        0,
    ]
    assert covered.loc["b", "f1"] < 0.6
    null = variables.shuffled()
    assert not torch.equal(null.values, variables.values)
    for at in range(4):
        # place stays
        here = torch.from_numpy(variables.position == at)
        assert torch.equal(null.values[here].sum(0), variables.values[here].sum(0))
    assert (matches(codes, null)["auc"] < 0.75).all()
    with pytest.raises(UsageError, match="no variable is true and false often enough"):
        replace(variables, values=variables.values & False).known()


def test_variables_of_a_board_are_its_rules(unique_puzzles):
    b = unique_puzzles
    m = naked_singles("sudoku6")
    found = known_variables(m, b, b.masked)
    place = {name: column for name, column in zip(found.names, found.values.T, strict=True)}
    row = next(iter(b.masked[0].nonzero()[:, 0].tolist()))
    at = 0
    r, c = row // 6, row % 6
    board = b.tokens[0].view(6, 6)
    box = board[r // 2 * 2 : r // 2 * 2 + 2, c // 3 * 3 : c // 3 * 3 + 3]
    for v in range(6):
        has = [bool((unit == v).any()) for unit in (board[r], board[:, c], box)]
        assert [bool(place[f"{unit} has {v + 1}"][at]) for unit in ("row", "column", "box")] == has
        assert bool(place[f"candidate {v + 1}"][at]) == (not any(has))
        assert bool(place[f"symbol {v + 1}"][at]) == (int(b.clean[0, row]) == v)
    assert place[f"in row {r + 1}"][at] and place[f"in column {c + 1}"][at]


# --- the planted model ---


@pytest.fixture(scope="module")
def planted():
    board = BOARDS["sudoku6"]
    b = puzzles(board, board.sample_grids("test", 200), 16)
    m = naked_singles(board)
    rows = gather(Given(m, 4, b))
    with torch.no_grad():
        training = Training(steps=600, batch_size=256, learning_rate=5e-3, dead_after=3000)
        return m, b, rows, train_dictionary(rows, Shape("sae", 64, k=12), training)


def test_features_are_the_planted_channels(planted):
    m, _, rows, dictionary = planted
    codes = dictionary.encode(rows.values)
    for loop in range(4):
        for channel, least in (("known", 0.999), ("candidates", 0.9)):
            true = rows.values[:, loop, m.model.channels[channel]] > 0.5
            best = auc(codes[:, loop], true).max(0)
            assert (best > least).all(), (channel, loop, best)
    null = auc(codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0)), 0], true)
    assert abs(np.nanmedian(null) - 0.5) < 0.02 and np.nanmax(null) < 0.75


def test_a_planted_feature_says_what_the_model_does(planted):
    m, b, rows, dictionary = planted
    codes = dictionary.encode(rows.values)
    true = rows.values[:, 3, m.model.channels["known"]] > 0.5
    for symbol in (0, 4):
        feature = int(auc(codes[:, 3], true)[:, symbol].argmax())
        page = feature_page(dictionary, m, feature, b)
        assert page.effects["token"].iloc[0] == str(symbol) and page.effects["effect"].iloc[0] > 0.5
        assert "follows symbol" in repr(page) and "<table" in page._repr_html_()
        assert len(page.examples) == 10 and page.examples["code"].is_monotonic_decreasing
        assert page.examples["text"].str.contains(f">>[{symbol}]<<", regex=False).all()
        direction = dictionary.directions(feature)[0]
        assert int(direction[m.model.channels["known"]].argmax()) == symbol


def test_pages_are_of_the_strongest_and_read_an_sae_where_it_is_active_most(planted):
    m, b, rows, dictionary = planted
    codes = dictionary.encode(rows.values)
    pages = feature_pages(dictionary, m, b.rows(slice(40)), 5, n_examples=3)
    there = codes[torch.from_numpy(rows.frame["sample"].to_numpy() < 40)]
    order = there.square().mean((0, 1)).argsort(descending=True).tolist()
    assert [page.feature for page in pages] == order[:5]
    for page in pages:
        share = (there[..., page.feature] > 0).float().mean(0)
        np.testing.assert_allclose(page.profile["active"], share, rtol=1e-5)
        assert share[page.loop] == share.max() and not bool((share[page.loop + 1 :] == share.max()).any())
        assert page.n == len(there) and page.n_sequences == 40
        assert not page.examples["sample"].duplicated().any()
        best = there[:, page.loop, page.feature].max()
        assert page.examples["code"].iloc[0] == pytest.approx(float(best))
        assert set(page.effects["n"]) == {len(page.examples)}


def test_taking_out_a_feature_without_a_direction_changes_nothing(hooked, batch):
    dictionary = made(hooked, batch, "sae", activation="relu")
    dictionary.decoder[0, 3] = 0
    dictionary.bias[3] = 5.0  # active everywhere
    page = feature_page(dictionary, hooked, 3, batch)
    assert len(page.examples) == 4 and np.abs(page.effects["effect"]).max() < 1e-6
    assert "22" not in page.effects["token"].tolist()  # [MASK] is no answer
    dictionary.decoder[0, 3, 0] = 30.0  # along one axis: the norm would take a constant away
    assert np.abs(feature_page(dictionary, hooked, 3, batch).effects["effect"]).max() > 1e-3


# --- other models, controls, refusals ---


@pytest.mark.parametrize(("name", "positions"), [("Bert", "masked"), ("Llama", "all")])
def test_other_peoples_models(name, positions):
    given = {"mask_token_id": 103} if name == "Bert" else {}
    m = hook_model(natives.native(name), loop=(1, 2), max_loops=2, **given)
    clean = natives.tokens(8)
    hidden = torch.zeros_like(clean, dtype=torch.bool)
    hidden[:, ::2] = name == "Bert"
    b = MaskedBatch(clean.masked_fill(hidden, 103), clean, hidden)
    rows = gather(Given(m, 2, b), Wanted(positions=positions))
    dictionary = train_dictionary(rows, Shape("crosscoder", 16, k=4), Training(steps=10, batch_size=16))
    scores = dictionary_scores(m, b, dictionary, meanings=False)
    assert scores.loc[scores["metric"] == "explained_variance", "value"].between(-1, 1).all()
    assert len(feature_page(dictionary, m, 0, b).profile) in (0, 2)
    other = untrained(m)
    assert not torch.equal(*(next(p for p in x.model.parameters() if p.ndim > 1) for x in (m, other)))
    with pytest.raises(UsageError, match="open that model"):
        dictionary_scores(other, b, dictionary)


def test_the_untrained_twin_has_the_shape_and_other_weights():
    hooked = HookedLoopMDM(toy_model(seed=5))
    first, again, other = untrained(hooked), untrained(hooked), untrained(hooked, 1)
    weights = [dict(x.model.state_dict())["blocks.0.mlp.out.weight"] for x in (first, again, other, hooked)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3]) and weights[0].shape == weights[3].shape


def test_what_is_wrong_is_said_in_a_line(hooked, batch, tmp_path):
    dictionary = made(hooked, batch)
    other = HookedLoopMDM(toy_model(seed=9))
    dictionary.save(tmp_path / "d")
    whole = Dictionary.open(tmp_path / "d", hooked)
    assert torch.equal(whole.decoder, dictionary.decoder.half().float())
    (tmp_path / "d" / "dictionary.safetensors").write_bytes(b"half")
    rows = gather(Given(hooked, 3, batch))
    calls = {
        "open that model": lambda: splice_losses(other, batch, dictionary),
        "no position is masked": lambda: splice_losses(
            hooked, MaskedBatch(batch.clean, batch.clean, batch.masked & False), dictionary
        ),
        "is damaged": lambda: Dictionary.open(tmp_path / "d"),
        "holds no dictionary": lambda: Dictionary.open(tmp_path),
        "feature must be at most 23": lambda: feature_page(dictionary, hooked, 24, batch),
        "kind must be": lambda: Shape("tree"),
        "k must be at most 8": lambda: Shape("sae", 8, k=9),
        "fewer than a batch": lambda: train_dictionary(rows, Shape(), Training(batch_size=10_000)),
        "takes an ActivationStore": lambda: train_dictionary(rows.values),
        "one vector a row": lambda: train_dictionary(
            gather(Given(hooked, 3, batch), Wanted("loop.*.blocks.1.attn.hook_z")), Shape(), Training(batch_size=8)
        ),
        "a dictionary reads": lambda: dictionary(rows.values[:, :2]),
    }
    for said, call in calls.items():
        with pytest.raises(UsageError, match=said) as error:
            call()
        assert "\n" not in str(error.value)


def test_the_measure_makes_a_table_and_reads_a_saved_dictionary(tmp_path):
    small = {"n": 32, "n_scored": 32, "n_features": 32, "k": 4, "steps": 15}
    frame = measure("dictionaries", "sudoku-loop-s4", **small)
    assert set(frame["arm"]) == {"trained", "untrained"}
    both = measure("dictionaries", "sudoku-loop-s4", **small, kind="both")
    pd.testing.assert_frame_equal(both[both["kind"] == "crosscoder"].reset_index(drop=True), frame)
    assert both[both["kind"] == "sae"]["loop"].max() == 3
    shares = both[both["metric"].isin(["born", "last"])].groupby(["kind", "arm", "metric"])["value"].sum()
    np.testing.assert_allclose(shares, 1)
    plot_recovered(frame)
    assert len(plot_recovered(both[both["arm"] == "trained"], by="kind").get_legend_handles_labels()[1]) >= 2
    plot_lives(frame[frame["arm"] == "trained"])
    plot_profiles(pd.DataFrame({"feature": [0, 0, 1, 1], "loop": [0, 1, 0, 1], "profile": [1, 0.2, 0.3, 1]}))
    with pytest.raises(UsageError, match="holds no dictionary"):
        measure("dictionaries", "sudoku-loop-s4", folder=str(tmp_path))
    with pytest.raises(UsageError, match='kind must be "crosscoder", "sae" or "both"'):
        measure("dictionaries", "sudoku-loop-s4", kind="tree")
