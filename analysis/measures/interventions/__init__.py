"""Causal tests of what loops do, all through public hooks: change one thing, read the model as usual.

    with cut(m, "masked->masked", loops=slice(2, None)):
        nelbo(m, tokens, n_loops=12)

`cut` forbids attention between groups of positions (or, as a control, random edges of equal mass and distance);
`stale` keeps patterns but feeds the values of loop 0; `freeze` holds the states of a group; `patch` puts in a
state from elsewhere; `skip` leaves a layer out, `ablate` heads; `damp` shortens each loop's step. They nest, and
end with their block. What is taken away leaves zero, or, `by` a `Reference`, what other sequences have there.
`replace_values` keeps patterns but feeds another sequence's values along chosen edges: resample and mean ablation.
`mediated_share` and `effect_by_loop` turn them into estimates with intervals; `causal_effects` gives every edge
group, by every kind of intervention, in nats with the first loop intact, beside controls of equal mass.
"""

from loopmdm.analysis.measures.interventions.causal import Arm, Trial, causal_effects
from loopmdm.analysis.measures.interventions.contexts import ablate, cut, damp, freeze, patch, skip, stale
from loopmdm.analysis.measures.interventions.effects import effect_by_loop, mediated_share
from loopmdm.analysis.measures.interventions.reference import Reference
from loopmdm.analysis.measures.interventions.schedules import run_layers
from loopmdm.analysis.measures.interventions.selections import Draw, EdgeSet, choice
from loopmdm.analysis.measures.interventions.values import mean_values, record_values, replace_values

__all__ = ["Arm", "Draw", "EdgeSet", "Reference", "Trial", "ablate", "causal_effects", "choice", "cut", "damp",
           "effect_by_loop", "freeze", "mean_values", "mediated_share", "patch", "record_values", "replace_values",
           "run_layers", "skip", "stale"]  # fmt: skip
