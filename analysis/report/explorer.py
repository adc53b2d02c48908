"""The attention explorer: an HTML document that needs nothing but itself."""

import html
import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup
from torch import Tensor

from loopmdm.analysis.report.curves import signed, swatch
from loopmdm.analysis.report.data import LEVELS, Run, run_of
from loopmdm.model.errors import UsageError
from loopmdm.model.files import write_atomic
from loopmdm.model.hooks.cache import LoopCache
from loopmdm.model.sequences import MaskedBatch

SCRIPTS = ("data.js", "draw.js", "panel.js", "explorer.js")
STYLES = ("page.css", "cards.css", "explorer.css")
HEIGHT = 1180
"""Pixels of the frame in a notebook; what is longer scrolls inside."""


@cache
def asset(name: str) -> str:
    """The text of a file that ships beside this module."""
    return (resources.files("loopmdm.analysis.report") / "assets" / name).read_text(encoding="utf-8")


def as_json(value: object) -> Markup:
    """JSON for a script element: no `<`, `>` or `&`, so that no token can end it or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def render(template: str, **values: object) -> str:
    """A template with the page's styles and scripts; everything but those and JSON is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    values |= {"swatch": swatch, "signed": signed}
    values |= {"styles": [Markup(asset(name)) for name in STYLES]}
    values |= {"scripts": [Markup(asset(name)) for name in SCRIPTS]}
    return environment.get_template(template).render(**values)


def payload(inputs: Iterable[tuple[str, Sequence[Run]]]) -> Markup:
    """Inputs (title, runs on the same tokens) as the JSON that the scripts read.

    UsageError if runs of one input saw other tokens.
    """
    found = []
    for title, runs in inputs:
        first = runs[0]
        for run in runs:
            if run.tokens != first.tokens:
                raise UsageError(
                    f"{run.model} ran on other tokens than {first.model}; compare runs on the same masked sequence"
                )
        names = [run.model for run in runs]
        if len(set(names)) < len(names):
            raise UsageError(f"runs have the same name ({', '.join(names)}); give each one with labels=")
        truth = next((run.truth for run in runs if run.truth is not None), None)
        shared = {"title": title, "tokens": first.tokens, "truth": truth, "masked": first.masked.tolist()}
        found.append(shared | {"board": first.board, "runs": [run.payload() for run in runs]})
    return as_json({"levels": LEVELS, "inputs": found})


class Explorer:
    """Attention maps of one or more runs on one sequence; shown by JupyterLab, written by `write`."""

    def __init__(self, title: str, runs: Sequence[Run]):
        self.title, self.runs = title, tuple(runs)
        self._json = payload([(title, self.runs)])

    @property
    def html(self) -> str:
        """The whole document."""
        return render("alone.html", title=self.title, data=self._json, heads=None)

    def write(self, path: Path | str) -> None:
        """Write the document to a file, whole or not at all."""
        write_atomic(Path(path), lambda temporary: temporary.write_text(self.html, encoding="utf-8"))

    def _repr_html_(self) -> str:
        """A frame that holds the document; scripts run in it, nothing else of the notebook is in reach."""
        return (
            f'<iframe title="{html.escape(self.title)}" sandbox="allow-scripts" '
            f'style="width:100%;height:{HEIGHT}px;border:0" srcdoc="{html.escape(self.html)}"></iframe>'
        )

    def __repr__(self) -> str:
        """Title, models and how to see it outside a notebook."""
        return f"Explorer({self.title}: {', '.join(run.model for run in self.runs)}); .write(path) makes it a page"


def explore(
    *caches: LoopCache,
    clean: MaskedBatch | Tensor | None = None,
    sequence: int = 0,
    labels: Sequence[str] | None = None,
) -> Explorer:
    """Look at the attention of cached runs: any loop, layer and head, two settings side by side, their difference.

    A notebook shows it; a script makes a page of it: `explore(cache).write("page.html")`.

    `clean` is the MaskedBatch that was run, or its clean token ids; with it the read-outs show p(true). Several
    caches of the same tokens (two models, or with and without a hook) are compared under their `labels`.

    >>> _, cache = m.run_with_cache(b, n_loops=4)
    >>> page = lm.explore(cache, clean=b)
    """
    if not caches:
        raise UsageError("explore takes the cache of run_with_cache")
    if not isinstance(labels, list | tuple | None):
        raise UsageError(f"labels must be a list of names, got {labels!r:.60}")
    if labels is not None and len(labels) != len(caches):
        raise UsageError(f"labels names {len(labels)} runs, but there are {len(caches)} caches; name each once")
    names = labels or [""] * len(caches)
    runs = [run_of(item, clean, sequence, name) for item, name in zip(caches, names, strict=True)]
    hidden = int(runs[0].masked.sum())
    return Explorer(f"{len(runs[0].tokens)} tokens, {hidden} masked", runs)
