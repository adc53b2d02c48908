"""Files that are whole or not there."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from loopmdm_model.errors import UsageError

PARTIAL = ".partial-"


def clear_partial(folder: Path) -> None:
    """Remove what killed writers left behind; only for a folder that nobody else writes to."""
    for path in folder.rglob(f"{PARTIAL}*"):
        path.unlink(missing_ok=True)


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` on a temporary name in the same folder, flush it to disk, then rename to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f"{PARTIAL}{path.name}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(Path(temporary))
        with Path(temporary).open("rb") as file:
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
