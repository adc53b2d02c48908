import numpy as np
import pytest
import torch

from loopmdm.analysis.measures.representation import (
    fixed_point_residual,
    fixed_point_summary,
    fixed_points,
    representation_change,
)
from loopmdm.analysis.measures.representation.fixed_points import (
    LoopMap,
    Steps,
    growth_rate,
    spectral_radius,
    tangents,
)
from loopmdm.model.errors import UsageError
from loopmdm.model.masking import mask_tokens
from loopmdm.model.sequences import MaskedBatch
from tests.analysis.measures.representation.test_change import planted


def linear(radius, seed=0) -> torch.Tensor:
    """A 16 x 16 matrix that is far from normal, with this spectral radius."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))
    return weight * radius / torch.linalg.eigvals(weight).abs().max()


def at_state(hooked, batch, n_loops=2) -> tuple[LoopMap, torch.Tensor]:
    for state, context in hooked.states(batch.tokens, n_loops, batch.attention_mask, "eager"):  # noqa: B007
        pass
    return LoopMap(hooked, context, n_loops), state


def dense_jacobian(loop_map, x) -> torch.Tensor:
    """dF/dx as a matrix, by reverse mode through the same loop."""
    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(loop_map, x)
    return jacobian.reshape(x.numel(), x.numel())


def test_the_map_is_the_next_loop(hooked, batch):
    loop_map, state = at_state(hooked, batch)
    *_, (after, _) = hooked.states(batch.tokens, 3, None, "eager")
    torch.testing.assert_close(loop_map(state), after)


def test_radius_and_growth_equal_the_dense_jacobians(hooked, batch):
    loop_map, x = at_state(hooked, batch.rows(slice(1, 2)))
    v = tangents(x.shape, 0, 0)
    jacobian = dense_jacobian(loop_map, x)
    expected = float(torch.linalg.eigvals(jacobian).abs().max())
    assert spectral_radius(loop_map, x, v) == pytest.approx(expected, rel=1e-3)
    w, here = v.flatten(), x
    for _ in range(3):
        w, here = dense_jacobian(loop_map, here) @ w, loop_map(here)
    expected = float((w.norm() / v.norm()).log()) / 3
    assert float(growth_rate(loop_map, x, v, 3)) == pytest.approx(expected, abs=1e-4)


def test_a_planted_contraction_gives_its_radius(hooked, batch):
    weight, centre = linear(0.6), torch.linspace(1, 2, 16)
    m = planted(hooked, lambda loop, x: centre + (x - centre) @ weight)
    frame = fixed_points(m, batch, n_loops=60, batch_size=3)
    assert frame["verified"].all() and (frame["kind"] == "spectral_radius").all()
    np.testing.assert_allclose(frame["value"], 0.6, rtol=1e-3)
    np.testing.assert_allclose(frame["rate"], np.log(0.6), atol=1e-3)
    summary = fixed_point_summary(frame).set_index("metric")
    assert summary.loc["spectral_radius", "value"] == pytest.approx(0.6, rel=1e-3)
    assert summary.loc["growth_rate", "n"] == 0 and np.isnan(summary.loc["growth_rate", "value"])


def test_an_even_contraction_too(hooked, batch):
    # Every direction shrinks alike: the Krylov space is one-dimensional.
    m = planted(hooked, lambda loop, x: 1 + (x - 1) * 0.5)
    frame = fixed_points(m, batch.rows(slice(0, 2)), n_loops=40)
    np.testing.assert_allclose(frame["value"], 0.5, rtol=1e-3)
    assert (frame["kind"] == "spectral_radius").all()


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-8])
def test_a_drift_is_never_a_fixed_point(hooked, batch, size):
    drift = size * torch.linspace(-1, 1, 16)
    m = planted(hooked, lambda loop, x: x + drift)
    frame = fixed_points(m, batch, n_loops=150, tol=0.5)  # any residual would do
    assert (frame["residual"] > 0).all()
    assert not frame["verified"].any() and (frame["kind"] == "growth_rate").all()
    np.testing.assert_allclose(frame["value"], 0, atol=1e-5)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_slowing_steps_whose_sum_diverges_are_no_fixed_point(hooked, batch, power):
    drift = torch.linspace(-1, 1, 16)
    m = planted(hooked, lambda loop, x: x + drift * (loop + 1.0) ** -power)
    assert not fixed_points(m, batch, n_loops=200, tol=0.5)["verified"].any()


def test_an_orbit_is_no_fixed_point(hooked, batch):
    m = planted(hooked, lambda loop, x: -x)
    frame = fixed_points(m, batch, n_loops=20)
    assert not frame["verified"].any()
    np.testing.assert_allclose(frame["residual"], 2, rtol=1e-5)
    np.testing.assert_allclose(frame["value"], 0, atol=1e-5)


def test_growth_of_an_expansion(hooked, batch):
    m = planted(hooked, lambda loop, x: 1.1 * x)
    np.testing.assert_allclose(fixed_points(m, batch, n_loops=5)["value"], np.log(1.1), atol=1e-5)
    m = planted(hooked, lambda loop, x: torch.ones_like(x) * (loop + 1.0))
    assert (fixed_points(m, batch, n_loops=5)["value"] == -np.inf).all()


def test_verification_by_hand():
    def steps(*sizes):
        sizes = torch.tensor(sizes, dtype=torch.float64)[None, :, None].expand(3, -1, 1)
        return Steps(sizes, torch.ones_like(sizes), torch.zeros(1, 1, 1), None)  # pyright: ignore

    assert bool(steps(1, 1e-2, 1e-5, 1e-6).verified(1e-4))  # halves and more
    assert not bool(steps(1, 1e-2, 1e-5, 1e-3).verified(1e-4))  # residual too large
    assert not bool(steps(1, 5e-5, 5e-5, 5e-5).verified(1e-4))  # small, but never slows
    assert bool(steps(1, 1e-7, 1e-7, 1e-7).verified(1e-4))  # rounding
    assert not bool(steps(1e-7, 1e-7, 1e-7, 1e-7).verified(1e-4))  # perhaps rounding, perhaps a slow drift
    assert not bool(steps(1e-5).verified(1e-4))  # one loop shows nothing
    assert bool(steps(0, 0, 0).verified(1e-4))


def test_residual_equals_a_naive_walk(hooked, batch):
    frame = fixed_point_residual(hooked, batch, n_loops=3, batch_size=3)
    states = [state for state, _ in hooked.states(batch.tokens, 4)]
    for group, members in (
        ("all", torch.ones_like(batch.masked)),
        ("masked", batch.masked),
        ("clean", ~batch.masked),
    ):
        for loop in range(3):
            values = []
            for row in range(4):
                here, after = states[loop][row, members[row]], states[loop + 1][row, members[row]]
                values.append(float((after - here).norm() / here.norm()))
            found = frame[(frame["token_group"] == group) & (frame["loop"] == loop)].iloc[0]
            assert found["value"] == pytest.approx(np.mean(values), rel=1e-4)
            assert found["standard_error"] == pytest.approx(np.std(values, ddof=1) / 2, rel=1e-3)


def test_padding_does_not_count(hooked, clean):
    short = mask_tokens(clean[:, :7], 22, mask_ratio=0.5)
    real, tokens, truth = torch.zeros(4, 10, dtype=torch.long), torch.full((4, 10), 3), torch.full((4, 10), 3)
    real[:, :7], tokens[:, :7], truth[:, :7] = 1, short.tokens, short.clean
    masked = torch.zeros(4, 10, dtype=torch.bool)
    masked[:, :7] = short.masked
    padded = MaskedBatch(tokens, truth, masked, attention_mask=real)
    ours, theirs = (fixed_point_residual(hooked, b, n_loops=4)["value"] for b in (padded, short))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    radii = []
    for b in (padded.rows(slice(0, 1)), short.rows(slice(0, 1))):
        loop_map, x = at_state(hooked, b)
        radii.append(spectral_radius(loop_map, x, tangents(x.shape, 0, 0)))
    assert radii[0] == pytest.approx(radii[1], rel=1e-3)


def test_a_sequence_alone_equals_itself_in_a_batch(hooked, batch):
    whole = fixed_points(hooked, batch, n_loops=4)
    pieces = fixed_points(hooked, batch, n_loops=4, batch_size=1)
    np.testing.assert_allclose(whole["value"], pieces["value"], atol=1e-5)
    other = fixed_points(hooked, batch, n_loops=4, seed=1)
    assert not np.allclose(whole["value"], other["value"], atol=1e-5)


def test_hooks_are_part_of_the_map(hooked, batch):
    # The loop's update halved by a hook: the tangent sees it.
    plain, x = at_state(hooked, batch)
    v = tangents(x.shape, 0, 0)
    with hooked.hooks([("loop.2.hook_out", lambda out, hook: 0.5 * out)]):
        halved = growth_rate(plain, x, v, 1)
    torch.testing.assert_close(halved, growth_rate(plain, x, v, 1) - np.log(2), atol=1e-5, rtol=0)


def test_empty_groups_and_misuse(hooked, batch, clean):
    frame = fixed_point_residual(hooked, mask_tokens(clean, 22, mask_ratio=1.0), n_loops=2)
    empty = frame[frame["token_group"] == "clean"]
    assert (empty["n"] == 0).all() and empty["value"].isna().all()
    assert len(fixed_points(hooked, batch.rows(slice(0, 1)), n_loops=1)) == 1
    for arguments, message in (({"tol": 0}, "tol"), ({"horizon": 0}, "horizon"), ({"n_loops": 0}, "n_loops")):
        with pytest.raises(UsageError, match=message):
            fixed_points(hooked, batch, **arguments)
    with pytest.raises(UsageError, match="MaskedBatch"):
        fixed_points(hooked, batch.tokens)


def test_the_residual_is_the_next_step_over_this_state(hooked, clean):
    b = mask_tokens(clean[:1, :1], 22, mask_ratio=1.0)  # one position: nothing is averaged
    residual = fixed_point_residual(hooked, b, n_loops=3)
    residual = residual[residual["token_group"] == "all"].set_index("loop")["value"]
    change = representation_change(hooked, b, n_loops=4)
    change = change[change["token_group"] == "masked"].pivot(index="loop", columns="metric", values="value")
    for loop in range(3):
        expected = change.loc[loop + 1, "step_norm"] / change.loc[loop, "state_norm"]
        assert residual[loop] == pytest.approx(expected, rel=1e-4)
