"""How the representation changes from loop to loop, and what each loop would answer."""

from analysis.representation.change import representation_change
from analysis.representation.convergence import convergence
from analysis.representation.fixed_points import fixed_point_residual, fixed_point_summary, fixed_points
from analysis.representation.paths import state_paths
from analysis.representation.rank import effective_rank
from analysis.representation.readout import LoopReadout, read_loops
from analysis.representation.settled import settled_curve, settled_loops, settled_means
from analysis.representation.similarity import loop_similarity

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
