"""The command line as a user or a script meets it: in this process, where the test is not about the process."""

import contextlib
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from loopmdm.analysis.cli import main

HIDDEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""What Python does not show of imported code."""


@dataclass
class Outcome:
    """How one run of the command line ended."""

    code: Any
    out: str
    err: str
    trace: str = ""

    @property
    def clear(self) -> bool:
        """One line of ours, or the lines of the parser."""
        said = self.err.strip().splitlines()
        return len(said) == 1 or (bool(said) and said[0].startswith("Usage:") and len(said) <= 5)


@contextlib.contextmanager
def as_a_process(arguments: list[str], env: Mapping[str, str]) -> Iterator[None]:
    """What a process has of its own and `main` changes: words, signals, warnings, environment, gradients."""
    before = sys.argv, signal.getsignal(signal.SIGTERM), warnings.showwarning
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    sys.argv = ["loopmdm", *arguments]
    try:
        with mock.patch.dict(os.environ, env), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("default")
            for kind in HIDDEN:
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        sys.argv, handler, warnings.showwarning = before
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, interrupts)


def run(arguments: list[str], env: Mapping[str, str] | None = None) -> Outcome:
    """The entry point in this process, as `loopmdm ARGUMENTS` would run it in its own."""
    out, err, trace = io.StringIO(), io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), as_a_process(arguments, env or {}):
            main()
        code: Any = "no exit"
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        code, trace = "traceback", traceback.format_exc()
    return Outcome(code, out.getvalue(), err.getvalue(), trace)


def loopmdm(
    *arguments: object, code: int = 0, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """What `loopmdm ARGUMENTS` prints, on stdout and stderr, where it ends with `code`."""
    with contextlib.chdir(cwd or Path.cwd()):
        outcome = run([str(argument) for argument in arguments], env)
    assert outcome.code == code, f"{outcome.code}: {outcome.err}{outcome.trace}"
    return outcome.out, outcome.err


def one_line(text: str) -> bool:
    """Whether a message is one line, and no traceback."""
    return text.strip().count("\n") == 0 and "Traceback" not in text
