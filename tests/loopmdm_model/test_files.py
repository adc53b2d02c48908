"""Files are whole, keep their mode, and are written where a regular file can be; folders have one owner."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loopmdm.model.errors import UsageError
from loopmdm.model.files import PARTIAL, check_target, clear_partial, lock_folder, write_atomic

ROOT = Path(__file__).parents[2]


def put(path, text="new"):
    write_atomic(path, lambda temporary: temporary.write_text(text))


def test_a_link_is_written_through_and_a_mode_is_kept(tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    put(link)
    assert link.is_symlink() and real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.txt", "real.txt"]


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_new_files_have_what_the_umask_leaves(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        put(tmp_path / "file.txt")
    finally:
        os.umask(before)
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == mode


def test_what_is_no_regular_file_is_refused_and_left(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, says in (
        (fifo, "no regular file"),
        (tmp_path, "is a folder"),
        (Path("/dev/null"), "no regular file"),
    ):
        with pytest.raises(UsageError, match=says):
            put(path)
    assert fifo.is_fifo()
    link = tmp_path / "link"
    link.symlink_to(fifo)
    with pytest.raises(UsageError, match="no regular file"):
        check_target(link)


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_only_what_dead_writers_of_this_host_left_is_cleared(tmp_path):
    code = (
        "import sys, os; from pathlib import Path; from loopmdm.model.files import write_atomic\n"
        "write_atomic(Path(sys.argv[1]), lambda temporary: os._exit(3))"
    )
    for folder in (tmp_path, tmp_path / "sub"):
        subprocess.run([sys.executable, "-c", code, str(folder / "state.bin")], check=False)
    dead = list(tmp_path.rglob(f"{PARTIAL}*"))
    assert len(dead) == 2
    mine = dead[0].name.replace(f"-{dead[0].name.split('-')[-3]}-", f"-{os.getpid()}-")
    others = [
        tmp_path / name for name in (mine, f"{PARTIAL}mine", f"{PARTIAL}elsewhere-1-0123abcd-x", "notes.txt")
    ]
    for path in others:
        path.write_text("kept")
    (tmp_path / f"{PARTIAL}folder").mkdir()
    clear_partial(tmp_path)
    assert all(path.is_file() for path in others) and (tmp_path / f"{PARTIAL}folder").is_dir()
    assert [path.parent for path in dead if path.exists()] == [tmp_path / "sub"]


HOLD = (
    "import sys, time; from pathlib import Path; from loopmdm.model.files import lock_folder\n"
    "lock = lock_folder(Path(sys.argv[1]), 'trained'); print('held', flush=True); time.sleep(60)"
)


def test_a_folder_has_one_owner_and_a_dead_one_holds_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="being trained by another process"):
            lock_folder(tmp_path, "trained")
    finally:
        holder.kill()
        holder.wait()
    lock_folder(tmp_path, "trained").release()


def test_specs_and_records_are_utf_8_whatever_the_locale_with_a_mark_or_without(tmp_path):
    for name, text in (("a.toml", "a = 'ü'"), ("a.json", '{"a": "ü"}'), ("a.jsonl", '{"a": "ü"}')):
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    told = (
        "from pathlib import Path; from loopmdm.model import files; print(ascii([files.read_toml(Path('a.toml')), "
    )
    told += "files.read_json(Path('a.json')), *files.read_json_lines(Path('a.jsonl'))]))"
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}  # Python's way to read as ASCII
    outcome = subprocess.run(
        [sys.executable, "-c", told], cwd=tmp_path, env=os.environ | plain, capture_output=True, text=True
    )
    assert outcome.stdout == "[{'a': '\\xfc'}, {'a': '\\xfc'}, {'a': '\\xfc'}]\n", outcome.stderr


def test_no_file_of_text_is_read_or_written_by_the_locale():
    found = []
    for path in [*(ROOT / "loopmdm_model").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                given = len(node.args) + len(node.keywords)
                if given < {"read_text": 1, "write_text": 2}.get(node.func.attr, 0):
                    found.append(f"{path.name}:{node.lineno}")
    assert not found
