"""The report: what this is, claims with their verdicts, the attention explorer, heads, features, every
figure; one file.

All pictures and all data are inside; the file's own content policy forbids it to load anything.
"""

import base64
import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure as MatplotlibFigure
from PIL import Image

from loopmdm.analysis.exhibits import EXHIBITS, Exhibit, by_theme
from loopmdm.analysis.exhibits import verdicts as claims
from loopmdm.analysis.exhibits.measuring import check_stored
from loopmdm.analysis.measures.access import Access
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.numbers import provenance
from loopmdm.analysis.plots.style import style
from loopmdm.analysis.report.explorer import payload, render
from loopmdm.analysis.report.features import shipped_pages
from loopmdm.analysis.report.heads import measured_cards, shown_cards
from loopmdm.analysis.report.inputs import inputs, inputs_of, models_here
from loopmdm.model.files import write_atomic
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.tasks.test_sets import TestSet
from loopmdm.model.training.record import commit, versions

WIDTH = 900
"""CSS pixels of a figure of full page width."""
THUMBNAIL = (180, 110)
"""CSS pixels at most, width and height."""


@dataclass(frozen=True)
class Picture:
    """A drawn figure: `source` and `thumbnail` are data addresses, sizes CSS pixels; `alt` says what is seen."""

    name: str
    finding: str
    source: str
    thumbnail: str
    width: int
    height: int
    alt: str
    caption: str


def picture(figure: Exhibit) -> Picture:
    """Draw a figure from its tables, as lossless WebP: less than half of a PNG."""
    drawn = figure.draw()
    inches = drawn.get_size_inches()
    width = round(WIDTH * min(1.0, inches[0] / 6.9))
    image = _image(drawn)
    small = image.copy()
    small.thumbnail((2 * THUMBNAIL[0], 2 * THUMBNAIL[1]))  # twice the size, for dense screens
    sources = _address(image, lossless=True, method=3), _address(small, quality=60)
    height = round(width * inches[1] / inches[0])
    return Picture(figure.name, figure.finding, *sources, width, height, figure.alt(drawn), figure.text)


def _image(drawn: MatplotlibFigure) -> Image.Image:
    buffer = io.BytesIO()
    with style():
        drawn.savefig(buffer, format="png")
    plt.close(drawn)
    return Image.open(buffer).convert("RGB")


def _address(image: Image.Image, **how: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="webp", **how)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def claim_rows() -> list[dict[str, str]]:
    """The claims table, as it is shown."""
    asked = {claim.name: claim.estimand for claim in claims.load_claims()}
    rows = []
    for row in claims.claims_table().itertuples():
        known = pd.notna(row.estimate)
        interval = f"({_number(row.low)} to {_number(row.high)}) " if pd.notna(row.low) else ""
        rows.append({
            "text": row.text, "estimand": asked[row.claim], "task": row.task, "verdict": row.verdict,
            "estimate": _number(row.estimate), "interval": f"{interval}{row.unit}" if known else "",
            "claimed": f"{row.direction} {_number(row.margin)}", "seeds": str(row.n_seeds) if known else "–",
            "why": row.why if row.verdict in (claims.UNDECIDED, claims.UNTESTABLE) else "", "figure": row.figure,
        })  # fmt: skip
    return rows


def _number(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3g}".replace("-", "−")


def _counts(rows: list[dict[str, str]]) -> str:
    counts = [(kind, sum(row["verdict"] == kind for row in rows)) for kind in claims.VERDICTS]
    return ", ".join(f"{n} {'are' if n != 1 else 'is'} {kind}" for kind, n in counts if n)


def report(progress: Callable[[list[Exhibit]], Iterable[Exhibit]] = iter) -> str:
    """The whole page as HTML; `progress` wraps the list of figures."""
    check_stored(dict.fromkeys(name for figure in EXHIBITS.values() for name in figure.tables))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rows, looked_at = claim_rows(), inputs()
        heads, features = shown_cards(), shipped_pages()
        pictures = [picture(figure) for figure in progress(list(chain(*by_theme().values())))]
    drawn = {shown.name: shown for shown in pictures}
    notes = list(dict.fromkeys(str(item.message) for item in said))
    for note in notes:  # each once, on the page and here
        warnings.warn(note, stacklevel=2)
    return render(
        "page.html",
        claims=rows,
        counts=_counts(rows),
        names=set(drawn),
        data=payload(looked_at),
        models=", ".join(dict.fromkeys(run.model for _, runs in looked_at for run in runs)),
        heads=heads,
        features=features,
        figures=pictures,
        themes={theme: [drawn[figure.name] for figure in shown] for theme, shown in by_theme().items()},
        notes=notes,
        commit=commit() or "unknown",
        versions=", ".join(f"{name} {number}" for name, number in versions(provenance.PACKAGES).items()),
        hashes=provenance.model_hashes(tuple(models_here())),
    )


def write_model_report(out: Path, m: HookedLoopMDM, test: TestSet, access: Access | None = None) -> None:
    """Write an attention explorer of one model on three of its sequences, or one's own, and cards of its heads.

    Whole or not at all; where cards are not defined for a model the page says why.
    """
    m.facts.need("masks", by="the report")
    m.facts.warn_beyond(0.5, "the report")
    source = ", ".join(m.record[key] for key in ("source", "licence") if m.record.get(key))
    title = f"{m.model_name} ({source})" if source else m.model_name
    heads = measured_cards(Case(m, test, access=access or Access()))
    page = render("alone.html", title=title, data=payload(inputs_of(m, test.sequences)), heads=heads)
    write_atomic(out, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def write_report(out: Path, progress: Callable[[list[Exhibit]], Iterable[Exhibit]] = iter) -> None:
    """Write the page to `out`, whole or not at all."""
    page = report(progress)
    write_atomic(out, lambda temporary: temporary.write_text(page, encoding="utf-8"))
