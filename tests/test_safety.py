"""What comes from elsewhere: sizes, specs and files that are too much, packages, licences; no network at all."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loopmdm.model.corpora.fetch import sources
from loopmdm.model.errors import UsageError
from loopmdm.model.files import read_json, read_toml
from loopmdm.model.network import checkpoints
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.training import budget, state
from loopmdm.model.training.spec import RunSpec
from loopmdm.model.training.trainer import Trainer
from tests.conftest import SHIPPED, shipped

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "figures/specs/smoke.toml"
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("d_model", 10**9, "at most"),
        ("d_mlp", 10**12, "at most"),
        ("d_vocab", 10**12, "at most"),
        ("n_ctx", 10**9, "at most"),
        ("n_ctx", 2**23, "exceeds"),
        ("n_loop_layers", 10**5, "at most"),
        ("max_loops", 10**9, "at most"),
        ("d_vocab", 2**26, "asks for"),  # 16 GiB, were it made
        ("d_mlp", 2**22, "asks for"),
        ("n_loop_layers", 200, "lacks"),
        ("eps", float("inf"), "finite"),
        ("rotary_base", 10**400, "finite"),
        ("forbid_mask_to_mask", 3, "list of segments"),
        ("architectures", 5, "another model"),
    ],
)
def test_a_config_that_asks_for_too_much_is_refused_before_anything_is_made(field, value, says, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROOT / "loopmdm_model/zoo/markov-loop" / name, tmp_path / name)
    config = read_json(tmp_path / "config.json") | {field: value, "mask_token_id": -1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    began = time.process_time()
    with pytest.raises(UsageError, match=says):
        LoopMDM.from_pretrained(tmp_path)
    assert time.process_time() - began < 5


def test_nested_and_huge_files_are_one_line(tmp_path):
    for text in ("[" * 100_000, "9" * 5_000, '{"a":' * 100_000):
        (tmp_path / "file").write_text(text)
        with pytest.raises(UsageError, match=r"nested too deeply|not JSON"):
            read_json(tmp_path / "file")
        (tmp_path / "file").write_text(f"a = {text}")
        with pytest.raises(UsageError, match=r"nested too deeply|not TOML"):
            read_toml(tmp_path / "file")


def test_specs_that_match_each_other_are_refused(tmp_path):
    text = re.sub(r"flops = .*", 'match = "{}"', SMOKE.read_text())
    for name, other in (("a", "b"), ("b", "c"), ("c", "a"), ("alone", "other/../alone")):
        (tmp_path / f"{name}.toml").write_text(text.replace("{}", f"{other}.toml"))
    with pytest.raises(UsageError, match=r"a.toml -> b.toml -> c.toml -> a.toml"):
        RunSpec.load(tmp_path / "a.toml")
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match=r"circle|another spec"):
        RunSpec.load(tmp_path / "alone.toml")


def test_budgets_and_threads_beyond_reason_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"more than 1e.07 steps"):
        budget.plan(RunSpec.load(SMOKE, {"training.flops": 1e300}))
    for key, value, says in (("threads", 100_000, "cores"), ("batch_size", 2**31 - 1, "GiB")):
        spec = RunSpec.load(SMOKE, {f"training.{key}": value})
        with pytest.raises(UsageError, match=says):
            Trainer(spec, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_build", lambda self: (_ for _ in ()).throw(MemoryError))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "tokenizer.json").write_text("mine")
    for folder in (tmp_path / "new" / "run", tmp_path / "empty"):
        with pytest.raises(MemoryError):
            Trainer(RunSpec.load(SMOKE, {"data.corpus": "markov"}), folder)
    with pytest.raises(UsageError, match="not empty"):
        Trainer(RunSpec.load(SMOKE), tmp_path / "there")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there", "there/tokenizer.json"]


def test_another_run_is_told_by_the_keys_that_differ(tmp_path):
    one = state.identity_of(RunSpec.load(SMOKE))
    two = state.identity_of(RunSpec.load(SMOKE, {"training.learning_rate": 0.125, "seed": 7}))
    state.save(tmp_path, {}, state.Progress(), one)
    with pytest.raises(UsageError) as told:
        state.load(tmp_path, two)
    said = str(told.value)
    assert "training.learning_rate was 0.002, is 0.125" in said and "seed was 0, is 7" in said
    assert "batch_size" not in said and len(said) < 300


def test_every_pin_is_locked_by_hash():
    locked = {}
    for path in sorted((ROOT / "locks").glob("*.txt")):
        for block in re.split(r"\n(?=\S)", path.read_text()):
            name, _, rest = block.partition("==")
            if rest:
                assert "--hash=sha256:" in rest, block
                locked.setdefault(name.partition("[")[0], set()).add(rest.split()[0])
    assert locked["torch"] == {PINS["torch"], f"{PINS['torch']}+cpu"}
    needed = {name for name in locked if name in PINS} - {"torch"}
    assert len(needed) > 200 and {name: {PINS[name]} for name in needed} == {name: locked[name] for name in needed}
    assert f'requires = ["setuptools=={PINS["setuptools"]}"]' in (ROOT / "pyproject.toml").read_text()


def test_the_notice_names_the_licence_of_all_data():
    notice = (ROOT / "NOTICE").read_text()
    for item in sources().values():
        assert f"* {item.name}: {item.licence} (in " in notice


CUT = ["unshare", "--map-root-user", "--net"]
ALONE = """
import socket
try:
    socket.create_connection(("127.0.0.1", 9), 1)
except OSError as error:
    assert error.errno == 101, error  # not even this machine can be reached
from loopmdm.analysis.cli import main
main()
"""


def _can_cut() -> bool:
    return (
        shutil.which("unshare") is not None and subprocess.run([*CUT, "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not _can_cut(), reason="no network namespaces here")
@pytest.mark.parametrize(
    "words",
    [
        "sample sotu-loop --steps 2 --prompt The",
        "measure mask-attention markov-loop --n 4",
        "evaluate markov-loop --n-samples 1 --n-loops 1",
        "figures sudoku-solve-rate --out out",
        "train SMOKE --set training.steps=2 --set training.flops=0.0 --out run",
    ],
)
@pytest.mark.slow
def test_commands_run_with_the_network_cut(words, tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path / "cache"))
    arguments = words.replace("SMOKE", str(SMOKE)).split()
    command = [*CUT, sys.executable, "-c", ALONE, *arguments]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert outcome.returncode == 0 and outcome.stdout, outcome.stderr


def test_what_needs_weights_is_marked_where_they_are_away_too(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "ZOO", tmp_path)
    assert shipped() == SHIPPED and SHIPPED.search("of sudoku-loop.") and not SHIPPED.search("of a toy")


@pytest.mark.weights
@pytest.mark.skipif(not _can_cut(), reason="no network namespaces here")
@pytest.mark.slow
def test_tests_run_with_the_network_cut():
    names = ("network/test_model", "hooks/test_hooked", "corpora/test_corpora", "test_masking")
    files = [f"tests/loopmdm_model/{name}.py" for name in names]
    assert all((ROOT / file).is_file() for file in files)
    command = [*CUT, sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *files]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert outcome.returncode == 0, outcome.stdout[-2000:]
