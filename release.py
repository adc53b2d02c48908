"""Make a release: `python release.py 0.3.0` in the environment of `make test`; --dry-run only says what it does.

It checks that the tree is clean and the versions agree, builds the wheel from the commit, packs every run of the
zoo (weights, records, what was measured) with the hashes that the wheel has of them, heads the changelog's
unreleased part with the version and the date, commits that and tags it. The files lie in dist/. Publishing is a
step by hand: push the tag, upload both files. The archive's address stands in `RELEASE` of
loopmdm_model/zoo/fetch.py; while it is empty, a line says so, and who has the wheel gives the archive by --from.
"""

import argparse
import ast
import datetime
import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

UNRELEASED = "## Unreleased"
MANIFEST = "loopmdm/model/zoo/manifest.json"
ZOO = "loopmdm_model/zoo"
ADDRESS = f"{ZOO}/fetch.py"
LARGEST = 15
"""MB that a wheel may have."""


class Refused(Exception):
    """What is in the way of a release, in one line."""


def git(root: Path, *words: str) -> str:
    """What git says; Refused with its last line if it fails."""
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"git {words[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def assigned(path: Path, name: str) -> str:
    """What a module says that a name is, without importing it; empty if it does not."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return str(ast.literal_eval(node.value))
    return ""


def stated_versions(root: Path) -> dict[str, str]:
    """The version by file: loopmdm/__init__.py, from which pyproject.toml takes it, and the citation."""
    told = assigned(root / "loopmdm" / "__init__.py", "__version__") or "nothing"
    cited = re.search(r"^version: (.*)$", (root / "CITATION.cff").read_text("utf-8"), re.M)
    return {"loopmdm/__init__.py": told, "CITATION.cff": cited[1].strip("\"' ") if cited else "nothing"}


def check(root: Path, version: str) -> str:
    """The changelog as the release has it; Refused if anything is in the way."""
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        raise Refused(f"a version reads 0.3.0 or 0.3.0rc1, got {version!r}")
    if changes := git(root, "status", "--porcelain").splitlines():
        raise Refused(f"the tree is not clean ({changes[0].strip()}, {len(changes)} in all); commit or stash")
    for file, told in stated_versions(root).items():
        if told != version:
            raise Refused(f"{file} says {told}; set it to {version} and commit")
    if git(root, "tag", "--list", f"v{version}"):
        raise Refused(f"the tag v{version} is there already")
    text = (root / "CHANGELOG.md").read_text("utf-8")
    head, mark, rest = text.partition(f"{UNRELEASED}\n")
    if not mark or re.search(r"^## ", head, re.M):
        raise Refused(f'CHANGELOG.md must begin with "{UNRELEASED}"')
    if not rest.partition("\n## ")[0].strip():
        raise Refused(f'CHANGELOG.md has nothing under "{UNRELEASED}"')
    if re.search(rf"^## {re.escape(version)}\b", rest, re.M):
        raise Refused(f"CHANGELOG.md has a part {version} already")
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{head}{UNRELEASED}\n\n## {version} ({today})\n{rest}"


def build_wheel(root: Path, out: Path) -> Path:
    """The wheel of a source tree, built with the setuptools that is installed."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(out.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise Refused(f"pip wheel failed: {(done.stderr.strip().splitlines() or ['no wheel'])[-1]}")
    return wheels[0]


def pack(root: Path, wheel: Path, version: str, out: Path) -> Path:
    """The archive of all runs, with the wheel's manifest of their hashes; the same bytes from the same files."""
    with zipfile.ZipFile(wheel) as built:
        told = built.read(MANIFEST)
    path = out / f"loopmdm-models-{version}.tar.gz"
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as file,
        tarfile.open(fileobj=file, mode="w") as archive,
    ):

        def add(name: str, data: bytes) -> None:
            item = tarfile.TarInfo(f"loopmdm-models-{version}/{name}")
            item.size, item.mode = len(data), 0o644
            archive.addfile(item, io.BytesIO(data))

        add("manifest.json", told)
        for run, names in json.loads(told).items():
            for name in names:
                add(f"{run}/{name}", (root / ZOO / run / name).read_bytes())
    return path


def make(root: Path, version: str, changelog: str) -> list[Path]:
    """Build, pack, head the changelog, commit and tag; files reach dist/ only once both are whole."""
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "source"), Path(folder, "made")
        source.mkdir()
        made.mkdir()
        git(root, "archive", "--output", f"{folder}/source.tar", "HEAD")
        with tarfile.open(f"{folder}/source.tar") as archive:
            archive.extractall(source, filter="data")
        wheel = build_wheel(source, made)
        if wheel.stat().st_size > LARGEST * 1e6:
            raise Refused(f"the wheel has {wheel.stat().st_size / 1e6:.1f} MB, more than {LARGEST}")
        built = [wheel, pack(source, wheel, version, made)]
        (root / "dist").mkdir(exist_ok=True)
        path, before = root / "CHANGELOG.md", (root / "CHANGELOG.md").read_text("utf-8")
        head = git(root, "rev-parse", "HEAD").strip()
        try:
            path.write_text(changelog, "utf-8")
            git(root, "commit", "--quiet", "--message", f"Version {version}", "CHANGELOG.md")
            git(root, "tag", "--annotate", f"v{version}", "--message", f"Version {version}")
        except (Refused, OSError):
            git(root, "reset", "--quiet", "--soft", head)
            path.write_text(before, "utf-8")
            git(root, "reset", "--quiet", "CHANGELOG.md")
            raise
        return [Path(shutil.move(file, root / "dist" / file.name)) for file in built]


def main() -> int:
    """One line for each step; 2 if something is in the way."""
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("version", help="such as 0.3.0; the files must say so already")
    asked.add_argument("--dry-run", action="store_true", help="check, say what would be done, and do nothing")
    given, root = asked.parse_args(), Path(__file__).resolve().parent
    try:
        changelog = check(root, given.version)
        if not assigned(root / ADDRESS, "RELEASE"):
            print(f"warning: no download address is built in; `RELEASE` of {ADDRESS} is empty", file=sys.stderr)
        if given.dry_run:
            print(f"the tree is clean, all files say {given.version}, the changelog has an unreleased part")
            head = git(root, "rev-parse", "--short", "HEAD").strip()
            print(f"would build dist/loopmdm-{given.version}-py3-none-any.whl from {head}")
            print(f"would pack dist/loopmdm-models-{given.version}.tar.gz: every run, with the wheel's hashes")
            print(f'would head the unreleased part of CHANGELOG.md "{given.version}" with the date, and commit')
            print(f"would tag v{given.version}; nothing was done")
            return 0
        for file in make(root, given.version, changelog):
            print(f"{file.relative_to(root)} {file.stat().st_size / 1e6:.1f} MB")
        print(f"tagged v{given.version}; publish by hand: push it, upload both files")
    except (Refused, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
