"""FLOPs to a target on curves whose answer is known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats as distributions

from loopmdm.analysis.measures.quality.efficiency import first_reach, flops_to_target, log_ratio


def curve(arm, seed, cost, floor=0.0, points=20, per_token=10.0):
    """NELBO = floor + 1 - log10(flops / cost) / 4 on flops from cost to cost * 10^4."""
    flops = cost * np.logspace(0, 4, points)
    nelbo = floor + 1 - np.log10(flops / cost) / 4
    return pd.DataFrame({"arm": arm, "seed": seed, "flops": flops, "tokens": flops / per_token, "nelbo": nelbo})


def test_a_target_is_reached_where_the_line_crosses_it():
    part = curve("base", 0, 1e6)
    flops, nelbo = part["flops"].to_numpy(), part["nelbo"].to_numpy()
    assert first_reach(flops, nelbo, 0.5) == pytest.approx(1e8)
    assert first_reach(flops, nelbo, 2.0) == flops[0]
    assert np.isnan(first_reach(flops, nelbo, -0.1))
    bumpy = np.array([1.0, 0.4, 0.6, 0.2])
    assert first_reach(np.array([1.0, 10.0, 100.0, 1000.0]), bumpy, 0.5) < 10


def test_a_cheaper_arm_has_its_factor_and_the_interval_of_its_seeds():
    factors = np.array([0.3, 0.33, 0.36])
    curves = pd.concat(
        [curve("base", seed, 1e6) for seed in range(3)]
        + [curve("loop", seed, 1e6 * factor, per_token=20.0) for seed, factor in enumerate(factors)]
    )
    frame = flops_to_target(curves, "loop", "base", epoch_tokens=1e6)
    assert frame["share"].tolist() == [0.25, 0.5, 0.75, 1.0]
    centre = np.log(1 / factors)
    half = distributions.t.ppf(0.975, 2) * centre.std(ddof=1) / np.sqrt(3)
    for _, row in frame.iterrows():
        assert row["ratio"] == pytest.approx(np.exp(centre.mean()), rel=1e-6)
        assert (np.log(row["low"]), np.log(row["high"])) == pytest.approx(
            (centre.mean() - half, centre.mean() + half)
        )
        assert row["token_ratio"] == pytest.approx(2 * row["ratio"])
        assert row["epochs"] == pytest.approx(row["tokens"] / 1e6)
    full = frame.iloc[-1]
    assert full["target"] == pytest.approx(0.0, abs=1e-9)
    assert full["flops"] == pytest.approx(1e10 / np.exp(centre.mean()))


def test_the_last_target_is_what_every_run_of_the_other_arm_reaches():
    curves = pd.concat(
        [curve("base", 0, 1e6), curve("base", 1, 1e6, 0.1), curve("loop", 0, 5e5), curve("loop", 1, 5e5)]
    )
    last = flops_to_target(curves, "loop", "base", 1.0).iloc[-1]
    assert last["target"] == pytest.approx(0.1) and (last["n_reached_against"], last["n_against"]) == (2, 2)
    assert np.isfinite(last["ratio"])


def test_not_reached_is_said_and_gives_no_ratio():
    curves = pd.concat(
        [curve("base", 0, 1e6), curve("base", 1, 1e6), curve("loop", 0, 1e6), curve("loop", 1, 1e6, 0.5)]
    )
    last = flops_to_target(curves, "loop", "base", 1.0).iloc[-1]
    assert (last["n_reached"], last["n"]) == (1, 2) and np.isnan(last["ratio"]) and np.isfinite(last["flops"])


def test_one_seed_has_no_interval():
    ratio, low, high = log_ratio(np.array([2.0]), np.array([1.0, 1.0]))
    assert ratio == pytest.approx(2.0) and np.isnan(low) and np.isnan(high)
