"""`loopmdm measure` and `loopmdm claims`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from loopmdm.analysis.cli.shared import app, check_out, err, integer, integers, interruptible, show, values
from loopmdm.model.errors import UsageError, check_count


@app.command()
def measure(
    name: Annotated[str, typer.Argument(help="measure; `loopmdm measure list` shows all, with their options")],
    model: Annotated[str, typer.Argument(help="shipped name, run folder or hub id")] = "",
    n_loops: Annotated[
        str, typer.Option(help="loops to read; loop counts, comma-separated, where it takes several")
    ] = "",
    mask_ratios: Annotated[str, typer.Option(help="shares to mask, comma-separated")] = "",
    n: Annotated[int | None, typer.Option(help="test sequences; puzzles, samples or items")] = None,
    along_sampling: Annotated[
        int | None, typer.Option(help="instead of masks: steps of the model's own samples")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of masks and samples")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="an option of the measure's own, such as n_thresholds=10")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also write a parquet file")] = None,
) -> None:
    """Run one measure on a model's test set, or along its own samples, and print the table."""
    from loopmdm.analysis.measures import MEASURES, fingerprints
    from loopmdm.analysis.measures import measure as run
    from loopmdm.analysis.numbers import frames, provenance
    from loopmdm.model.network.checkpoints import ZOO, resolve

    if name == "list":
        rows = [(item.name, item.on, item.options(), item.what) for item in MEASURES.values()]
        show(["measure", "on", "options", "what"], [(*row[:2], _told(row[2]), row[3]) for row in rows])
        return
    if not model:
        raise UsageError(f"name a model: loopmdm measure {name} MODEL; `loopmdm models` lists the shipped ones")
    asked: dict[str, Any] = {"n": n, "seed": seed, "along_sampling": along_sampling}
    asked |= {"n_loops": _counts(n_loops)} if n_loops else {}
    asked |= {"mask_ratios": [_share(word) for word in mask_ratios.split(",")]} if mask_ratios else {}
    given = {key: value for key, value in asked.items() if value is not None} | values(changes or [])
    check_out(out, ".parquet")
    status = err.status(f"{name} of {model}") if err.is_terminal else nullcontext()
    with interruptible("nothing was written"), status:
        frame = run(name, model, **given)
    if out is not None:
        known = (model,) if resolve(model).parent == ZOO else ()
        options = {name: str(MEASURES[name].options.of(name, given))}
        told = provenance.of_table(name, known, measures=fingerprints([name]), options=options)
        frames.write_table(frame, out, told)
    show(list(frame.columns), frame.itertuples(index=False))


def _told(options: Any) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.asked().items())


def _counts(text: str) -> int | list[int]:
    """One loop count, or several."""
    counts = integers(text, "--n-loops", "1,2,4")
    return counts[0] if len(counts) == 1 else counts


def _share(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise UsageError(f"--mask-ratios takes shares such as 0.25,0.5; got {word!r:.80}") from None


@app.command()
def claims(
    seeds: Annotated[str, typer.Option(help="only claims decided over at least so many seeds")] = "",
) -> None:
    """The paper's claims: what was asked, what was measured, and the verdict; one line each in a pipe."""
    from loopmdm.analysis.exhibits.verdicts import claims_table

    least = check_count("--seeds", integer(seeds, "--seeds", "5"), least=0) if seeds else 0
    frame = claims_table()
    if seeds:
        frame = frame[frame["n_seeds"] >= least]
    columns = ["claim", "task", "verdict", "estimate", "low", "high", "margin", "direction", "n_seeds", "figure",
               "text"]  # fmt: skip
    show(columns, frame[columns].itertuples(index=False))
