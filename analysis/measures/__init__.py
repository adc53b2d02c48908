"""Measures: any of them on any model, from notebook, command line and tables alike.

    measure("mask-attention", "sudoku-loop", n_loops=18)           the test set at three mask ratios
    measure("mask-attention", "sudoku-loop", along_sampling=16)    before the denoising steps of its own samples
    measure("mask-attention", [m, "sotu-base"], batch=b)           models or names, on a batch of one's own
    merge([measure("settled", "sotu-loop", shard=(i, 2)) for i in (1, 2)])    in parts, on several machines
    evaluate("sotu-loop", "zero-shot", [1, 6])                     from the cache if nothing changed

`MEASURES` has them all by name, and `MEASURES[name].options` what each can be asked; registry.py says how to add
one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch

from loopmdm.analysis.measures.access import Access
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.registry import MEASURES, Measure, fingerprints, options_asked, plain
from loopmdm.analysis.measures.shards import measured_part, merge, share_of
from loopmdm.analysis.numbers.parallel import one_thread
from loopmdm.analysis.numbers.store import Question
from loopmdm.model.batching import at_a_time
from loopmdm.model.errors import UsageError, check_model
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.checkpoints import RECORD, need, resolve
from loopmdm.model.sequences import MaskedBatch

__all__ = [
    "MEASURES",
    "Access",
    "Case",
    "Measure",
    "evaluate",
    "fingerprints",
    "measure",
    "merge",
    "options_asked",
    "plain",
    "question",
]

Model = str | HookedLoopMDM


@torch.no_grad()
@one_thread()
def measure(
    name: str,
    models: Model | Sequence[Model],
    n_loops: int | Sequence[int] | None = None,
    *,
    batch: MaskedBatch | None = None,
    access: Access | None = None,
    batch_size: int | None = None,
    shard: tuple[int, int] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """One measure of one model or several, on their test sets or on `batch`.

    Models are any that `open_model` knows, or loaded ones; `access` says how they are opened, and which texts
    stand for a test set. `batch_size` sequences run at a time (None: as `at_a_time` says, or as each function does
    by itself); it takes memory, and changes values by rounding alone.

    Columns `model` and `task` come first. Measures on masks have `nominal_mask_ratio`, or with `along_sampling`
    `step`. `n_units` independent sequences, or documents where they share one, are what errors are over;
    Student's t with n_units - 1 goes with them. `options` are the measure's (`MEASURES[name].options`).

    `shard` (i, n) measures the i-th of n shards of one model's sequences and gives a part, for `merge`.

    >>> df = lm.measure("settled", "sudoku-loop-s4", n=8, mask_ratios=(0.5,))
    >>> df["model"].unique().tolist()
    ['sudoku-loop-s4']
    """
    given = list(models) if isinstance(models, Iterable) and not isinstance(models, str) else [models]
    for model in given:
        if not isinstance(model, str):
            check_model(model, "measure", hooked=True)
    if batch is not None and not isinstance(batch, MaskedBatch):
        raise UsageError(f"batch must be a MaskedBatch (m.mask, mask_tokens), got {batch!r:.60}")
    if not given:
        raise UsageError(f"{name} needs a model; `loopmdm models` lists the shipped ones")
    asked = options if n_loops is None else {"n_loops": n_loops} | options
    access = access or Access()
    with at_a_time(batch_size):
        if shard is not None:
            if len(given) > 1 or batch is not None:
                raise UsageError("a shard is of one model and its test set; give one model, and leave batch= out")
            item = MEASURES[name]
            return measured_part(item, given[0], access, item.options.of(name, asked), share_of(shard))
        frames = [_measured(MEASURES[name], model, batch, access, asked) for model in given]
    return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)


def _measured(
    item: Measure, model: Model, batch: MaskedBatch | None, access: Access, asked: dict[str, Any]
) -> pd.DataFrame:
    options = item.options.of(item.name, asked)
    if batch is not None:
        return _on_batch(item, access.open(model) if isinstance(model, str) else model, batch, options)
    case = Case.of(model, options=options, access=access)
    frame = item.of(case)
    return item.labelled(frame, case, _name(model))


def _on_batch(item: Measure, m: HookedLoopMDM, batch: MaskedBatch, options: Any) -> pd.DataFrame:
    if item.on != "masks":
        raise UsageError(f"{item.name} draws its own masks; leave batch= out")
    case = Case.given(m, batch, options)
    return item.labelled(item.of(case, batch), case, m.model_name)


def _name(model: Model) -> str:
    return model.model_name if isinstance(model, HookedLoopMDM) else str(model)


def question(name: str, measure: str, n_loops: int | Sequence[int] | None = None, **options: Any) -> Question:
    """What is asked of a shipped name, run folder or hub id; UsageError on what does not exist."""
    item = MEASURES[measure]
    asked = options if n_loops is None else {"n_loops": n_loops} | options
    settings = item.options.of(item.name, asked)
    need(resolve(name), RECORD)

    def answer() -> pd.DataFrame:
        with torch.no_grad():
            case = Case.of(str(name), options=settings)
            return item.labelled(item.of(case), case, str(name))

    return Question(name, item.label, [settings.asked()], answer)


def evaluate(name: str, measure: str, n_loops: int | Sequence[int], **options: Any) -> pd.DataFrame:
    """As `measure` of one model by name, from what is kept if neither weights, measure nor options changed."""
    return question(name, measure, n_loops, **options).answer()
