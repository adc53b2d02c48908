"""What a trained model can do, by number of loops: tidy tables with errors, cached by content.

`nll` test NELBO; `noise-level` where looping gains; `zero-shot` NELBO on corpora it never saw; `excess-kl` over
the exact posterior of `tree` and `markov`, by hops; `solve-rate` of Sudoku by clue count and generation order;
`generative` perplexity of samples under a judge, by denoising steps; `multiple-choice` and `word-problems` on
benchmarks. Results are kept by weights, question and edition of the measure (`loopmdm.analysis.numbers.store`).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from loopmdm.analysis.measures.quality import generation, likelihoods, questions, solving
from loopmdm.analysis.measures.quality.subject import Subject
from loopmdm.analysis.numbers.editions import Edition
from loopmdm.analysis.numbers.store import Question
from loopmdm.model.errors import UsageError, check_count, unknown_name
from loopmdm.model.files import read_json
from loopmdm.model.network.checkpoints import RECORD, need, resolve
from loopmdm.model.tasks.test_sets import task_of


@dataclass(frozen=True)
class Evaluation(Edition):
    """`run` takes a subject, loop counts and options of its own."""

    run: Callable[..., pd.DataFrame]


MEASURES = {
    "nll": Evaluation(likelihoods.nll),
    "noise-level": Evaluation(likelihoods.noise_level),
    "zero-shot": Evaluation(likelihoods.zero_shot, goes_by=likelihoods.zero_shot_corpora),
    "excess-kl": Evaluation(likelihoods.excess_kl),
    "solve-rate": Evaluation(solving.solve_rate),
    "generative": Evaluation(generation.generative),
    "multiple-choice": Evaluation(questions.multiple_choice),
    "word-problems": Evaluation(questions.word_problems),
}


def evaluate(name: str, measure: str, n_loops: list[int], **options: Any) -> pd.DataFrame:
    """One measure of one model at the loop counts `n_loops`; from the cache if nothing changed.

    `options` are the measure's own, such as n_samples= (masks a sequence) or n_clues=; see its docstring.
    """
    frame = question(name, measure, n_loops, **options).answer()
    frame.insert(0, "model", str(name))
    return frame


def question(name: str, measure: str, n_loops: list[int], **options: Any) -> Question:
    """What `evaluate` asks; UsageError on a measure, loop count or option that does not exist."""
    if measure not in MEASURES:
        raise unknown_name("measure", measure, MEASURES)
    counts = sorted({check_count("n_loops", count) for count in n_loops})
    settings = _settings(measure, options)
    task = task_of(read_json(need(resolve(name), RECORD)))

    def measured() -> pd.DataFrame:
        return MEASURES[measure].run(Subject.load(str(name)), counts, **options)

    return Question(name, measure, [task, counts, settings], measured)


def _settings(measure: str, options: dict[str, Any]) -> dict[str, Any]:
    """All options of a measure, given or default; UsageError on one it does not have."""
    _, _, *own = inspect.signature(MEASURES[measure].run).parameters.values()
    known = {parameter.name: parameter.default for parameter in own}
    for key in options:
        if key not in known:
            raise UsageError(f"{measure} takes no {key}; it takes {', '.join(known)}")
    return known | options
