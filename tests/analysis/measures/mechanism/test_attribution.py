"""Shares of a logit difference close, agree with TransformerLens, and name the writer that a planted model has."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from loopmdm.analysis.measures import measure
from loopmdm.analysis.measures.mechanism.attribution import Attribution, attribute, logit_attribution
from loopmdm.analysis.measures.mechanism.contrast import Contrast, contrast
from loopmdm.analysis.measures.mechanism.writes import Part
from loopmdm.analysis.plots.mechanism import plot_attribution
from loopmdm.model.adapters import hook_model
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.planted import KNOWN_LOGIT, naked_singles
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.propagation import propagate
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.conftest import toy_model
from tests.loopmdm_model.adapters import natives, standins
from tests.loopmdm_model.models import InjectedToy

SIX = BOARDS["sudoku6"]


def of(found: Attribution, read: str, *kinds: str) -> dict[Part, np.ndarray]:
    return {
        part: v for (name, part), v in found.parts.items() if name == read and (part.kind in kinds or not kinds)
    }


@pytest.fixture(params=["LN", "RMS"])
def biased(request) -> HookedLoopMDM:
    """A toy with every bias there is, and none of them 0."""
    model = toy_model(normalization_type=request.param, attn_bias=True, mlp_bias=True, unembed_bias=True)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
    return HookedLoopMDM(model)


def test_all_parts_of_every_read_sum_to_the_difference(biased, batch):
    found = attribute(biased, batch)
    asked = contrast(biased, batch)
    logits = biased.run(batch.tokens, 3, rows=batch.masked).logits
    wanted = asked.by_sequence(asked.difference(logits)).numpy()
    np.testing.assert_allclose(found.difference, wanted, atol=1e-5)
    for read in ("direct", "linear", "exact"):
        np.testing.assert_allclose(sum(of(found, read).values()), wanted, atol=2e-5)
    kinds = {part.kind for part in of(found, "direct")}
    assert kinds == {"embed", "head", "attention bias", "mlp", "bias"}
    assert len(of(found, "direct", "head")) == (1 + 3 * 2 + 1) * 2
    assert not any(part.layer == 3 for read in ("linear", "exact") for part in of(found, read))  # the coda's


def test_direct_shares_are_transformerlens_logit_attrs(biased, batch):
    found = of(attribute(biased, batch, reads=["direct"]), "direct")
    asked = contrast(biased, batch)
    cache = biased.unrolled(3).run_with_cache(batch.tokens)[1]
    right, wrong = (torch.zeros_like(batch.tokens).masked_scatter(batch.masked, ids) for ids in
                    (asked.right, asked.wrong))  # fmt: skip
    heads = cache.stack_head_results()
    others = cache.decompose_resid(mode="mlp")
    shares = cache.logit_attrs(torch.cat([heads, others]), tokens=right, incorrect_tokens=wrong)
    theirs = torch.stack([asked.by_sequence(share[batch.masked]) for share in shares]).numpy()
    layers = [(None, 0), *((loop, layer) for loop in range(3) for layer in (1, 2)), (None, 3)]
    ours = [found[Part("head", *place, head)] for place in layers for head in range(2)]
    ours += [found[Part("embed")], *(found[Part("mlp", *place)] for place in layers)]
    np.testing.assert_allclose(ours, theirs[: len(ours)], atol=1e-5)


def test_without_a_coda_linear_is_direct_less_what_the_norm_takes_back(biased, batch):
    """linear(w) = direct(w) - sum over rows of (difference without biases) (Cw . Cx) / (d scale^2), row by row."""
    m = HookedLoopMDM(biased.model.looping(1, 3, 2))
    one = MaskedBatch(batch.tokens[:1], batch.clean[:1], batch.masked[:1])
    found = attribute(m, one, 2, reads=["direct", "linear"])
    asked = contrast(m, one, 2)
    _, cache = m.run_with_cache(one.tokens, 2)
    norm, _ = m.model.readout_weights()
    x = cache["loop.1.hook_out"][one.masked]
    x = x - x.mean(-1, keepdim=True) if norm.centred else x
    scale2 = x.pow(2).mean(-1, keepdim=True) + norm.eps
    logits = m.run(one.tokens, 2, rows=one.masked).logits
    biases = found.parts["direct", Part("bias")]
    for part in (Part("mlp", 1, 2), Part("mlp", None, 0)):
        prefix = "" if part.loop is None else f"loop.{part.loop}."
        write = cache[f"{prefix}blocks.{part.layer}.hook_mlp_out"][one.masked]
        write = write - write.mean(-1, keepdim=True) if norm.centred else write
        own = asked.difference(logits) - _bias_by_row(m, asked)
        back = asked.by_sequence(own * (write * x).sum(-1) / scale2[:, 0] / x.shape[-1]).numpy()
        np.testing.assert_allclose(found.parts["linear", part], found.parts["direct", part] - back, atol=1e-5)
    assert np.abs(biases).max() > 0.01
    rest = found.parts["linear", Part("rest")]  # a norm does not change with the length of its input
    np.testing.assert_allclose(rest, found.difference, atol=1e-3 + 1e-3 * np.abs(found.difference).max())


def _bias_by_row(m, asked):
    norm, unembed = m.model.readout_weights()
    ends = torch.stack([asked.right, asked.wrong])
    one, other = unembed.weight[ends]
    bias = 0 if norm.bias is None else (one - other) @ norm.bias
    first, second = unembed.bias[ends]
    return bias + first - second


def test_exact_is_the_run_without_the_write(biased, batch):
    found = attribute(biased, batch, reads=["exact"])
    asked = contrast(biased, batch)
    _, cache = biased.run_with_cache(batch.tokens, 3, names_filter=["loop.1.blocks.2.hook_mlp_out"])
    states = list(biased.states(batch.tokens, 3))
    state, context = states[-1]
    without = biased.readout(state - cache["loop.1.blocks.2.hook_mlp_out"], context, rows=batch.masked)
    wanted = found.difference - asked.by_sequence(asked.difference(without)).numpy()
    np.testing.assert_allclose(found.parts["exact", Part("mlp", 1, 2)], wanted, atol=1e-5)


def test_in_double_precision_parts_close_to_rounding(batch):
    m = HookedLoopMDM(toy_model().double())
    found = attribute(m, batch, reads=["direct"])
    np.testing.assert_allclose(sum(found.parts.values()), found.difference, rtol=0, atol=1e-12)


# --- the planted mechanism ---


def test_the_planted_mlp_of_layer_1_fills_a_cell_one_loop_before_its_round_counts():
    m = naked_singles(max_loops=6)
    b = puzzles(SIX, SIX.sample_grids("test", 12), 16, unique=True)
    found = propagate(SIX, b.tokens, hidden_singles=False)
    assert found.depth.max() >= 3
    for depth in range(1, 4):
        rows = found.depth == depth
        wrong = (b.clean + 1) % SIX.size
        asked = Contrast(rows, b.clean[rows], wrong[rows])
        told = attribute(m, b, 6, asked=asked, reads=["direct"])
        some = rows.any(-1).numpy()
        for part, values in of(told, "direct").items():
            values = values[some]
            if part.kind == "mlp" and part.layer == 1:  # it fills, in the loop of its round and in no other
                wanted = KNOWN_LOGIT if part.loop == depth - 1 else 0.0
                np.testing.assert_allclose(values, wanted, atol=1e-3)
            elif part.kind != "mlp":  # no logit reads what heads write
                np.testing.assert_allclose(values, 0.0, atol=1e-3)
        np.testing.assert_allclose(told.difference[some], KNOWN_LOGIT, atol=1e-3)


def test_an_untrained_model_owes_nothing_to_its_loops_that_random_targets_do_not(batch):
    """Means over many random models are 0 within their error: no part is favoured by construction."""
    means = []
    for seed in range(12):
        m = HookedLoopMDM(toy_model(seed))
        rows = batch.masked
        right, wrong = torch.randint(0, 22, (2, int(rows.sum())), generator=torch.Generator().manual_seed(seed))
        told = attribute(m, batch, reads=["direct", "linear"], asked=Contrast(rows, right, wrong))
        means.append([np.nanmean(v) for (_, part), v in told.parts.items() if part.loop is not None])
    t = np.mean(means, 0) / (np.std(means, 0, ddof=1) / len(means) ** 0.5)
    assert (np.abs(t) > 2.2).mean() <= 0.15  # 5% expected of each


# --- other people's models ---


def test_causal_models_of_others_are_asked_what_comes_next():
    m = hook_model(natives.native("Llama"), loop=(1, 2), max_loops=2)
    tokens = natives.tokens()
    found = attribute(m, MaskedBatch(tokens, tokens, torch.zeros_like(tokens).bool()), 2)
    for read in ("direct", "linear", "exact"):
        np.testing.assert_allclose(sum(of(found, read).values()), found.difference, atol=1e-4)
    assert len(of(found, "direct", "head")) == (1 + 2 * 2 + 1) * 4


def test_a_shifted_model_is_read_before_each_row_and_has_no_direct_shares():
    m = hook_model(standins.prepared(standins.DreamModel()), loop=(1, 1), max_loops=2)
    tokens = torch.randint(4, 20, (3, 8), generator=torch.Generator().manual_seed(3))
    b = mask_tokens(tokens, m.cfg.mask_token_id, mask_ratio=0.5, seed=0)
    with pytest.warns(UserWarning, match='"direct" is left out: .*shifted'):
        found = attribute(m, b, 2)
    assert {read for read, _ in found.parts} == {"linear", "exact"}
    for read in ("linear", "exact"):
        np.testing.assert_allclose(sum(of(found, read).values()), found.difference, atol=1e-4)
    with pytest.raises(UsageError, match="shifted"):
        attribute(m, b, 2, reads=["direct"])


def test_what_is_no_sum_is_refused(batch):
    post_norm = hook_model(natives.native("Bert"), mask_token_id=103)
    tokens = natives.tokens()
    b = mask_tokens(tokens, 103, mask_ratio=0.5, seed=0)
    with pytest.raises(UsageError, match=r"^logit-attribution needs an additive .*facts\.additive = False\)$"):
        attribute(post_norm, b)
    with pytest.raises(UsageError, match=r"facts\.additive = False"):
        attribute(HookedLoopMDM(InjectedToy()), batch)


def test_bad_input_is_refused_in_a_line(hooked, batch):
    nothing = MaskedBatch(batch.clean, batch.clean, torch.zeros_like(batch.masked))
    for call, says in (
        (lambda: attribute(hooked, nothing), "no position is masked"),
        (lambda: attribute(hooked, batch, reads=["dirct"]), 'reads must be "direct", "linear" or "exact"'),
        (lambda: attribute(hooked, batch, reads=[]), "reads is empty"),
        (lambda: logit_attribution(hooked, batch, n_exact=0), "n_exact must be at least 1"),
        (lambda: attribute(hooked, batch, asked=contrast(hooked, batch.rows(slice(0, 2)))), "asked has rows"),
        (lambda: Attribution(hooked, np.ones(2), {("direct", Part("embed")): np.zeros(2)}), "does not sum"),
    ):
        with pytest.raises(UsageError, match=says) as said:
            call()
        assert "\n" not in str(said.value)


# --- frames and plots ---


def test_batches_make_no_difference_and_sequences_without_rows_do_not_count(hooked, batch):
    asked = contrast(hooked, batch)
    rows = batch.masked.clone()
    rows[1] = False
    keep = rows[batch.masked]
    some = Contrast(rows, asked.right[keep], asked.wrong[keep])
    whole, pieces = (attribute(hooked, batch, asked=some, batch_size=size) for size in (4, 1))
    for key, values in whole.parts.items():
        np.testing.assert_allclose(pieces.parts[key], values, atol=1e-5)
        assert np.isnan(values[1]) and np.isfinite(np.delete(values, 1)).all()
    assert (whole.frame()["n"] == 3).all()


def test_the_measure_is_the_function_and_its_plot_shows_every_cell(batch):
    m = HookedLoopMDM(toy_model())
    frame = measure("logit-attribution", m, batch=batch, n_exact=2)
    assert frame["read"].unique().tolist() == ["direct", "linear", "exact"]
    for _, part in frame.groupby("read"):
        assert part["value"].sum() == pytest.approx(part["difference"].iloc[0], abs=1e-4)
    assert set(frame.loc[frame["read"] == "exact", "n"]) == {2}
    ax = plot_attribution(frame[frame["read"] == "direct"], ax=plt.subplots()[1])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["head 0", "head 1", "MLP", "others"]
    places = [label.get_text() for label in ax.get_xticklabels()]
    assert places == ["embed", "L0", "0·L1", "0·L2", "1·L1", "1·L2", "2·L1", "2·L2", "L3", "bias"]
    assert len(ax.texts) == 2 + 3 * 8
    plt.close(ax.figure)
    with pytest.raises(ValueError, match="no rows"):
        plot_attribution(frame[:0])


def test_where_numbers_do_not_fit_signs_are_written():
    b = puzzles(SIX, SIX.sample_grids("test", 4), 16, unique=True)
    frame = attribute(naked_singles(max_loops=12), b, 12, reads=["direct"]).frame()
    ax = plot_attribution(frame, ax=plt.subplots()[1])
    assert {text.get_text() for text in ax.texts} == {"+", "-"}
    shown = frame["value"].abs() >= 0.02 * frame["value"].abs().max()
    assert len(ax.texts) == shown.sum()
    plt.close(ax.figure)
