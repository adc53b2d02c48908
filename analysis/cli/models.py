"""`loopmdm models` and `loopmdm sites`: what can be opened, and what can be heard in it."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from loopmdm.analysis.cli.completion import among, model_names, run_names
from loopmdm.analysis.cli.printing import show
from loopmdm.analysis.cli.shared import LOOK, MODEL, app, interruptible, opens
from loopmdm.analysis.cli.waiting import progress_bar, say
from loopmdm.model.places import figures_folder

if TYPE_CHECKING:
    from loopmdm.analysis.measures.access import Access


models_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(models_app, name="models", rich_help_panel=LOOK)


@models_app.callback(epilog="Example: loopmdm models")
def models(
    context: typer.Context,
    families: Annotated[
        bool,
        typer.Option("--families", help="List the families of other people's models that are known by record."),
    ] = False,
) -> None:
    """List the models: those of this package, here or to be fetched, and other people's."""
    if context.invoked_subcommand is not None:
        return
    if families:
        _list_families()
        return
    from loopmdm.model.adapters.specimens import SPECIMENS
    from loopmdm.model.files import read_json
    from loopmdm.model.network.checkpoints import CONFIG, RECORD, list_models, list_released, resolve
    from loopmdm.model.network.config import LoopMDMConfig

    rows, here, reached, unknown = [], set(list_models()), _reached(), float("nan")
    for name in list_released():
        cfg, record = LoopMDMConfig.load(resolve(name) / CONFIG), read_json(resolve(name) / RECORD)
        layers = f"{cfg.n_prelude_layers}+{cfg.n_loop_layers}xS+{cfg.n_coda_layers}"
        flops = record["training_flops"]["realised"]
        corpus = record["spec"]["data"]["corpus"]
        test = reached.get(name, (unknown, unknown))
        source = "this package" + ("" if name in here else f" (loopmdm models fetch {name})")
        rows.append((name, corpus, layers, cfg.max_loops, cfg.d_model, flops, *test, source, "MIT"))
    for name, item in SPECIMENS.items():
        source = f"{item.source.package}=={item.source.version}"
        source += "" if item.fetched else f" (loopmdm data fetch {item.archive})"
        rows.append((name, "antibodies", f"{item.layers}+0xS+0", 1, item.d_model, *[unknown] * 3, source,
                     item.source.licence))  # fmt: skip
    columns = ["model", "trained_on", "layers", "S_max", "d_model", "training_flops", "test_nelbo", "se"]
    show([*columns, "source", "licence"], rows)


def _reached() -> dict[str, tuple[float, float]]:
    """Test NELBO at S_max (base: S = 1) and its standard error, of the table that pages and figures show.

    A run that was shipped since that table was measured has none yet.
    """
    from pyarrow.parquet import ParquetFile  # without pandas, which takes as long as all else here

    path = figures_folder() / "tables" / "nll-by-loops.parquet"
    if not path.is_file():
        return {}
    rows = ParquetFile(path).read(columns=["model", "n_loops", "max_loops", "nll", "nll_se"]).to_pylist()
    return {row["model"]: (row["nll"], row["nll_se"]) for row in rows if row["n_loops"] == row["max_loops"]}


def _list_families() -> None:
    from loopmdm.model.adapters.families import FAMILIES

    rows = []
    for name, family in FAMILIES.items():
        said = {
            "causal": family.causal,
            "shifted logits": family.shifted,
            "loops by itself": family.loop is not None,
        }
        said |= {"random first state": family.random_start, "an exit gate": family.gated}
        said |= {"stream is no sum of layers": not family.additive, "gated heads": not family.linear_heads}
        facts = ", ".join(fact for fact, holds in said.items() if holds)
        rows.append((name, " ".join(family.classes) or f"by family={name}", family.home or "transformers", facts))
    show(["family", "classes", "code", "facts"], rows)


@models_app.command(epilog="Example: loopmdm models fetch sotu-deep --from loopmdm-models-0.2.0.tar.gz")
def fetch(
    names: Annotated[
        list[str],
        typer.Argument(help="models or records of runs that are not here; all", autocompletion=among(run_names)),
    ],
    source: Annotated[
        str, typer.Option("--from", help="archive of a release (file or URL), or folder of a checkout")
    ] = "",
) -> None:
    """Bring weights and measurements that this installation does not hold into the cache, checked by hash."""
    from loopmdm.model.network.checkpoints import fetched_folder
    from loopmdm.model.zoo.fetch import chosen, fetch_models, source_of, to_fetch

    names = chosen(names)
    wanted = to_fetch(names)
    if wanted:
        source, megabytes = source_of(source), sum(item.size for item in wanted.values()) / 1e6
        where = fetched_folder(names[0]).parents[1]
        say(f"fetching {len(wanted)} files, {megabytes:.1f} MB, from {source} into {where}")
    with interruptible("what was whole is kept; run it again"), progress_bar() as bar:
        task = bar.add_task("files", total=len(wanted))
        folders = fetch_models(names, source, lambda _: bar.advance(task))
    show(["model", "folder"], zip(names, folders, strict=True))


@app.command(rich_help_panel=LOOK, epilog="Example: loopmdm sites sudoku-loop --n-loops 2")
@opens(text=False, runs=False)
def sites(
    model: Annotated[str, typer.Argument(help=MODEL, autocompletion=among(model_names))],
    n_loops: Annotated[int, typer.Option(help="loops to list; 0: as many as the model knows")] = 0,
    *,
    how: "Access",
) -> None:
    """List a model's hook names and the shapes that they have on one sequence, without loading its weights."""
    from loopmdm.model import sites as names
    from loopmdm.model.errors import check_count

    m = replace(how, device="meta").open(model)
    loops = check_count("--n-loops", n_loops, least=0) or m.cfg.max_loops
    shapes = [(name, list(names.shape(m.cfg, name, 1, m.cfg.n_ctx))) for name in names.all_names(m.cfg, loops)]
    show(["site", "shape"], shapes)
