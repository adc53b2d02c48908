"""The pipeline, run by Snakemake in a copy of the repository: what it would do, what it reruns, how it fails."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from analysis import frames
from analysis.roster import roster
from loopmdm_model.checkpoints import list_models, list_runs
from loopmdm_model.errors import UsageError

ROOT = Path(__file__).parents[2]
RECORDS = Path(".snakemake/loopmdm/records")

# Stands for `loopmdm`: writes what the command would, as far as the plan reads it, and notes what it was asked.
STUB = """
import hashlib, json, os, re, sys
from pathlib import Path
kind, name, *rest = sys.argv[1:]
with open("asked.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if f"{kind} {name}" == os.environ.get("FAILS"):
    Path(f"figures/tables/.partial-{name}").write_text("half")
    sys.exit(f"error: no {name}")
plan = {f"{item['kind']}/{item['name']}": item for item in json.loads(Path("plan.json").read_text())}
zoo, tables, out = Path("loopmdm_model/zoo"), Path("figures/tables"), Path("figures/out")
def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
if kind == "train":
    run = Path("runs") / Path(name).stem
    run.mkdir(parents=True, exist_ok=True)
    record = json.loads((zoo / run.name / "train.json").read_text())
    rate = float(re.search("learning_rate = (.*)", Path(name).read_text())[1])
    record["spec"]["training"]["learning_rate"] = rate
    (run / "train.json").write_text(json.dumps(record))
    (run / "model.safetensors").write_text(f"{name} {rate}")
elif kind == "ship":
    for file in Path(name).iterdir():
        (zoo / file.parent.name / file.name).write_bytes(file.read_bytes())
elif kind == "table":
    import pyarrow as pa, pyarrow.parquet as pq
    models = [need.partition("/")[2] for need in plan[f"table/{name}"]["needs"] if need.startswith("model/")]
    hashes = {m: sha(zoo / m / "model.safetensors") + ":" + sha(zoo / m / "config.json") for m in models}
    told = json.dumps({"attributes": {"models": hashes, "values_sha256": name + " again"}})
    pq.write_table(pa.table({"model": models}).replace_schema_metadata({"pandas": told}), tables / f"{name}.parquet")
elif kind == "figures":
    import pyarrow.parquet as pq
    drawn = {}
    for need in plan[f"figure/{name}"]["needs"]:
        table = need.partition("/")[2]
        told = pq.read_schema(tables / f"{table}.parquet").metadata[b"pandas"]
        drawn[table] = json.loads(told)["attributes"]["values_sha256"]
    (out / f"{name}.json").write_text(json.dumps({"tables": drawn}))
"""

TINY = ("sudoku-base", "sudoku-loop", "sotu-base", "sotu-loop")


def environment(root: Path) -> dict[str, str]:
    return os.environ | {"LOOPMDM_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}


def snakemake(root: Path, *arguments: str, code: int = 0, **variables: str) -> str:
    command = [sys.executable, "-m", "snakemake", "--profile", "figures/profiles/local", *arguments]
    told = {"env": environment(root) | variables, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    outcome = subprocess.run(command, cwd=root, text=True, check=False, **told)
    assert outcome.returncode == code, outcome.stdout
    return outcome.stdout


def plan_of(root: Path) -> dict[str, dict]:
    """The plan of a copy, by place; also left as plan.json for the stub."""
    command = [sys.executable, "-m", "analysis.pipeline"]
    told = subprocess.run(
        command, cwd=root, env=environment(root), capture_output=True, text=True, check=True
    ).stdout
    (root / "plan.json").write_text(told)
    return {f"{item['kind']}/{item['name']}": item for item in json.loads(told)}


def copied(root: Path) -> Path:
    """The repository without its models and tables."""
    ignore = shutil.ignore_patterns("zoo", "tables", "out", "gallery", "__pycache__", "report", "*.jsonl")
    shutil.copytree(ROOT / "analysis", root / "analysis", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("loopmdm_model", "figures"):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    return root


def current(root: Path) -> dict[str, dict]:
    """Make everything current but the figures' files; gives the plan."""
    for entry in roster(root / "figures"):
        spec, home = entry.load(root / "figures"), root / "loopmdm_model" / "zoo" / entry.spec
        home.mkdir(parents=True)
        (home / "train.json").write_text(json.dumps({"spec": spec.to_dict(), "seed": spec.seed}))
        (home / "config.json").write_text("{}")
        (home / "model.safetensors").write_text(spec.name)
    plan = plan_of(root)

    def short(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    for place, item in plan.items():
        kind, _, name = place.partition("/")
        homes = [root / "loopmdm_model" / "zoo" / need[6:] for need in item["needs"] if need.startswith("model/")]
        if kind == "table":
            told = {
                home.name: f"{short(home / 'model.safetensors')}:{short(home / 'config.json')}" for home in homes
            }
            table = pd.DataFrame({"model": list(told)})
            frames.write_table(table, root / "figures/tables" / f"{name}.parquet", {"models": told})
    return plan


def draw_all(root: Path, plan: dict[str, dict]) -> None:
    for place, item in plan.items():
        if place.startswith("figure/"):
            tables = [need.partition("/")[2] for need in item["needs"]]
            frame = {name: pd.read_parquet(root / f"figures/tables/{name}.parquet") for name in tables}
            told = {name: table.attrs["values_sha256"] for name, table in frame.items()}
            out = root / "figures" / "out"
            out.mkdir(exist_ok=True)
            (out / f"{item['name']}.json").write_text(json.dumps({"tables": told}))
            for kind in ("pdf", "png", "svg"):
                (out / f"{item['name']}.{kind}").touch()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A copy with four models, in which everything is current, and the stub for `loopmdm`."""
    root = copied(tmp_path_factory.mktemp("world"))
    runs = "".join(f'[[run]]\nspec = "{name}"\nseeds = [0]\n' for name in TINY)
    (root / "figures" / "zoo.toml").write_text(runs)
    (root / "stub.py").write_text(STUB)
    draw_all(root, current(root))
    return root


def downstream(plan: dict[str, dict], *places: str) -> set[str]:
    """Everything that is made from one of `places`, and they."""
    found = set(places)
    for place, item in plan.items():  # each comes after what it needs
        if found & set(item["needs"]):
            found.add(place)
    return found


def asked(root: Path) -> list[str]:
    lines = (root / "asked.txt").read_text().splitlines() if (root / "asked.txt").exists() else []
    (root / "asked.txt").unlink(missing_ok=True)
    return lines


def test_all_runs_of_the_zoo_are_in_the_roster():
    weights = {entry.load().name: entry.weights for entry in roster()}
    for name in list_runs():
        assert weights.get(name) == (name in list_models()), name


def test_a_roster_that_makes_no_sense_is_refused(tmp_path):
    for text, says in (
        ("", r"lists no \[\[run\]\]"),
        ("[[run]]\nspec = 'a'\n", "needs spec"),
        ("[[run]]\nspec = 'a'\nseeds = [0, 1]\nweights = [2]\n", "not all among"),
        ("[[run]]\nspec = 'a'\nseeds = [-1]\n", "at least 0"),
        ("[[run]]\nspec = 'a'\nseeds = [0]\n[[run]]\nspec = 'a'\nseeds = [0]\n", "twice"),
        ("[[run]]\nspec = 'a'\nseed = [0]\n", "did you mean seeds"),
        ("[[run", "not TOML"),
    ):
        (tmp_path / "zoo.toml").write_text(text)
        with pytest.raises(UsageError, match=says):
            roster(tmp_path)


def test_dry_run_of_the_real_registries(tmp_path):
    """As in a fresh clone: no runs, no memory of Snakemake's; a shipped model of today's spec is not trained."""
    root = copied(tmp_path)
    (root / "loopmdm_model/zoo").symlink_to(ROOT / "loopmdm_model/zoo")
    (root / "figures/tables").symlink_to(ROOT / "figures/tables")
    said = snakemake(root, "-n")
    known = {entry.load().name: entry for entry in roster()}
    for name in list_runs():
        record = json.loads((ROOT / f"loopmdm_model/zoo/{name}/train.json").read_text())["spec"]
        if record == known[name].load().to_dict():
            assert f"wildcards: name={name}," not in said.replace("rule table", "").split("rule figure")[0] or (
                f"--seed {known[name].seed} --resume > {RECORDS}/log/train-{name}." not in said
            )
    assert "train figures/specs/sudoku-loop.toml --seed 0 " not in said
    assert "rule figure:" in said and "Job stats:" in said


def test_a_changed_spec_reruns_what_depends_on_it_and_nothing_else(world):
    plan, stub = plan_of(world), f"loopmdm={sys.executable} stub.py"
    assert all(
        item["current"] for place, item in plan.items() if place.split("/")[0] in ("model", "table", "figure")
    )
    spec = world / "figures/specs/sotu-base.toml"
    before = spec.read_text()
    for path in world.rglob("*.*"):
        if "__pycache__" not in path.parts:
            path.touch()
    assert "Nothing to be done" in snakemake(world, "--config", stub) and asked(world) == []

    spec.write_text(before.replace("learning_rate = 1e-3", "learning_rate = 2e-3"))
    plan = plan_of(world)
    expected = {
        place for place, item in plan.items() if not item["current"] and not place.startswith(("run/", "corpus/"))
    }
    assert expected == {p for p in downstream(plan, "model/sotu-base")}
    assert "table/references" in expected and "table/sudoku-solve-rate" not in expected
    commands = {" ".join(plan[place]["command"]) for place in expected | {"run/sotu-base"}}

    old = (world / "figures/tables/references.parquet").read_bytes()
    said = snakemake(world, "--config", stub, code=1, FAILS="table references")
    assert "error: no references" in said
    assert (world / "figures/tables/references.parquet").read_bytes() == old
    assert not list((world / RECORDS / "table/references").glob("*"))
    first = asked(world)
    assert len(first) == len(set(first))
    held = {line for line in commands - set(first)}
    assert held == {
        " ".join(plan[place]["command"]) for place in downstream(plan, "table/references") if "figure" in place
    }

    snakemake(world, "--config", stub)
    fetched = {line for line in first if line.startswith("data fetch ")}
    assert set(asked(world)) == held | {"table references"} and set(first) - fetched == commands - held
    assert all(
        item["current"] for place, item in plan_of(world).items() if not place.startswith(("run/", "corpus/"))
    )


def test_from_scratch_trains_everything(world):
    said = snakemake(world, "-n", "--config", "from=scratch")
    for name in TINY:
        assert f"train figures/specs/{name}.toml --seed 0 --resume" in said


def test_misuse_is_one_line(world):
    for option, says in (("form=scratch", "unknown config key"), ("from=memory", "records or scratch")):
        said = snakemake(world, "-n", "--config", option, code=2).splitlines()
        assert len(said) == 2 and says in said[1]  # the first names the profile
    (world / "figures/zoo.toml").rename(world / "figures/gone.toml")
    said = snakemake(world, "-n", code=2).splitlines()
    (world / "figures/gone.toml").rename(world / "figures/zoo.toml")
    assert len(said) == 2 and "zoo.toml is missing" in said[1]
