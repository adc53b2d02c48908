"""The command line: `loopmdm COMMAND`. Exit codes: 0 fine, 1 the world failed, 2 misuse.

Tables go to a terminal as aligned columns, into a pipe as plain TSV, one record a line.
"""

import signal
import sys
import warnings

from analysis.cli import data, evaluation, figures, report, sampling, science, training  # noqa: F401 - each adds its commands
from analysis.cli.shared import Interrupted, app, err
from loopmdm_model.allocator import keep_freed_memory
from loopmdm_model.errors import DivergedError, UsageError


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
