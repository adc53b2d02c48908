"""Other people's models in the measures: own texts, causal models, shifted ones, random starts, gates."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from loopmdm.analysis import mask_attention, representation_change
from loopmdm.analysis.cli.shared import values
from loopmdm.analysis.measures import MEASURES, measure
from loopmdm.analysis.measures.access import Access
from loopmdm.analysis.measures.attention import attention_shape
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.interventions import damp
from loopmdm.analysis.measures.interventions.training_free import training_free
from loopmdm.analysis.measures.options import OnTests
from loopmdm.analysis.measures.representation import settled_loops
from loopmdm.analysis.measures.starts import over_starts
from loopmdm.model import LoopMDM, MaskedBatch, UsageError, nelbo, sample
from loopmdm.model.adapters import hook_model
from loopmdm.model.masking import hide
from loopmdm.model.sequences import Sequences
from loopmdm.model.tasks.test_sets import TestSet, text_set
from tests.conftest import toy_model
from tests.loopmdm_model.adapters import natives, standins

pytestmark = pytest.mark.filterwarnings("ignore:.*extrapolation")
IDS = "\n".join(" ".join(str(40 + (7 * row + 3 * at) % 60) for at in range(10 + row % 3)) for row in range(12))
BERT = Access(changes={"mask_token_id": 103})


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of a saved BERT and a saved Llama, and a file of sequences."""
    root = tmp_path_factory.mktemp("models")
    for name in ("Bert", "Llama"):
        natives.native(name).save_pretrained(root / name)
    (root / "own.txt").write_text(IDS + "\n\n")
    return root


def on(places, **how) -> Access:
    return Access(text=places / "own.txt", **how)


# --- texts of one's own ---


def test_own_sequences_are_cut_padded_and_held_out(places):
    m = BERT.open(places / "Bert")
    test, held_out = (on(places).test_set(m, split) for split in ("test", "validation"))
    rows = [[int(word) for word in line.split()] for line in IDS.splitlines()]
    assert [row[real].tolist() for row, real in zip(test.tokens, test.sequences.real, strict=True)] == [
        row for index, row in enumerate(rows) if index % 4 != 3
    ]
    assert held_out.tokens[:, :10].tolist() == [row[:10] for row in rows[3::4]]
    assert text_set("x", ["1 2 3"] * 5, m).sequences.real is None
    assert text_set("x", [" ".join(["5"] * 60)], m).tokens.shape == (1, m.cfg.n_ctx)
    with pytest.raises(UsageError, match="x has 3 texts, none for validation; give at least 4"):
        text_set("x", ["1", "2", "3"], m, "validation")
    with pytest.raises(UsageError, match="no tokenizer, and 'words' is no list of token ids"):
        text_set("x", ["words"], m)


def test_a_measure_on_own_sequences_is_the_function_on_them(places):
    how = on(places, changes={"mask_token_id": 103, "loop": (1, 2), "max_loops": 2})
    frame = measure("mask-attention", str(places / "Bert"), mask_ratios=[0.5], access=how)
    m = how.open(places / "Bert")
    case = Case(m, how.test_set(m), OnTests(2, 256))
    pd.testing.assert_frame_equal(frame[["mass", "log_odds", "n"]], mask_attention(m, case.masked(0.5), 2)[
        ["mass", "log_odds", "n"]])  # fmt: skip
    assert set(frame["task"]) == {"own.txt"} and set(frame["n_units"]) == {9}


@pytest.mark.parametrize("name", ["stopping-frontier", "representation-change", "cut-effects", "settled"])
def test_measures_of_many_kinds_run_on_a_saved_model(places, name):
    how = on(places, changes={"mask_token_id": 103, "loop": (1, 2), "max_loops": 3})
    given = {"mask_ratios": [0.5]} if MEASURES[name].on == "masks" else {}
    frame = measure(name, str(places / "Bert"), access=how, **given)
    assert len(frame) and set(frame["model"]) == {str(places / "Bert")}


def test_ours_take_own_texts_too(tmp_path, places):
    toy_model(d_vocab=120).save_pretrained(tmp_path / "ours")
    (tmp_path / "ours.txt").write_text("1 2 3 4\n5 6 7 8\n")
    frame = measure("nll", str(tmp_path / "ours"), [2], access=Access(text=tmp_path / "ours.txt"), n_samples=1)
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    expected = nelbo(LoopMDM.from_pretrained(tmp_path / "ours"), tokens, 2, n_samples=1)
    assert frame["nelbo"].tolist() == [expected.mean]


def test_evaluations_of_others(places):
    how = on(places, changes={"mask_token_id": 103})
    frame = measure("noise-level", str(places / "Bert"), access=how, n_samples=1)
    assert set(frame["n_loops"]) == {1} and set(frame["n_units"]) == {9}
    with pytest.raises(UsageError, match="generative is asked of shipped models and run folders only"):
        measure("generative", str(places / "Bert"), access=how)
    with pytest.raises(UsageError, match=r"nll needs a model with a \[MASK\] token"):
        measure("nll", str(places / "Llama"), access=on(places))


def test_what_is_wrong_is_said_in_a_line(places):
    for how, said in (
        (BERT, "Bert has no test set of its own; give --text FILE, a sequence a line"),
        (Access(device="nowhere"), "device 'nowhere' cannot be used here"),
        (Access(dtype="int8"), "as \"bfloat16\"; got 'int8'"),
        (Access(text=places / "none.txt", changes=BERT.changes), "none.txt is no file"),
        (Access(changes={"mask_tokn_id": 3}), "did you mean mask_token_id"),
    ):
        with pytest.raises(UsageError, match=said):
            Case.of(str(places / "Bert"), access=how)
    assert values(["a=1", "loop=[1, 2]", "word=x"]) == {"a": 1, "loop": [1, 2], "word": "x"}


def test_more_masks_than_in_training_are_warned_of(places):
    with pytest.warns(UserWarning, match="trained with 15% of tokens masked.*up to 50%, is extrapolation"):
        measure(
            "attention-shape",
            str(places / "Bert"),
            1,
            mask_ratios=[0.1, 0.5],
            access=on(places, changes=BERT.changes),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = measure(
            "attention-shape", str(places / "Bert"), 1, mask_ratios=[0.1], access=on(places, changes=BERT.changes)
        )
    assert frame.attrs["remarks"] == hook_model(natives.native("Bert"), mask_token_id=103).facts.remarks


# --- causal models ---


def test_where_a_causal_models_states_go_is_asked_of_it():
    assert all(MEASURES[name].groupless for name in ("convergence", "fixed-points", "state-paths", "settled"))


def test_a_model_without_weights_measures_nothing(places):
    for name in (str(places / "Bert"), "sudoku-loop"):
        changes = {} if name == "sudoku-loop" else BERT.changes
        with pytest.raises(UsageError, match="no weights on the meta device; take another --device"):
            measure("attention-shape", name, access=Access(device="meta", changes=changes))
        with pytest.raises(UsageError, match='weights lie on the device "meta"'):
            sample(Access(device="meta", changes=changes).open(name), n=1, steps=2)


@pytest.mark.parametrize("name", [name for name, item in MEASURES.items() if item.groupless])
def test_a_causal_model_has_rows_without_groups_and_a_sentence(places, name):
    how = on(places, changes={"loop": (1, 2), "max_loops": 3})
    with pytest.warns(UserWarning, match="is causal, so masked and clean positions are no groups of it"):
        frame = measure(name, str(places / "Llama"), access=how)
    group = next((c for c in ("query_group", "token_group") if c in frame), None)
    if group is not None:
        masked = frame[frame[group] == "masked"]
        assert len(masked)
        assert masked["pc1"].isna().all() if name == "state-paths" else masked["n"].eq(0).all()
    numbers = frame.select_dtypes("float").drop(columns=["nominal_mask_ratio", "mask_ratio"], errors="ignore")
    if name == "attention-change":  # of the rows of masked queries
        assert numbers.isna().all(axis=None) and frame["n"].eq(0).all()
    elif name.startswith("mask-attention"):
        assert numbers.isna().all(axis=None) and frame["n"].eq(0).all()
        with pytest.raises(UsageError, match=r"needs a model with a \[MASK\] token"):
            m = how.open(places / "Llama")
            mask_attention(m, Case(m, how.test_set(m), OnTests(3, 9)).unmasked())
    else:
        assert numbers.notna().any(axis=None)


@pytest.mark.filterwarnings("ignore:.*this model is causal")
def test_what_is_asked_of_a_measure_reaches_causal_models_too(places):
    how = on(places, changes={"loop": (1, 2), "max_loops": 3})
    frames = [measure("stopping-frontier", str(places / "Llama"), access=how, n_thresholds=n) for n in (2, 5)]
    assert len(frames[0]) < len(frames[1])
    with pytest.raises(UsageError, match="stopping-frontier compares loops; give n_loops of at least 2"):
        measure("stopping-frontier", str(places / "Llama"), 1, access=how)


def test_a_causal_models_answers_settle_on_its_next_tokens(places):
    m = on(places, changes={"loop": (1, 2), "max_loops": 3}).open(places / "Llama")
    tokens = torch.randint(40, 100, (2, 8), generator=torch.Generator().manual_seed(0))
    tokens[0, 3] = tokens[0, 2]  # a next token may be the same again
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, 5:] = False
    b = MaskedBatch(tokens, tokens, torch.zeros_like(real), None, real)
    found = settled_loops(m, b, 3)
    assert [tuple(at) for at in found[["sequence", "position"]].to_numpy()] == (
        [(0, pos) for pos in range(7)] + [(1, pos) for pos in range(4)]
    )
    answers = [m.readout(state, context).argmax(-1) for state, context in m.states(tokens, 3, real)]
    for row in found.itertuples():
        told = [int(answer[row.sequence, row.position]) for answer in answers]
        stays = [loop for loop in range(3) if set(told[loop:]) == {told[-1]}]
        assert row.settled == stays[0] and row.appears == told.index(told[-1])
        assert row.correct == (told[-1] == int(tokens[row.sequence, row.position + 1]))


def test_what_asks_for_masked_positions_alone_is_refused(places):
    for name in ("stopping-usage", "attention-toggle", "cut-effects"):
        with pytest.raises(UsageError, match=rf"^{name} needs a model with a \[MASK\] token"):
            measure(name, str(places / "Llama"), access=on(places))


# --- shifted models ---


@pytest.fixture
def shifted():
    return hook_model(standins.prepared(standins.DreamModel()), loop=(1, 1), max_loops=2)


def batch(m, batch_size: int = 5) -> MaskedBatch:
    tokens = torch.randint(4, 20, (batch_size, 8), generator=torch.Generator().manual_seed(3))
    return hide(tokens, torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4)) < 0.5,
                m.cfg.mask_token_id)  # fmt: skip


def test_by_what_they_predict_queries_stand_one_position_before(shifted):
    """Masses by hand: queries 0..6 go by tokens 1..7, the last query by nothing, keys by what they hold."""
    b = batch(shifted)
    frame = mask_attention(shifted, b, 2, by="predicts")
    _, kept = shifted.run_with_cache(b.tokens, 2, names_filter="loop.1.blocks.1.attn.hook_pattern")
    (pattern,) = kept.values()
    sums = []
    for weights, masked in zip(pattern[:, 0].double(), b.masked, strict=True):
        found = [
            sum(float(weights[at, key]) for key in range(8) if masked[key] and key != at)
            for at in range(7)
            if masked[at + 1]
        ]
        sums += [np.mean(found)] if found else []
    row = frame.query("loop == 1 and layer == 1 and head == 0 and query_group == key_group == 'masked'")
    assert float(row["mass"].iloc[0]) == pytest.approx(np.mean(sums), abs=1e-6)
    assert set(frame["by"]) == {"predicts"} and frame["mass_with_self"].isna().all()
    total = frame.groupby(["segment", "loop", "layer", "head", "query_group"], dropna=False)["mass"].sum()
    assert np.allclose(total, 1.0, atol=1e-5)


def test_every_measure_by_both_says_which(shifted):
    b = batch(shifted)
    for function in (attention_shape, representation_change):
        holds, predicts = (function(shifted, b, 2, by=by) for by in ("holds", "predicts"))
        assert "by" not in holds and set(predicts["by"]) == {"predicts"} and len(holds) == len(predicts)
        values = "entropy" if "entropy" in holds else "value"
        assert not np.allclose(holds[values], predicts[values], equal_nan=True)
    change = [representation_change(shifted, b, 2, by=by).query("lens != ''") for by in ("holds", "predicts")]
    assert np.array_equal(change[0]["value"], change[1]["value"], equal_nan=True)  # read-outs are the same


def test_by_is_checked(shifted):
    plain = hook_model(natives.native("Bert"), mask_token_id=103)
    with pytest.raises(UsageError, match='must be "holds" or "predicts"'):
        mask_attention(shifted, batch(shifted), by="is")
    with pytest.raises(UsageError, match="predicts a token where it stands"):
        mask_attention(plain, batch(plain), by="predicts")


def test_a_measure_of_a_shifted_model_comes_both_ways(shifted, monkeypatch):
    test = TestSet("own", Sequences.of(batch(shifted).clean))
    monkeypatch.setattr(Case, "of", lambda *given, options, **how: Case(shifted, test, options))
    frame = measure("mask-attention", "dream", mask_ratios=[0.5])
    assert frame["by"].value_counts().to_dict() == {"holds": len(frame) / 2, "predicts": len(frame) / 2}


# --- random first states ---


def test_numbers_that_hang_on_a_random_start_have_their_spread_over_seeds():
    m = hook_model(standins.prepared(standins.RavenForCausalLM()))
    tokens = torch.randint(4, 20, (4, 8), generator=torch.Generator().manual_seed(0))
    b = MaskedBatch(tokens, tokens, torch.zeros_like(tokens, dtype=torch.bool))

    def run():
        return attention_shape(m, b, 3)

    frame, alone = over_starts(m, run), []
    for seed in range(3):
        m.model.seed = seed
        alone.append(run()["entropy"].to_numpy())
    np.testing.assert_allclose(frame["entropy"], np.mean(alone, 0), equal_nan=True)
    np.testing.assert_allclose(frame["entropy_spread"], np.std(alone, 0, ddof=1), equal_nan=True)
    looped = frame[(frame["segment"] == "loop") & (frame["query_group"] == "clean")]
    assert (looped["entropy_spread"] > 0).all() and set(frame["n_starts"]) == {3}
    assert "distance_uniform_spread" not in frame  # it hangs on nothing
    prelude = frame[(frame["segment"] == "prelude") & (frame["query_group"] == "clean")]
    assert prelude["entropy_spread"].eq(0).all()


def test_a_fixed_start_is_measured_once(shifted):
    calls = []
    over_starts(shifted, lambda: calls.append(1) or pd.DataFrame({"x": [1.0]}))
    assert calls == [1]


def test_text_through_a_tokenizer(places):
    words = {f"w{index}": index for index in range(120)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    m = hook_model(natives.native("Bert"), mask_token_id=103, tokenizer=tokenizer)
    assert text_set("x", ["w5 w6 w7", "w8"], m).tokens.tolist() == [[5, 6, 7], [8, 0, 0]]


# --- looping what never looped ---


def repeated(native, first: int, times: int):
    """A model of transformers with a layer written down several times, the same weights."""
    layers = list(native.bert.encoder.layer)
    longer = natives.native("Bert", num_hidden_layers=len(layers) + times - 1)
    longer.load_state_dict(native.state_dict(), strict=False)
    order = [*range(first), *[first] * times, *range(first + 1, len(layers))]
    for place, layer in enumerate(order):
        longer.bert.encoder.layer[place].load_state_dict(layers[layer].state_dict())
    return longer


def test_training_free_looping_is_the_model_with_its_layer_written_twice(places):
    how = on(places, changes={"mask_token_id": 103})
    m = how.open(places / "Bert")
    sequences = how.test_set(m).sequences
    frame = training_free(m, sequences, blocks=[(2, 1)], n_loops=(1, 2), n_samples=1)
    frame = frame.set_index(["damping", "n_loops"])
    for times in (1, 2):
        twin = hook_model(repeated(natives.native("Bert"), 2, times), mask_token_id=103)
        expected = nelbo(twin, sequences, 1, n_samples=1).mean
        assert frame.loc[("none", times), "nelbo"] == pytest.approx(expected, abs=1e-5)
    once, twice = (frame.xs(loops, level="n_loops")["nelbo"] for loops in (1, 2))
    assert once["none"] == pytest.approx(once["1/n_loops"], abs=1e-5)
    assert abs(twice["none"] - twice["1/n_loops"]) > 1e-3


def test_the_damped_arm_goes_half_the_way_at_two_loops(places):
    how = on(places, changes={"mask_token_id": 103, "loop": (2, 1), "max_loops": 2})
    m = how.open(places / "Bert")
    tokens = how.test_set(m).tokens[:2, :9]
    states = [state for state, _ in m.states(tokens, 2)]
    with damp(m, 0.5):
        first, second = [state for state, _ in m.states(tokens, 2)]
    before = m.run_with_cache(tokens, 1, names_filter="loop.0.hook_in")[1]["loop.0.hook_in"]
    torch.testing.assert_close(first, (before + states[0]) / 2, rtol=0, atol=1e-6)
    assert not torch.allclose(second, states[1], atol=1e-3)


def test_training_free_looping_of_what_cannot_be_looped(places):
    with pytest.raises(UsageError, match=r"loops by itself \(S_max = 3\)"):
        training_free(hook_model(natives.native("Albert"), mask_token_id=4), natives.tokens())
    with pytest.raises(UsageError, match=r"^training-free looping needs a model with a \[MASK\]"):
        training_free(hook_model(natives.native("Llama")), natives.tokens())
