"""Files that are whole or not there, and folders that one process works in at a time."""

import errno
import hashlib
import json
import os
import re
import secrets
import socket
import stat
import tomllib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from loopmdm.model.errors import UsageError

PARTIAL = ".partial-"
LOCK = ".lock"
TEXT = "utf-8-sig"
"""How JSON and TOML are read, whatever the locale: some editors put a mark before UTF-8."""


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` on a temporary name in the same folder, flush it to disk, then rename to `path`.

    A symbolic link is written through, an existing file keeps its mode, a new one gets what the umask leaves.
    """
    path = check_target(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    temporary = _partial(path)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the umask applies
    mode = stat.S_IMODE(temporary.stat().st_mode) if mode is None else mode
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # writers may have made a file of their own
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _partial(path: Path) -> Path:
    """A temporary name that tells whose it is: host and process."""
    owner = f"{PARTIAL}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}-"
    return path.with_name(f"{owner}{path.stem[:60]}{path.suffix}")


def check_target(path: Path) -> Path:
    """The path, if a file can be written there; UsageError for devices, FIFOs and folders, OSError otherwise."""
    try:
        found = path.resolve()
        folder = found.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        if isinstance(error, PermissionError):
            raise
        raise UsageError(f"{str(path)!r:.80} cannot be a file ({_why(error)}); give another --out") from None
    if folder:
        raise UsageError(f"{path} is a folder; give the name of a file")
    if found.exists() and not found.is_file():
        raise UsageError(f"{path} is no regular file; give the name of one, or of a new one")
    above = next(folder for folder in found.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write into {above}; give another --out")
    return path


def _why(error: Exception) -> str:
    """What went wrong, without the path that the error may repeat."""
    return (error.strerror or "") if isinstance(error, OSError) else f"{error!s:.80}"


def clear_partial(*folders: Path) -> None:
    """Remove what writers that are dead left in these folders, of this host and by their own names only."""
    mine = re.compile(re.escape(f"{PARTIAL}{socket.gethostname()}-") + r"(\d+)-[0-9a-f]{8}-.*")
    for folder in folders:
        for path in folder.glob(f"{PARTIAL}*"):
            match = mine.fullmatch(path.name)
            if match and path.is_file() and not _alive(int(match[1])):
                path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def lock_folder(folder: Path, what: str, wait: bool = False) -> BaseFileLock:
    """Take a folder for this process until it drops the lock or ends; UsageError if another one has it.

    With `wait` that is said, and waited for.
    The lock is the operating system's: a process that died, however it did, holds none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        if wait:
            warnings.warn(f"{folder} is being {what} by another process; waiting for it", stacklevel=2)
            lock.acquire(timeout=-1)
            return lock
        raise UsageError(
            f"{folder} is being {what} by another process; wait for it or give another --out"
        ) from None
    return lock


@contextmanager
def taken(folder: Path, doing: str) -> Iterator[None]:
    """A folder of the cache for this process, waiting for another one; OSError names the remedy if it is full.

    `doing` says what is done there, as "tokenised into".
    """
    try:
        lock = lock_folder(folder, doing, wait=True)
    except OSError as error:
        raise OSError(
            f"cannot write into the cache {folder} ({error.strerror or error}); "
            "set LOOPMDM_CACHE to a folder that can be written to"
        ) from None
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(f"no space left in {folder}; free some or set LOOPMDM_CACHE") from None
    finally:
        lock.release()


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", "utf-8"))


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal; one that has not changed since is hashed once."""
    status = path.stat()
    return _sha256(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=1024)
def _sha256(path: Path, *state: int) -> str:  # noqa: ARG001
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_file(path: Path) -> bool:
    """Whether there is such a file; what cannot be a path (too long, NUL inside) is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; what cannot be a path is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_json(path: Path) -> Any:
    """Read JSON; UsageError names a damaged file."""
    try:
        return json.loads(path.read_text(TEXT))
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise UsageError(f"{path} is not JSON ({error}); restore the file") from error
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply; restore the file") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file with a JSON object a line; UsageError names a damaged line."""
    records = []
    for number, line in enumerate(path.read_text(TEXT, "replace").splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UsageError(f"{path} line {number} is no JSON object; restore the file")
        records.append(record)
    return records


def read_toml(path: Path) -> dict[str, Any]:
    """Read TOML; UsageError names a damaged file."""
    try:
        text = path.read_text(TEXT)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    return parse_toml(text, str(path))


def parse_toml(text: str, what: str) -> dict[str, Any]:
    """The values of a TOML text; UsageError names `what` if it is none, or nested beyond reason."""
    try:
        return tomllib.loads(text)
    except ValueError as error:  # not TOML, or a number of thousands of digits
        raise UsageError(f"{what} is not TOML: {error}") from error
    except RecursionError:
        raise UsageError(f"{what} is nested too deeply; a spec has tables of plain values") from None


def toml_value(text: str) -> Any:
    """The TOML value that a word of the command line is, or the word itself; UsageError beyond reason."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        raise UsageError(f"{text:.40}... is no value that a spec can hold; shorten it") from None
