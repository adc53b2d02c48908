import numpy as np
import pytest
import torch

from loopmdm.analysis.measures.representation import convergence
from loopmdm.analysis.measures.representation.convergence import slopes, verdict, window
from loopmdm.model.errors import UsageError
from loopmdm.model.masking import mask_tokens
from tests.analysis.measures.representation.test_change import planted


def verdicts(frame) -> set:
    return set(frame["verdict"])


def slope(frame, metric, group="masked") -> float:
    return float(frame[(frame["metric"] == metric) & (frame["token_group"] == group)]["value"].iloc[0])


def test_a_drift_is_called_a_drift(hooked, batch):
    drift = torch.linspace(-1, 1, 16)
    frame = convergence(
        planted(hooked, lambda loop, x: (drift * (loop + 1)).expand_as(x) + 0 * x), batch, n_loops=40
    )
    assert verdicts(frame) == {"drifts"}
    assert slope(frame, "relative_change") == pytest.approx(-1, abs=1e-3)
    assert slope(frame, "step_norm") == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("start", [-10.0, 0.0, 3.0])
def test_a_drift_from_anywhere_is_no_convergence(hooked, batch, start):
    # From the far side of the origin the relative change falls faster than 1/i, though nothing converges.
    drift = torch.linspace(0.5, 1, 16)
    frame = convergence(planted(hooked, lambda loop, x: (drift * (loop + 1 + start)) + 0 * x), batch, n_loops=40)
    assert "converges" not in verdicts(frame)
    if start < 0:
        assert slope(frame, "relative_change") < -1.25


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_steps_that_do_not_add_up_are_no_convergence(hooked, batch, power):
    drift = torch.linspace(0.5, 1, 16)
    frame = convergence(planted(hooked, lambda loop, x: x + drift * (loop + 1.0) ** -power), batch, n_loops=80)
    assert slope(frame, "step_norm") == pytest.approx(-power, abs=0.02)
    assert "converges" not in verdicts(frame)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_contraction_converges(hooked, batch, rate):
    # The fast ones reach float32's floor long before the last loop.
    frame = convergence(planted(hooked, lambda loop, x: 2 + rate * (x - 2)), batch, n_loops=64)
    assert verdicts(frame) == {"converges"} and (frame["n"] == 4).all() and (frame["n_still"] == 0).all()


def test_a_slow_contraction_is_undecided_until_run_further(hooked, batch):
    m = planted(hooked, lambda loop, x: 2 + 0.98 * (x - 2))
    assert verdicts(convergence(m, batch, n_loops=40)) == {"undecided"}
    assert verdicts(convergence(m, batch, n_loops=200)) == {"converges"}


def test_an_orbit_drifts_and_a_standstill_votes_for_nothing(hooked, batch):
    assert verdicts(convergence(planted(hooked, lambda loop, x: -x), batch, n_loops=30)) == {"drifts"}
    hooked.reset_hooks(including_permanent=True)
    frame = convergence(planted(hooked, lambda loop, x: x), batch, n_loops=30)
    assert verdicts(frame) == {"undecided"} and (frame["n"] == 0).all() and (frame["n_still"] == 4).all()
    assert frame["value"].isna().all()


def test_slopes_by_hand():
    loops = np.arange(1, 9)
    relative = np.stack([loops**-1.0, loops**-2.0, np.where(loops < 6, loops**-2.0, 1e-9)])
    assert [window(row) for row in relative] == [(4, 8), (4, 8), (2, 5)]
    np.testing.assert_allclose(slopes(relative, relative), [-1, -2, -2], atol=1e-12)
    assert window(np.array([1, 0.1, 1e-9])) == (0, 0)
    assert np.isnan(slopes(np.full((1, 8), np.nan), np.ones((1, 8)))).all()
    three = slopes(np.ones((1, 3)), np.array([[1.0, 2.0, 6.0]]))  # least squares over all three
    x = np.log([1, 2, 3])
    assert three[0] == pytest.approx(np.polyfit(x, np.log([1, 2, 6]), 1)[0])


def test_verdicts_by_hand():
    assert verdict((-3, -2), (-3, -2)) == "converges"
    assert verdict((-3, -1.2), (-3, -2)) == "undecided"  # within the margin of the null
    assert verdict((-3, -2), (-1.1, -0.9)) == "undecided"  # 1/i steps
    assert verdict((-1.1, -0.9), (-0.1, 0.1)) == "drifts"
    assert verdict((-1.1, -0.9), (-0.5, 0.1)) == "undecided"
    assert verdict((float("nan"), float("nan")), (-3, -2)) == "undecided"


def test_noise_about_the_null_is_rarely_called(hooked):
    # Verdicts on simulated slopes at the border of convergence: a one-sided 2.5% error.
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(400):
        spans = []
        for _ in range(2):
            draws = rng.normal(-1.25, 1, 20)
            half = 2.093 * draws.std(ddof=1) / np.sqrt(20)
            spans.append((draws.mean() - half, draws.mean() + half))
        called += verdict(*spans) == "converges"
    assert called <= 0.05 * 400


def test_the_interval_is_over_clusters(hooked, batch):
    thrice = batch.rows(torch.arange(4).repeat_interleave(3))
    alone = convergence(hooked, batch, n_loops=12).iloc[0]
    copies = convergence(hooked, thrice, n_loops=12, clusters=np.arange(4).repeat(3), batch_size=5).iloc[0]
    for column in ("value", "standard_error", "low", "high"):
        np.testing.assert_allclose(copies[column], alone[column], rtol=1e-3)


def test_single_sequences_few_loops_and_misuse(hooked, batch, clean):
    one = convergence(hooked, batch.rows(slice(0, 1)), n_loops=12)
    assert verdicts(one) == {"undecided"} and one["low"].isna().all() and (one["n"] == 1).all()
    short = convergence(hooked, batch, n_loops=1)
    assert verdicts(short) == {"undecided"} and short["value"].isna().all() and (short["n"] == 0).all()
    empty = convergence(hooked, mask_tokens(clean, 22, mask_ratio=1.0), n_loops=12)
    empty = empty[empty["token_group"] == "clean"]
    assert (empty["n"] == 0).all() and (empty["n_still"] == 0).all() and verdicts(empty) == {"undecided"}
    for margin in (2, 1, -0.1, float("nan"), True, "0.2"):
        with pytest.raises(UsageError, match="margin must be"):
            convergence(hooked, batch, margin=margin)
    with pytest.raises(UsageError, match="clusters"):
        convergence(hooked, batch, clusters=np.arange(2))
    with pytest.raises(UsageError, match="MaskedBatch"):
        convergence(hooked, batch.tokens)
