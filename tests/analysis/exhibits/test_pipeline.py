"""The pipeline, run by Snakemake in a copy of the repository: what it would do, what it reruns, how it fails."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from loopmdm.analysis.cli.shared import values
from loopmdm.analysis.exhibits import pipeline, tables
from loopmdm.model.corpora.fetch import sources
from loopmdm.model.network.checkpoints import ZOO
from loopmdm.model.training import state
from loopmdm.model.training.spec import RunSpec
from loopmdm.model.zoo.runs import Run, Zoo

ROOT = Path(__file__).parents[3]

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
zoo, tables = Path("loopmdm_model/zoo"), Path("figures/tables")
values = re.compile(rb'(?<="values_sha256": ")[0-9a-f]*')
if kind == "train":
    run = Path("runs") / Path(name).stem
    run.mkdir(parents=True, exist_ok=True)
    record = json.loads((zoo / run.name / "train.json").read_text())
    rate = re.search("learning_rate = (.*)", Path(name).read_text())[1]
    record["spec"]["training"]["learning_rate"] = float(rate)
    (run / "train.json").write_text(json.dumps(record))
    (run / "model.safetensors").write_text("trained again")
elif kind == "ship":
    for file in Path(name).iterdir():
        (zoo / file.parent.name / file.name).write_bytes(file.read_bytes())
elif kind == "table":
    told = (tables / f"{name}.parquet").read_bytes()
    for need in plan[f"table/{name}"]["needs"]:
        if need.startswith("model/"):
            weights = (zoo / need[6:] / "model.safetensors").read_bytes()
            new = f'"{need[6:]}": "{hashlib.sha256(weights).hexdigest()[:16]}'.encode()
            told = re.sub(f'"{need[6:]}": "[0-9a-f]*'.encode(), new, told)
    told = values.sub(lambda found: found[0][::-1], told)
    (tables / f"{name}.parquet").write_bytes(told)
elif kind == "figures":
    needs = [need.partition("/")[2] for need in plan[f"figure/{name}"]["needs"]]
    drawn = {table: values.search((tables / f"{table}.parquet").read_bytes())[0].decode() for table in needs}
    Path(f"figures/out/{name}.json").write_text(json.dumps({"tables": drawn}))
"""


def environment(root: Path) -> dict[str, str]:
    return os.environ | {"LOOPMDM_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}


def snakemake(root: Path, *arguments: str, code: int = 0, **variables: str) -> str:
    command = [sys.executable, "-m", "snakemake", "--profile", "figures/profiles/local", *arguments]
    told = {"env": environment(root) | variables, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    outcome = subprocess.run(command, cwd=root, text=True, check=False, **told)
    assert outcome.returncode == code, outcome.stdout
    return outcome.stdout


def interpreter(root: Path) -> Path:
    """This Python under a name without blanks, which Snakemake's --config would take apart."""
    link = root / "interpreter"
    if not link.exists():
        link.symlink_to(sys.executable)
    return link


def plan_of(root: Path) -> dict[str, dict]:
    """The plan of a copy, by place; also left as plan.json for the stub."""
    command = [sys.executable, "-m", "loopmdm.analysis.exhibits.pipeline"]
    told = subprocess.run(
        command, cwd=root, env=environment(root), capture_output=True, text=True, check=True
    ).stdout
    (root / "plan.json").write_text(told)
    return by_place(told)


def by_place(told: str) -> dict[str, dict]:
    return {f"{item['kind']}/{item['name']}": item for item in json.loads(told)}


def copied(root: Path, models: bool = False) -> Path:
    """The repository without its tables and, unless asked for, its models."""
    ignore = shutil.ignore_patterns("zoo", "tables", "out", "gallery", "__pycache__", "report", "*.jsonl")
    for name in ("analysis", "loopmdm"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("loopmdm_model", "figures"):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    (root / "loopmdm_model/zoo").mkdir()
    for path in [*ZOO.glob("*.py"), *(ZOO.glob("[!_]*/") if models else ())]:
        place = root / "loopmdm_model/zoo" / path.name
        place.symlink_to(path) if path.is_dir() else shutil.copyfile(path, place)
    return root


def make_current(root: Path) -> None:
    """Plant models, tables and figures as today's specs ask for, and all corpora but one."""
    (root / "cache").mkdir()
    for item in sources().values():
        if item.name != "sotu":
            (root / "cache" / f"{item.sha256[:16]}-archive").touch()
    zoo = Zoo.roster(root / "figures")
    for run in zoo:
        home = root / "loopmdm_model" / "zoo" / run.name
        home.mkdir(parents=True)
        (home / "train.json").write_text(json.dumps({"spec": run.spec.to_dict(), "seed": run.seed}))
        (home / "config.json").write_text("{}")
        (home / "model.safetensors").write_text(run.name)
    plan = plan_of(root)
    (root / "figures/tables").mkdir()
    (root / "figures/out").mkdir()
    for place, item in plan.items():
        kind, _, name = place.partition("/")
        needs = [need.partition("/")[2] for need in item["needs"]]
        if kind == "table":
            homes = [root / "loopmdm_model/zoo" / need[6:] for need in item["needs"] if need.startswith("model/")]
            models = {h.name: f"{short(h / 'model.safetensors')}:{short(h / 'config.json')}" for h in homes}
            told = {"models": models, "values_sha256": value(name)} | tables.table(name).made_from(zoo)
            write_table(root / f"figures/tables/{name}.parquet", told)
        elif kind == "figure":
            sidecar = {"tables": {table: value(table) for table in needs}}
            (root / f"figures/out/{name}.json").write_text(json.dumps(sidecar))
            for suffix in ("pdf", "png", "svg"):
                (root / f"figures/out/{name}.{suffix}").touch()


def write_table(path: Path, attributes: dict) -> None:
    """A table of no rows; with its attributes once and in plain text, for the stub to change."""
    schema = pa.schema({"model": pa.string()})
    with pq.ParquetWriter(path, schema, store_schema=False) as writer:
        writer.add_key_value_metadata({"pandas": json.dumps({"attributes": attributes})})


def value(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def short(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A copy with one seed of each spec, in which everything is current, and the stub for `loopmdm`."""
    root = copied(tmp_path_factory.mktemp("world"))
    (root / "figures" / "zoo.toml").write_text("".join(listed(run) for run in Zoo.roster().select(seed=0)))
    (root / "stub.py").write_text(STUB)
    make_current(root)
    return root


def listed(run: Run) -> str:
    """An entry of zoo.toml with this seed alone, with weights."""
    return f'[[run]]\ntask = "{run.task}"\narm = "{run.arm}"\nspec = "{run.file}"\nseeds = [{run.seed}]\n'


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


@pytest.mark.slow
def test_dry_run_of_the_real_registries(tmp_path):
    """As in a fresh clone: no runs, no memory of Snakemake's. A model shipped from today's spec is not trained."""
    root = copied(tmp_path, models=True)
    (root / "figures/tables").symlink_to(ROOT / "figures/tables")
    said = snakemake(root, "-n")
    logs = [line.split()[-2] for line in said.splitlines() if line.startswith("Shell command")]
    trained = {Path(log).name.removeprefix("train-").partition(".")[0] for log in logs if "/train-" in log}
    specs = {run.name: run.spec.to_dict() for run in Zoo.roster()}
    records = {
        path.parent.name: RunSpec.from_dict(json.loads(path.read_text())["spec"]).to_dict()
        for path in ZOO.glob("*/train.json")
    }
    assert trained == {name for name, spec in specs.items() if records.get(name) != spec}
    assert "sudoku-loop" not in trained and "figures sudoku-boards " in said


@pytest.mark.slow
def test_a_changed_spec_reruns_what_depends_on_it_and_nothing_else(world):
    stub = f"loopmdm={interpreter(world)} -I -S stub.py"
    plan = by_place((world / "plan.json").read_text())  # of before, when all was current
    for path in world.rglob("*.*"):
        if path.suffix in (".toml", ".py", ".parquet", ".json", ".safetensors"):
            path.touch()
    spec = world / "figures/specs/sotu-base.toml"
    spec.write_text(spec.read_text().replace("learning_rate = 1e-3", "learning_rate = 2e-3"))
    places = downstream(plan, "model/sotu-base")
    assert "table/references" in places and "table/sudoku-solve-rate" not in places
    commands = {" ".join(plan[place]["command"]) for place in places | {"corpus/sotu", "run/sotu-base"}}
    held = {" ".join(plan[place]["command"]) for place in downstream(plan, "table/references")}

    old = (world / "figures/tables/references.parquet").read_bytes()
    said = snakemake(world, "--config", stub, code=1, FAILS="table references")
    assert "error: no references" in said  # the failed job's log is shown
    assert (world / "figures/tables/references.parquet").read_bytes() == old
    assert not list((world / ".snakemake/loopmdm/records/table/references").glob("*"))
    assert sorted(asked(world)) == sorted(commands - held | {"table references"})

    snakemake(world, "--config", stub)
    assert sorted(asked(world)) == sorted(held)
    (world / "figures/out/learning-curves.png").touch()
    assert "Nothing to be done" in snakemake(world, "--config", stub) and asked(world) == []


def test_a_run_may_differ_from_its_spec():
    changes = (("training.learning_rate", 2e-3), ("training.matmul_precision", "highest"))
    spec = RunSpec.load(ROOT / "figures/specs/markov-loop.toml", dict(changes)).seeded(1)
    assert (spec.name, spec.training.learning_rate) == ("markov-loop-seed1", 2e-3)
    items: pipeline.Items = {}
    pipeline._add_run(items, Run("markov", "loop", 1, "markov-loop", spec, True, changes))
    command = list(items["run/markov-loop-seed1"].command)
    assert command[:4] == ["train", "figures/specs/markov-loop.toml", "--seed", "1"]
    given = [after for before, after in itertools.pairwise(command) if before == "--set"]
    assert values(given) == dict(changes)


@pytest.mark.parametrize("corpus", ["markov", "files:texts/*.txt"])
def test_a_saved_state_of_the_same_spec_is_gone_on_with(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = RunSpec.load(ROOT / "figures/specs/markov-loop.toml")
    spec = replace(spec, data=replace(spec.data, corpus=corpus))
    assert pipeline._run_folder(spec) == Path("runs/markov-loop")
    state.save(Path("runs/markov-loop"), {}, state.Progress(), state.identity_of(spec) | {"corpus sha256": "0"})
    assert pipeline._run_folder(spec) == Path("runs/markov-loop")
    other = replace(spec, training=replace(spec.training, learning_rate=3e-3))
    assert pipeline._run_folder(other).name.startswith("markov-loop.")


@pytest.mark.slow
def test_from_scratch_trains_everything(world):
    said = snakemake(world, "-n", "--config", "from=scratch")
    for run in Zoo.roster(world / "figures"):
        assert f"train figures/specs/{run.file}.toml --seed 0 --resume" in said


@pytest.mark.slow
def test_misuse_is_one_line(world):
    said = snakemake(world, "-n", "--config", "form=scratch", code=2).splitlines()
    assert len(said) == 2 and "unknown config key 'form'" in said[1]  # the first names the profile
    (world / "figures/zoo.toml").rename(world / "figures/gone.toml")
    said = snakemake(world, "-n", code=2).splitlines()
    (world / "figures/gone.toml").rename(world / "figures/zoo.toml")
    assert len(said) == 2 and "zoo.toml is missing" in said[1]


@pytest.mark.slow
def test_values_of_a_roster_reach_the_command_as_they_are(world):
    """Blanks, patterns, quotes and braces are words of the command, and nothing in them runs."""
    corpus = "files:texts of 'mine'/$(touch${IFS}PWNED) `touch PWNED`/{a}*.txt; touch PWNED #"
    roster = world / "figures/zoo.toml"
    before = roster.read_text()
    entry = '[[run]]\ntask = "own"\narm = "base"\nspec = "smoke"\nseeds = [0]\n'
    changes = f'set = {{ "name" = "0.5", "data.corpus" = {json.dumps(corpus)} }}\n'
    roster.write_text(before + entry + changes)
    try:
        (world / "words.py").write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
        snakemake(world, "--config", f"loopmdm={interpreter(world)} words.py", "only=run/0.5")
        (log,) = (world / ".snakemake/loopmdm/records/log").glob("train-0.5.*.log")
        command = json.loads(log.read_text().splitlines()[-1])
    finally:
        roster.write_text(before)
    given = [after for word, after in itertools.pairwise(command) if word == "--set"]
    assert values(given) == {"name": "0.5", "data.corpus": corpus}
    assert not list(world.rglob("PWNED"))


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 100_000, '{"spec": []}', "x"])
def test_records_that_hold_anything_are_of_nothing(text, tmp_path):
    (tmp_path / "train.json").write_text(text)
    (tmp_path / "state").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / state.STATE_FILE, metadata={"identity": text})
    assert pipeline._recorded_spec(tmp_path) is None
    assert pipeline._saved_identity(tmp_path) in (None, {"spec": []})
    nested = {"attributes": text}
    with contextlib.suppress(ValueError, RecursionError):
        nested = {"attributes": json.loads(text)}
    table = pa.table({"a": [1]}).replace_schema_metadata({b"pandas": json.dumps(nested).encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    assert isinstance(pipeline._attributes(tmp_path / "a.parquet"), dict)


@pytest.mark.slow
def test_a_plan_that_cannot_be_noted_is_one_line(world):
    command = [sys.executable, "-m", "loopmdm.analysis.exhibits.pipeline", "--stamps", "/dev/null/x"]
    outcome = subprocess.run(command, cwd=world, capture_output=True, text=True, env=environment(world))
    assert outcome.returncode == 1 and outcome.stderr.count("\n") == 1 and outcome.stderr.startswith("error: ")
