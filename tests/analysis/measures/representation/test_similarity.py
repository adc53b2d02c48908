import numpy as np
import pytest
import torch

from loopmdm.analysis.measures.representation import effective_rank, loop_similarity
from loopmdm.analysis.measures.representation.moments import LoopMoments
from loopmdm.analysis.measures.representation.rank import rank_of
from loopmdm.analysis.measures.representation.similarity import _Influence, cka, hsic
from loopmdm.model.errors import UsageError
from loopmdm.model.masking import mask_tokens
from tests.analysis.measures.representation.test_change import planted


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x, size=7) -> LoopMoments:
    """Sums of x [loop, sample, d_model], taken in by pieces."""
    s = LoopMoments(len(x), x.shape[-1])
    for start in range(0, x.shape[1], size):
        s.add(x[:, start : start + size])
    return s


def naive_hsic(x, y) -> float:
    """The estimator as printed: n x n Gram matrices with zeroed diagonals, explicit loops."""
    n = len(x)
    k, other = (
        np.array([[float(u @ v) if i != j else 0.0 for j, v in enumerate(z)] for i, u in enumerate(z)])
        for z in (x, y)
    )
    ones = np.ones(n)
    value = np.trace(k @ other) + (ones @ k @ ones) * (ones @ other @ ones) / ((n - 1) * (n - 2))
    return (value - 2 / (n - 2) * (ones @ k @ other @ ones)) / (n * (n - 3))


def naive_cka(x, y) -> float:
    return naive_hsic(x, y) / np.sqrt(naive_hsic(x, x) * naive_hsic(y, y))


@pytest.mark.parametrize("n", [4, 9, 30])
def test_sums_give_the_n_by_n_estimate(n):
    x = normal(0, 3, n, 5)
    x[1] = x[0] @ normal(1, 5, 5) + 0.5 * x[1] + 40  # related, and far from the origin
    s = moments(x)
    value, dependence = cka(s)
    for a in range(3):
        for b in range(3):
            expected = naive_hsic(x[a].numpy(), x[b].numpy())
            assert dependence[a, b] == pytest.approx(expected, rel=1e-8, abs=1e-8)
            if value[a, b] == value[a, b]:
                assert value[a, b] == pytest.approx(naive_cka(x[a].numpy(), x[b].numpy()), rel=1e-8)


def test_by_hand():
    # Four samples on a line, K = L with products x_i x_j off the diagonal.
    x = torch.tensor([[[1.0], [-1.0], [1.0], [-1.0]]], dtype=torch.float64)
    # tr KK = 12; 1'K1 = -4; K1 = (-1, ..), 1'KK1 = 4: (12 + 16 / 6 - 4) / 4 = 8 / 3.
    assert hsic(moments(x), 0, 0) == pytest.approx(8 / 3)


def test_equal_features_give_one_and_rotations_too():
    x = normal(2, 50, 8)
    turn, _ = torch.linalg.qr(normal(3, 8, 8))
    value, _ = cka(moments(torch.stack([x, x, 3 * x @ turn + 5])))
    np.testing.assert_allclose(value, 1, atol=1e-10)


def test_independent_features_give_zero_also_with_few_samples():
    # n = 12 < d = 64: plain CKA is above 0.8 here.
    draws = []
    for seed in range(60):
        value, _ = cka(moments(normal(seed, 2, 12, 64)))
        draws.append(value[0, 1])
    mean, error = np.mean(draws), np.std(draws) / np.sqrt(len(draws))
    assert abs(mean) < 4 * error and error < 0.06
    x, y = (v - v.mean(0) for v in normal(0, 2, 12, 64))
    plain = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert plain > 0.7


def test_errors_agree_with_a_jackknife_over_sequences():
    n_sequences, each = 40, 3
    shared = normal(5, n_sequences, 1, 6).expand(-1, each, -1).reshape(-1, 6)
    noise = normal(6, 2, n_sequences * each, 6)
    x = torch.stack([shared + noise[0], shared + 0.7 * noise[1]])
    owner = torch.arange(n_sequences).repeat_interleave(each)
    s = moments(x)
    value, dependence = cka(s)
    second = _Influence(s, n_sequences)
    second.add(x, owner)
    ours = second.errors(value, dependence, None)[0, 1]
    left = np.array([cka(moments(x[:, owner != drop]))[0][0, 1] for drop in range(n_sequences)])
    jackknife = np.sqrt((n_sequences - 1) / n_sequences * ((left - left.mean()) ** 2).sum())
    assert ours == pytest.approx(jackknife, rel=0.15)


def states(hooked, batch, n_loops, group):
    """[loop -1.., sample, d_model] from a cache."""
    names = lambda n: n.endswith("hook_out") or n == "loop.0.hook_in"  # noqa: E731
    _, cache = hooked.run_with_cache(batch.tokens, n_loops=n_loops, names_filter=names, attn_path="sdpa")
    walk = torch.cat([cache["loop.0.hook_in"][None], cache.stack("out")])
    return walk[:, batch.masked if group == "masked" else ~batch.masked].double()


@pytest.mark.parametrize("group", ["masked", "clean"])
def test_a_model_equals_its_cached_states(hooked, batch, group):
    frame = loop_similarity(hooked, batch, n_loops=3, batch_size=3)
    frame = frame[frame["token_group"] == group].set_index(["loop", "other_loop"])
    x = states(hooked, batch, 3, group)
    for a in range(-1, 3):
        for b in range(-1, 3):
            expected = naive_cka(x[a + 1].numpy(), x[b + 1].numpy())
            assert frame.loc[(a, b), "value"] == pytest.approx(expected, abs=1e-5)  # states are float32
    assert (frame["n"] == 4).all() and (frame["n_samples"] == x.shape[1]).all()
    some = loop_similarity(hooked, batch, n_loops=3, loops=(2, 0))
    some = some[some["token_group"] == group].set_index(["loop", "other_loop"])
    assert some.index.tolist() == [(0, 0), (0, 2), (2, 0), (2, 2)]
    assert some.loc[(0, 2), "value"] == pytest.approx(frame.loc[(0, 2), "value"], abs=1e-5)


def test_planted_rotation_and_noise(hooked, batch):
    turn, _ = torch.linalg.qr(normal(8, 16, 16).float())
    fresh = normal(9, 4, 10, 16).float()
    m = planted(hooked, lambda loop, x: x @ turn * 2 if loop == 0 else fresh)
    frame = loop_similarity(m, batch, n_loops=2)
    frame = frame[frame["token_group"] == "masked"].set_index(["loop", "other_loop"])
    assert frame.loc[(-1, 0), "value"] == pytest.approx(1, abs=1e-4)
    assert abs(frame.loc[(0, 1), "value"]) < 0.35


def test_sequence_means_are_a_unit(hooked, batch):
    frame = loop_similarity(hooked, batch, n_loops=2, unit="sequence", batch_size=2)
    x = states(hooked, batch, 2, "masked").view(3, 4, -1, 16).mean(2)
    row = frame[(frame["token_group"] == "masked") & (frame["loop"] == 0) & (frame["other_loop"] == 1)].iloc[0]
    assert row["n_samples"] == 4 and row["value"] == pytest.approx(naive_cka(x[1].numpy(), x[2].numpy()), abs=1e-4)


def test_effective_rank_of_known_spectra():
    for spectrum, expected in (((1, 1, 1, 1), 4), ((1, 0, 0, 0), 1), ((2, 2, 0, 0), 2)):
        assert rank_of(torch.diag(torch.tensor(spectrum, dtype=torch.float64)))[0] == pytest.approx(expected)
    assert rank_of(torch.diag(torch.tensor([0.5, 0.25, 0.25])).double())[0] == pytest.approx(2**1.5)
    assert np.isnan(rank_of(torch.zeros(3, 3, dtype=torch.float64))[0])


def test_effective_rank_of_a_model(hooked, batch):
    frame = effective_rank(hooked, batch, n_loops=2, batch_size=3)
    for group in ("masked", "clean"):
        x = states(hooked, batch, 2, group).numpy()
        for loop in (-1, 0, 1):
            values = np.linalg.eigvalsh(np.cov(x[loop + 1].T))
            share = values[values > 1e-12] / values.sum()
            row = frame[(frame["token_group"] == group) & (frame["loop"] == loop)].iloc[0]
            assert row["value"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)


def test_effective_rank_error_agrees_with_a_jackknife(hooked):
    tokens = torch.randint(0, 22, (60, 10), generator=torch.Generator().manual_seed(1))
    b = mask_tokens(tokens, 22, mask_ratio=0.5)
    row = effective_rank(hooked, b, n_loops=1, loops=(0,)).iloc[0]
    left = []
    for drop in range(60):
        part = b.rows(torch.arange(60) != drop)
        left.append(effective_rank(hooked, part, n_loops=1, loops=(0,))["value"].iloc[0])
    jackknife = np.sqrt(59 / 60 * ((np.array(left) - np.mean(left)) ** 2).sum())
    assert row["standard_error"] == pytest.approx(jackknife, rel=0.15)


def test_planted_line_has_rank_one(hooked, batch):
    line = torch.linspace(-1, 1, 16)
    m = planted(hooked, lambda loop, x: x.norm(dim=-1, keepdim=True) * line)
    frame = effective_rank(m, batch, n_loops=1, loops=(0,))
    np.testing.assert_allclose(frame["value"], 1, atol=1e-4)


def test_empty_groups_and_constant_states_are_nan(hooked, clean):
    b = mask_tokens(clean, 22, mask_ratio=1.0)
    m = planted(hooked, lambda loop, x: torch.ones_like(x))
    for frame in (loop_similarity(m, b, n_loops=1, loops=(0,)), effective_rank(m, b, n_loops=1, loops=(0,))):
        assert frame["value"].isna().all() and (frame["n"] == 0).all() and frame["standard_error"].isna().all()
    one = loop_similarity(hooked, b.rows(slice(0, 1)), n_loops=1)
    assert one[one["token_group"] == "masked"]["standard_error"].isna().all()


def test_misuse_is_refused(hooked, batch):
    for measure in (loop_similarity, effective_rank):
        with pytest.raises(UsageError, match="loop 5 is outside"):
            measure(hooked, batch, n_loops=3, loops=(0, 5))
        with pytest.raises(UsageError, match="unit"):
            measure(hooked, batch, unit="token")
        with pytest.raises(UsageError, match="clusters"):
            measure(hooked, batch, clusters=np.arange(3))
        with pytest.raises(UsageError, match="MaskedBatch"):
            measure(hooked, batch.tokens)
