"""`loopmdm report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopmdm.analysis.cli.completion import among, model_names
from loopmdm.analysis.cli.shared import LOOK, MODEL, app, check_out, draw_offline, interruptible, opens
from loopmdm.analysis.cli.waiting import progress_bar, working
from loopmdm.model.errors import UsageError

if TYPE_CHECKING:
    from loopmdm.analysis.measures.access import Access


@app.command(rich_help_panel=LOOK, epilog="Example: loopmdm report --out report.html")
@opens()
def report(
    model: Annotated[
        str, typer.Argument(help=f"an explorer of one model alone: {MODEL}", autocompletion=among(model_names))
    ] = "",
    out: Annotated[Path | None, typer.Option(help="the file, .html; default report.html")] = None,
    *,
    how: "Access",
) -> None:
    """Write claims, figures, heads, features and an attention explorer into one file that opens offline.

    Of one model its explorer and head cards. Without a model `--out report.html` is meant, and the shipped models
    are shown.
    """
    out = out or Path("report.html")
    check_out(out, ".html", ".htm")
    draw_offline()
    from loopmdm.analysis.measures.access import Access
    from loopmdm.analysis.numbers.place import on_device
    from loopmdm.analysis.report.page import write_model_report, write_report

    if not model and how != Access(how.device):
        raise UsageError(
            "name a model to --text, --dtype, --set, --revision and --trust-remote-code; "
            "the report of all shipped ones takes --device and --batch-size"
        )
    if model:
        with interruptible(f"{out} is as it was"), working(f"report on {model}"):
            m = how.open(model)
            write_model_report(out, m, how.test_set(m), how)
    else:
        with interruptible(f"{out} is as it was"), on_device(how.device), progress_bar() as bar:
            write_report(out, lambda figures: bar.track(figures, description="figures"))
    print(out)
