"""Does adaptive stopping pay? Frontiers of quality against true FLOPs, with the controls that can say no.

record = record_loops(m, tokens, rules)           one trajectory: losses and criteria after every loop
stopping_frontier(m, tokens, validation=other)    all rules and thresholds by replay, controls beside them
noninferiority(record, rule, margin=0.05)         "12 loops become 5 at the same performance": yes or no
"""

from analysis.stopping.frontier import stopping_frontier
from analysis.stopping.record import LoopRecord, default_rules, record_loops
from analysis.stopping.verdicts import calibration, noninferiority

__all__ = ["LoopRecord", "calibration", "default_rules", "noninferiority", "record_loops", "stopping_frontier"]
