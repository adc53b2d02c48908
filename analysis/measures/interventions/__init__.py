"""Causal tests of what loops do, all through public hooks: change one thing, read the model as usual.

    with cut(m, "masked->masked", loops=slice(2, None)):
        nelbo(m, tokens, n_loops=12)

`cut` forbids attention between groups of positions (or, as a control, random edges of equal mass and distance);
`stale` keeps patterns but feeds the values of loop 0; `freeze` holds the states of a group; `patch` puts in a
state from elsewhere; `skip` leaves a layer out; `damp` shortens each loop's step. They nest, and end with their
block.
`mediated_share` and `effect_by_loop` turn them into estimates with intervals.
"""

from loopmdm.analysis.measures.interventions.contexts import cut, damp, freeze, patch, skip, stale
from loopmdm.analysis.measures.interventions.effects import effect_by_loop, mediated_share
from loopmdm.analysis.measures.interventions.schedules import run_layers

__all__ = ["cut", "damp", "effect_by_loop", "freeze", "mediated_share", "patch", "run_layers", "skip",
           "stale"]  # fmt: skip
