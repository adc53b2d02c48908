"""`make soak`: the pipeline through Slurm, on a cluster of one node that is started here."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import toy_spec
from tests.slurm import Cluster, lacking

pytestmark = [pytest.mark.soak, pytest.mark.skipif(bool(lacking()), reason=f"Slurm: {lacking()}")]
HERE = Path(__file__).parents[3]
PROGRAM = f"OMP_NUM_THREADS=1 {sys.executable} -m loopmdm.analysis.cli"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture
def checkout(tmp_path):
    """A copy of the tracked files, in which one seed of one small run asks for fewer FLOPs than are recorded."""
    folder = tmp_path / "checkout"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=HERE, capture_output=True, check=True, text=True)
    for name in filter(None, tracked.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(HERE / name, folder / name, follow_symlinks=False)
    spec, roster = folder / "figures/specs/markov-base.toml", folder / "figures/zoo.toml"
    spec.write_text(spec.read_text().replace("flops = 3e12", "flops = 3e10"))
    entry = re.compile(r'(spec = "markov-base"\nseeds = )\[[^]]*\]')
    assert len(entry.findall(roster.read_text())) == 1
    roster.write_text(entry.sub(r"\1[0]", roster.read_text()))
    profile = folder / "profile"
    shutil.copytree(folder / "figures/profiles/slurm", profile)
    path = profile / "config.yaml"
    path.write_text(
        path.read_text().replace("  # slurm_account: NAME\n  # slurm_partition: NAME", "  slurm_partition: work")
    )
    with path.open("a") as file:
        file.write("slurm-init-seconds-before-status-checks: 5\n")
    return folder


def coordinator(cluster, folder, *options):
    command = [sys.executable, "-m", "snakemake", "--profile", "profile", *options]
    log = (folder / "coordinator.log").open("ab")
    return subprocess.Popen(
        command, cwd=folder, env=cluster.environment, stdout=log, stderr=log, start_new_session=True
    )


WANTED = ("--config", "only=table/excess-kl,figure/excess-kl")


def test_train_ship_table_and_figure_as_jobs(cluster, checkout):
    process = coordinator(cluster, checkout, *WANTED)
    assert process.wait(1500) == 0, (checkout / "coordinator.log").read_text()[-3000:]
    told = (checkout / "coordinator.log").read_text()
    assert len(re.findall(r"Job \d+ has been submitted with SLURM jobid", told)) >= 3, told[-3000:]
    record = json.loads((checkout / "loopmdm_model/zoo/markov-base/train.json").read_text())
    assert record["spec"]["training"]["flops"] == 3e10
    assert (checkout / "figures/out/excess-kl.png").is_file()


def test_a_killed_coordinator_leaves_a_lock_with_its_remedy(cluster, checkout):
    process = coordinator(cluster, checkout, *WANTED)
    end = time.monotonic() + 600
    while "has been submitted with SLURM jobid" not in (checkout / "coordinator.log").read_text():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert coordinator(cluster, checkout, *WANTED).wait(300) != 0
    assert "--unlock" in (checkout / "coordinator.log").read_text()
    assert coordinator(cluster, checkout, *WANTED, "--unlock").wait(300) == 0
    assert coordinator(cluster, checkout, *WANTED).wait(1500) == 0, (checkout / "coordinator.log").read_text()[
        -3000:
    ]
    assert (checkout / "figures/out/excess-kl.png").is_file()


def rows(folder):
    path = folder / "runs/requeued/metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def wait_for_rows(folder, n):
    end = time.monotonic() + 600
    while len(rows(folder)) < n:
        assert time.monotonic() < end
        time.sleep(0.2)


def trained(cluster, folder, script, seconds=900):
    job = cluster.submit(script, "--requeue", "--open-mode=append", cwd=folder)
    cluster.wait(job, "COMPLETED", seconds=seconds)
    return rows(folder)


def test_preempted_trainings_end_as_others(cluster, tmp_path):
    told, requeued, whole = (tmp_path / name for name in ("told", "requeued", "whole"))
    for folder in (told, requeued, whole):
        folder.mkdir()
        (folder / "requeued.toml").write_text(toy_spec("flops = 6e11", 20, name="requeued"))
    train = f"cd {{}} && PYTHONPATH={HERE} {PROGRAM} train requeued.toml --out runs/requeued --resume"
    wanted = trained(cluster, whole, train.format(whole))
    assert len(wanted) == 20

    job = cluster.submit(f"exec bash -c '{train.format(told)}'", cwd=told)
    wait_for_rows(told, 2)
    cluster.run("scancel", "--signal=TERM", "--full", job)
    assert cluster.wait(job, "FAILED", "CANCELLED", seconds=120)
    assert "add --resume to go on from step" in (told / f"slurm-{job}.out").read_text()
    assert 2 <= len(rows(told)) < 20 and trained(cluster, told, train.format(told)) == wanted

    job = cluster.submit(train.format(requeued), "--requeue", "--open-mode=append", cwd=requeued)
    wait_for_rows(requeued, 2)
    cluster.run("scontrol", "requeue", job)
    assert len(rows(requeued)) < 20
    cluster.wait(job, "COMPLETED", seconds=900)  # Slurm holds a requeued job for two minutes
    assert rows(requeued) == wanted
