"""Token ids as people hold them: lists, arrays and tensors."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopmdm.model.errors import UsageError, check_data

IdLists = Sequence[Sequence[int] | np.ndarray | Tensor] | np.ndarray | Tensor
"""Rows of token ids, each a list or an integer array or tensor, or all in one."""


def id_lists(name: str, given: Any) -> list[list[int]]:
    """Rows of token ids as lists; UsageError for anything else, of which `name` says what it should be."""
    rows = given if _is_listed(given) or isinstance(given, np.ndarray | Tensor) else None
    whole = getattr(rows, "ndim", 1) > 0
    lists = [as_list(row) for row in rows] if rows is not None and whole else [None]
    found = [row for row in lists if row is not None]
    if len(found) < len(lists):
        raise UsageError(f"give {name} as lists of token ids, got {' '.join(repr(given).split()):.60}")
    return found


def as_list(row: Any) -> list[int] | None:
    """A row of integers as a list: of an array or tensor by its dtype, else one by one; None if it is none."""
    check_data("token ids", row)
    if isinstance(row, np.ndarray | Tensor):
        return row.tolist() if row.ndim == 1 and _holds_integers(row) else None
    if not _is_listed(row) or not all(type(token) is int or _is_integer(token) for token in row):
        return None
    return [int(token) for token in row]


def _is_listed(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray)


def _holds_integers(ids: np.ndarray | Tensor) -> bool:
    if isinstance(ids, Tensor):
        return not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    return ids.dtype.kind in "iu"


def _is_integer(token: Any) -> bool:
    if isinstance(token, bool) or (isinstance(token, Tensor) and not _holds_integers(token)):
        return False
    try:
        operator.index(token)
    except TypeError:
        return False
    return True
