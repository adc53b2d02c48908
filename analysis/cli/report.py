"""`loopmdm report`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from analysis.cli.shared import app, interruptible, progress_bar
from loopmdm_model.errors import UsageError


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="the file, .html")] = Path("report.html"),
) -> None:
    """Write claims, figures and an attention explorer into one file that opens offline."""
    _check(out)
    import matplotlib as mpl

    mpl.use("Agg")
    from analysis.report.page import write_report

    with interruptible(f"{out} is as it was"), progress_bar() as bar:
        write_report(out, lambda figures: bar.track(figures, description="figures"))
    print(out)


def _check(out: Path) -> None:
    """Refuse what cannot be written before any work is done."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder; give --out the name of a .html file")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out takes a .html file, got {out}")
    above = next(path for path in out.absolute().parents if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise PermissionError(f"cannot write into {above}; give another --out")
