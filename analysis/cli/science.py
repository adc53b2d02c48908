"""`loopmdm measure` and `loopmdm claims`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from loopmdm.analysis.cli.shared import app, check_out, err, integers, interruptible, show
from loopmdm.model.errors import UsageError


@app.command()
def measure(
    name: Annotated[str, typer.Argument(help="measure; `loopmdm measure list` shows all")],
    model: Annotated[str, typer.Argument(help="shipped name, run folder or hub id")] = "",
    n_loops: Annotated[int | None, typer.Option(help="loops to read; default S_max")] = None,
    mask_ratios: Annotated[str, typer.Option(help="shares to mask, comma-separated")] = "0.25,0.5,0.75",
    n: Annotated[int, typer.Option(help="test sequences")] = 256,
    along_sampling: Annotated[int, typer.Option(help="instead of masks: steps of the model's own samples")] = 0,
    seed: Annotated[int, typer.Option(help="of masks and samples")] = 0,
    out: Annotated[Path | None, typer.Option(help="also write a parquet file")] = None,
) -> None:
    """Run one measure on a model's test set, or along its own samples, and print the table."""
    from loopmdm.analysis import measures
    from loopmdm.analysis.numbers import frames, provenance
    from loopmdm.analysis.numbers.editions import fingerprints
    from loopmdm.model.network.checkpoints import ZOO, resolve

    if name == "list":
        show(["measure", "what", "on"], [(item.name, item.what, item.on) for item in measures.MEASURES.values()])
        return
    if not model:
        raise UsageError(f"name a model: loopmdm measure {name} MODEL; `loopmdm models` lists the shipped ones")
    ratios = [_share(word) for word in mask_ratios.split(",")]
    check_out(out, ".parquet")
    status = err.status(f"{name} of {model}") if err.is_terminal else nullcontext()
    with interruptible("nothing was written"), status:
        frame = measures.measure(name, model, n_loops, ratios, n, along_sampling, seed)
    if out is not None:
        known = (model,) if resolve(model).parent == ZOO else ()
        frames.write_table(frame, out, provenance.of_table(name, known, measures=fingerprints([name])))
    show(list(frame.columns), frame.itertuples(index=False))


def _share(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise UsageError(f"--mask-ratios takes shares such as 0.25,0.5; got {word!r}") from None


@app.command()
def claims(
    seeds: Annotated[str, typer.Option(help="only claims decided over at least so many seeds")] = "",
) -> None:
    """The paper's claims: what was asked, what was measured, and the verdict; one line each in a pipe."""
    from loopmdm.analysis.exhibits.verdicts import claims_table

    frame = claims_table()
    if seeds:
        frame = frame[frame["n_seeds"] >= integers(seeds, "--seeds", "5")[0]]
    columns = ["claim", "task", "verdict", "estimate", "low", "high", "margin", "direction", "n_seeds", "figure",
               "text"]  # fmt: skip
    show(columns, frame[columns].itertuples(index=False))
