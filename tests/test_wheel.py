"""A release of a clone; its wheel outside of any checkout, where the user has an `analysis.py`; its archive."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import loopmdm
import release
from loopmdm.analysis.exhibits import EXHIBITS
from loopmdm.model.zoo import fetch

ROOT = Path(__file__).parents[1]
VERSION = "9.9.9"
UNADDRESSED = "warning: no download address is built in"
TOUR = {"sotu-base", "sotu-loop", "sudoku-base", "sudoku-loop", "sudoku-loop-s4"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.weights,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git repository"),
]


def git(root: Path, *words: str) -> str:
    who = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "core.hooksPath=/dev/null"]
    return subprocess.run(["git", *who, *words], cwd=root, capture_output=True, text=True, check=True).stdout


def configure(root: Path) -> None:
    """For commits that are not made by `git` above."""
    for key, value in (("user.name", "x"), ("user.email", "x@x"), ("core.hooksPath", "/dev/null")):
        git(root, "config", key, value)


def clone(root: Path) -> Path:
    """This tree as it is now, committed, as version `VERSION`."""
    git(ROOT, "clone", "--quiet", "--no-tags", "--", str(ROOT), str(root))
    for name in git(ROOT, "ls-files", "-z", "-m", "-o", "--exclude-standard").split("\0")[:-1]:
        (root / name).unlink(missing_ok=True)
        if (ROOT / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, root / name)
    for name in ("loopmdm/__init__.py", "CITATION.cff"):
        (root / name).write_text((root / name).read_text().replace(loopmdm.__version__, VERSION))
    (root / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n- A change.\n\n## 0.1.0\n\nFirst.\n")
    configure(root)
    git(root, "add", "-A")
    git(root, "commit", "--quiet", "-m", "As it is")
    return root


def run_release(root: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "release.py", *words], cwd=root, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A clone in which a release was made, after a dry run that changed nothing."""
    root = clone(tmp_path_factory.mktemp("release") / "clone")
    before = git(root, "log", "--all", "--oneline"), sorted(path.name for path in root.iterdir())
    said = run_release(root, VERSION, "--dry-run")
    assert "nothing was done" in said and said.count(UNADDRESSED) == (not fetch.RELEASE)
    assert before == (git(root, "log", "--all", "--oneline"), sorted(path.name for path in root.iterdir()))
    said = run_release(root, VERSION)
    assert f"tagged v{VERSION}" in said and said.count(UNADDRESSED) == (not fetch.RELEASE)
    return root


@pytest.fixture(scope="module")
def wheel(released):
    (found,) = (released / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def archive(released):
    return released / "dist" / f"loopmdm-models-{VERSION}.tar.gz"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target]
    subprocess.run([*command, wheel], check=True)
    return target


def test_all_say_one_version():
    assert set(release.stated_versions(ROOT).values()) == {loopmdm.__version__}
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text and not re.search(r'^version = "', text, re.M)


def test_a_release_is_a_commit_a_tag_and_two_files(released, wheel, archive):
    assert git(released, "status", "--porcelain") == "" and wheel.name == f"loopmdm-{VERSION}-py3-none-any.whl"
    assert git(released, "describe", "--exact-match").strip() == f"v{VERSION}"
    assert git(released, "diff", "--name-only", "HEAD~1").split() == ["CHANGELOG.md"]
    head = rf"# Changelog\n\n## Unreleased\n\n## {VERSION} \(\d{{4}}-\d\d-\d\d\)\n\n- A change\.\n\n## 0"
    assert re.match(head, (released / "CHANGELOG.md").read_text())
    with zipfile.ZipFile(wheel) as built:
        told = built.read(release.MANIFEST)
    with tarfile.open(archive) as packed:
        files = {member.name.partition("/")[2]: member.size for member in packed}
        assert packed.extractfile(f"loopmdm-models-{VERSION}/manifest.json").read() == told
    listed = {
        f"{run}/{name}": size for run, names in json.loads(told).items() for name, (_, size) in names.items()
    }
    assert {name: size for name, size in files.items() if name != "manifest.json"} == listed
    shipped = git(released, "ls-files", "loopmdm_model/zoo/*/*").split()
    assert set(listed) == {name.removeprefix("loopmdm_model/zoo/") for name in shipped}


def little_tree(root: Path) -> str:
    """What a release looks at, committed."""
    git(root, "init", "--quiet")
    (root / "loopmdm").mkdir()
    (root / "loopmdm/__init__.py").write_text(f'__version__ = "{VERSION}"\n')
    (root / "CITATION.cff").write_text(f"version: {VERSION}\n")
    (root / "LICENSE").write_text("MIT\n")
    (root / "CHANGELOG.md").write_text("## Unreleased\n\n- A change.\n\n## 0.1.0\n\nFirst.\n")
    configure(root)
    git(root, "add", "-A")
    git(root, "commit", "--quiet", "-m", "First")
    return git(root, "rev-parse", "HEAD")


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("LICENSE", "MIT", "MIT ", "the tree is not clean"),
        ("CITATION.cff", VERSION, "9.9.8", "CITATION.cff says 9.9.8"),
        ("CHANGELOG.md", "- A change.\n", "", "nothing under"),
        ("CHANGELOG.md", "## Unreleased", "## Soon", "must begin with"),
        ("CHANGELOG.md", "## 0.1.0", f"## {VERSION}", "has a part"),
    ],
)
def test_what_is_in_the_way_of_a_release_is_named(file, old, new, says, tmp_path):
    little_tree(tmp_path)
    assert f"## {VERSION} (" in release.check(tmp_path, VERSION)
    with pytest.raises(release.Refused, match="a version reads"):
        release.check(tmp_path, "9.9")
    git(tmp_path, "tag", f"v{VERSION}")
    with pytest.raises(release.Refused, match="is there already"):
        release.check(tmp_path, VERSION)
    git(tmp_path, "tag", "-d", f"v{VERSION}")
    path = tmp_path / file
    path.write_text(path.read_text().replace(old, new))
    if "clean" not in says:
        git(tmp_path, "commit", "--quiet", "-a", "-m", "Changed")
    with pytest.raises(release.Refused, match=says):
        release.check(tmp_path, VERSION)


def test_a_release_without_its_tag_is_none(tmp_path, monkeypatch):
    before = little_tree(tmp_path)
    monkeypatch.setattr(release, "build_wheel", lambda source, made: shutil.copy(source / "LICENSE", made / "w"))
    monkeypatch.setattr(release, "pack", lambda source, wheel, version, made: wheel)
    git(tmp_path, "tag", f"v{VERSION}")  # by another process, after the check
    with pytest.raises(release.Refused, match=r"git tag: .*already exists"):
        release.make(tmp_path, VERSION, "## Unreleased\n\n## Released\n")
    assert git(tmp_path, "rev-parse", "HEAD") == before and git(tmp_path, "status", "--porcelain") == ""


def test_the_wheel_is_small_and_holds_the_study(wheel):
    assert wheel.stat().st_size < 15e6
    with zipfile.ZipFile(wheel) as built:
        names = set(built.namelist())
    assert {name.split("/")[-2] for name in names if name.endswith(".safetensors")} == TOUR
    for folder, inside in (("figures/tables", "*"), ("figures/specs", "*"), ("figures", "*.toml")):
        listed = {path.name for path in (ROOT / folder).glob(inside) if path.is_file()}
        assert {f"loopmdm/{folder}/{name}" for name in listed} <= names
    runs = {path.parent.name for path in (ROOT / "loopmdm_model/zoo").glob("*/train.json")}
    assert {f"loopmdm/model/zoo/{run}/train.json" for run in runs} <= names
    assert {name.split("/")[0] for name in names} == {"loopmdm", f"loopmdm-{VERSION}.dist-info"}


# --- the wheel in use ---

LOOK = (
    (["--version"], f"loopmdm {VERSION}"),
    (["models"], "loopmdm models fetch markov-loop"),
    (["claims"], "fewer-training-flops"),
    (["figures", "mask-to-mask-by-loop", "--out", "out"], "out/mask-to-mask-by-loop.pdf"),
    (["table", "list"], "learning-curves"),
    (["measure", "list"], "mask-attention"),
    (["sites", "sudoku-loop"], "loop.0.hook_in"),
    (["train", "smoke", "--dry-run"], "training FLOPs"),
)
"""Commands that change nothing, and what they say among other things."""
REFUSED = (
    (["figures", "mask-to-mask-by-loop"], "give --out FOLDER"),
    (["figures", "mask-to-mask-by-loop", "--from", "checkpoints", "--out", "out"], "`loopmdm models fetch all`"),
    (["table", "mask-attention"], "`loopmdm models fetch all`"),
    (["evaluate", "markov-loop"], "`loopmdm models fetch markov-loop`"),
    (["sample", "sudoku-base-seed7"], "kept as a record only"),
    (["models", "fetch", "markov-loop"], "no address of a release archive is known; give"),
    (["models", "fetch", "markov-lop", "--from", "x"], "did you mean markov-loop"),
    (["models", "fetch", "markov-loop", "--from", "nowhere.tar.gz"], "no folder or archive 'nowhere.tar.gz'"),
    (["train", "smok", "--dry-run"], "did you mean smoke"),
    (["gallery"], "no checkout"),
)
IN_ONE = """
import contextlib, io, json, sys
import loopmdm
assert loopmdm.__file__.startswith(sys.argv[1]), loopmdm.__file__
from loopmdm.analysis.cli import main
for words in json.loads(sys.argv[2]):
    sys.argv[:] = ["loopmdm", *words]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    print(json.dumps([words, code, out.getvalue(), err.getvalue()]))
"""


def users_own(root: Path) -> Path:
    """A folder of the user's, who has an `analysis.py`."""
    home = root / "user"
    home.mkdir()
    (home / "analysis.py").write_text("raise SystemExit('this is not ours')\n")
    return home


@pytest.fixture
def folder(tmp_path):
    return users_own(tmp_path)


def python(installed: Path, folder: Path, *words: object) -> subprocess.CompletedProcess:
    """Python with the wheel and what it needs, and without the .pth files that lead into this checkout."""
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    environment = {key: value for key, value in os.environ.items() if key != "LOOPMDM_MODELS"}
    environment |= {"PYTHONPATH": path, "LOOPMDM_CACHE": str(folder.parent / "cache"), "MPLBACKEND": "agg"}
    command = [sys.executable, "-S", *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def in_one(installed: Path, folder: Path, commands: list[list[str]]) -> list[tuple[list[str], int, str, str]]:
    """Commands one after the other in one process: words, exit code, what was printed, and what on stderr."""
    done = python(installed, folder, "-c", IN_ONE, installed, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def tour() -> str:
    """The README's."""
    text = (ROOT / "README.md").read_text().partition("## Tour")[2]
    return re.search(r"```python\n(.*?)```", text, re.S)[1]


def test_the_tour_runs_anywhere(installed, folder):
    end = f"\nassert lm.__version__ == {VERSION!r} and len(lm.list_models()) == {len(TOUR)} and len(df)"
    done = python(installed, folder, "-c", tour() + end)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["analysis.py"]


@pytest.fixture(scope="module")
def session(installed, archive, tmp_path_factory):
    """The user's folder, and by words what each command gave; all in one process, which costs two imports less."""
    home = users_own(tmp_path_factory.mktemp("session"))
    commands = [words for words, _ in (*LOOK, *REFUSED)] + fetching(archive)
    return home, in_one(installed, home, commands)


def fetching(archive: Path) -> list[list[str]]:
    fetch = ["models", "fetch", "markov-loop", "sudoku-base-seed7"]
    return [
        [*fetch, "--from", str(archive)], fetch, ["models"], ["measure", "settled", "markov-loop", "--n", "2"]
    ]  # fmt: skip


def test_commands_run_anywhere_and_say_what_is_missing(session):
    home, said = session
    for (_, says), (words, code, out, err) in zip((*LOOK, *REFUSED), said, strict=False):
        if (words, says) in LOOK:
            assert code == 0 and says in out and not re.search("warning|error", err), (words, err)
        else:
            assert code == 2 and says in err and err.count("\n") == 1 and out == "", (words, out, err)
    assert sorted(path.name for path in home.iterdir()) == ["analysis.py", "out"]
    assert len(list((home / "out").iterdir())) == 4
    assert not (home.parent / "cache" / "tables").exists()


def test_models_come_from_the_archive(session, archive):
    _, said = session
    first, again, listed, measured = said[-len(fetching(archive)) :]
    assert first[1] == 0 and re.search(
        r"fetching \d+ files, .* MB, from .*\.tar\.gz into .*cache/models", first[3]
    )
    assert again[1:] == (0, first[2], "")
    row = next(line for line in listed[2].splitlines() if line.startswith("markov-loop\t"))
    assert "\tthis package\t" in row and measured[1] == 0, measured[3]
    assert (Path(first[2].splitlines()[2].split("\t")[1]) / "evaluations").is_dir()


@pytest.mark.soak
def test_each_command_in_a_process_of_its_own(installed, archive, folder):
    for words, says in LOOK:
        done = python(installed, folder, "-m", "loopmdm", *words)
        assert done.returncode == 0 and says in done.stdout and "warning" not in done.stderr, (words, done.stderr)
    claims = python(installed, folder, "-m", "loopmdm", "claims").stdout
    here = [sys.executable, "-m", "loopmdm", "claims"]
    assert claims == subprocess.run(here, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    done = python(installed, folder, "-m", "loopmdm", "report", "--out", "r.html")
    assert done.returncode == 0 and "explorer lacks sudoku-loop-seed3" in done.stderr
    page = (folder / "r.html").read_text()
    assert all(f'id="{name}"' in page for name in EXHIBITS)
    done = python(installed, folder, "-m", "loopmdm", "models", "fetch", "all", "--from", ROOT)
    assert done.returncode == 0, done.stderr
    done = python(installed, folder, "-m", "loopmdm", "models")
    assert "models fetch" not in done.stdout
    done = python(installed, folder, "-m", "loopmdm", "table", "learning-curves")
    assert "cache/tables" in done.stderr and (folder.parent / "cache/tables/learning-curves.parquet").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["analysis.py", "out", "r.html"]
