"""Files that are whole or not there, and folders that one process works in at a time."""

import hashlib
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from loopmdm.model.errors import UsageError

PARTIAL = ".partial-"
LOCK = ".lock"


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
    found = path.resolve()
    if found.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")
    if found.exists() and not found.is_file():
        raise UsageError(f"{path} is no regular file; give the name of one, or of a new one")
    above = next(folder for folder in found.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write into {above}; give another --out")
    return path


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


def lock_folder(folder: Path, what: str) -> BaseFileLock:
    """Take a folder for this process until it drops the lock or ends; UsageError if another one has it.

    The lock is the operating system's: a process that died, however it did, holds none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"{folder} is being {what} by another process; wait for it or give another --out"
        ) from None
    return lock


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal; one that has not changed since is hashed once."""
    status = path.stat()
    return _sha256(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=1024)
def _sha256(path: Path, *state: int) -> str:  # noqa: ARG001
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Read JSON; UsageError names a damaged file."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # not UTF-8, or not JSON
        raise UsageError(f"{path} is not JSON ({error}); restore the file") from error
