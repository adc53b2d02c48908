"""`loopmdm table`, `loopmdm figures` and `loopmdm bench`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from loopmdm.analysis.cli.completion import among, figure_names, table_names
from loopmdm.analysis.cli.printing import show, show_frame
from loopmdm.analysis.cli.shared import (
    BATCH,
    DEVICE,
    MAINTAIN,
    MEASURE,
    app,
    check_folder,
    draw_offline,
    interruptible,
)
from loopmdm.analysis.cli.waiting import progress_bar, say, working
from loopmdm.model.errors import UsageError, check_word
from loopmdm.model.places import figures_folder


@app.command(rich_help_panel=MEASURE, epilog="Example: loopmdm table settled")
def table(
    name: Annotated[
        str, typer.Argument(help="table; `loopmdm table list` shows all", autocompletion=among(table_names))
    ],
    out: Annotated[
        Path | None, typer.Option(help="folder; default figures/tables in a checkout, else the cache")
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "cpu",
    batch_size: Annotated[int | None, typer.Option(help=BATCH)] = None,
) -> None:
    """Measure a table again from the shipped models and print it."""
    from loopmdm.analysis.exhibits import tables
    from loopmdm.analysis.exhibits.measuring import all_tables, check_weights, measure_one
    from loopmdm.analysis.exhibits.measuring import table as find
    from loopmdm.model.network.checkpoints import check_device

    if name == "list":
        show(
            ["table", "models", "measures", "columns"],
            [(t.name, t.models, ",".join(t.measures), ",".join(t.columns)) for t in all_tables().values()],
        )
        return
    find(name)
    place, folder = str(check_device(device)), out or tables.measured_folder()
    check_weights([name])
    check_folder(folder)
    say(f"measuring {name} into {folder}, {tables.HOW_LONG}")
    with interruptible("the old table is intact"), working(f"measuring {name}"):
        frame = measure_one(name, folder, place, batch_size)
    show_frame(frame)


@app.command(rich_help_panel=MEASURE, epilog="Example: loopmdm figures mask-to-mask-by-loop --out somewhere")
def figures(
    names: Annotated[
        list[str] | None, typer.Argument(help="figures; default all", autocompletion=among(figure_names))
    ] = None,
    source: Annotated[
        str, typer.Option("--from", help="tables | checkpoints (measure the tables again)")
    ] = "tables",
    out: Annotated[
        Path | None, typer.Option(help="folder for pdf, png, svg and json; default figures/out in a checkout")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="draw anew and compare with --out and what is committed; write nothing")
    ] = False,
    device: Annotated[str, typer.Option(help=f"with --from checkpoints, {DEVICE}")] = "cpu",
    batch_size: Annotated[int | None, typer.Option(help=f"with --from checkpoints, {BATCH}")] = None,
) -> None:
    """Draw figures from the tables that are stored, or measure these again from the checkpoints.

    Without names, figures that this commit has drawn already from the same tables are left as they are.
    """
    draw_offline()
    from loopmdm.analysis import exhibits as registry
    from loopmdm.analysis.exhibits.measuring import check_stored, check_weights, measure_all
    from loopmdm.analysis.exhibits.tables import HOW_LONG, measured_folder
    from loopmdm.model.network.checkpoints import check_device

    check_word("--from", source, ("tables", "checkpoints"))
    if source == "tables" and (device != "cpu" or batch_size is not None):
        raise UsageError("figures from tables run no model; add --from checkpoints to --device and --batch-size")
    place = str(check_device(device))
    chosen = [registry.EXHIBITS[name] for name in names or registry.EXHIBITS]
    if check:
        if source != "tables":
            raise UsageError("--check compares what the committed tables give; leave --from out")
        _check(names, out or figures_folder() / "out")
        return
    out, needed = _pictures(out), list(dict.fromkeys(name for figure in chosen for name in figure.tables))
    if source == "tables":
        check_stored(needed, " ".join(["loopmdm figures", *(names or ()), "--from checkpoints"]))
    check_folder(out)
    if source == "checkpoints":
        check_weights(needed)
        say(f"measuring {len(needed)} tables into {measured_folder()}, {HOW_LONG}")
    with interruptible("pictures that were finished are whole, the others as they were"), progress_bar() as bar:
        if source == "checkpoints":
            for _ in bar.track(measure_all(needed, 0, place, batch_size), total=len(needed), description="tables"):
                pass
        # what is named is drawn anew
        left = [figure.name for figure in chosen if names or not figure.is_drawn(out)]
        for _ in bar.track(registry.draw_all(left, out), total=len(left), description="figures"):
            pass
    show(["figure", "file"], [(figure.name, out / f"{figure.name}.pdf") for figure in chosen])


def _pictures(out: Path | None) -> Path:
    """Where pictures go: into the checkout if that is where one works, else only where asked."""
    if out is None and Path("figures").resolve() != figures_folder().resolve():
        raise UsageError("give --out FOLDER for the pictures; only in the checkout there is a default")
    return out or Path("figures/out")


def _check(names: list[str] | None, out: Path) -> None:
    """Print what differs, a line each, and exit with 1; without names the generated pages are held, too."""
    from loopmdm.analysis.exhibits import EXHIBITS, gallery, pages

    root, chosen = gallery.repository(), list(names or EXHIBITS)
    with interruptible("nothing was written"), progress_bar() as bar:
        found = gallery.outdated(chosen)
        for name in bar.track(chosen, description="checking"):
            found += gallery.changed([name], out, root / "figures" / "gallery")
        found += [] if names else pages.stale_pages(root)
    for line in found:
        print(line)
    if found:
        raise typer.Exit(1)


@app.command(rich_help_panel=MAINTAIN, epilog="Example: loopmdm gallery")
def gallery() -> None:
    """Write figures/gallery and the generated pages and blocks anew, in a checkout."""
    draw_offline()
    from loopmdm.analysis.exhibits import gallery as pictures

    with interruptible("files that were finished are whole, the others as they were"):
        pictures.write_gallery(pictures.repository())


@app.command(rich_help_panel=MAINTAIN, epilog="Example: loopmdm bench forward")
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="benchmarks; default all")] = None,
) -> None:
    """Measure the speed goals as ratios in one run; exits 1 where one is missed."""
    from loopmdm.analysis.exhibits.gallery import repository

    sys.path.insert(0, str(repository()))
    from tests.bench import run

    results = run(names)
    show(["benchmark", "measured", "goal", "met"], results)
    if any(met == "NO" for *_, met in results):
        raise typer.Exit(1)
