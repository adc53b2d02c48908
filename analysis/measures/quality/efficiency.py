"""FLOPs to a target: how much training each arm needs for the same validation NELBO.

Learning curves are of EMA weights under warm-up and then a constant rate, so that every point is what a shorter
run would have given; n_loops is fixed beforehand (S_max for a looped arm). A run's FLOPs to a target are those
of its first curve point at or below it, interpolated linearly in log FLOPs against the point before. The ratio of
two arms is that of geometric means over seeds, with Welch's 95% interval on log FLOPs; where a run never
reaches the target there is no ratio, and `n_reached` says so.
"""

import numpy as np
import pandas as pd

from loopmdm.analysis.numbers import contrasts

SHARES = (0.25, 0.5, 0.75, 1.0)


def first_reach(flops: np.ndarray, nelbo: np.ndarray, target: float) -> float:
    """FLOPs at which a curve first reaches `target`; NaN if it never does."""
    below = np.flatnonzero(nelbo <= target)
    if not len(below):
        return float("nan")
    point = below[0]
    if point == 0:
        return float(flops[0])
    share = (nelbo[point - 1] - target) / (nelbo[point - 1] - nelbo[point])
    return float(np.exp(np.log(flops[point - 1]) * (1 - share) + np.log(flops[point]) * share))


def log_ratio(over: np.ndarray, under: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean of `over` by that of `under`, with Welch's 95% interval on the logarithms."""
    ratio, low, high = np.exp(contrasts.welch(np.log(over), np.log(under)))
    return float(ratio), float(low), float(high)


def flops_to_target(curves: pd.DataFrame, arm: str, against: str, epoch_tokens: float) -> pd.DataFrame:
    """What `arm` needs for the NELBO that `against` has, on average, after a share of its budget.

    At `share` 1 the target is what every run of `against` reaches in the end (the worst of their best points).
    `curves` has columns arm, seed, flops, tokens, nelbo: one curve an (arm, seed). `ratio` is FLOPs of
    `against` by FLOPs of `arm` (above 1: `arm` needs fewer), `token_ratio` the same in tokens; `tokens` and
    `epochs` (passes over `epoch_tokens` of data) are `arm`'s geometric means.
    """
    runs = {
        name: [part.sort_values("flops") for _, part in curves[curves["arm"] == name].groupby("seed")]
        for name in (arm, against)
    }
    budget = min(part["flops"].max() for part in runs[against])
    rows = []
    for share in SHARES:
        at = [
            np.interp(np.log(share * budget), np.log(part["flops"].astype(float)), part["nelbo"])
            for part in runs[against]
        ]
        target = float(np.mean(at)) if share < 1 else max(part["nelbo"].min() for part in runs[against])
        reached = {
            (name, unit): np.array([_reach(part, unit, target) for part in parts])
            for name, parts in runs.items()
            for unit in ("flops", "tokens")
        }
        count = {name: int(np.isfinite(reached[name, "flops"]).sum()) for name in runs}
        row = {"arm": arm, "against": against, "share": share, "target": target}
        row |= {"flops": float("nan"), "tokens": float("nan"), "epochs": float("nan")}
        row |= dict.fromkeys(("ratio", "low", "high", "token_ratio", "token_low", "token_high"), float("nan"))
        if count[arm]:
            for unit in ("flops", "tokens"):
                row[unit] = float(np.exp(np.nanmean(np.log(reached[arm, unit]))))
            row["epochs"] = row["tokens"] / epoch_tokens
        if all(count[name] == len(parts) for name, parts in runs.items()):
            row["ratio"], row["low"], row["high"] = log_ratio(reached[against, "flops"], reached[arm, "flops"])
            tokens = log_ratio(reached[against, "tokens"], reached[arm, "tokens"])
            row["token_ratio"], row["token_low"], row["token_high"] = tokens
        row |= {"n_reached": count[arm], "n": len(runs[arm])}
        row |= {"n_reached_against": count[against], "n_against": len(runs[against])}
        rows.append(row)
    return pd.DataFrame(rows)


def _reach(part: pd.DataFrame, unit: str, target: float) -> float:
    return first_reach(part[unit].to_numpy(float), part["nelbo"].to_numpy(float), target)
