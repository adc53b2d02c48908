"""Models that draw their first state: what is measured is a mean over draws, with its spread."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from loopmdm.model.hooks.hooked import HookedLoopMDM

STARTS = 3
"""How many first states are drawn in models that draw one."""


def over_starts(m: HookedLoopMDM, run: Callable[[], pd.DataFrame], n: int = STARTS) -> pd.DataFrame:
    """What `run` measures; in a model that draws its first state, means over `n` of its seeds.

    Then every number has a column <name>_spread, its standard deviation over seeds, and `n_starts` is n.
    """
    core = m.model
    if not (m.facts.random_start and hasattr(core, "seed")):
        return run()
    frames, before = [], core.seed
    try:
        for seed in range(n):
            core.seed = seed
            frames.append(run())
    finally:
        core.seed = before
    return _spread(frames)


def _spread(frames: list[pd.DataFrame]) -> pd.DataFrame:
    first = frames[0]
    if any(len(frame) != len(first) for frame in frames):  # rows that depend on the run, such as thresholds
        return pd.concat([frame.assign(start=seed) for seed, frame in enumerate(frames)], ignore_index=True)
    found = first.copy()
    for name in first.select_dtypes("float").columns:
        values = np.stack([frame[name].to_numpy(dtype=float) for frame in frames])
        if not np.array_equal(values, np.broadcast_to(values[:1], values.shape), equal_nan=True):
            found[name], found[f"{name}_spread"] = values.mean(0), values.std(0, ddof=1)
    return found.assign(n_starts=len(frames))
