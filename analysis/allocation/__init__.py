"""Where to spend FLOPs, beyond a threshold on one number (what the paper names as future work).

schedule_frontier(record, fitted)     loops as a function of the noise level, fitted on validation
predictor_frontier(record, fitted)    loops by the predicted remaining gain, on the same frontier
PredictedGain.of(predictor, record, price)    the same as a rule for `model.run` and `sample`
prediction_quality(record, fitted)    how well the remaining gain is foreseen on unseen sequences
loops_against_steps(m, ...)           loops or denoising steps at equal FLOPs: marginal NLL and joint coherence
"""

from analysis.allocation.predictor import (
    GainPredictor,
    PredictedGain,
    feature_rules,
    prediction_quality,
    predictor_frontier,
)
from analysis.allocation.schedule import schedule_frontier, schedules_by_noise
from analysis.allocation.steps import equal_flops_pairs, loops_against_steps

__all__ = [
    "GainPredictor",
    "PredictedGain",
    "equal_flops_pairs",
    "feature_rules",
    "loops_against_steps",
    "prediction_quality",
    "predictor_frontier",
    "schedule_frontier",
    "schedules_by_noise",
]
