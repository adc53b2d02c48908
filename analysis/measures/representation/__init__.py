"""How the representation changes from loop to loop, and what each loop would answer."""

from loopmdm.analysis.measures.representation.change import representation_change
from loopmdm.analysis.measures.representation.convergence import convergence
from loopmdm.analysis.measures.representation.fixed_points import (
    fixed_point_residual,
    fixed_point_summary,
    fixed_points,
)
from loopmdm.analysis.measures.representation.paths import state_paths
from loopmdm.analysis.measures.representation.rank import effective_rank
from loopmdm.analysis.measures.representation.readout import LoopReadout, read_loops
from loopmdm.analysis.measures.representation.settled import settled_curve, settled_loops, settled_means
from loopmdm.analysis.measures.representation.similarity import loop_similarity

__all__ = [
    "LoopReadout",
    "convergence",
    "effective_rank",
    "fixed_point_residual",
    "fixed_point_summary",
    "fixed_points",
    "loop_similarity",
    "read_loops",
    "representation_change",
    "settled_curve",
    "settled_loops",
    "settled_means",
    "state_paths",
]
