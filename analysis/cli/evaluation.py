"""`loopmdm evaluate` and `loopmdm lm-eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopmdm.analysis.cli.completion import among, model_names
from loopmdm.analysis.cli.printing import show_frame
from loopmdm.analysis.cli.shared import MEASURE, MODEL, app, integer, integers, interruptible, opens
from loopmdm.analysis.cli.waiting import working

if TYPE_CHECKING:
    from loopmdm.analysis.measures.access import Access


@app.command(rich_help_panel=MEASURE, epilog="Example: loopmdm evaluate sudoku-loop --n-loops 1,2,4")
@opens()
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL, autocompletion=among(model_names))],
    measure: Annotated[
        str,
        typer.Option(
            help="nll | noise-level | zero-shot | excess-kl | excess-kl-cut | solve-rate | generative | "
            "multiple-choice | word-problems"
        ),
    ] = "nll",
    n_loops: Annotated[str, typer.Option(help="loop counts, comma-separated; default 1 and S_max")] = "",
    n_samples: Annotated[int | None, typer.Option(help="masks a sequence")] = None,
    n: Annotated[int | None, typer.Option(help="puzzles, samples or items")] = None,
    n_clues: Annotated[str, typer.Option(help="solve-rate: clue counts, such as 10,16,20")] = "",
    unique: Annotated[bool, typer.Option(help="solve-rate: puzzles with one solution")] = False,
    orders: Annotated[str, typer.Option(help="solve-rate: generation orders, comma-separated")] = "",
    steps: Annotated[str, typer.Option(help="generative: denoising steps, such as 8,16,32")] = "",
    tasks: Annotated[str, typer.Option(help="multiple-choice: benchmarks, comma-separated")] = "",
    *,
    how: "Access",
) -> None:
    """Evaluate a model by number of loops, with standard errors; results are cached by content."""
    from loopmdm.analysis.measures import Access
    from loopmdm.analysis.measures import evaluate as run
    from loopmdm.analysis.measures import measure as anew
    from loopmdm.model.adapters.open import is_ours
    from loopmdm.model.network.checkpoints import CONFIG, need, resolve
    from loopmdm.model.network.config import LoopMDMConfig

    options: dict[str, Any] = {"n_samples": n_samples, "n": n, "unique": unique or None}
    options |= {"n_clues": integers(n_clues, "--n-clues", "10,16") if n_clues else None}
    options |= {"steps": integers(steps, "--steps", "8,16") if steps else None}
    options |= {"orders": orders.split(",") if orders else None, "tasks": tasks.split(",") if tasks else None}
    if measure == "word-problems" and steps:
        options["steps"] = integer(steps, "--steps of word-problems", "64")
    options = {key: value for key, value in options.items() if value is not None}
    counts = integers(n_loops, "--n-loops", "1,2,4") if n_loops else None
    with interruptible("nothing was written"), working(f"{measure} of {model}"):
        if how != Access() or not is_ours(model):
            frame = anew(measure, model, counts, access=how, **options)
        else:
            most = LoopMDMConfig.load(need(resolve(model), CONFIG)).max_loops
            frame = run(model, measure, counts or sorted({1, most}), **options)
    show_frame(frame)


@app.command(
    "lm-eval",
    rich_help_panel=MEASURE,
    epilog="Example: loopmdm lm-eval --model sotu-loop --tasks my-task.yaml --n-loops 4",
)
@opens(text=False)
def lm_eval(
    model: Annotated[
        str, typer.Option(help="shipped name, run folder or hub id", autocompletion=among(model_names))
    ],
    tasks: Annotated[Path, typer.Option(help="YAML task of the harness, its data files beside it")],
    n_loops: Annotated[int | None, typer.Option(help="loops; default S_max")] = None,
    n_samples: Annotated[int, typer.Option(help="masks a continuation")] = 8,
    steps: Annotated[int, typer.Option(help="denoising steps where the task wants text")] = 64,
    limit: Annotated[int | None, typer.Option(help="first items only")] = None,
    *,
    how: "Access",
) -> None:
    """Run a text model on a local task of the lm-eval harness (extra lm-eval)."""
    from loopmdm.analysis.harness import run_harness

    with interruptible("nothing was written"), working(f"{tasks} of {model}"):
        frame = run_harness(model, tasks, n_loops, n_samples, steps, limit, how)
    show_frame(frame)
