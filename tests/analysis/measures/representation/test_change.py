import weakref

import numpy as np
import pytest
import torch

from loopmdm.analysis.measures.representation import read_loops, representation_change
from loopmdm.analysis.watch.states import trajectory
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.stopping.rules import SecondDifference
from tests.conftest import toy_model


def value(frame, loop, metric, group="masked"):
    row = frame[(frame["loop"] == loop) & (frame["metric"] == metric) & (frame["token_group"] == group)]
    assert len(row) == 1
    return float(row["value"].iloc[0])


def planted(hooked, step) -> HookedLoopMDM:
    """Replace every loop's output by step(loop, input)."""
    memory = {}

    def keep(x, hook):
        memory["in"] = x

    def replace(x, hook):
        return step(int(hook.name.split(".")[1]), memory["in"])

    hooked.add_hook(lambda n: n.endswith("hook_in"), keep, is_permanent=True)
    hooked.add_hook(lambda n: n.endswith("hook_out"), replace, is_permanent=True)
    return hooked


def test_a_contraction_of_known_rate(hooked, batch):
    # H(i) = f + r^(i+1) (H(-1) - f): steps shrink by r and keep their direction.
    fixed = torch.full((16,), 2.0)
    m = planted(hooked, lambda loop, x: fixed + 0.5 * (x - fixed))
    frame = representation_change(m, batch, n_loops=6)
    norms = [value(frame, loop, "step_norm") for loop in range(6)]
    np.testing.assert_allclose(np.divide(norms[1:], norms[:-1]), 0.5, rtol=1e-4)
    assert value(frame, 3, "step_cosine") == pytest.approx(1, abs=1e-4)
    assert value(frame, 5, "relative_change") < 0.05


def test_a_pure_drift_follows_its_null(hooked, batch):
    drift = torch.linspace(-1, 1, 16)
    m = planted(hooked, lambda loop, x: (drift * (loop + 1)).expand_as(x))
    frame = representation_change(m, batch, n_loops=8)
    for loop in range(1, 8):
        assert value(frame, loop, "relative_change") == pytest.approx(value(frame, loop, "drift_null"), rel=1e-4)
        assert value(frame, loop, "drift_null") == pytest.approx(1 / (loop + 1))
        assert value(frame, loop, "state_cosine") == pytest.approx(1, abs=1e-5)


def test_a_state_that_stands_still_changes_nothing(hooked, batch):
    m = planted(hooked, lambda loop, x: x)
    frame = representation_change(m, batch, n_loops=3)
    for metric in ("step_norm", "relative_change", "kl_previous", "top1_flips", "kl_last"):
        assert value(frame, 2, metric) == pytest.approx(0, abs=1e-6)


def test_metrics_equal_a_naive_walk(hooked, batch):
    frame = representation_change(hooked, batch, n_loops=3, batch_size=3)
    _, cache = hooked.run_with_cache(
        batch.tokens,
        n_loops=3,
        attn_path="sdpa",
        names_filter=lambda n: "hook_" in n and n.endswith(("_in", "_out")),
    )
    before, after = cache.stack("in")[2], cache.stack("out")[2]
    change = ((after - before).norm(dim=-1) / after.norm(dim=-1))[batch.masked].view(4, -1).mean(-1).mean()
    assert value(frame, 2, "relative_change") == pytest.approx(float(change), rel=1e-4)
    p, q = (hooked(batch.tokens, n_loops=s)[..., :22].log_softmax(-1)[batch.masked] for s in (3, 2))
    assert value(frame, 2, "kl_previous") == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert value(frame, 1, "kl_last") == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert value(frame, 2, "top1_flips") == pytest.approx(float((p.argmax(-1) != q.argmax(-1)).float().mean()))
    true = p.gather(-1, batch.clean[batch.masked][:, None]).exp().mean()
    assert value(frame, 2, "p_true") == pytest.approx(float(true), rel=1e-4)
    assert value(frame, 2, "entropy") == pytest.approx(float(-(p.exp() * p).sum(-1).mean()), rel=1e-4)


def test_empty_groups_are_nan_with_n_zero(hooked, clean):
    frame = representation_change(hooked, mask_tokens(clean, 22, mask_ratio=1.0), n_loops=2)
    empty = frame[frame["token_group"] == "clean"]
    assert len(empty) and (empty["n"] == 0).all() and empty["value"].isna().all()


def test_loops_are_read_as_shorter_models(hooked, batch):
    frame = read_loops(hooked, batch, n_loops=3)
    assert len(frame) == 4 * 10 * 3
    for n_loops in (1, 3):
        p = hooked(batch.tokens, n_loops=n_loops).softmax(-1)
        part = frame[frame["loop"] == n_loops - 1].sort_values(["sequence", "position"])
        assert part["top1_id"].tolist() == p.argmax(-1).flatten().tolist()
        np.testing.assert_allclose(part["p_true"], p.gather(-1, batch.clean[..., None]).flatten(), atol=1e-5)
    flips = frame.pivot(index=["sequence", "position"], columns="loop", values="top1_id")
    flipped = frame.pivot(index=["sequence", "position"], columns="loop", values="flipped")
    assert (flipped[1] == (flips[1] != flips[0])).all() and not flipped[0].any()


def test_readout_plots_masked_positions_and_outlines_flips(hooked, batch):
    frame = read_loops(hooked, batch, n_loops=3)
    ax = frame.plot(sequence=1)
    part = frame[(frame["sequence"] == 1) & frame["masked"]]
    assert len(ax.texts) == len(part) and len(ax.patches) == int(part["flipped"].sum())
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1", "2"]


def test_misuse_is_refused(hooked, batch):
    with pytest.raises(UsageError, match="MaskedBatch"):
        representation_change(hooked, batch.tokens)
    with pytest.raises(UsageError, match="n_loops"):
        read_loops(hooked, batch, n_loops=0)


def test_second_difference_is_the_stopping_rules(hooked, batch):
    frame = representation_change(hooked, batch, n_loops=5)
    criterion = hooked.run(batch.tokens, stop=SecondDifference(0.0, max_loops=5, positions="masked")).criterion
    for loop in (2, 3, 4):
        assert value(frame, loop, "second_difference") == pytest.approx(float(criterion[loop].mean()), rel=1e-4)
    assert 0 not in set(frame[frame["metric"] == "second_difference"]["loop"])


def test_a_drift_has_no_second_difference(hooked, batch):
    m = planted(hooked, lambda loop, x: x + torch.linspace(-1, 1, 16))
    frame = representation_change(m, batch, n_loops=4)
    for group in ("masked", "clean"):
        assert value(frame, 3, "second_difference", group) == pytest.approx(0, abs=1e-5)


def test_the_direct_lens_unembeds_the_state(hooked, batch):
    frame = representation_change(hooked, batch, n_loops=3)
    states = [state for state, _ in hooked.states(batch.tokens, 3)]
    reads = [hooked.model.unembedding(state)[batch.masked][:, :22].log_softmax(-1) for state in states]
    truth, (_, q, p) = batch.clean[batch.masked], reads
    expected = {
        "entropy": -(p.exp() * p).sum(-1),
        "p_true": p.gather(-1, truth[:, None]).exp(),
        "accuracy": (p.argmax(-1) == truth).float(),
        "kl_previous": (p.exp() * (p - q)).sum(-1),
        "top1_flips": (p.argmax(-1) != q.argmax(-1)).float(),
    }
    for name, values in expected.items():
        assert value(frame, 2, f"direct_{name}") == pytest.approx(float(values.mean()), rel=1e-3, abs=1e-6)
    kl_last = (p.exp() * (p - q)).sum(-1).mean()
    assert value(frame, 1, "direct_kl_last") == pytest.approx(float(kl_last), rel=1e-3)
    assert value(frame, 2, "direct_entropy") != pytest.approx(value(frame, 2, "entropy"), rel=1e-3)
    lenses = frame.groupby("metric")["lens"].agg(set)
    assert lenses["direct_entropy"] == {"direct"} and lenses["entropy"] == {"coda"} and lenses["step_norm"] == {""}


def test_without_a_coda_both_lenses_agree(clean):
    m = HookedLoopMDM(toy_model(n_coda_layers=0))
    frame = representation_change(m, mask_tokens(clean, 22, mask_ratio=0.5), n_loops=3)
    for metric in ("entropy", "p_true", "kl_last"):
        assert value(frame, 1, f"direct_{metric}") == pytest.approx(value(frame, 1, metric), rel=1e-5)
    same = [read_loops(m, mask_tokens(clean, 22, mask_ratio=0.5), 2, lens=lens) for lens in ("coda", "direct")]
    np.testing.assert_allclose(same[0]["p_true"], same[1]["p_true"], rtol=1e-5)
    assert set(same[1]["lens"]) == {"direct"}


def test_far_loops_agree_with_near_ones_and_hold_nothing_more(hooked, batch):
    near, far = (representation_change(hooked, batch, n_loops=n) for n in (3, 40))
    for metric in ("relative_change", "accuracy", "direct_p_true"):
        assert value(far, 2, metric) == pytest.approx(value(near, 2, metric), rel=1e-5)
    assert value(far, 39, "kl_last") == pytest.approx(0, abs=1e-6)
    seen = []
    for loop, state, _ in trajectory(hooked, batch, 40):
        seen.append(weakref.ref(state))
        assert loop == len(seen) - 2 and sum(ref() is not None for ref in seen) <= 2


def test_padding_does_not_count(hooked, clean):
    short = mask_tokens(clean[:, :7], 22, mask_ratio=0.5)
    real, tokens, truth = torch.zeros(4, 10, dtype=torch.long), torch.full((4, 10), 22), torch.full((4, 10), 22)
    real[:, :7], tokens[:, :7], truth[:, :7] = 1, short.tokens, short.clean
    masked = torch.zeros(4, 10, dtype=torch.bool)
    masked[:, :7] = short.masked
    padded = MaskedBatch(tokens, truth, masked, attention_mask=real)
    ours, theirs = (representation_change(hooked, b, n_loops=3) for b in (padded, short))
    np.testing.assert_allclose(ours["value"], theirs["value"], rtol=1e-3, atol=1e-6)
    assert len(read_loops(hooked, padded, 2)) == 4 * 7 * 2
