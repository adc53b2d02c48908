"""A measure in shards as Snakemake jobs: what would run, what runs again, what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Stands for `loopmdm`: notes what it was asked, writes --out; a shard named in FAILS is killed half-way.
STUB = """
import os, sys
from pathlib import Path
with open("asked.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
Path(sys.argv[sys.argv.index("--out") + 1]).write_text("half" if os.environ.get("FAILS") in sys.argv else "whole")
if os.environ.get("FAILS") in sys.argv:
    os.kill(os.getpid(), 9)
"""
ASKED = ("measure=settled", "model=sotu-loop", "shards=3", "out=a table.parquet", "options=--n 96")


def snakemake(root: Path, *config: str, dry: bool = False, code: int = 0, **variables: str) -> str:
    (root / "stub.py").write_text(STUB)
    (root / "python").unlink(missing_ok=True)
    (root / "python").symlink_to(sys.executable)  # a name without blanks
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "figures/shards.smk"), "--cores", "1"]
    command += ["--keep-going", "--rerun-triggers", "params", *(["-n"] if dry else [])]
    command += ["--config", *config, f"loopmdm={root}/python {root}/stub.py"]
    told = {"env": os.environ | variables, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    outcome = subprocess.run(command, cwd=root, text=True, check=False, **told)
    assert outcome.returncode == code, outcome.stdout
    return outcome.stdout


@pytest.mark.slow
def test_each_shard_is_a_job_and_a_killed_one_is_done_again_alone(tmp_path):
    said = snakemake(tmp_path, *ASKED, dry=True)
    jobs = [line.split() for line in said.splitlines()]
    assert ["part", "3"] in jobs and ["merge", "1"] in jobs and ["total", "4"] in jobs
    snakemake(tmp_path, *ASKED, code=1, FAILS="2/3")
    parts = tmp_path / "a table.parquet.parts"
    assert sorted(path.name for path in parts.glob("*.parquet")) == ["1.parquet", "3.parquet"]
    assert not (tmp_path / "a table.parquet").exists()
    (tmp_path / "asked.txt").unlink()
    snakemake(tmp_path, *ASKED)
    first, last = (tmp_path / "asked.txt").read_text().splitlines()
    assert first == "measure settled sotu-loop --n 96 --shard 2/3 --out a table.parquet.parts/2.parquet"
    parts = " ".join(f"a table.parquet.parts/{number}.parquet" for number in (1, 2, 3))
    assert last == f"merge {parts} --out a table.parquet"
    assert "Nothing to be done" in snakemake(tmp_path, *ASKED, dry=True)


def test_misuse_is_one_line(tmp_path):
    for config, says in (
        (("model=sotu-loop", "out=x.parquet"), "measure= is missing"),
        ((*ASKED, "shards=none"), "takes a number such as 8, got 'none'"),
        ((*ASKED, "shard=2"), "unknown config key 'shard'"),
    ):
        said = [line for line in snakemake(tmp_path, *config, dry=True, code=2).splitlines() if "error:" in line]
        assert len(said) == 1 and says in said[0]
