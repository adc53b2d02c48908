"""Does adaptive stopping pay? Frontiers of quality against true FLOPs, with the controls that can say no.

record = record_loops(m, tokens, rules)           one trajectory: losses and criteria after every loop
stopping_frontier(m, tokens, validation=other)    all rules and thresholds by replay, controls beside them
noninferiority(record, fitted, rule)              "12 loops become 5 at the same performance": yes or no
usefulness(record, fitted)                        better than fixed S, a schedule and its own counts shuffled?
loop_usage(m, tokens, rule)                       loops by mask ratio, difficulty and token class, both scopes
stopping_in_sampling(m, rules), usage_by_step     whole sampling runs: quality, FLOPs, time, loops by step

And where to spend FLOPs, beyond a threshold on one number (what the paper names as future work):

schedule_frontier(record, fitted)     loops as a function of the noise level, fitted on validation
predictor_frontier(record, fitted)    loops by the predicted remaining gain, on the same frontier
PredictedGain.of(predictor, record, price)    the same as a rule for `model.run` and `sample`
prediction_quality(record, fitted)    how well the remaining gain is foreseen on unseen sequences
loops_against_steps(m, ...)           loops or denoising steps at equal FLOPs: marginal NLL and joint coherence
"""

from loopmdm.analysis.measures.stopping.frontier import stopping_frontier
from loopmdm.analysis.measures.stopping.predictor import (
    GainPredictor,
    PredictedGain,
    feature_rules,
    prediction_quality,
    predictor_frontier,
)
from loopmdm.analysis.measures.stopping.record import LoopRecord, default_rules, record_loops
from loopmdm.analysis.measures.stopping.sampling import stopping_in_sampling, usage_by_step
from loopmdm.analysis.measures.stopping.schedule import schedule_frontier, schedules_by_noise
from loopmdm.analysis.measures.stopping.steps import equal_flops_pairs, loops_against_steps
from loopmdm.analysis.measures.stopping.usage import frequency_classes, loop_usage, peer_classes, piece_classes
from loopmdm.analysis.measures.stopping.verdicts import calibration, judge_usefulness, noninferiority, usefulness

__all__ = [
    "GainPredictor",
    "LoopRecord",
    "PredictedGain",
    "calibration",
    "default_rules",
    "equal_flops_pairs",
    "feature_rules",
    "frequency_classes",
    "judge_usefulness",
    "loop_usage",
    "loops_against_steps",
    "noninferiority",
    "peer_classes",
    "piece_classes",
    "prediction_quality",
    "predictor_frontier",
    "record_loops",
    "schedule_frontier",
    "schedules_by_noise",
    "stopping_frontier",
    "stopping_in_sampling",
    "usage_by_step",
    "usefulness",
]
