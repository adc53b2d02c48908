"""Does adaptive stopping pay? Frontiers of quality against true FLOPs, with the controls that can say no.

record = record_loops(m, tokens, rules)           one trajectory: losses and criteria after every loop
stopping_frontier(m, tokens, validation=other)    all rules and thresholds by replay, controls beside them
noninferiority(record, fitted, rule)              "12 loops become 5 at the same performance": yes or no
usefulness(record, fitted)                        better than fixed S, a schedule and its own counts shuffled?
loop_usage(m, tokens, rule)                       loops by mask ratio, difficulty and token class, both scopes
stopping_in_sampling(m, rules), usage_by_step     whole sampling runs: quality, FLOPs, time, loops by step
"""

from loopmdm.analysis.measures.stopping.frontier import stopping_frontier
from loopmdm.analysis.measures.stopping.record import LoopRecord, default_rules, record_loops
from loopmdm.analysis.measures.stopping.sampling import stopping_in_sampling, usage_by_step
from loopmdm.analysis.measures.stopping.usage import frequency_classes, loop_usage, peer_classes, piece_classes
from loopmdm.analysis.measures.stopping.verdicts import calibration, judge_usefulness, noninferiority, usefulness

__all__ = [
    "LoopRecord",
    "calibration",
    "default_rules",
    "frequency_classes",
    "judge_usefulness",
    "loop_usage",
    "noninferiority",
    "peer_classes",
    "piece_classes",
    "record_loops",
    "stopping_frontier",
    "stopping_in_sampling",
    "usage_by_step",
    "usefulness",
]
