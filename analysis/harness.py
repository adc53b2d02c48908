"""Our models inside EleutherAI's evaluation harness (lm-eval), on task files that lie on this machine.

The harness has no plug-in mechanism for models, so ours is handed to it as an object. A masked diffusion model has
no left-to-right likelihood: log-likelihoods are minus the NELBO of the continuation given its context, estimated
with `n_samples` masks, hence lower bounds.

A task file comes from anywhere: its templates are rendered in Jinja's sandbox, and what would load code (metrics
that lm-eval does not have, data sets with scripts) is refused.
"""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from loopmdm.analysis.measures.access import Access
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.quality.questions import fitted
from loopmdm.model.corpora.windows import sliding_windows
from loopmdm.model.diffusion.likelihood import continuation_nelbo, nelbo
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.errors import UsageError
from loopmdm.model.files import is_file

try:
    from lm_eval import utils
    from lm_eval.api.model import LM
except ImportError as error:
    raise UsageError("the harness needs lm-eval; run pip install 'loopmdm[lm-eval]'") from error


class HarnessModel(LM):
    """A text model at a fixed number of loops, as the harness wants to call it."""

    def __init__(self, case: Case, n_loops: int, n_samples: int = 8, steps: int = 64, seed: int = 0):
        super().__init__()
        case.need_text("lm-eval")
        self.case, self.n_loops, self.n_samples, self.steps, self.seed = (
            case,
            n_loops,
            n_samples,
            steps,
            seed,
        )

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """Minus the NELBO of each continuation in nats; contexts lose their beginning where they do not fit.

        Whether greedy decoding would write it is not asked of a masked model: always False.
        """
        pairs = [fitted(self.case, *request.args) for request in requests]
        r = continuation_nelbo(
            self.case.m,
            [prompt for prompt, _ in pairs],
            [continuation for _, continuation in pairs],
            self.n_loops,
            n_samples=self.n_samples,
            seed=self.seed,
        )
        return [(-value, False) for value in (r.per_sequence * r.lengths).tolist()]

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        """Minus the NELBO of each whole text in nats, every token scored once in windows of n_ctx."""
        texts = [self.case.tokenizer.encode(request.args[0]).ids for request in requests]
        length = self.case.m.cfg.n_ctx
        w = sliding_windows(texts, length, length)
        r = nelbo(self.case.m, w.sequences, self.n_loops, n_samples=self.n_samples, seed=self.seed)
        total = np.zeros(len(texts))
        np.add.at(total, w.owners, -(r.per_sequence * r.lengths).numpy())
        return total.tolist()

    def generate_until(self, requests: list) -> list[str]:
        """Text after each context, in the confidence order at temperature 0, up to the first stop string."""
        answers, length = [], self.case.m.cfg.n_ctx
        for index, request in enumerate(requests):
            context, settings = request.args
            room = min(int(settings.get("max_gen_toks", length // 2)), length // 2)
            before = self.case.tokenizer.encode(context).ids[-(length - room) :]
            clues = torch.tensor([[*before, *[-1] * room]])
            r = sample(
                self.case.m, clues=clues, steps=min(self.steps, room), n_loops=self.n_loops,
                order="confidence", temperature=0, seed=self.seed, first_index=index,
            )  # fmt: skip
            text = self.case.tokenizer.decode(r.tokens[0, len(before) :].tolist(), skip_special_tokens=True)
            stops = settings.get("until", [])
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            answers.append(text)
        return answers


def read_task(path: Path) -> dict[str, Any]:
    """A task of the harness (YAML); its data files are looked for beside it."""
    import yaml

    if not is_file(path):
        raise UsageError(f"no task file at {path}; give a YAML task of the harness")
    try:
        task = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not YAML of plain values: {error!s:.200}") from error
    if not isinstance(task, dict) or "task" not in task:
        raise UsageError(f"{path} describes no task (a key `task` is expected)")
    options = task.get("dataset_kwargs") or {}
    if not isinstance(options, dict):
        raise UsageError(f"{path}: dataset_kwargs must be a table, got {options!r:.80}")
    _check_no_code(task, options, path.name)
    files = options.get("data_files", {})
    for split, name in files.items() if isinstance(files, dict) else ():
        beside = path.parent / str(name)
        if not beside.is_file():
            raise UsageError(f"{path.name}: no data file {beside}; put it beside the task")
        files[split] = str(beside.resolve())
    return task


def _check_no_code(task: dict[str, Any], options: dict[str, Any], name: str) -> None:
    """UsageError where a task asks for code: a metric that is fetched, a data set with a script."""
    import lm_eval.api.metrics  # noqa: F401 - registers the metrics
    from lm_eval.api.registry import metric_registry

    listed = task.get("metric_list") or []
    entries = [
        entry if isinstance(entry, dict) else {} for entry in (listed if isinstance(listed, list) else [{}])
    ]
    for entry in entries:
        metric = entry.get("metric")
        if entry.get("hf_evaluate") or not isinstance(metric, str) or metric not in metric_registry:
            raise UsageError(
                f"{name}: metric {metric!r:.80} is none of lm-eval's own; others are code and not loaded"
            )
    if options.get("trust_remote_code"):
        raise UsageError(f"{name}: trust_remote_code runs a data set's script; give data files beside the task")


@contextmanager
def sandboxed(name: str) -> Iterator[None]:
    """Templates of the task file `name` run in Jinja's sandbox inside; UsageError if one fails or reaches out."""
    inside = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    inside.filters |= utils.env.filters
    before, utils.env = utils.env, inside
    try:
        yield
    except SecurityError as error:
        raise UsageError(f"{name}: a template reaches for Python itself ({error}); take that out") from error
    except TemplateError as error:
        raise UsageError(f"{name}: a template fails ({error}); mend it") from error
    finally:
        utils.env = before


def run_harness(
    name: str,
    path: Path,
    n_loops: int | None = None,
    n_samples: int = 8,
    steps: int = 64,
    limit: int | None = None,
    access: Access | None = None,
) -> pd.DataFrame:
    """Run a model, opened as `access` says, on one task file; a row a metric, as the harness reports it."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    task, case = read_task(path), Case.of(name, access=access)
    model = HarnessModel(case, n_loops or case.m.cfg.max_loops, n_samples, steps)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with sandboxed(path.name), redirect_stdout(io.StringIO()):  # results are ours to print
        found: Any = simple_evaluate(
            model, tasks=[task], limit=limit, bootstrap_iters=1000, log_samples=False,
            task_manager=TaskManager(include_defaults=False),
        )  # fmt: skip
    rows = []
    for label, results in found["results"].items():
        for key, value in results.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
                error = results.get(f"{metric}_stderr,{kind}")
                error = float(error) if isinstance(error, int | float) else float("nan")
                n = found["n-samples"][label]["effective"]
                rows.append((name, label, model.n_loops, n_samples, metric, kind, float(value), error, n))
    columns = ["model", "task", "n_loops", "n_samples", "metric", "filter", "value", "standard_error", "n"]
    return pd.DataFrame(rows, columns=columns)
