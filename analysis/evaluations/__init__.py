"""What a trained model can do, by number of loops: tidy tables with errors, cached by content.

`nll` test NELBO; `noise-level` where looping gains; `zero-shot` NELBO on corpora it never saw; `excess-kl` over
the exact posterior of `tree` and `markov`, by hops; `solve-rate` of Sudoku by clue count and generation order;
`generative` perplexity of samples under a judge, by denoising steps; `multiple-choice` and `word-problems` on
benchmarks. An entry of the cache is named by the hash of the weights and of what was asked.
"""

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import frames
from analysis.evaluations import generation, likelihoods, questions, solving
from analysis.evaluations.subject import Subject
from loopmdm_model.checkpoints import RECORD, need, resolve, weights_hash
from loopmdm_model.data.fetch import cache_folder
from loopmdm_model.errors import UsageError, check_count, unknown_name
from loopmdm_model.evaluation import task_of
from loopmdm_model.files import read_json, write_atomic

VERSION = 3
"""Raised when a measure changes, so that older results are not taken for its own."""

KEPT = "evaluations"
_keeping: set[Path] = set()

MEASURES: dict[str, Callable[..., pd.DataFrame]] = {
    "nll": likelihoods.nll,
    "noise-level": likelihoods.noise_level,
    "zero-shot": likelihoods.zero_shot,
    "excess-kl": likelihoods.excess_kl,
    "solve-rate": solving.solve_rate,
    "generative": generation.generative,
    "multiple-choice": questions.multiple_choice,
    "word-problems": questions.word_problems,
}


def evaluate(name: str, measure: str, n_loops: list[int], **options: Any) -> pd.DataFrame:
    """One measure of one model at the loop counts `n_loops`; from the cache if nothing changed.

    `options` are the measure's own, such as n_samples= (masks a sequence) or n_clues=; see its docstring.
    """
    if measure not in MEASURES:
        raise unknown_name("measure", measure, MEASURES)
    counts = sorted({check_count("n_loops", count) for count in n_loops})
    settings = _settings(measure, options)
    task = task_of(read_json(need(resolve(name), RECORD)))

    def measured() -> pd.DataFrame:
        return MEASURES[measure](Subject.load(str(name)), counts, **options)

    frame = cached(name, [task, measure, counts, settings], measured)
    frame.insert(0, "model", str(name))
    return frame


def cached(name: str, asked: list[Any], compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """`compute()`, or what it gave before for the same weights and the same `asked` (plain JSON).

    What was measured of a run that is kept without weights lies in its folder.
    """
    folder = resolve(name)
    key = json.dumps([VERSION, weights_hash(folder), *asked])
    entry = f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.parquet"
    if (folder / KEPT / entry).is_file():
        return frames.read_table(folder / KEPT / entry)
    path = cache_folder() / "evaluations" / entry
    if not path.is_file():
        frames.write_table(compute(), path, {"asked": key})
    if folder in _keeping:
        write_atomic(folder / KEPT / entry, lambda temporary: shutil.copyfile(path, temporary))
    return frames.read_table(path)


@contextmanager
def keeping(folder: Path) -> Iterator[None]:
    """What is measured of the model in `folder` inside is also kept beside it."""
    _keeping.add(folder)
    try:
        yield
    finally:
        _keeping.discard(folder)


def _settings(measure: str, options: dict[str, Any]) -> dict[str, Any]:
    """All options of a measure, given or default; UsageError on one it does not have."""
    _, _, *own = inspect.signature(MEASURES[measure]).parameters.values()
    known = {parameter.name: parameter.default for parameter in own}
    for key in options:
        if key not in known:
            raise UsageError(f"{measure} takes no {key}; it takes {', '.join(known)}")
    return known | options
