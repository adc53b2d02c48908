"""Learned lenses: exact where the rest is linear or nothing follows, no worse than direct, bound to weights."""

from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from loopmdm.analysis.activations.identity import identity
from loopmdm.analysis.measures import measure
from loopmdm.analysis.measures.representation.learned_lenses import LearnedLens
from loopmdm.analysis.measures.representation.lens_comparison import compare_lenses, fitted
from loopmdm.analysis.measures.representation.lens_fitting import (
    Asked,
    Descent,
    fit_jacobian,
    fit_tuned,
    read_at,
    unembed,
)
from loopmdm.analysis.measures.representation.lenses import LEARNED, LENSES, read
from loopmdm.analysis.measures.twins import untrained
from loopmdm.model.context import Context
from loopmdm.model.errors import UnknownNameError, UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.layout import Facts
from loopmdm.model.masking import mask_tokens
from loopmdm.model.planted import naked_singles
from loopmdm.model.protocol import Core
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.taps import NO_TAP, no_taps
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.analysis.measures.representation.test_gain import FOREIGN, foreign
from tests.conftest import toy_model
from tests.loopmdm_model.models import ToyLayout

SIX = BOARDS["sudoku6"]
SHORT = Descent(steps=24, n_rows=64)


def masked(n: int = 24, seed: int = 0, n_ctx: int = 10) -> MaskedBatch:
    clean = torch.randint(0, 22, (n, n_ctx), generator=torch.Generator().manual_seed(seed))
    return mask_tokens(clean, 22, mask_ratio=0.5, seed=seed)


def kl_by_loop(frame, lens):
    return frame[(frame["metric"] == "kl_final") & (frame["lens"] == lens)].sort_values("loop")["value"].to_numpy()


class Linear(Core):
    """x <- x M + t per layer, one prelude, one looped, one coda layer; positions never meet."""

    def __init__(self):
        super().__init__()
        self.cfg = _LinearLayout()
        torch.manual_seed(0)
        self.embed = nn.Embedding(23, 16)
        self.maps = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 23)

    def context(self, tokens, attention_mask=None):
        return Context(tokens, 22, None)

    def enter(self, tokens, context):
        return self.embed(tokens)

    def layer(self, layer, x, context, tap=NO_TAP, held=None):
        return tap("hook_resid_post", self.maps[layer](tap("hook_resid_pre", x)))

    def unembedding(self, x, taps=no_taps, rows=None):
        logits = self.head(x if rows is None else x[rows])
        logits[..., 22] = float("-inf")
        return logits


@dataclass(frozen=True, kw_only=True)
class _LinearLayout(ToyLayout):
    """Three layers, bidirectional."""

    n_prelude_layers: int = 1
    n_coda_layers: int = 1
    mask_token_id: int = 22
    leaves: tuple = ("hook_resid_pre", "hook_resid_post")
    facts = Facts(mask_token_id=22, additive=False)


# --- identities ---


def test_without_a_coda_the_last_loop_is_read_exactly():
    m = HookedLoopMDM(toy_model(n_coda_layers=0))
    learned = fitted(m, masked(), 3, LEARNED, SHORT, 4)
    frame = compare_lenses(m, masked(seed=1), learned)
    for lens in (*LENSES, *LEARNED):
        assert kl_by_loop(frame, lens)[-1] == pytest.approx(0, abs=1e-6), lens
    for lens in learned.values():
        torch.testing.assert_close(lens.weight[-1], torch.eye(16), atol=1e-5, rtol=0)
        torch.testing.assert_close(lens.bias[-1], torch.zeros(16), atol=1e-5, rtol=0)


def test_no_steps_leave_the_direct_lens(hooked):
    lens = fit_tuned(hooked, masked(), 2, Descent(steps=0))
    frame = compare_lenses(hooked, masked(seed=1), {"tuned": lens}, 2)
    np.testing.assert_allclose(kl_by_loop(frame, "tuned"), kl_by_loop(frame, "direct"), atol=1e-6)


def test_the_jacobian_lens_is_exact_where_the_rest_is_linear():
    m = HookedLoopMDM(Linear())
    frame = compare_lenses(m, masked(seed=1), {"jacobian": fit_jacobian(m, masked(), 3)})
    assert kl_by_loop(frame, "jacobian") == pytest.approx([0, 0, 0], abs=1e-6)
    assert kl_by_loop(frame, "direct").min() > 0.01
    ends = [linear.weight for linear in m.model.maps[1:]]
    weight = fit_jacobian(m, masked(), 3).weight
    torch.testing.assert_close(weight[0], ends[1] @ ends[0] @ ends[0], atol=1e-5, rtol=1e-4)


def test_the_jacobian_is_that_of_autograd(hooked):
    """One hidden position a sequence: signs cancel exactly, and the dense derivative can be had."""
    b = masked(3)
    rows = torch.zeros_like(b.masked)
    rows[torch.arange(3), b.masked.int().argmax(-1)] = True
    b = MaskedBatch(torch.where(rows, 22, b.clean), b.clean, rows)
    lens, wanted = fit_jacobian(hooked, b, 2), torch.zeros(2, 16, 16)
    for row in range(3):
        one = b.rows(slice(row, row + 1))
        at = int(one.masked[0].int().argmax())
        run = list(hooked.states(one.tokens, 2, None, "eager"))

        def end(x, run=run, at=at, loops=1):
            x = hooked.loop(x, run[0][1], 1, attn_path="eager") if loops else x
            return hooked.model.coda(x, run[0][1])[0, at]

        for loop in range(2):
            with torch.enable_grad():
                whole = torch.autograd.functional.jacobian(lambda x, k=1 - loop: end(x, loops=k), run[loop][0])
            wanted[loop] += whole[:, 0, at] / 3
    torch.testing.assert_close(lens.weight, wanted, atol=1e-4, rtol=1e-3)


def test_a_tuned_lens_learns_a_change_of_basis():
    """What follows a state is linear: the map exists, and descent finds most of it."""
    m = HookedLoopMDM(Linear())
    lens = fit_tuned(m, masked(100), 2, Descent(steps=150, rate=2e-2))
    frame = compare_lenses(m, masked(40, seed=1), {"tuned": lens}, 2)
    assert (kl_by_loop(frame, "tuned") < 0.2 * kl_by_loop(frame, "direct")).all()


# --- the planted mechanism ---


def test_in_naked_singles_direct_is_coda_and_learned_lenses_lose_nothing():
    m = naked_singles("sudoku6")
    validation, test = (
        puzzles(SIX, SIX.sample_grids(split, 32), 16, unique=True) for split in ("validation", "test")
    )
    learned = fitted(m, validation, 3, LEARNED, Descent(steps=60), 4)
    frame = compare_lenses(m, test, learned, 3)
    wide = frame[frame["metric"] != "n"].pivot_table(index=["metric", "loop"], columns="lens", values="value")
    np.testing.assert_array_equal(wide["direct"], wide["coda"])
    own = frame[frame["metric"] == "kl_final"].pivot_table(index="loop", columns="lens", values="value")
    assert (own["tuned"] < own["direct"] + 0.02).all() and own["direct"][0] > 0.5 and own["tuned"][2] < 1e-6
    # Its steps are flat: to first order nothing moves what a cell knows or may hold from loop 0 on.
    known = m.model.channels["known"]
    torch.testing.assert_close(learned["jacobian"].weight[0][known, known], torch.eye(6), atol=1e-3, rtol=0)


# --- nulls ---


def test_shuffled_answers_say_nothing_of_a_state_and_untrained_models_agree_everywhere():
    m, b = HookedLoopMDM.from_pretrained("sudoku-loop-s4"), SIX.sample_grids("validation", 60)
    held = mask_tokens(b, 6, mask_ratio=0.5)
    test = mask_tokens(SIX.sample_grids("test", 40), 6, mask_ratio=0.5)
    frame = compare_lenses(m, test, fitted(m, held, 4, ("tuned", "shuffled"), SHORT, 4))
    accuracy = frame[(frame["metric"] == "accuracy")].pivot_table(index="loop", columns="lens", values="value")
    assert (accuracy["shuffled"] < 0.25).all() and (accuracy["tuned"] > 0.45).all()
    twin = untrained(m)
    frame = compare_lenses(twin, test, fitted(twin, held, 2, LEARNED, SHORT, 2), 2)
    for lens in (*LENSES, *LEARNED):
        assert kl_by_loop(frame, lens).max() < 0.05
    accuracy = frame[frame["metric"] == "accuracy"]["value"]
    assert accuracy.max() < 0.25


# --- other people's models ---


@pytest.mark.parametrize("name", FOREIGN)
def test_other_peoples_models_are_read(name):
    m, b = foreign(name)
    learned = fitted(m, b, 3, LEARNED, Descent(steps=5, n_rows=8), 2)
    frame = compare_lenses(m, b, learned, 3)
    assert kl_by_loop(frame, "coda")[-1] == pytest.approx(0, abs=1e-5)
    assert frame["value"].notna().all() and set(frame["lens"]) == {*LENSES, *LEARNED}


def test_packed_rows_of_a_shifted_model_are_read_where_they_stand():
    m, b = foreign("shifted")
    *_, (state, context) = m.states(b.tokens, 2)
    asked = Asked.of(m, b, 2)
    wanted = read(m, state, context, "coda", b.masked)
    torch.testing.assert_close(unembed(m.model, asked.end), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        unembed(m.model, asked.states[-1]), read(m, state, context, "direct", b.masked), atol=1e-5, rtol=1e-4
    )
    first = b.masked.clone()
    first[0, 0] = True
    with pytest.raises(UsageError, match="reads no state before the first position"):
        read_at(m.model, first)


# --- files, and what is refused ---


def test_a_lens_comes_back_from_disk_and_belongs_to_its_weights(hooked, tmp_path):
    lens = fit_tuned(hooked, masked(), 2, SHORT)
    lens.save(tmp_path / "lens.safetensors")
    back = LearnedLens.load(tmp_path / "lens.safetensors", hooked)
    assert torch.equal(back.weight, lens.weight) and torch.equal(back.bias, lens.bias)
    assert back.kind == "tuned" and back.record == lens.record
    assert {"model", "n_loops", "steps", "loss", "mask_ratio", "n_rows"} <= back.record.keys()
    other = HookedLoopMDM(toy_model(seed=1))
    for refuse in (
        lambda: LearnedLens.load(tmp_path / "lens.safetensors", other),
        lambda: compare_lenses(other, masked(), {"tuned": lens}, 2),
    ):
        with pytest.raises(UsageError, match="this tuned lens is of an unnamed model"):
            refuse()
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="is no learned lens"):
        LearnedLens.load(tmp_path / "no.safetensors", hooked)
    with pytest.raises(UsageError, match="is no file; fit a lens"):
        LearnedLens.load(tmp_path / "none.safetensors", hooked)
    wide = HookedLoopMDM(toy_model(d_model=32))
    with pytest.raises(UsageError, match="is a lens of d_model 16, the model's is 32"):
        LearnedLens.load(tmp_path / "lens.safetensors", wide)


def test_a_lens_of_an_older_config_still_reads_its_model(hooked):
    """Whose config had no key yet for what has a default now; the weights are the same."""
    lens = fit_tuned(hooked, masked(), 2, Descent(steps=0))
    made_of = identity(hooked)
    config = {key: value for key, value in made_of.config.items() if key != "scaled_residual"}
    older = asdict(made_of) | {"hash": made_of.hash.partition(":")[0] + ":" + "0" * 16, "config": config}
    assert len(config) < len(made_of.config)
    replace(lens, record=lens.record | {"model": older}).check(hooked)
    for record in ({}, {"model": "sotu-loop", "model_hash": made_of.hash}):
        with pytest.raises(UsageError, match="does not say which model it is of; fit it anew"):
            replace(lens, record=record).check(hooked)


def test_the_hash_is_of_weights_alone(hooked):
    before = identity(hooked).hash
    assert before == identity(HookedLoopMDM(toy_model())).hash
    hooked.model.unembed.bias.data[3] += 1e-3
    assert before != identity(hooked).hash


def test_fitting_is_deterministic(hooked):
    one, same, other = (fit_tuned(hooked, masked(), 2, replace(SHORT, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
    one, same = (fit_jacobian(hooked, masked(4), 2) for _ in range(2))
    assert torch.equal(one.weight, same.weight)


def test_what_cannot_be_read_is_refused_in_a_line(hooked, clean):
    lens = fit_tuned(hooked, masked(), 2, Descent(steps=0))
    unknown = MaskedBatch(masked().tokens, masked().tokens, masked().masked)
    none = MaskedBatch(clean, clean, torch.zeros_like(clean).bool())
    big = HookedLoopMDM(toy_model(d_model=1028, d_mlp=4, n_prelude_layers=0, n_loop_layers=1, n_coda_layers=0))
    for call, says in (
        (lambda: compare_lenses(hooked, masked(), {"tuned": lens}, 3), "the lens tuned reads 2 loops of 3"),
        (lambda: compare_lenses(hooked, unknown, {}), "compare_lenses needs what is hidden"),
        (lambda: compare_lenses(hooked, none, {}), "compare_lenses: no position is masked"),
        (lambda: lens.translate(torch.zeros(2, 16), 2), r"reads loops 0\.\.1, not 2"),
        (lambda: fit_tuned(hooked, masked(1), 2), "needs two sequences or documents"),
        (lambda: fit_jacobian(big, masked(2), 1), "d_model 1028 exceeds 1024; leave it out"),
        (lambda: Descent(rate=0.0), "rate must be above 0"),
        (lambda: LearnedLens("logit", lens.weight, lens.bias, {}), 'kind of lens must be "tuned" or "jacobian"'),
    ):
        with pytest.raises(UsageError, match=says) as said:
            call()
        assert "\n" not in str(said.value)


def test_the_measure_compares_chosen_lenses_with_their_nulls():
    options = {"n": 12, "n_fit": 16, "steps": 4, "n_jacobian": 2}
    frame = measure("lenses", "sudoku-loop-s4", 2, **options)
    assert set(frame["lens"]) == {*LENSES, *LEARNED, "shuffled"} and set(frame["weights"]) == {
        "trained",
        "untrained 0",
    }
    assert "shuffled" not in set(frame[frame["weights"] == "untrained 0"]["lens"])
    frame = measure("lenses", "sudoku-loop-s4", 2, lenses=("direct",), twins=0, **options)
    assert set(frame["lens"]) == {"direct"} and set(frame["weights"]) == {"trained"}
    with pytest.raises(UnknownNameError, match="unknown lens 'tunde'; did you mean tuned"):
        measure("lenses", "sudoku-loop-s4", 2, lenses=("tunde",), **options)
