"""`make soak`: what is too slow for every run of the tests. Twenty kills at random moments lose nothing.

The moments are told by what a run has done, never by the clock alone: a loaded machine makes them later, not
others.
"""

import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from loopmdm.model.files import LOCK, PARTIAL
from tests.conftest import toy_spec

pytestmark = pytest.mark.soak
PROGRAM = [sys.executable, "-m", "loopmdm.analysis.cli", "train"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--no-python"]
KINDS = ("starting",) * 5 + ("between two states",) * 10 + ("while a file is written",) * 5
MOST_ROWS = 3
"""Of a run between two kills: twenty times as many are less than the run has."""


def start(launch, folder, *arguments):
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    with (folder.parent / f"{folder.name}.err").open("wb") as told:
        return subprocess.Popen(
            [*launch, *PROGRAM, str(folder.parent / "soak.toml"), "--out", str(folder), *arguments],
            stdout=subprocess.DEVNULL, stderr=told, env=environment,
        )  # fmt: skip


def said(folder):
    return (folder.parent / f"{folder.name}.err").read_text()


def finish(launch, folder, *arguments):
    assert start(launch, folder, *arguments).wait() == 0, said(folder)


def kill(process):
    """SIGKILL for the program and all that it started, which launchers put into sessions of their own."""
    family = [psutil.Process(process.pid)]
    family[0].suspend()  # it starts nothing more
    family += family[0].children(recursive=True)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family)


def n_rows(folder):
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines() if n_rows(folder) else []
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def writes(folder):
    return any(folder.glob(f"{PARTIAL}*")) or any(folder.glob(f"state/{PARTIAL}*"))


def wait_for_moment(process, folder, kind, moments, usual):
    """Until a moment of this kind, at the latest until there are MOST_ROWS new rows; a start takes about `usual`.

    Between two states it is a random part of the time that the row before took: this run tells how fast it is.
    """
    had = seen = n_rows(folder)
    wanted, at = moments.randrange(MOST_ROWS), time.monotonic()
    until = at + moments.random() * usual if kind == "starting" else float("inf")
    while time.monotonic() < until and seen - had < MOST_ROWS:
        assert process.poll() is None, said(folder)
        if kind == "while a file is written" and seen - had >= wanted and writes(folder):
            return
        time.sleep(0.001)
        if (now := n_rows(folder)) > seen:
            seen, before, at = now, at, time.monotonic()
            if kind == "between two states" and seen - had == 2:
                until = at + moments.random() * (at - before)


@pytest.mark.parametrize("launch", [[], TWO], ids=["one process", "two processes"])
def test_twenty_kills_at_random_moments(launch, tmp_path):
    whole, broken, moments = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    (tmp_path / "soak.toml").write_text(toy_spec("flops = 8e11", 100, name="soak"))
    began = time.monotonic()
    finish(launch, whole)
    trained = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    usual, seen, caught = time.monotonic() - began - trained, [], 0
    for kind in moments.sample(KINDS, len(KINDS)):
        process = start(launch, broken, "--resume")
        wait_for_moment(process, broken, kind, moments, usual)
        kill(process)
        caught += writes(broken)
        steps = [row["step"] for row in rows(broken)]
        assert steps == sorted(set(steps))
        assert steps[: len(seen)] == seen  # nothing recorded is lost
        seen = steps
    assert len(seen) >= 10, "too few kills came after a checkpoint"
    finish(launch, broken, "--resume")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    assert rows(whole) == rows(broken) and len(rows(whole)) == 100
    left = [path for path in broken.rglob(".*") if path.is_file() and path.name != LOCK]
    assert not left
    told = f"{'two processes' if launch else 'one process'}, {caught} within a write"
    print(f"\n20 kills of {told}: 100 of 100 rows and all weights as without, no file left over")
