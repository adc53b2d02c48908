"""Tasks whose answer is known: what a loop does, against what an exact algorithm does.

`boards_by_loop` Sudoku boards after every loop, local against global violations, and repairs; `settling_by_depth`
and `settling_correlation` the loop at which a cell is right against the depth of constraint propagation;
`belief_rounds` and `best_rounds` read-outs against rounds of belief propagation on `tree` and `markov`;
`order_interaction` does looping help more where the generation order is restricted? `excess_with_cuts` how far
from the exact answer, by the steps that it takes, with edges of attention cut.
"""

from loopmdm.analysis.measures.known.belief import belief_rounds, beliefs, best_rounds
from loopmdm.analysis.measures.known.boards import boards_after_loops, boards_by_loop
from loopmdm.analysis.measures.known.orders import OrderEffects, order_interaction
from loopmdm.analysis.measures.known.settling import settling_by_depth, settling_correlation
from loopmdm.analysis.measures.known.steps import excess_with_cuts

__all__ = [
    "OrderEffects",
    "belief_rounds",
    "beliefs",
    "best_rounds",
    "boards_after_loops",
    "boards_by_loop",
    "excess_with_cuts",
    "order_interaction",
    "settling_by_depth",
    "settling_correlation",
]
