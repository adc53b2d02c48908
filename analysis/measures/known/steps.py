"""How far loops carry a computation whose answer is known, with some edges of attention cut."""

from collections.abc import Sequence

import pandas as pd

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.interventions.contexts import cut
from loopmdm.analysis.measures.quality.likelihoods import excess_kl
from loopmdm.analysis.measures.registry import Measure
from loopmdm.model.errors import UsageError

EDGES = ("none", "masked->masked", "masked->clean")


def excess_with_cuts(
    case: Case, counts: list[int], edges: Sequence[str] = EDGES, n_samples: int = 2, batch_size: int = 32
) -> pd.DataFrame:
    """`excess_kl` with edges cut in the looped layers from the second loop on; "none" cuts nothing.

    `edges` as `cut` takes them; the same sequences and masks for all. At S = 1 there is no second loop, so only
    "none" has rows. UsageError without edges. Columns: edges and those of `excess_kl`.
    """
    if not edges:
        raise UsageError(f"edges names none; give some of {', '.join(EDGES)}")
    parts = []
    for what in edges:
        asked = counts if what == "none" else [count for count in counts if count > 1]
        if asked:
            with cut(case.m, what, loops=slice(1, None)):
                parts.append(excess_kl(case, asked, n_samples, batch_size).assign(edges=what))
    if not parts:
        raise UsageError("with S = 1 there is no loop to cut in; give n_loops of at least 2")
    df = pd.concat(parts, ignore_index=True)
    return df[["edges", *df.columns.drop("edges")]]


MEASURES = (
    Measure(
        "excess-kl-cut",
        "excess over the exact posterior by hops, with edges cut from the second loop on",
        excess_with_cuts,
        "loops",
        others=False,
        shards=True,
    ),
)
