"""`make soak`: what is too slow for every run of the tests. Twenty kills at random moments lose nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from loopmdm.model.files import LOCK

pytestmark = pytest.mark.soak
SPEC = """
name = "soak"
seed = 1
[data]
corpus = "sudoku6"
[model]
d_model = 32
n_heads = 2
max_loops = 3
[training]
flops = 8e11
batch_size = 8
curve_points = 100
curve_sequences = 16
"""
PROGRAM = [sys.executable, "-m", "loopmdm.analysis.cli", "train"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--no-python"]


def start(launch, *arguments):
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launch, *PROGRAM, *map(str, arguments)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
    )  # fmt: skip


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("launch", [[], TWO], ids=["one process", "two processes"])
def test_twenty_kills_at_random_moments(launch, tmp_path):
    spec, whole, broken = tmp_path / "soak.toml", tmp_path / "whole", tmp_path / "broken"
    spec.write_text(SPEC)
    started = time.monotonic()
    assert start(launch, spec, "--out", whole).wait() == 0
    trained = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    longest = time.monotonic() - started - trained + 0.08 * trained  # starting up, and a part of the run
    moments = random.Random(0)
    metrics, seen = broken / "metrics.jsonl", []
    for _ in range(20):
        process = start(launch, spec, "--out", broken, "--resume")
        wait_until = time.monotonic() + moments.uniform(0, longest)
        while process.poll() is None and time.monotonic() < wait_until:
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if metrics.is_file():
            steps = [row["step"] for row in rows(broken)]
            assert steps == sorted(set(steps))
            assert steps[: len(seen)] == seen  # nothing recorded is lost
            seen = steps
    assert seen, "no kill came after a checkpoint"
    assert start(launch, spec, "--out", broken, "--resume").wait() == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    assert rows(whole) == rows(broken) and len(rows(whole)) == 100
    left = [path for path in broken.rglob(".*") if path.is_file() and path.name != LOCK]
    assert not left
    told = "two processes" if launch else "one process"
    print(f"\n20 kills of {told}: 100 of 100 rows and all weights as without, {len(left)} files left over")
