"""The command line: `loopmdm COMMAND`. Exit codes: 0 fine, 1 the world failed, 2 misuse.

Tables go to a terminal as aligned columns, into a pipe as plain TSV, one record a line.
"""

import math
import os
import signal
import sys
import tomllib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from loopmdm_model.allocator import keep_freed_memory
from loopmdm_model.errors import DivergedError, UsageError

app = typer.Typer(
    help="See inside looped masked-diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(
    help="Corpora: what there is, and fetching it.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")
err = Console(stderr=True)


class Interrupted(RuntimeError):
    """Ctrl-C, with what is left and how to go on."""


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Turn Ctrl-C into one line (typer itself would end without a word)."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(message) from None


def show(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print records: aligned on a terminal, TSV in a pipe."""
    cells = [[_cell(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for row in [list(columns), *cells]:
            print("\t".join(row))
        return
    table = RichTable(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in cells:
        table.add_row(*row)
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value:.6g}"
    return str(value).replace("\t", " ").replace("\n", " ")


def progress_bar() -> Progress:
    """A progress bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


@app.command()
def models() -> None:
    """List the shipped models."""
    from loopmdm_model.checkpoints import RECORD, ZOO, list_models
    from loopmdm_model.config import LoopMDMConfig
    from loopmdm_model.files import read_json

    rows = []
    for name in list_models():
        cfg, record = LoopMDMConfig.load(ZOO / name / "config.json"), read_json(ZOO / name / RECORD)
        layers = f"{cfg.n_prelude_layers}+{cfg.n_loop_layers}xS+{cfg.n_coda_layers}"
        reached = record["evaluation"]
        flops = record["training_flops"]["realised"]
        corpus = record["spec"]["data"]["corpus"]
        test = (reached["test_nelbo"], reached["test_nelbo_se"])
        rows.append((name, corpus, layers, cfg.max_loops, cfg.d_model, flops, *test))
    show(["model", "trained_on", "layers", "S_max", "d_model", "training_flops", "test_nelbo", "se"], rows)


@data_app.command("list")
def data_list() -> None:
    """List corpora and tasks: size, licence, role, whether they are here."""
    from loopmdm_model.data.fetch import cached_archive, sources
    from loopmdm_model.data.hub import HUB

    here, made = "embedded", "generated"
    rows = [
        ("sotu-slice", "0.95 MB", "public domain", "training", "sotu's test, validation, 4 speeches", here),
        ("sudoku6", "-", made, "task", "solved 6x6 grids, all 39,168 classes, split by class", here),
        ("tree", "-", made, "task", "binary tree of 63 nodes, leaves observed; exact posterior known", here),
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


@data_app.command("fetch")
def data_fetch(name: Annotated[str, typer.Argument(help="corpus; see `loopmdm data list`")] = "sotu") -> None:
    """Fetch a corpus into the cache; refuses anything whose hash is not the pinned one."""
    from loopmdm_model.data.fetch import fetch

    path = fetch(name)
    show(["corpus", "archive", "bytes"], [(name, path, path.stat().st_size)])


@app.command()
def train(
    spec: Annotated[Path, typer.Argument(help="TOML spec; examples in figures/specs")],
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/NAME")] = None,
    resume: Annotated[bool, typer.Option(help="start, continue, or do nothing if finished")] = False,
    dry_run: Annotated[bool, typer.Option(help="print sizes, FLOPs and steps; train nothing")] = False,
    seed: Annotated[int | None, typer.Option(help="another seed; the name gains -seedN")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="another value, such as training.learning_rate=5e-4")
    ] = None,
) -> None:
    """Train a model from a spec."""
    from loopmdm_model.training.spec import RunSpec

    loaded = RunSpec.load(spec, _changes(changes or []))
    if seed is not None:
        loaded = RunSpec.from_dict(loaded.to_dict() | {"seed": seed, "name": f"{loaded.name}-seed{seed}"})
    if dry_run:
        _dry_run(loaded)
        return
    from loopmdm_model.training.budget import share_spent
    from loopmdm_model.training.trainer import Trainer

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


def _changes(pairs: list[str]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        key, mark, value = pair.partition("=")
        try:
            found[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = value  # a bare word
        if not key or not mark:
            raise UsageError(f"--set takes KEY=VALUE such as training.learning_rate=5e-4, got {pair!r}")
    return found


def _dry_run(spec: Any) -> None:
    import torch

    from loopmdm_model.flops import applied_parameters, flops_per_token
    from loopmdm_model.model import LoopMDM
    from loopmdm_model.training.budget import plan, product_rate, training_memory

    cfg, planned = spec.config, plan(spec)
    rate = product_rate(spec.training.threads)
    with torch.device("meta"):
        model = LoopMDM(cfg)
    parameters = model.n_parameters
    layer = sum(parameter.numel() for parameter in model.get_submodule("blocks.0").parameters())
    rows = [
        ("parameters", parameters),
        (f"parameters applied at S = {cfg.max_loops}", applied_parameters(cfg, parameters, layer, cfg.max_loops)),
        ("effective depth at E[S]", cfg.effective_depth),
        ("forward FLOPs per token at S = 1", flops_per_token(cfg, spec.data.length, 1)),
        (
            f"forward FLOPs per token at S = {cfg.max_loops}",
            flops_per_token(cfg, spec.data.length, cfg.max_loops),
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


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="shipped name, run folder or hub id")],
    measure: Annotated[
        str, typer.Option(help="nll | noise-level | zero-shot | solve-rate | excess-kl; default nll")
    ] = "nll",
    n_loops: Annotated[str, typer.Option(help="loop counts, comma-separated; default 1 and S_max")] = "",
    n_samples: Annotated[int, typer.Option(help="masks a sequence")] = 2,
) -> None:
    """Evaluate a model by number of loops, with standard errors; results are cached by content."""
    from analysis.evaluations import evaluate as run
    from loopmdm_model.checkpoints import CONFIG, need, resolve
    from loopmdm_model.config import LoopMDMConfig

    most = LoopMDMConfig.load(need(resolve(model), CONFIG)).max_loops
    counts = [_integer(word) for word in n_loops.split(",")] if n_loops else sorted({1, most})
    status = err.status(f"{measure} of {model}") if err.is_terminal else nullcontext()
    with interruptible("nothing was written"), status:
        frame = run(model, measure, counts, n_samples)
    show(list(frame.columns), frame.itertuples(index=False))


def _integer(word: str, option: str = "--n-loops", example: str = "1,2,4") -> int:
    try:
        return int(word)
    except ValueError:
        raise UsageError(f"{option} takes integers such as {example}; got {word!r}") from None


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="shipped name, run folder or hub id")],
    n: Annotated[int, typer.Option(help="sequences")] = 1,
    length: Annotated[int | None, typer.Option(help="tokens a sequence; default the model's n_ctx")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 64,
    n_loops: Annotated[int | None, typer.Option(help="loops, or with --stop the most; default S_max")] = None,
    stop: Annotated[str, typer.Option(help="stopping rule, such as state-delta:0.03")] = "",
    order: Annotated[str, typer.Option(help="random, confidence, left-to-right, blocks:8, ...")] = "random",
    prompt: Annotated[str, typer.Option(help="text to begin with")] = "",
    clues: Annotated[str, typer.Option(help="POSITION:ID,.. that stay")] = "",
    temperature: Annotated[float, typer.Option(help="0 takes the best token")] = 1.0,
    top_p: Annotated[float, typer.Option(help="smallest set of tokens with this probability")] = 1.0,
    seed: Annotated[int, typer.Option(help="same seed, same sample")] = 0,
    first_index: Annotated[int, typer.Option(help="number of the first sequence, to shard a job")] = 0,
    batch_size: Annotated[int, typer.Option(help="sequences at a time")] = 32,
    partial: Annotated[bool, typer.Option(help="on Ctrl-C give the finished batches")] = False,
    out: Annotated[Path | None, typer.Option(help="TSV file; default standard output")] = None,
) -> None:
    """Sample sequences: text, loops and forwards of each."""
    from loopmdm_model.files import write_atomic
    from loopmdm_model.hooked import HookedLoopMDM
    from loopmdm_model.sampling import sample as run
    from loopmdm_model.stopping import parse_rule

    if out is not None and out.is_dir():
        raise UsageError(f"{out} is a folder; give --out the name of a file")
    above = next((path for path in out.absolute().parents if path.exists()), None) if out else None
    if above is not None and not (above.is_dir() and os.access(above, os.W_OK)):
        raise PermissionError(f"cannot write into {above}; give another --out")
    m = HookedLoopMDM.from_pretrained(model)
    rule = parse_rule(stop, m.cfg.max_loops if n_loops is None else n_loops) if stop else None
    with interruptible("nothing was written; --partial keeps the finished batches"):
        r = run(
            m, n, length, steps, None if rule else n_loops, rule, order, prompt or None, _clues(clues),
            temperature, top_p, seed, first_index, None, batch_size, err.is_terminal, partial,
        )  # fmt: skip
    ran = r.loops_used > 0
    columns = ["sequence", "forwards", "mean_loops", "flops", "text"]
    rows = []
    for index, ids in enumerate(r.tokens):
        forwards = int(ran[:, index].sum())
        loops = int(r.loops_used[:, index].sum()) / forwards if forwards else float("nan")
        text = m.to_string(ids) if m.tokenizer else " ".join(map(str, ids.tolist()))
        rows.append((first_index + index, forwards, loops, float(r.step_flops[:, index].sum()), text))
    if out is None:
        show(columns, rows)
        return
    lines = ["\t".join(_cell(value) for value in row) for row in (columns, *rows)]
    write_atomic(out, lambda path: path.write_text("\n".join(lines) + "\n"))
    print(out)


def _check_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write into {folder}; give another --out")


def _clues(text: str) -> dict[int, int] | None:
    pairs = [pair.split(":") for pair in text.split(",") if pair]
    if any(len(pair) != 2 for pair in pairs):
        raise UsageError(f"--clues takes POSITION:ID pairs such as 0:3,7:1; got {text!r}")
    return {_integer(a, "--clues", "0:3"): _integer(b, "--clues", "0:3") for a, b in pairs} or None


@app.command()
def table(
    name: Annotated[str, typer.Argument(help="table; `loopmdm table list` shows all")],
    out: Annotated[Path | None, typer.Option(help="folder; default figures/tables")] = None,
) -> None:
    """Measure a table again from the shipped models and print it."""
    from analysis import tables

    if name == "list":
        show(
            ["table", "models", "columns"],
            [(t.name, ",".join(t.models), ",".join(t.columns)) for t in tables.TABLES.values()],
        )
        return
    item = tables.table(name)
    status = err.status(f"measuring {name}") if err.is_terminal else nullcontext()
    with interruptible("the old table is intact"), status:
        frame = item.measure(out or tables.tables_folder())
    show(list(frame.columns), frame.itertuples(index=False))


@app.command()
def figures(
    names: Annotated[list[str] | None, typer.Argument(help="figures; default all")] = None,
    source: Annotated[
        str, typer.Option("--from", help="tables | checkpoints (measure the tables again)")
    ] = "tables",
    out: Annotated[Path, typer.Option(help="folder for pdf, png, svg and json")] = Path("figures/out"),
) -> None:
    """Draw figures from the committed tables, or from the checkpoints."""
    import matplotlib as mpl

    mpl.use("Agg")
    from analysis import figures as registry
    from analysis import tables

    if source not in ("tables", "checkpoints"):
        raise UsageError(f"--from takes tables or checkpoints, got {source!r}")
    chosen = [registry.figure(name) for name in names or registry.FIGURES]
    _check_folder(out)
    with interruptible("pictures that were finished are whole, the others as they were"), progress_bar() as bar:
        if source == "checkpoints":
            needed = dict.fromkeys(name for figure in chosen for name in figure.tables)
            for name in bar.track(list(needed), description="tables"):
                tables.table(name).measure(tables.tables_folder())
        for figure in bar.track(chosen, description="figures"):
            figure.draw(out=out)
    show(["figure", "file"], [(figure.name, out / f"{figure.name}.pdf") for figure in chosen])


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="benchmarks; default all")] = None,
) -> None:
    """Measure the speed goals as ratios in one run; exits 1 where one is missed."""
    from analysis.bench import run

    results = run(names)
    show(["benchmark", "measured", "goal", "met"], results)
    if not all(met == "yes" for *_, met in results):
        raise typer.Exit(1)


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def main() -> None:
    """Entry point: one line for each expected failure."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    keep_freed_memory()
    warnings.showwarning = lambda message, *_, **__: err.print(
        f"warning: {message}", style="yellow", soft_wrap=True, markup=False, highlight=False
    )
    try:
        app()
    except UsageError as error:
        _fail(f"error: {_describe(error)}", 2)
    except DivergedError as error:
        _fail(f"error: {_describe(error)}", 1)
    except OSError as error:
        place = "" if error.filename is None else "; give another --out (or LOOPMDM_CACHE), or free some space"
        _fail(f"error: {_describe(error)}{place}", 1)
    except Interrupted as error:
        _fail(f"interrupted: {error}", 130)


def _fail(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
