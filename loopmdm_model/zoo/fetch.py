"""Bring the runs that a wheel does not hold into the cache, from a release archive or a checkout.

Every file is checked against the hash that the wheel has of it before it is kept. A run is there whole or not at
all: what an interrupted fetch has kept is not looked for again, and the folder gets its name last.
"""

import contextlib
import hashlib
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Collection, Generator, Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.error import URLError
from urllib.request import urlopen

from loopmdm.model.errors import UsageError, and_more, unknown_name
from loopmdm.model.files import clear_partial, is_file, is_folder, sha256, taken, write_atomic
from loopmdm.model.network.checkpoints import (
    RECORD,
    WEIGHTS,
    fetched_folder,
    is_fetched,
    is_shipped,
    list_models,
    manifest,
    need,
    resolve,
)
from loopmdm.model.places import cache_folder

RELEASE = ""
"""Address of this release's archive; none is published yet."""
SOURCE = "LOOPMDM_MODELS"
"""Environment variable that names another one: a folder, an archive or a URL."""
TIMEOUT = 60
"""Seconds without a byte."""
EVERY = "all"
BROKEN = (tarfile.TarError, EOFError, zlib.error, HTTPException, TimeoutError, ConnectionError)


Offered = Generator[tuple[str, IO[bytes]], None, None]
"""Files of a source by "run/file"."""


@dataclass(frozen=True)
class Wanted:
    """One file: where it is kept until its run is whole, its hash and size."""

    place: Path
    sha256: str
    size: int

    def is_kept(self) -> bool:
        """Whether it is there, as it should be."""
        return is_file(self.place) and self.place.stat().st_size == self.size and sha256(self.place) == self.sha256


def chosen(names: Iterable[str]) -> list[str]:
    """Names as given, or all of this release; UnknownNameError for others."""
    known = manifest() or list_models()
    found = [one for name in names for one in (known if name == EVERY else [name])]
    for name in found:
        if name not in known:
            if is_shipped(name):  # a record in a checkout
                need(resolve(name), WEIGHTS)
            raise unknown_name("model", name, known)
    return list(dict.fromkeys(found))


def to_fetch(names: Iterable[str]) -> dict[str, Wanted]:
    """Files that are still to be brought, by "run/file"."""
    wanted = {}
    for name in _missing(names):
        for file, (digest, size) in manifest()[name].items():
            wanted[f"{name}/{file}"] = Wanted(_staged(name) / file, digest, size)
    return {place: item for place, item in wanted.items() if not item.is_kept()}


def _missing(names: Iterable[str]) -> list[str]:
    return [name for name in names if name in manifest() and not is_fetched(name)]


def _staged(name: str) -> Path:
    return fetched_folder(name).with_name(f".{name}")


def source_of(given: str = "") -> str:
    """Where to fetch from; UsageError says what to give."""
    found = given or os.environ.get(SOURCE, "") or RELEASE
    if not found:
        raise UsageError(
            "no address of a release archive is known; give its file or URL, or a checkout's folder, "
            f"by --from or {SOURCE}"
        )
    path = Path(found).expanduser()
    if "://" not in found and not is_folder(path) and not is_file(path):
        raise UsageError(f"there is no folder or archive {found!r:.200}; give --from one, or a URL")
    return found


def fetch_models(names: Iterable[str], source: str = "", on_file: Callable[[int], Any] = int) -> list[Path]:
    """The folders of runs, fetched unless they are here; `on_file` is told the size of every file that came.

    UsageError for what is no source, OSError where it cannot be read, lacks a file or has another one than this
    release.
    """
    names = chosen(names)
    if _missing(names):
        source = source_of(source) if to_fetch(names) else ""
        with taken(cache_folder() / "models", "fetched into"):
            missing = _missing(names)  # as it is now
            clear_partial(*(_staged(name) for name in missing))
            _bring(to_fetch(missing), source, on_file)
            for name in missing:
                shutil.rmtree(fetched_folder(name), ignore_errors=True)  # one that lost a file
                _staged(name).rename(fetched_folder(name))
    return [resolve(name) for name in names]


def _bring(wanted: dict[str, Wanted], source: str, on_file: Callable[[int], Any]) -> None:
    left = dict(wanted)
    try:
        with contextlib.closing(_offered(source, left)) as offered:
            for place, file in offered if left else ():
                _keep(left[place], file, f"{place} of {source}")
                on_file(left.pop(place).size)
                if not left:
                    break
    except BROKEN as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"{source} breaks off or is no archive ({why:.80}); what was whole is kept: run it again"
        ) from error
    if left:
        raise OSError(f"{source} lacks {next(iter(left))}{and_more(left)}; take the archive of this version")


def _keep(item: Wanted, file: IO[bytes], what: str) -> None:
    """Write a file if it is the one meant."""

    def copy(path: Path) -> None:
        digest, size = hashlib.sha256(), 0
        with path.open("wb") as out:
            while size <= item.size and (block := file.read(1 << 20)):
                digest.update(block)
                size += out.write(block)
        if (digest.hexdigest(), size) != (item.sha256, item.size):
            raise OSError(f"{what} is not the file of this release (its hash is another); it was not kept")

    write_atomic(item.place, copy)


def _offered(source: str, wanted: Collection[str]) -> Offered:
    """What a source has of the files wanted, by "run/file", in its own order."""
    if "://" in source:
        try:
            stream = urlopen(source, timeout=TIMEOUT)
        except (ValueError, URLError, HTTPException, OSError) as error:
            raise OSError(f"cannot read {source} ({error}); check the address and the network") from error
        yield from _in_archive(stream, wanted)
        return
    path = Path(source).expanduser()
    if is_folder(path):
        yield from _in_folder(path, wanted)
    else:
        yield from _in_archive(path.open("rb"), wanted)


def _in_folder(folder: Path, wanted: Collection[str]) -> Offered:
    """A checkout, or a folder of runs."""
    inside = [folder / "loopmdm_model" / "zoo", folder / "zoo", folder]
    home = next((place for place in inside if any(is_file(place / run / RECORD) for run in manifest())), None)
    if home is None:
        raise UsageError(f"{folder} holds no runs; give a checkout, or an unpacked release archive's folder")
    for place in sorted(wanted):
        if is_file(home / place):
            with (home / place).open("rb") as file:
                yield place, file


def _in_archive(stream: Any, wanted: Collection[str]) -> Offered:
    """A tar.gz, read as it comes: "FOLDER/run/file"."""
    with contextlib.closing(stream), tarfile.open(fileobj=stream, mode="r|gz") as archive:
        for member in archive:
            place = "/".join(PurePosixPath(member.name).parts[1:])
            file = archive.extractfile(member) if member.isfile() and place in wanted else None
            if file is not None:
                yield place, file
