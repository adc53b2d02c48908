"""Runs of a release, brought into the cache: checked by hash, whole or not at all."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import pytest
import torch

from loopmdm.model.errors import UsageError
from loopmdm.model.network import checkpoints
from loopmdm.model.network.checkpoints import list_models, list_released, model_hash, resolve, save_weights
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.zoo.fetch import SOURCE, fetch_models, to_fetch
from tests.conftest import toy_model

RUNS = ("one", "two")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A folder of two whole runs and a record; the zoo of a wheel has their records, configs and hashes."""
    whole, zoo = tmp_path / "whole", tmp_path / "zoo"
    for seed, name in enumerate((*RUNS, "kept")):
        save_weights(
            whole / name,
            toy_model().cfg,
            toy_model(seed).state_dict(),
            record={"spec": {"name": "smoke", "seed": 0}},
        )
        (whole / name / "evaluations").mkdir()
        (whole / name / "evaluations" / "x.parquet").write_bytes(name.encode())
    (whole / "kept" / checkpoints.WEIGHTS).unlink()
    told: dict[str, dict] = {}
    for place, data in sorted(files_of(whole).items()):
        run, _, file = place.partition("/")
        told.setdefault(run, {})[file] = (hashlib.sha256(data).hexdigest(), len(data))
    shutil.copytree(whole, zoo, ignore=shutil.ignore_patterns("evaluations", checkpoints.WEIGHTS))
    (zoo / checkpoints.MANIFEST).write_text(json.dumps(told))
    monkeypatch.setattr(checkpoints, "ZOO", zoo)
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(SOURCE, raising=False)
    return whole


def packed(folder: Path, path: Path, **changed: bytes) -> Path:
    """An archive of a folder; `changed` are other contents, by the first letters of a place."""
    with tarfile.open(path, "w:gz") as archive:
        for place, data in sorted(files_of(folder).items()):
            data = next((other for key, other in changed.items() if place.startswith(key)), data)
            item = tarfile.TarInfo(f"top/{place}")
            item.size = len(data)
            archive.addfile(item, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["folder", "checkout", "archive", "url", "environment"])
def test_a_run_is_found_by_name_once_it_is_fetched(kind, release, tmp_path, monkeypatch):
    source = str(release)
    if kind == "checkout":
        (tmp_path / "root" / "loopmdm_model").mkdir(parents=True)
        source = str(release.rename(tmp_path / "root/loopmdm_model/zoo").parents[1])
    elif kind != "folder":
        path = packed(release, tmp_path / "models.tar.gz")
        source = path.as_uri() if kind == "url" else str(path)
    if kind == "environment":
        monkeypatch.setenv(SOURCE, source)
        source = ""
    assert list_models() == [] and list_released() == ["one", "two"]
    with pytest.raises(UsageError, match=r"weights of two are not here.*`loopmdm models fetch two`"):
        LoopMDM.from_pretrained("two")
    before, told = model_hash(resolve("two")), []
    (folder,) = fetch_models(["two"], source, told.append)
    assert folder == resolve("two") and list_models() == ["two"] and model_hash(folder) == before
    assert sorted(told) == sorted(map(len, files_of(folder).values()))
    torch.testing.assert_close(LoopMDM.from_pretrained("two").state_dict(), toy_model(1).state_dict())
    assert fetch_models(["two"]) == [folder]  # needs no source
    assert len(fetch_models(["all"], str(tmp_path / "root") if kind == "checkout" else str(release))) == 3
    assert list_models() == ["one", "two"]


def test_a_record_gains_what_was_measured(release):
    with pytest.raises(
        UsageError, match=r"fetch kept` brings what was measured of it.*loopmdm train smoke --seed 0"
    ):
        LoopMDM.from_pretrained("kept")
    (folder,) = fetch_models(["kept"], str(release))
    assert (folder / "evaluations" / "x.parquet").read_bytes() == b"kept" and list_models() == []
    with pytest.raises(UsageError, match=r"without weights; train it again"):
        LoopMDM.from_pretrained("kept")
    assert model_hash(folder) == model_hash(checkpoints.ZOO / "kept")


def test_a_fetch_that_broke_off_goes_on_with_the_next_file(release, tmp_path):
    path = packed(release, tmp_path / "models.tar.gz")
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    every = set(to_fetch(RUNS))
    with pytest.raises(OSError, match=r"breaks off .* kept: run it again"):
        fetch_models(RUNS, str(broken))
    left = set(to_fetch(RUNS))
    assert set() < left < every and "two" not in list_models()
    come = []
    fetch_models(RUNS, str(path), come.append)
    assert len(come) == len(left) and list_models() == ["one", "two"]


@pytest.mark.parametrize("wrong", [b"", b"short", b"x" * 10**6])
def test_another_file_than_the_release_has_is_never_kept(wrong, release, tmp_path):
    path = packed(release, tmp_path / "models.tar.gz", **{"one/model": wrong})
    with pytest.raises(OSError, match=r"one/model\.safetensors of .*its hash is another"):
        fetch_models(["one"], str(path))
    assert list_models() == [] and not list((tmp_path / "cache").rglob(checkpoints.WEIGHTS))
    assert not list((tmp_path / "cache").rglob(".partial-*"))


def test_a_file_that_was_changed_while_its_run_was_not_whole_comes_again(release, tmp_path):
    (release / "one" / checkpoints.WEIGHTS).rename(tmp_path / "aside")
    with pytest.raises(OSError, match=r"lacks one/model\.safetensors"):
        fetch_models(["one"], str(release))
    (staged,) = (tmp_path / "cache").rglob(checkpoints.CONFIG)
    staged.write_bytes(bytes(staged.stat().st_size))
    (tmp_path / "aside").rename(release / "one" / checkpoints.WEIGHTS)
    fetch_models(["one"], str(release))
    assert LoopMDM.from_pretrained("one")


HOLD = (
    "import sys; from pathlib import Path; from loopmdm.model.files import lock_folder\n"
    "lock = lock_folder(Path(sys.argv[1]), 'fetched into'); print('held', flush=True); sys.stdin.read()"
)


def test_a_fetch_waits_for_another_one(release, tmp_path, monkeypatch):
    command, said = [sys.executable, "-c", HOLD, str(tmp_path / "cache" / "models")], []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as holder, warnings.catch_warnings():
        assert holder.stdout.readline() == "held\n"
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda what, *_: said.append(what) or holder.stdin.close())
        fetch_models(["one"], str(release))
    assert "being fetched into by another process; waiting for it" in str(*said) and list_models() == ["one"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"short")])
def test_a_fetched_run_that_lost_a_file_comes_again(damage, release):
    (folder,) = fetch_models(["one"], str(release))
    before = files_of(folder)
    damage(folder / checkpoints.WEIGHTS)
    assert list_models() == []
    with pytest.raises(UsageError, match=r"weights of one are not here; fetch them: `loopmdm models fetch one`"):
        LoopMDM.from_pretrained("one")
    assert fetch_models(["one"], str(release)) == [folder] and files_of(folder) == before


def test_what_is_no_source_is_named(release, tmp_path):
    (tmp_path / "text.tar.gz").write_text("no archive")
    (tmp_path / "empty").mkdir()
    for source, kind, says in (
        ("", UsageError, f"by --from or {SOURCE}"),
        ("nowhere", UsageError, "no folder or archive 'nowhere'"),
        (tmp_path / "empty", UsageError, "holds no runs; give a checkout"),
        (tmp_path / "text.tar.gz", OSError, "is no archive"),
        ((tmp_path / "none").as_uri(), OSError, "cannot read file://"),
        ("http://127.0.0.1:9/x", OSError, "check the address"),
        ("what://x", OSError, "check the address"),
    ):
        with pytest.raises(kind, match=says):
            fetch_models(["one"], str(source))
    with pytest.raises(UsageError, match="unknown model 'on'; did you mean one"):
        fetch_models(["on"], str(release))
    assert list_models() == []


@pytest.mark.weights
def test_in_a_checkout_all_is_here():
    (folder,) = fetch_models(["markov-loop"])
    assert folder == checkpoints.ZOO / "markov-loop"
    with pytest.raises(UsageError, match="kept as a record only, without weights; train it again"):
        fetch_models(["sudoku-base-seed7"])
