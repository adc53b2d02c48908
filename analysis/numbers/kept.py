"""Results that are kept as a table: a row each, with its key, its shape as JSON and the bytes of its arrays.

A result is a tree of lists, tuples, dictionaries, numbers, words, arrays and tensors. Nothing else is written, and
nothing that could run is read.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopmdm.model.errors import UsageError

COLUMNS = ["key", "tree", "data"]


def table(results: Mapping[str, Any]) -> pd.DataFrame:
    """Columns key tree data."""
    rows = []
    for key, value in results.items():
        arrays: list[bytes] = []
        rows.append((key, json.dumps(_tree(value, arrays)), b"".join(arrays)))
    return pd.DataFrame(rows, columns=COLUMNS)


def results(frame: pd.DataFrame) -> Iterator[tuple[str, Any]]:
    """The (key, result) of each row."""
    for key, tree, data in frame[COLUMNS].itertuples(index=False):
        value, end = _value(json.loads(tree), memoryview(data), 0)
        if end != len(data):
            raise UsageError(f"a kept result has {len(data)} bytes, {end} were expected; make the part again")
        yield key, value


def _tree(value: Any, arrays: list[bytes]) -> Any:
    """Plain JSON; arrays go to `arrays` in the order in which the tree names them."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor | np.ndarray | np.generic):
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if not array.dtype.hasobject:
            arrays.append(np.ascontiguousarray(array).tobytes())
            return {"tensor" if isinstance(value, Tensor) else "array": [array.dtype.str, list(array.shape)]}
    if isinstance(value, dict):
        return {"dict": [[_tree(name, arrays), _tree(entry, arrays)] for name, entry in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_tree(entry, arrays) for entry in value]}
    raise TypeError(f"{type(value).__name__} cannot be kept; give numbers, words, arrays and tensors")


def _value(tree: Any, data: memoryview, at: int) -> tuple[Any, int]:
    """What a tree says, and where its bytes end."""
    if not isinstance(tree, dict):
        return tree, at
    ((kind, told),) = tree.items()
    if kind in ("array", "tensor"):
        dtype, shape = np.dtype(told[0]), tuple(told[1])
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(data[at : at + size], dtype).reshape(shape).copy()
        return (torch.from_numpy(array) if kind == "tensor" else array), at + size
    entries = []
    for entry in told:
        if kind == "dict":
            name, at = _value(entry[0], data, at)
            entry, at = _value(entry[1], data, at)
            entries.append((_hashable(name), entry))
        else:
            entry, at = _value(entry, data, at)
            entries.append(entry)
    return {"dict": dict, "list": list, "tuple": tuple}[kind](entries), at


def _hashable(name: Any) -> Any:
    return name.item() if isinstance(name, np.ndarray) else name
