"""What the commands share: the app and its groups, interruption, options."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import click
import typer
import typer.core

import loopmdm
from loopmdm.model.errors import Stopped, UsageError
from loopmdm.model.files import check_target, toml_value

LOOK, MEASURE, TRAIN, MAINTAIN = "Look", "Measure", "Train", "Maintain"


class Grouped(typer.core.TyperGroup):
    """Commands in `--help` by what one wants to do, each with its whole first sentence."""

    def groups(self) -> dict[str, list[str]]:
        """Names of the commands by group, in the order of the work."""
        found: dict[str, list[str]] = {group: [] for group in (LOOK, MEASURE, TRAIN, MAINTAIN)}
        for name, command in self.commands.items():
            if not command.hidden:
                found[getattr(command, "rich_help_panel", "")].append(name)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write a section for each group."""
        widest = max(map(len, self.commands))
        for group, names in self.groups().items():
            rows = [(name.ljust(widest), self.commands[name].get_short_help_str(limit=200)) for name in names]
            with formatter.section(group):
                formatter.write_dl(rows)


app = typer.Typer(
    cls=Grouped,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"loopmdm {loopmdm.__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """See inside looped masked-diffusion language models."""


MODEL = "shipped name, run folder or hub id; somebody else's: hf:owner/name, a folder, a name of `loopmdm models`"


class Interrupted(RuntimeError):
    """Ctrl-C or SIGTERM, with what is left and how to go on; `code` is the command's exit code."""

    def __init__(self, message: str, code: int = 130):
        super().__init__(message)
        self.code = code


class Terminated(BaseException):
    """SIGTERM: what a scheduler sends. Unwinds as Ctrl-C does, so that workers and partial files go."""


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into one line (typer itself would end without a word)."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(message) from None
    except Terminated:
        raise Interrupted(message, 143) from None
    except Stopped as error:
        raise Interrupted(str(error), 143) from None


def integer(word: str, option: str = "--n-loops", example: str = "1,2,4") -> int:
    """One integer of an option."""
    try:
        return int(word)
    except ValueError:
        raise UsageError(f"{option} takes integers such as {example}; got {word!r:.80}") from None


def integers(text: str, option: str, example: str) -> list[int]:
    """Comma-separated integers of an option."""
    return [integer(word, option, example) for word in text.split(",")]


def shares(text: str) -> list[float]:
    """The comma-separated shares of --mask-ratios."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--mask-ratios takes shares such as 0.25,0.5; got {text!r:.80}") from None


def values(pairs: list[str], example: str = "training.learning_rate=5e-4") -> dict[str, Any]:
    """KEY=VALUE pairs of --set; a value is TOML or a bare word."""
    found = {}
    for pair in pairs:
        key, mark, value = pair.partition("=")
        if not key or not mark:
            raise UsageError(f"--set takes KEY=VALUE such as {example}, got {pair!r:.80}")
        found[key] = toml_value(value)
    return found


def check_folder(folder: Path) -> None:
    """Make a folder, or say that it cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write into {folder}; give another --out")


def check_out(out: Path | None, *suffixes: str) -> None:
    """Try --out before the work: a regular file or a new one, in a folder that can be written to."""
    if out is None:
        return
    check_target(out)
    if suffixes and out.suffix.lower() not in suffixes:
        raise UsageError(f"--out takes a {suffixes[0]} file, got {out}")


def draw_offline() -> None:
    """Draw into files, here and in workers, whatever the environment says: an unknown backend stops matplotlib."""
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib as mpl

    mpl.use("agg")


TEXT = typer.Option(help="measure on these instead of a test set: UTF-8, a text or sequence a line")
SET = "about somebody else's model, such as mask_token_id=103, bidirectional=true"


DEVICE = "where models run: cpu, cuda, cuda:1, or auto for a GPU if there is one"
BATCH = "sequences at a time: a matter of memory, not of values; default as each function does"


def opens(
    *, text: bool = True, runs: bool = True, changes: str = SET
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that opens a model: its parameter `how`, an `Access`, becomes the options of opening one.

    `text`: whether it measures on texts of the user's, too; `runs`: whether it computes anything with the model,
    so that device, dtype and batch size matter; `changes` is the help of --set.
    """
    options: dict[str, tuple[Any, Any]] = {
        "text": (Annotated[Path | None, TEXT], None),
        "device": (Annotated[str, typer.Option(help=DEVICE)], "cpu"),
        "dtype": (
            Annotated[
                str, typer.Option(help="of the weights: float32, bfloat16, float16, float64; default as stored")
            ],
            "",
        ),
        "batch_size": (Annotated[int | None, typer.Option(help=BATCH)], None),
        "revision": (Annotated[str, typer.Option(help="of a model of the hub")], ""),
        "trust_remote_code": (
            Annotated[bool, typer.Option("--trust-remote-code", help="let code run that lies beside the weights")],
            False,
        ),
        "changes": (Annotated[list[str] | None, typer.Option("--set", help=changes)], None),
    }
    for name in (*(() if text else ("text",)), *(() if runs else ("device", "dtype", "batch_size"))):
        del options[name]

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            from loopmdm.analysis.measures.access import Access
            from loopmdm.model.batching import at_a_time

            how = {name: given.pop(name) for name in options}
            how |= {name: how.get(name) or None for name in ("dtype", "revision")}
            how |= {"changes": values(how["changes"] or [], "mask_token_id=103")}
            with at_a_time(how.pop("batch_size", None)):
                command(**given, how=Access(**how))

        own = [item for name, item in signature(command).parameters.items() if name != "how"]
        more = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (kind, default) in options.items()
        ]
        own = [item.replace(kind=Parameter.KEYWORD_ONLY) for item in own]
        run.__signature__ = Signature([*own, *more])  # type: ignore[attr-defined]
        run.__annotations__ = {item.name: item.annotation for item in [*own, *more]} | {"return": None}
        return run

    return with_options
