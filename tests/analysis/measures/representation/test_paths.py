import numpy as np
import pytest
import torch

from loopmdm.analysis.measures.representation import state_paths
from loopmdm.analysis.measures.representation.paths import fitted_half
from loopmdm.model.errors import UsageError
from loopmdm.model.masking import mask_tokens
from tests.analysis.measures.representation.test_change import planted


def test_a_straight_line_is_one_component(hooked, batch):
    drift = torch.zeros(16)
    drift[3] = 5.0
    m = planted(hooked, lambda loop, x: 0.0 * x + drift * (loop + 1))
    m.add_hook("loop.0.hook_in", lambda x, hook: 0.0 * x, is_permanent=True)
    frame = state_paths(m, batch, n_loops=6)
    np.testing.assert_allclose(frame["explained1"], 1, atol=1e-6)
    path = frame[(frame["sequence"] == 1) & (frame["token_group"] == "masked")].sort_values("loop")
    assert path["loop"].tolist() == [-1, 0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(np.diff(path["pc1"]), 5, atol=1e-4)  # the sign is fixed: loadings positive
    np.testing.assert_allclose(path["pc2"], 0, atol=1e-4)


def test_equals_a_principal_component_analysis_of_cached_states(hooked, batch):
    frame = state_paths(hooked, batch, n_loops=3, batch_size=1)
    names = lambda n: n.endswith("hook_out") or n == "loop.0.hook_in"  # noqa: E731
    _, cache = hooked.run_with_cache(batch.tokens, n_loops=3, names_filter=names, attn_path="sdpa")
    states = torch.cat([cache["loop.0.hook_in"][None], cache.stack("out")]).double().numpy()
    for group, member in (("masked", batch.masked.numpy()), ("clean", ~batch.masked.numpy())):
        fit = np.concatenate([states[:, row, member[row]].reshape(-1, 16) for row in (0, 2)])
        held = np.concatenate([states[:, row, member[row]].reshape(-1, 16) for row in (1, 3)])
        _, _, axes = np.linalg.svd(fit - fit.mean(0), full_matrices=False)
        part = frame[frame["token_group"] == group]
        assert sorted(part["sequence"].unique()) == [1, 3]
        for k in (0, 1):
            axis = axes[k] * np.sign(axes[k][np.abs(axes[k]).argmax()])
            share = (((held - fit.mean(0)) @ axis) ** 2).sum() / ((held - fit.mean(0)) ** 2).sum()
            assert part[f"explained{k + 1}"].iloc[0] == pytest.approx(share, rel=1e-4)
            for row in (1, 3):
                expected = [(states[i, row, member[row]].mean(0) - fit.mean(0)) @ axis for i in range(4)]
                ours = part[part["sequence"] == row].sort_values("loop")[f"pc{k + 1}"]
                np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_halves_keep_clusters_together():
    assert fitted_half(np.arange(5)).tolist() == [True, False, True, False, True]
    names = np.array(["b", "b", "a", "b", "c", "a"])
    assert fitted_half(names).tolist() == [True, True, False, True, True, False]


def test_empty_groups_and_misuse(hooked, batch, clean):
    frame = state_paths(hooked, mask_tokens(clean, 22, mask_ratio=1.0), n_loops=2, n_components=3)
    empty = frame[frame["token_group"] == "clean"]
    assert len(empty) == 2 * 3 and empty[["pc1", "pc3", "explained1"]].isna().all(axis=None)
    assert frame[frame["token_group"] == "masked"]["pc3"].notna().all()
    with pytest.raises(UsageError, match="two sequences"):
        state_paths(hooked, batch.rows(slice(0, 1)))
    with pytest.raises(UsageError, match="two sequences or clusters"):
        state_paths(hooked, batch, clusters=np.zeros(4))
    with pytest.raises(UsageError, match="clusters must name"):
        state_paths(hooked, batch, clusters=np.arange(3))
    with pytest.raises(UsageError, match="n_components"):
        state_paths(hooked, batch, n_components=17)
    with pytest.raises(UsageError, match="MaskedBatch"):
        state_paths(hooked, batch.tokens)
