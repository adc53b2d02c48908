"""`loopmdm table`, `loopmdm figures` and `loopmdm bench`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from analysis.cli.shared import app, check_folder, err, interruptible, progress_bar, show
from loopmdm_model.errors import UsageError


@app.command()
def table(
    name: Annotated[str, typer.Argument(help="table; `loopmdm table list` shows all")],
    out: Annotated[Path | None, typer.Option(help="folder; default figures/tables")] = None,
) -> None:
    """Measure a table again from the shipped models and print it."""
    from analysis import tables

    if name == "list":
        show(
            ["table", "models", "columns"],
            [(t.name, ",".join(t.models), ",".join(t.columns)) for t in tables.TABLES.values()],
        )
        return
    item = tables.table(name)
    status = err.status(f"measuring {name}") if err.is_terminal else nullcontext()
    with interruptible("the old table is intact"), status:
        frame = item.measure(out or tables.tables_folder())
    show(list(frame.columns), frame.itertuples(index=False))


@app.command()
def figures(
    names: Annotated[list[str] | None, typer.Argument(help="figures; default all")] = None,
    source: Annotated[
        str, typer.Option("--from", help="tables | checkpoints (measure the tables again)")
    ] = "tables",
    out: Annotated[Path, typer.Option(help="folder for pdf, png, svg and json")] = Path("figures/out"),
) -> None:
    """Draw figures from the committed tables, or from the checkpoints."""
    import matplotlib as mpl

    mpl.use("Agg")
    from analysis import figures as registry
    from analysis import tables

    if source not in ("tables", "checkpoints"):
        raise UsageError(f"--from takes tables or checkpoints, got {source!r}")
    chosen = [registry.figure(name) for name in names or registry.FIGURES]
    check_folder(out)
    with interruptible("pictures that were finished are whole, the others as they were"), progress_bar() as bar:
        if source == "checkpoints":
            needed = dict.fromkeys(name for figure in chosen for name in figure.tables)
            for name in bar.track(list(needed), description="tables"):
                tables.table(name).measure(tables.tables_folder())
        for figure in bar.track(chosen, description="figures"):
            figure.draw(out=out)
    show(["figure", "file"], [(figure.name, out / f"{figure.name}.pdf") for figure in chosen])


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="benchmarks; default all")] = None,
) -> None:
    """Measure the speed goals as ratios in one run; exits 1 where one is missed."""
    from analysis.bench import run

    results = run(names)
    show(["benchmark", "measured", "goal", "met"], results)
    if not all(met == "yes" for *_, met in results):
        raise typer.Exit(1)
