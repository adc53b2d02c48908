"""The command line: `loopmdm COMMAND`. Exit codes: 0 fine, 1 the world failed, 2 misuse.

What is printed: `printing.py`.
"""

import signal
import sys
import warnings

from loopmdm.analysis.cli import (  # noqa: F401 - each adds its commands
    activations,
    data,
    dictionaries,
    evaluation,
    figures,
    models,
    report,
    sampling,
    science,
    training,
)
from loopmdm.analysis.cli.shared import Interrupted, Terminated, app
from loopmdm.analysis.cli.waiting import err
from loopmdm.model.errors import DivergedError, NotFiniteError, UsageError
from loopmdm.model.training.allocator import keep_freed_memory

LONGEST = 1000
"""Characters of a message: it may repeat what somebody gave."""
NO_ROOM = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed", "out of memory")
"""How torch says that memory ran out."""


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= LONGEST else f"{text[:LONGEST]} ...") or type(error).__name__


def main() -> None:
    """Entry point: one line for each expected failure."""
    signal.signal(signal.SIGTERM, _terminate)
    keep_freed_memory()
    warnings.showwarning = lambda message, *_, **__: err.print(
        f"warning: {message}", style="yellow", soft_wrap=True, markup=False, highlight=False
    )
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 shows escapes
    try:
        _run()
    except UsageError as error:
        _fail(f"error: {_describe(error)}", 2)
    except (DivergedError, NotFiniteError) as error:
        _fail(f"error: {_describe(error)}", 1)
    except MemoryError as error:
        _fail(f"error: not enough memory ({_describe(error)}); ask for fewer or shorter sequences at a time", 1)
    except BrokenPipeError:
        sys.stdout = None  # nothing more can be written; its flush at the end would fail again
        _fail("error: whoever read the output went away", 141)
    except OSError as error:
        place = "" if error.filename is None else "; give another --out (or LOOPMDM_CACHE), or free some space"
        _fail(f"error: {_describe(error)}{place}", 1)
    except Interrupted as error:
        _fail(f"interrupted: {error}", error.code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Terminated:
        _fail("interrupted: told to end", 143)
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_ROOM):
            raise
        _fail(
            f"error: not enough memory ({_describe(error):.120}); ask for fewer or shorter sequences at a time", 1
        )


def _run() -> None:
    if sys.stdout is None:
        raise UsageError("standard output is closed; redirect it to a file or to /dev/null")
    code = 0
    try:
        app(prog_name="loopmdm")  # under whatever name it runs: what shells complete goes by it
    except SystemExit as error:
        code = error.code
    sys.stdout.flush()  # what cannot be written is an error of its own
    if code == 130:
        raise KeyboardInterrupt
    raise SystemExit(code)


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise Terminated


def _fail(message: str, code: int) -> None:
    if sys.stderr is not None:
        print(message, file=sys.stderr)
    raise SystemExit(code)
