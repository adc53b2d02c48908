"""`loopmdm dictionary`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopmdm.analysis.cli.completion import among, dictionary_names
from loopmdm.analysis.cli.printing import show
from loopmdm.analysis.cli.shared import MEASURE, MODEL, app, interruptible, opens
from loopmdm.analysis.cli.waiting import err, working

if TYPE_CHECKING:
    from loopmdm.analysis.measures.access import Access


@app.command(
    rich_help_panel=MEASURE, epilog="Example: loopmdm dictionary sudoku-loop --out sudoku-loop-dictionary"
)
@opens()
def dictionary(
    model: Annotated[
        str,
        typer.Argument(
            help=f"{MODEL}; `list` shows those shipped with a dictionary", autocompletion=among(dictionary_names)
        ),
    ],
    kind: Annotated[str, typer.Option(help="sae: a code at each loop; crosscoder: one for all loops")] = "sae",
    layer: Annotated[int | None, typer.Option(help="looped layer; default: states after each loop")] = None,
    features: Annotated[int, typer.Option(help="how many")] = 256,
    k: Annotated[int, typer.Option("-k", help="active at a position, on average")] = 16,
    steps: Annotated[int, typer.Option(help="of training")] = 3000,
    n_loops: Annotated[int | None, typer.Option(help="loops to read; default S_max of training")] = None,
    n: Annotated[int, typer.Option(help="validation sequences to train on")] = 1024,
    seed: Annotated[int, typer.Option(help="of masks, start and order")] = 0,
    out: Annotated[Path | None, typer.Option(help="the folder; default MODEL-dictionary")] = None,
    *,
    how: "Access",
) -> None:
    """Train a sparse dictionary over the loops of a model, and write it with its record.

    On validation sequences, and the same of an untrained twin; the scores that are printed, and kept in the
    record, are of test sequences. With --out FOLDER of a shipped model it becomes the one that is shipped with it.
    """
    if model == "list":
        _list()
        return
    from loopmdm.analysis.measures import Case
    from loopmdm.analysis.measures.mechanism.dictionaries import Shape, Training, make_dictionary
    from loopmdm.analysis.measures.mechanism.dictionaries.coder import FILE
    from loopmdm.model.files import check_target

    shape, training = Shape(kind, features, k=k), Training(steps=steps, seed=seed)  # pyright: ignore[reportArgumentType]
    folder = out or Path(f"{Path(model).name.rpartition(':')[2]}-dictionary")
    check_target(folder / FILE)
    with interruptible(f"nothing was written to {folder}"), working(f"dictionary of {model}"):
        made, scores = make_dictionary(Case.of(model, n_loops, n, seed, access=how), shape, training, layer)
        made.save(folder)
    show(list(scores.columns), scores.itertuples(index=False))
    print(folder, file=err.file)


def _list() -> None:
    """The shipped ones, as their records say."""
    from loopmdm.analysis.measures.mechanism.dictionaries import Dictionary, list_dictionaries

    rows = []
    for name in list_dictionaries():
        found = Dictionary.from_pretrained(name)
        told, shape = found.origin.told, found.shape
        kept = told["scores"]["trained"]
        rows.append((name, shape.kind, told["layer"], found.origin.n_loops, shape.n_features, shape.k,
                     *(_range(kept[metric]["value"]) for metric in ("explained_variance", "kl_recovered")),
                     kept["dead"]["value"]))  # fmt: skip
    show(["model", "kind", "layer", "loops", "features", "k", "explained_variance", "kl_recovered", "dead"], rows)


def _range(values: list[float]) -> str:
    """First and last loop's."""
    return f"{values[0]:.3f}..{values[-1]:.3f}"
