"""Rows of arrays on disk, read and written some at a time: neither they nor pages of a map stay in memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np

AT_A_TIME = 2**16
"""Rows that are read or written at a time."""
Rows = Callable[[], Iterator[np.ndarray]]
"""Goes through rows once more, from the first on, in parts; one pass at a time."""


def read_rows(path: Path) -> Iterator[np.ndarray]:
    """The rows of an .npy file, in parts."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        _, _, dtype = np.lib.format.read_array_header_1_0(file)
        yield from _rows_in(file, dtype)


@contextmanager
def spilled(parts: Iterable[np.ndarray], dtype: np.dtype, folder: Path) -> Iterator[Rows]:
    """Rows that are made once, to be gone through again: they wait in a file of the folder that has no name."""
    with TemporaryFile(dir=folder) as file:
        file.writelines(part.tobytes() for part in parts)

        def again() -> Iterator[np.ndarray]:
            file.seek(0)
            return _rows_in(file, dtype)

        yield again


def _rows_in(file: IO[bytes], dtype: np.dtype) -> Iterator[np.ndarray]:
    while raw := file.read(AT_A_TIME * dtype.itemsize):
        yield np.frombuffer(raw, dtype)


def numbered(parts: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Each part and the number of its first row."""
    start = 0
    for part in parts:
        yield start, part
        start += len(part)


def column(parts: Iterable[np.ndarray], field: str) -> np.ndarray:
    """A field of integers from 0 on, [row], in the smallest signed type that holds all."""
    found = [part[field].astype(np.min_scalar_type(~part[field].max(initial=0))) for part in parts]
    return np.concatenate([np.zeros(0, np.int8), *found])


def save_columns(path: Path, dtype: np.dtype, columns: Mapping[str, np.ndarray]) -> None:
    """Write rows as `np.save` does, under this very name; each field is a column, [row]."""
    (n_rows,) = {len(values) for values in columns.values()}
    with path.open("wb") as file:
        told = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n_rows,)}
        np.lib.format.write_array_header_1_0(file, told)
        for start in range(0, n_rows, AT_A_TIME):
            part = np.zeros(min(AT_A_TIME, n_rows - start), dtype)
            for field, values in columns.items():
                part[field] = values[start : start + AT_A_TIME]
            file.write(part.tobytes())
