"""`loopmdm models` and `loopmdm sites`: what can be opened, and what can be heard in it."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from loopmdm.analysis.cli.completion import among, model_names
from loopmdm.analysis.cli.shared import MODEL, app, opens, show

if TYPE_CHECKING:
    from loopmdm.analysis.measures.access import Access


@app.command(epilog="Example: loopmdm models")
def models(
    families: Annotated[
        bool,
        typer.Option("--families", help="List the families of other people's models that are known by record."),
    ] = False,
) -> None:
    """List the shipped models, and other people's that can be fetched."""
    if families:
        _list_families()
        return
    from loopmdm.model.adapters.specimens import SPECIMENS
    from loopmdm.model.files import read_json
    from loopmdm.model.network.checkpoints import RECORD, ZOO, list_models
    from loopmdm.model.network.config import LoopMDMConfig

    rows = []
    for name in list_models():
        cfg, record = LoopMDMConfig.load(ZOO / name / "config.json"), read_json(ZOO / name / RECORD)
        layers = f"{cfg.n_prelude_layers}+{cfg.n_loop_layers}xS+{cfg.n_coda_layers}"
        reached = record["evaluation"]
        flops = record["training_flops"]["realised"]
        corpus = record["spec"]["data"]["corpus"]
        test = (reached["test_nelbo"], reached["test_nelbo_se"])
        rows.append((name, corpus, layers, cfg.max_loops, cfg.d_model, flops, *test, "this package", "MIT"))
    unknown = float("nan")
    for name, item in SPECIMENS.items():
        source = f"{item.source.package}=={item.source.version}"
        source += "" if item.fetched else f" (loopmdm data fetch {item.archive})"
        rows.append((name, "antibodies", f"{item.layers}+0xS+0", 1, item.d_model, *[unknown] * 3, source,
                     item.source.licence))  # fmt: skip
    columns = ["model", "trained_on", "layers", "S_max", "d_model", "training_flops", "test_nelbo", "se"]
    show([*columns, "source", "licence"], rows)


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


@app.command(epilog="Example: loopmdm sites sudoku-loop --n-loops 2")
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
