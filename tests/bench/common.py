"""What benchmarks share: paired ratios, rows against a goal, sizes of models."""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from loopmdm.model.network.config import LoopMDMConfig

Row = tuple[str, str, str, str]
"""Benchmark, measured, goal, met ("yes", "NO", or "not run" where something is missing)."""


def ratio(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int = 25,
    inner: int = 1,
    now: Callable[[], float] = time.perf_counter,
) -> float:
    """Median over alternating repeats of time(ours) / time(theirs), by the clock `now`.

    `time.process_time` leaves out what other processes take; it counts all threads.
    """

    def clock(call: Callable[[], object]) -> float:
        start = now()
        for _ in range(inner):
            call()
        return now() - start

    clock(ours), clock(theirs)
    ratios = []
    for repeat in range(repeats):
        pair = [clock(theirs), clock(ours)] if repeat % 2 else [clock(ours), clock(theirs)][::-1]
        ratios.append(pair[1] / pair[0])
    return statistics.median(ratios)


def shape(d: int, layers: int, length: int, loops: int = 1, heads: int = 4, vocab: int = 1024) -> LoopMDMConfig:
    """A config with one looped layer in the middle."""
    sizes = {"d_vocab": vocab, "n_ctx": length, "d_model": d, "n_heads": heads, "max_loops": loops}
    return LoopMDMConfig(**sizes, n_prelude_layers=1, n_loop_layers=1, n_coda_layers=layers - 2)


def peak_kib() -> int:
    """Peak of resident memory of the process itself; ru_maxrss would carry over its parent's at the fork."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def alone(part: str, what: object, **more: str) -> str:
    """What `once(what)` of tests/bench/PART.py prints in a process of its own, with `more` in its environment.

    With glibc's thresholds fixed its peak of memory follows what is alive.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} | more
    command = [sys.executable, "-c", f"from tests.bench.{part} import once; once({what!r})"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout


def median_peak(part: str, what: object) -> float:
    """Peak memory, KiB: the median of three such processes."""
    return statistics.median(float(alone(part, what)) for _ in range(3))


def at_most(name: str, value: float, goal: float, unit: str = "x") -> Row:
    """A row whose goal is an upper bound."""
    return name, f"{value:.3f}{unit}", f"<= {goal}{unit}", "yes" if value <= goal else "NO"


def at_least(name: str, value: float, goal: float) -> Row:
    """A row whose goal is a lower bound."""
    return name, f"{value:.3f}x", f">= {goal}x", "yes" if value >= goal else "NO"
