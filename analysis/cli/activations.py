"""`loopmdm record`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopmdm.analysis.cli.completion import among, model_names
from loopmdm.analysis.cli.printing import show
from loopmdm.analysis.cli.shared import MEASURE, MODEL, app, interruptible, opens, shares
from loopmdm.analysis.cli.waiting import working
from loopmdm.model.errors import UsageError, check_word

if TYPE_CHECKING:
    from loopmdm.analysis.measures.access import Access


@app.command(
    rich_help_panel=MEASURE, epilog="Example: loopmdm record sudoku-loop store --sites 'loop.*.hook_out' --n 64"
)
@opens()
def record(
    model: Annotated[str, typer.Argument(help=MODEL, autocompletion=among(model_names))],
    folder: Annotated[Path, typer.Argument(help="a new one, or with --resume a half-written one")],
    sites: Annotated[
        str, typer.Option(help="hook names with *, comma-separated; `loopmdm sites MODEL` lists them")
    ] = "loop.*.hook_out",
    positions: Annotated[str, typer.Option(help="masked, clean or all")] = "masked",
    mask_ratios: Annotated[str, typer.Option(help="shares to mask, comma-separated")] = "0.5",
    along_sampling: Annotated[int, typer.Option(help="instead of masks: steps of the model's own samples")] = 0,
    n_loops: Annotated[int | None, typer.Option(help="loops to read; default S_max of training")] = None,
    n: Annotated[int, typer.Option(help="test sequences, or samples")] = 256,
    seed: Annotated[int, typer.Option(help="of masks and samples")] = 0,
    kept_as: Annotated[str, typer.Option(help="float16 or float32")] = "float16",
    resume: Annotated[bool, typer.Option("--resume", help="go on with a half-written store")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it would take, write nothing")] = False,
    *,
    how: "Access",
) -> None:
    """Write activations by loop, layer and position to a folder, for `ActivationStore.open` to read lazily.

    Shards are whole or not there. What has no room on the disk is refused before anything is run.
    """
    from loopmdm.analysis.activations import Wanted, estimate_store
    from loopmdm.analysis.activations import record as write
    from loopmdm.analysis.activations.writing import DTYPES
    from loopmdm.analysis.measures import Case
    from loopmdm.analysis.measures.options import OnMasks

    check_word("--kept-as", kept_as, list(DTYPES))
    options = OnMasks(n_loops, n, seed, tuple(shares(mask_ratios)), along_sampling)
    names = [word.strip() for word in sites.split(",") if word.strip()]
    if not names:
        raise UsageError("--sites names none; give some, such as loop.*.hook_out")
    chosen = Wanted(names, positions)  # pyright: ignore[reportArgumentType]
    with interruptible("add --resume to go on"), working(f"activations of {model}"):
        case = Case.of(model, options=options, access=how)
        if dry_run:
            show(["folder", "bytes"], [(folder, estimate_store(case, chosen, dtype=kept_as))])
            return
        store = write(case, folder, chosen, dtype=kept_as, resume=resume)
    show(["folder", "rows", "sites", "bytes"], [(folder, len(store), len(store.sites), store.n_bytes)])
