"""Tidy tables on disk: parquet with provenance in `df.attrs`, hashed by their values."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from loopmdm.model.errors import UsageError
from loopmdm.model.files import write_atomic

SCHEMA = 1


def value_hash(df: pd.DataFrame) -> str:
    """sha256 over column names and values; independent of dates, commits and file format."""
    digest = hashlib.sha256("\0".join(df.columns).encode())
    digest.update(pd.util.hash_pandas_object(df.reset_index(drop=True), index=False).to_numpy().tobytes())
    return digest.hexdigest()


def write_table(df: pd.DataFrame, path: Path, provenance: dict[str, Any]) -> None:
    """Write parquet atomically with schema, value hash and provenance."""
    df = df.copy()
    df.attrs = {"schema": SCHEMA, "values_sha256": value_hash(df)} | provenance
    write_atomic(path, lambda temporary: df.to_parquet(temporary, index=False))


class Told(dict[str, Any]):
    """What a frame says of its origin. pandas copies `attrs` deeply at every step; this is shared, not changed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Told":
        """Itself."""
        return self


def read_table(path: Path, columns: Iterable[str] = (), remedy: str = "") -> pd.DataFrame:
    """Read and check a table; UsageError if it is not there, damaged, of another schema or lacks columns.

    A file that has not changed is read and hashed once; the frames share their values, copied on writing. `remedy`
    says what makes it anew; by default `loopmdm table`.
    """
    remedy = remedy or f"delete it and run `loopmdm table {path.stem}`"
    try:
        status = path.stat()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    df = _checked(path, status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns, remedy)
    missing = [column for column in columns if column not in df.columns]
    if missing:
        raise UsageError(f"{path} lacks column {missing[0]}; {remedy}")
    return df.copy(deep=False)


@lru_cache(maxsize=64)
def _checked(path: Path, modified: int, size: int, inode: int, changed: int, remedy: str) -> pd.DataFrame:  # noqa: ARG001
    """The table of this state of the file."""
    try:
        df = pd.read_parquet(path)
    except OSError as error:
        raise UsageError(f"{path} is damaged ({error}); {remedy}") from error
    except Exception as error:  # pyarrow raises its own kinds
        raise UsageError(f"{path} is no readable table ({type(error).__name__}); {remedy}") from error
    if df.attrs.get("schema") != SCHEMA:
        raise UsageError(f"{path} has schema {df.attrs.get('schema')}, this version reads {SCHEMA}; {remedy}")
    if df.attrs["values_sha256"] != value_hash(df):
        raise UsageError(f"{path}: values do not match their recorded hash; {remedy}")
    df.attrs = {name: Told(value) if isinstance(value, dict) else value for name, value in df.attrs.items()}
    return df
