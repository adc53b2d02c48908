"""Several measures of attention in one forward: what costs is the walk, not the watching.

Masses with content, shape, and change between loops share each pattern while it lives; with sinks that were chosen
on other sequences they are measured in the same walk. Toggle needs forwards of its own and stays outside; rank
correlation sorts every row and is off by default.
"""

import numpy as np
import pandas as pd

from loopmdm.analysis.measures.attention.change import ChangeSums
from loopmdm.analysis.measures.attention.masses import AttentionSums
from loopmdm.analysis.measures.attention.shape import ShapeSums
from loopmdm.analysis.measures.attention.sinks import ReceivedSums
from loopmdm.analysis.watch.walk import PlaceSums, walk
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch, as_batch


def attention_survey(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    received: ReceivedSums | None = None,
    factors: tuple[float, ...] = (3.0, 5.0, 10.0),
    rank: bool = False,
    by_head: bool = True,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> dict[str, pd.DataFrame]:
    """Frames "masses", "shape" and, for looped models, "change", as their own functions give them.

    `received`, of *other* sequences (`received_attention`), adds "sinks": masses with sinks as a group at several
    `factors`, in a column.
    """
    b = as_batch("attention_survey", b, clusters)
    sums: dict[str, PlaceSums] = {"masses": AttentionSums(m, n_loops, True, by_head)}
    sums["shape"] = ShapeSums(m, n_loops, by_head)
    if m.cfg.layers("loop"):
        sums["change"] = ChangeSums(m, n_loops, rank, by_head)
    apart: dict[float, PlaceSums] = {}
    if received is not None:
        keys = {factor: received.sinks(factor).groups for factor in factors}
        apart = {factor: AttentionSums(m, n_loops, False, by_head, groups) for factor, groups in keys.items()}
    for _, part in b.batches(batch_size):
        walk(m, part, sums["masses"].n_loops, [*sums.values(), *apart.values()])
    frames = {name: one.frame() for name, one in sums.items()}
    if apart:
        rows = [one.frame().assign(factor=factor) for factor, one in apart.items()]
        frames["sinks"] = pd.concat(rows, ignore_index=True)
    return frames
