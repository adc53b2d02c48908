"""A dictionary with its record: trained on validation sequences, scored on test ones beside an untrained model's.

    dictionary, scores = make_dictionary(Case.of("sudoku-loop"), Shape("sae", 256), Training(steps=3000))
    dictionary.save("folder")

The record (`origin.told`) says what it was trained on and how, the versions, and in `scores` what it is worth: by
arm (trained, untrained) and metric `value` and `standard_error`, a number a loop or one for all, and `n`; metrics
as in `report`.
"""

from dataclasses import replace
from time import process_time
from typing import Any

import pandas as pd

from loopmdm.analysis.activations.catching import LOOPS
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.mechanism.dictionaries.coder import Dictionary, Shape
from loopmdm.analysis.measures.mechanism.dictionaries.report import Reading, dictionary_scores
from loopmdm.analysis.measures.mechanism.dictionaries.training import Training, train_dictionary
from loopmdm.analysis.measures.options import RATIOS
from loopmdm.analysis.measures.twins import untrained
from loopmdm.analysis.numbers.provenance import PACKAGES
from loopmdm.model.errors import UsageError
from loopmdm.model.network.checkpoints import is_shipped, model_hash, resolve
from loopmdm.model.training.record import commit, versions

N_SCORED = 256
DIGITS = 6
"""Significant digits of a record's numbers."""
KEPT = (
    "explained_variance", "loss_intact", "loss_spliced", "loss_mean", "loss_recovered", "kl_recovered", "l0",
    "dead", "born", "last", "turn", "matched", "matched_shuffled",
)  # fmt: skip
"""Metrics that a record keeps."""


def make_dictionary(
    case: Case, shape: Shape, training: Training, layer: int | None = None, n_scored: int = N_SCORED
) -> tuple[Dictionary, pd.DataFrame]:
    """Train one over all loops of a looped layer (default: the states after each loop), and score it.

    The frame has `arm` (trained, untrained) beside what `dictionary_scores` gives. UsageError for a layer that is
    not looped.
    """
    reading = Reading(case, n_scored=n_scored, sites=sites_of(case, layer))
    arms = {"trained": case.m, "untrained": untrained(case.m, training.seed)}
    made, seconds, frames, b = {}, {}, [], reading.scored()
    for arm, m in arms.items():
        rows, start = reading.training(m), process_time()
        made[arm] = train_dictionary(rows, shape, training)
        seconds[arm] = round(process_time() - start, 1)
        frames.append(dictionary_scores(m, b, made[arm]).assign(arm=arm))
    scores = pd.concat(frames, ignore_index=True)[["arm", "loop", "metric", "value", "standard_error", "n"]]
    found = made["trained"]
    looped = case.m.cfg.layers("loop")
    told = {
        "layer": looped[-1] if layer is None else layer,
        **found.origin.told,
        "cpu_seconds": seconds["trained"],
        "data": _data(case, len(b), b.mask_ratio),
        "scores": _told(scores),
        "versions": versions(PACKAGES),
        "commit": commit(),
    }
    if is_shipped(case.m.model_name):
        told["model_files"] = model_hash(resolve(case.m.model_name))
    found.origin = replace(found.origin, told=told)
    return found, scores


def sites_of(case: Case, layer: int | None) -> str:
    """The sites of a looped layer's output at all loops; UsageError where no layer, or not this one, is looped."""
    looped = list(case.m.cfg.layers("loop"))
    if not looped:
        raise UsageError("a dictionary over loops needs a looped layer; this model has none: give loop=(first, n)")
    if layer is None:
        return LOOPS
    if layer not in looped:
        raise UsageError(f"layer {layer} is not looped; the looped layers are {', '.join(map(str, looped))}")
    return f"loop.*.blocks.{layer}.hook_resid_post"


def command(dictionary: Dictionary) -> str:
    """What makes it again, by its record; --out is left to who calls it."""
    told, shape = dictionary.origin.told, dictionary.shape
    training, trained = told["training"], told["data"]["trained_on"]
    words = f"loopmdm dictionary {dictionary.origin.model.name} --kind {shape.kind} --features {shape.n_features}"
    words += f" -k {shape.k} --steps {training['steps']} --n-loops {dictionary.origin.n_loops} --n {trained['n']}"
    layer = "" if dictionary.origin.sites[0].endswith("hook_out") else f" --layer {told['layer']}"
    return f"{words} --seed {training['seed']}{layer}"


def _data(case: Case, n_scored: int, mask_ratio: float) -> dict[str, Any]:
    grouped = case.m.facts.grouped
    trained = {"split": "validation", "n": min(case.n, len(case.validation.tokens)), "seed": case.seed}
    trained |= {"mask_ratios": list(RATIOS)} if grouped else {}
    scored = (
        {"split": "test", "n": n_scored, "mask_ratio": mask_ratio} if grouped else {"split": "test", "n": n_scored}
    )
    return {"task": case.test.label, "trained_on": trained, "scored_on": scored}


def _told(scores: pd.DataFrame) -> dict[str, Any]:
    """Scores in plain JSON; a metric of all loops is one number, NaN is null."""
    found: dict[str, Any] = {}
    kept = scores[scores["metric"].isin(KEPT)]
    for (arm, metric), part in kept.groupby(["arm", "metric"], sort=False):
        lists = {name: [_short(value) for value in part[name]] for name in ("value", "standard_error")}
        lists["n"] = part["n"].tolist() if part["n"].nunique() > 1 else [int(part["n"].iloc[0])]
        found.setdefault(str(arm), {})[str(metric)] = {
            name: values[0] if len(values) == 1 else values for name, values in lists.items()
        }
    return found


def _short(value: float) -> float | None:
    return None if pd.isna(value) else float(f"{value:.{DIGITS}g}")
