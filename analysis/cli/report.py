"""`loopmdm report`."""

from pathlib import Path
from typing import Annotated

import typer

from loopmdm.analysis.cli.shared import app, check_out, interruptible, progress_bar


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="the file, .html")] = Path("report.html"),
) -> None:
    """Write claims, figures and an attention explorer into one file that opens offline."""
    check_out(out, ".html", ".htm")
    import matplotlib as mpl

    mpl.use("Agg")
    from loopmdm.analysis.report.page import write_report

    with interruptible(f"{out} is as it was"), progress_bar() as bar:
        write_report(out, lambda figures: bar.track(figures, description="figures"))
    print(out)
