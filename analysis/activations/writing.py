"""Writing a store: what it will take is known before, each shard is whole or not there, a killed run goes on.

safetensors with a JSON index, against zarr: zarr cuts arrays in every direction and compresses, but brings four
packages more (numcodecs, donfig, crc32c, msgspec), writes thousands of small files, and leaves "is this chunk
whole" to its user. Rows are only ever added here, and read back in order or by number; safetensors is a dependency
already, maps files into memory, holds no code, and a shard is one file, renamed into place when it is whole.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loopmdm.analysis.activations.catching import (
    Given,
    Setting,
    Source,
    Wanted,
    as_source,
    catch,
    row_columns,
    shape_of,
)
from loopmdm.analysis.activations.identity import identity
from loopmdm.analysis.activations.index import AGAIN, INDEX, Index, Shard
from loopmdm.analysis.activations.store import ActivationStore
from loopmdm.model.errors import NotFiniteError, UsageError, check_word
from loopmdm.model.files import clear_partial, is_file, lock_folder
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.checkpoints import write_tensors
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.training.record import commit, versions

DTYPES = {"float16": torch.float16, "float32": torch.float32}
ROW_BYTES = 8 + 8 + 4 + 1 + 4 + 4
"""What the index of a row takes beside its values."""
SPARE = 2**26
"""Bytes of a disk that a store leaves free."""


def record(
    source: Source | HookedLoopMDM,
    folder: Path | str,
    wanted: Wanted | None = None,
    *,
    batch: MaskedBatch | None = None,
    n_loops: int | None = None,
    dtype: str = "float16",
    resume: bool = False,
    whatever_fits: bool = False,
) -> ActivationStore:
    """Write the activations of a case (a test set, masked as its options say), or of a model on `batch`.

    One shard per `wanted.batch_size` sequences and mask ratio or step. What is done of a half-written store is
    kept with `resume=True`, which asks for the same model and settings. UsageError in one line for a folder that
    holds a store or files already, and for what the disk has no room for (`whatever_fits=True` tries anyway);
    NotFiniteError for values beyond the range of `dtype`.
    """
    check_word("dtype", dtype, list(DTYPES))
    found, folder = as_source(source, batch, n_loops, "record"), Path(folder)
    plan = _plan(found, wanted or Wanted(), dtype)
    started = _started(folder, plan.index, resume)
    if not whatever_fits:
        _check_room(folder, plan.n_bytes - _written(started, plan))
    lock = lock_folder(folder, "written")
    try:
        clear_partial(folder)
        index = started or plan.index
        index.save(folder)
        for shard, setting, start, part in plan.parts():
            if shard not in index.done:
                _write(folder / shard.file, plan, (setting, start, part))
                index = index.with_done(shard)
                index.save(folder)
    finally:
        lock.release()
    return ActivationStore.open(folder)


def estimate_store(
    source: Source | HookedLoopMDM,
    wanted: Wanted | None = None,
    *,
    batch: MaskedBatch | None = None,
    n_loops: int | None = None,
    dtype: str = "float16",
) -> int:
    """Bytes that `record` of the same would write, before anything is run (but samples, if it is along those)."""
    check_word("dtype", dtype, list(DTYPES))
    return _plan(as_source(source, batch, n_loops, "estimate_store"), wanted or Wanted(), dtype).n_bytes


@dataclass(frozen=True)
class _Plan:
    """What is to be written: the index of it, and the batches that it comes from."""

    source: Source
    wanted: Wanted
    index: Index
    settings: list[Setting]

    @property
    def names(self) -> list[str]:
        return list(self.index.shapes)

    @property
    def row_bytes(self) -> int:
        numbers = sum(torch.Size(shape).numel() for shape in self.index.shapes.values())
        return ROW_BYTES + DTYPES[self.index.dtype].itemsize * numbers

    @property
    def n_bytes(self) -> int:
        return self.row_bytes * sum(shard.n_rows for shard in self.index.planned)

    def parts(self) -> Iterator[tuple[Shard, float, int, MaskedBatch]]:
        """Shard, mask ratio or step, number of the first sequence, sequences."""
        pieces = _pieces(self.settings, self.wanted)
        for shard, (value, start, part) in zip(self.index.planned, pieces, strict=True):
            yield shard, value, start, part


def _pieces(settings: list[Setting], wanted: Wanted) -> Iterator[tuple[float, int, MaskedBatch]]:
    for _, value, whole in settings:
        for start, part in whole.batches(wanted.batch_size):
            yield value, start, part


def _plan(source: Source, wanted: Wanted, dtype: str) -> _Plan:
    m = source.m
    wanted.check(m)
    names = wanted.names(m, source.n_loops)
    masks = m.facts.mask_token_id is not None or isinstance(source, Given)
    settings = list(source.batches()) if masks else _without_masks(source)
    length = settings[0][2].tokens.shape[1]
    counts = [int(wanted.members(m, part).sum()) for _, _, part in _pieces(settings, wanted)]
    if not sum(counts):
        raise UsageError(f"no position is {wanted.positions}, so there is nothing to record; mask some")
    shards = tuple(Shard(f"shard-{number:05}.safetensors", n) for number, n in enumerate(counts))
    shapes = {name: shape_of(m, name, length) for name in names}
    asked = wanted.asked() | {"options": str(getattr(source, "options", "")), "sequences": _digest(settings)}
    by = {"commit": commit(), "versions": versions(("torch", "safetensors"))}
    index = Index(identity(m), asked, settings[0][0], source.n_loops, dtype, shapes, shards, written_by=by)
    return _Plan(source, wanted, index, settings)


def _without_masks(source: Source) -> list[Setting]:
    """Of a model that has no [MASK]: the sequences as they are."""
    unmasked = getattr(source, "unmasked", None)
    if unmasked is None:
        raise UsageError("this model has no [MASK], and the source offers nothing unmasked; give batch=")
    return [("nominal_mask_ratio", 0.0, unmasked())]


def _digest(settings: list[Setting]) -> str:
    """Of the tokens that are read, so that only the same are resumed."""
    digest = hashlib.sha256()
    for name, value, b in settings:
        digest.update(f"{name} {value};".encode())
        digest.update(b.tokens.cpu().numpy().tobytes() + b.clean.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _started(folder: Path, new: Index, resume: bool) -> Index | None:
    """The index of a half-written store that is gone on with; UsageError for whatever else is there."""
    if not is_file(folder / INDEX):
        if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
            raise UsageError(f"{folder} exists and is no activation store; give a new folder")
        return None
    found = Index.load(folder)
    if not resume:
        state = "whole" if found.complete else f"half-written; {AGAIN}"
        raise UsageError(f"{folder} holds a store already, which is {state}; open it, or give a new folder")
    for name, value in found.said.items():
        if value != new.said[name]:
            raise UsageError(f"{folder} was begun with another {name}; resume with the same, or give a new folder")
    return found


def _written(started: Index | None, plan: _Plan) -> int:
    return 0 if started is None else plan.row_bytes * sum(shard.n_rows for shard in started.done)


def _check_room(folder: Path, n_bytes: int) -> None:
    above = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    free = shutil.disk_usage(above).free
    if n_bytes > free - SPARE:
        raise UsageError(
            f"the store would take {n_bytes / 2**20:.0f} MiB, {above} has {free / 2**20:.0f} free; choose fewer "
            'sites or sequences, dtype="float16", another disk, or whatever_fits=True'
        )


def _write(path: Path, plan: _Plan, piece: tuple[float, int, MaskedBatch]) -> None:
    """One shard, whole or not at all."""
    setting, start, part = piece
    m, rows = plan.source.m, plan.wanted.members(plan.source.m, part)
    caught = catch(m, part, plan.source.n_loops, plan.names, rows)
    told = {f"row.{name}": value.cpu() for name, value in row_columns(m, part, rows, start, setting).items()}
    values = {name: _as(name, value, DTYPES[plan.index.dtype]) for name, value in caught.items()}
    write_tensors(path, told | values, {"format": "pt"})


def _as(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    kept = value.detach().cpu().to(dtype).contiguous()
    if not bool(kept.isfinite().all()) and bool(value.isfinite().all()):
        raise NotFiniteError(f'{name} is beyond the range of {dtype}; record with dtype="float32"')
    return kept
