"""`loopmdm train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loopmdm.analysis.cli.completion import among, spec_names
from loopmdm.analysis.cli.printing import show
from loopmdm.analysis.cli.shared import MAINTAIN, TRAIN, app, interruptible, values
from loopmdm.analysis.cli.waiting import progress_bar


@app.command(rich_help_panel=TRAIN, epilog="Example: loopmdm train smoke")
def train(
    spec: Annotated[
        Path,
        typer.Argument(
            help="TOML spec, or the name of a shipped one, such as smoke", autocompletion=among(spec_names)
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/NAME")] = None,
    resume: Annotated[bool, typer.Option(help="start, continue, or do nothing if finished")] = False,
    dry_run: Annotated[bool, typer.Option(help="print sizes, FLOPs and steps; train nothing")] = False,
    seed: Annotated[int | None, typer.Option(help="another seed than the spec's; the name gains -seedN")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="another value, such as training.learning_rate=5e-4")
    ] = None,
) -> None:
    """Train a model from a spec."""
    from loopmdm.model.training.spec import RunSpec

    loaded = RunSpec.load(spec, values(changes or []))
    if seed is not None:
        loaded = loaded.seeded(seed)
    if dry_run:
        _dry_run(loaded)
        return
    from loopmdm.model.training.budget import share_spent
    from loopmdm.model.training.trainer import Trainer

    folder = out or Path("runs") / loaded.name
    with interruptible(f"add --resume to go on from the last checkpoint in {folder}"):
        trainer = Trainer(loaded, folder, resume=resume)
        with progress_bar() as bar:
            task = bar.add_task(loaded.name, total=100)

            def on_step(progress: Any) -> None:
                share = 100 * min(1.0, share_spent(loaded, progress.step, progress.flops))
                loss = progress.window.get("loss", 0.0) / max(1.0, progress.window.get("steps", 1.0))
                text = f"{loaded.name} step {progress.step} loss {loss:.3f}"
                bar.update(task, completed=int(share), description=text)

            trainer.train(on_step)
    if trainer.accelerator.is_main_process:
        last = trainer.progress.rows[-1]
        show(list(last), [list(last.values())])
        print(folder)


@app.command(rich_help_panel=MAINTAIN, epilog="Example: loopmdm ship runs/smoke")
def ship(
    run: Annotated[Path, typer.Argument(help="finished run folder, such as runs/sudoku-loop")],
    record_only: Annotated[bool, typer.Option(help="keep curve and measurements, not the weights")] = False,
) -> None:
    """Copy a finished run into the zoo of shipped models (fp16), evaluated as shipped."""
    from loopmdm.model.training.ship import ship

    with interruptible("ship it again"):
        print(_as_record(run) if record_only else ship(run))


def _as_record(run: Path) -> Path:
    """Ship a run of the roster, measure what the tables ask of it, and let its weights go."""
    from loopmdm.analysis.exhibits.tables import quality
    from loopmdm.model.training.ship import forget_weights, name_of, ship
    from loopmdm.model.zoo.runs import Zoo

    zoo = Zoo.roster()
    listed = zoo[name_of(run)]  # before anything is written
    home = ship(run)
    quality.keep(listed, zoo)
    forget_weights(home)
    return home


def _dry_run(spec: Any) -> None:
    import torch

    from loopmdm.model.flops import applied_parameters, flops_per_token
    from loopmdm.model.network.model import LoopMDM
    from loopmdm.model.training.budget import check_threads, plan, product_rate, training_memory

    check_threads(spec.training.threads)
    cfg, planned = spec.config, plan(spec)
    rate = product_rate(spec.training.threads)
    with torch.device("meta"):
        model = LoopMDM(cfg)
    parameters, looped = model.n_parameters, next(iter(cfg.layers("loop")), 0)
    layer = sum(parameter.numel() for parameter in model.get_submodule(f"blocks.{looped}").parameters())
    rows = [
        ("parameters", parameters),
        (f"parameters applied at S = {cfg.max_loops}", applied_parameters(cfg, parameters, layer, cfg.max_loops)),
        ("effective depth at E[S]", cfg.effective_depth),
        *(
            (f"forward FLOPs per token at S = {count}", flops_per_token(cfg, spec.data.length, count))
            for count in sorted({1, cfg.max_loops})
        ),
        ("E[S] over the run", planned.e_s),
        ("training FLOPs", planned.flops),
        ("steps", planned.steps),
        ("tokens", planned.tokens),
        ("memory of one process, GiB", round(training_memory(spec, parameters) / 2**30, 3)),
        (f"matrix products here, GFLOP/s with {spec.training.threads} threads", round(rate / 1e9, 1)),
        ("hours here at 70% of that", round(planned.flops / (0.7 * rate) / 3600, 3)),
        ("days at 1e15 FLOP/s", round(planned.flops / 1e15 / 86400, 6)),
    ]
    show(["quantity", "value"], rows)
