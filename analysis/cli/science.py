"""`loopmdm measure` and `loopmdm claims`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopmdm.analysis.cli.completion import among, measure_names, model_names
from loopmdm.analysis.cli.printing import show, show_frame
from loopmdm.analysis.cli.shared import (
    LOOK,
    MEASURE,
    MODEL,
    app,
    check_out,
    integer,
    integers,
    interruptible,
    opens,
    shares,
)
from loopmdm.analysis.cli.waiting import working
from loopmdm.model.errors import UsageError, check_count, unknown_name

if TYPE_CHECKING:
    import pandas as pd

    from loopmdm.analysis.exhibits.verdicts import Claim
    from loopmdm.analysis.measures.access import Access


@app.command(
    rich_help_panel=MEASURE, epilog="Example: loopmdm measure mask-attention sudoku-loop --mask-ratios 0.5"
)
@opens(changes="the measure's own option, or one of somebody else's model; n_thresholds=10")
def measure(
    name: Annotated[
        str,
        typer.Argument(
            help="measure; `loopmdm measure list` shows all, with their options",
            autocompletion=among(measure_names),
        ),
    ],
    model: Annotated[str, typer.Argument(help=MODEL, autocompletion=among(model_names))] = "",
    n_loops: Annotated[
        str | None, typer.Option(help="loops to read; loop counts, comma-separated, where it takes several")
    ] = None,
    mask_ratios: Annotated[str | None, typer.Option(help="shares to mask, comma-separated")] = None,
    n: Annotated[int | None, typer.Option(help="test sequences; puzzles, samples or items")] = None,
    along_sampling: Annotated[
        int | None, typer.Option(help="instead of masks: steps of the model's own samples")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of masks and samples")] = None,
    shard: Annotated[
        str,
        typer.Option(help="only the I-th of N shards of the sequences, such as 1/4; --out takes it to `merge`"),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="also write a parquet file")] = None,
    *,
    how: "Access",
) -> None:
    """Run one measure on a model's test set, own texts, or along its own samples, and print the table."""
    from loopmdm.analysis.measures import MEASURES

    if name == "list":
        rows = [(item.name, item.on, item.shards, item.options(), item.what) for item in MEASURES.values()]
        names = ["measure", "on", "shards", "options", "what"]
        show(names, [(*row[:2], "yes" if row[2] else "no", _told(row[3]), row[4]) for row in rows])
        return
    if not model:
        raise UsageError(f"name a model: loopmdm measure {name} MODEL; `loopmdm models` lists the shipped ones")
    asked: dict[str, Any] = {"n": n, "seed": seed, "along_sampling": along_sampling}
    asked |= {} if n_loops is None else {"n_loops": _counts(n_loops)}
    asked |= {} if mask_ratios is None else {"mask_ratios": shares(mask_ratios)}
    own = MEASURES[name].own
    asked |= {key: value for key, value in how.changes.items() if key in own}
    how = replace(how, changes={key: value for key, value in how.changes.items() if key not in own})
    asked = {key: value for key, value in asked.items() if value is not None}
    if shard:
        _part(name, model, how, asked, _shard(shard), out)
    else:
        _measure(name, model, how, asked, out)


def _shard(text: str) -> tuple[int, int]:
    number, mark, of = text.partition("/")
    if not mark:
        raise UsageError(f"--shard takes I/N such as 1/4, the first of four; got {text!r:.80}")
    return integer(number, "--shard", "1/4"), integer(of, "--shard", "1/4")


def _part(
    name: str, model: str, how: "Access", asked: dict[str, Any], shard: tuple[int, int], out: Path | None
) -> None:
    """Measure one shard, and write what it keeps."""
    from loopmdm.analysis.measures import measure as run
    from loopmdm.analysis.numbers import frames

    if out is None:
        raise UsageError("--shard needs --out FILE.parquet; `loopmdm merge` makes a table of all parts")
    check_out(out, ".parquet")
    told = f"shard {shard[0]}/{shard[1]} of {name} of {model}"
    with interruptible("nothing was written"), working(told):
        part = run(name, model, access=how, shard=shard, **asked)
    frames.write_table(part, out, dict(part.attrs))
    show(["shard", "batches", "out"], [(f"{shard[0]}/{shard[1]}", len(part), out)])


@app.command(rich_help_panel=MEASURE, epilog="Example: loopmdm merge part-*.parquet --out table.parquet")
def merge(
    parts: Annotated[list[Path], typer.Argument(help="what `loopmdm measure .. --shard I/N --out` wrote, all N")],
    out: Annotated[Path | None, typer.Option(help="also write a parquet file")] = None,
) -> None:
    """Make of all parts of a measure the table that one job would have given, and print it."""
    from loopmdm.analysis.measures import merge as run
    from loopmdm.analysis.numbers import frames

    check_out(out, ".parquet")
    remedy = "measure that shard again"
    with interruptible("nothing was written"):
        found = [frames.read_table(path, remedy=remedy) for path in parts]
        frame = run(found, names=[str(path) for path in parts])
    _print(frame, frame.attrs["asked"]["measure"], frame.attrs["asked"], out)


def _measure(name: str, model: str, how: "Access", given: dict[str, Any], out: Path | None) -> None:
    """Run a measure as `given` asks, print its table, and write it if `out` is given."""
    from loopmdm.analysis.measures import measure as run

    check_out(out, ".parquet")
    with interruptible("nothing was written"), working(f"{name} of {model}"):
        frame = run(name, model, access=how, **given)
    _print(frame, name, {"model": model, "options": given}, out)


def _print(frame: "pd.DataFrame", name: str, asked: dict[str, Any], out: Path | None) -> None:
    """Print the table of a measure, and write it if `out` is given."""
    from loopmdm.analysis.measures import MEASURES, fingerprints
    from loopmdm.analysis.numbers import frames, provenance
    from loopmdm.model.network.checkpoints import is_shipped

    if out is not None:
        known = (asked["model"],) if is_shipped(asked["model"]) else ()
        options = {name: str(MEASURES[name].options.of(name, asked["options"]))}
        told = provenance.of_table(name, known, measures=fingerprints([name]), options=options)
        told |= {"remarks": list(frame.attrs["remarks"])} if frame.attrs.get("remarks") else {}
        frames.write_table(frame, out, told)
    show_frame(frame)


def _told(options: Any) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.asked().items())


def _counts(text: str) -> int | list[int]:
    """One loop count, or several."""
    counts = integers(text, "--n-loops", "1,2,4")
    return counts[0] if len(counts) == 1 else counts


@app.command(
    "training-free",
    rich_help_panel=MEASURE,
    epilog="Example: loopmdm training-free sudoku-base --blocks 1:1 --n 32",
)
@opens()
def training_free(
    model: Annotated[str, typer.Argument(help=MODEL, autocompletion=among(model_names))],
    blocks: Annotated[str, typer.Option(help="FIRST:NUMBER of layers to repeat, with commas; default all")] = "",
    n_loops: Annotated[str, typer.Option(help="loop counts, comma-separated")] = "1,2,4,8",
    n_samples: Annotated[int, typer.Option(help="masks a sequence")] = 2,
    n: Annotated[int, typer.Option(help="test sequences")] = 256,
    seed: Annotated[int, typer.Option(help="of masks")] = 0,
    out: Annotated[Path | None, typer.Option(help="also write a parquet file")] = None,
    *,
    how: "Access",
) -> None:
    """Loop layers of a model that never looped: its NELBO and its attention to masked keys, naive and damped.

    At one loop it is the model as it is. `change` below 0 means that looping helps; a `rise` of the log-odds here
    is what looping gives without any training for it.
    """
    counts, places = integers(n_loops, "--n-loops", "1,2,4"), [_block(word) for word in blocks.split(",") if word]
    own = {"blocks": places or None, "n_samples": n_samples, "counts": counts}
    _measure("training-free", model, how, {"n_loops": 1, "n": n, "seed": seed} | own, out)


def _block(word: str) -> tuple[int, int]:
    first, _, size = word.partition(":")
    return integer(first, "--blocks", "1:2"), integer(size, "--blocks", "1:2")


@app.command(rich_help_panel=LOOK, epilog="Example: loopmdm claims placement")
def claims(
    name: Annotated[str, typer.Argument(help="one claim: with its estimand, gate, margin and falsifier")] = "",
    seeds: Annotated[str, typer.Option(help="only claims decided over at least so many seeds")] = "",
) -> None:
    """The paper's claims: what was asked, what was measured, and the verdict; one line each in a pipe."""
    from loopmdm.analysis.exhibits import EXHIBITS
    from loopmdm.analysis.exhibits.measuring import check_stored
    from loopmdm.analysis.exhibits.verdicts import claims_table, load_claims

    asked = {claim.name: claim for claim in load_claims()}
    if name and name not in asked:
        raise unknown_name("claim", name, asked)
    if name and seeds:
        raise UsageError("--seeds chooses among all claims; leave it out where one is named")
    least = check_count("--seeds", integer(seeds, "--seeds", "5"), least=0) if seeds else 0
    check_stored(EXHIBITS["claims"].tables)
    frame = claims_table()
    if name:
        _tell(asked[name], frame[frame["claim"] == name])
        return
    if seeds:
        fewest = frame["n_against"].where(frame["n_against"] > 0, frame["n_seeds"])
        frame = frame[frame["n_seeds"].clip(upper=fewest) >= least]
    columns = ["claim", "task", "verdict", "estimate", "unit", "low", "high", "margin", "direction", "p_holm",
               "n_seeds", "n_against", "figure", "why", "text"]  # fmt: skip
    show(columns, frame[columns].itertuples(index=False))


def _tell(claim: "Claim", rows: "pd.DataFrame") -> None:
    """One claim with all that was written down of it, and its verdicts."""
    from loopmdm.analysis.plots.claims import said

    told = {"claim": claim.claim, "where": claim.where, "estimand": claim.estimand, "unit": claim.unit}
    told |= {
        "test": claim.test,
        "gate": claim.gate,
        "margin": f"{claim.direction} {claim.margin:g}, {claim.because}",
    }
    told |= {"falsifier": claim.falsifier, "seen": claim.seen, "figure": claim.figure}
    for row in rows.itertuples():
        told[str(row.task)] = "; ".join(filter(None, (row.verdict, said(row), row.why)))
    for key, value in told.items():
        print(f"{key}: {value}")
