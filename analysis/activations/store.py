"""A store of activations, read back lazily: files are mapped into memory, and only what is asked for is read."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loopmdm.analysis.activations.catching import COLUMNS, frame_of, same_shape, shuffled
from loopmdm.analysis.activations.identity import Identity
from loopmdm.analysis.activations.index import AGAIN, Index
from loopmdm.model.errors import UsageError, unknown_name
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import wide
from loopmdm.model.sites import Site, at

OPEN_FILES = 64
"""Shards that are mapped at a time."""


class ActivationStore:
    """What `record` wrote; make it with `open`. Rows are the same at every site (`frame`)."""

    def __init__(self, folder: Path, index: Index):
        self.folder, self.index = folder, index
        self._mapped: dict[tuple[str, str], Tensor] = {}

    @classmethod
    def open(cls, folder: Path | str, partial: bool = False) -> "ActivationStore":
        """UsageError where there is no store, or a half-written one unless `partial` takes what there is."""
        folder = Path(folder)
        index = Index.load(folder)
        if not index.complete and not partial:
            raise UsageError(
                f"{folder} is half-written: {len(index.done)} of {len(index.planned)} shards; {AGAIN}, or open it "
                "with partial=True"
            )
        missing = [shard.file for shard in index.done if not (folder / shard.file).is_file()]
        if missing:
            raise UsageError(f"{folder} lacks {missing[0]} (and {len(missing) - 1} more); copy or record it anew")
        return cls(folder, index)

    # --- what it is ---

    @property
    def model(self) -> Identity:
        """The model that it is of."""
        return self.index.model

    @property
    def sites(self) -> list[str]:
        """Hook names in running order."""
        return list(self.index.shapes)

    @property
    def n_loops(self) -> int:
        """How far the model was read."""
        return self.index.n_loops

    @property
    def positions(self) -> str:
        """Which positions have rows: "masked", "clean" or "all"."""
        return self.index.asked["positions"]

    @property
    def n_bytes(self) -> int:
        """Bytes on disk."""
        return sum((self.folder / shard.file).stat().st_size for shard in self.index.done)

    def __len__(self) -> int:
        """Rows."""
        return sum(shard.n_rows for shard in self.index.done)

    def __repr__(self) -> str:
        """Rows, sites, size and model."""
        done = "" if self.index.complete else f", {len(self.index.done)} of {len(self.index.planned)} shards"
        return (
            f"ActivationStore({self.folder}: {len(self):,} rows x {len(self.sites)} sites of "
            f"{self.model.name or 'an unnamed model'}, {self.index.dtype}, {self.n_bytes / 2**20:.1f} MiB{done})"
        )

    def check(self, m: HookedLoopMDM) -> None:
        """UsageError unless it is of this model."""
        self.model.check(m, f"the store {self.folder}")

    # --- reading ---

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row a stored position: sample, mask ratio or step, position masked token true."""
        columns = {
            name: torch.cat([self.mapped(shard.file, f"row.{name}") for shard in self.index.done])
            for name in COLUMNS
        }
        return frame_of(columns, self.index.setting)

    def array(self, site: str | Site | None = None, **place: Any) -> "Rows":
        """Rows of one site, by name or by loop=, layer=, leaf=; read when indexed."""
        (name,) = self._only(self._places(site, place))
        return Rows(self, name)

    def select(self, site: str | Site | None = None, **asked: Any) -> Tensor:
        """[row, ..] of one site, [row, site, ..] of several; `asked`: loop, layer, leaf, and columns of `frame`.

        As in store.select(masked=True, loop=3, nominal_mask_ratio=0.5); float32.
        """
        place = {name: asked.pop(name) for name in ("loop", "layer", "leaf") if name in asked}
        keep = np.ones(len(self), dtype=bool)
        for name, value in asked.items():
            if name not in self.frame:
                raise unknown_name("column", name, self.frame.columns)
            keep &= np.isin(self.frame[name].to_numpy(), value)
        names = self._places(site, place)
        picked = torch.from_numpy(np.flatnonzero(keep))
        found = same_shape([Rows(self, name)[picked] for name in names])
        return wide(found[0] if len(found) == 1 else torch.stack(found, 1))

    def batches(self, size: int, seed: int = 0, epochs: int | None = 1, **place: Any) -> Iterator[Tensor]:
        """[row, site, ..] in random order, float32, of all sites or those at loop=, layer=, leaf=.

        `epochs` None goes on for ever; the rest of an epoch that fills no batch is left out.
        """
        arrays = [Rows(self, name) for name in self._places(None, place)]
        for picked in shuffled(len(self), size, seed, epochs):
            yield wide(torch.stack(same_shape([array[picked] for array in arrays]), 1))

    def _places(self, site: str | Site | None, place: dict[str, Any]) -> list[str]:
        if site is not None:
            if str(site) not in self.sites:
                raise unknown_name("stored site", str(site), self.sites)
            return [str(site)]
        meant = at(**place)
        found = [name for name in self.sites if meant(name)]
        if not found:
            raise UsageError(f"no stored site is {meant!r}; there are {', '.join(self.sites[:4])} ..")
        return found

    def _only(self, names: list[str]) -> list[str]:
        if len(names) > 1:
            raise UsageError(f"{len(names)} stored sites are meant, such as {names[0]} and {names[1]}; name one")
        return names

    def mapped(self, file: str, name: str) -> Tensor:
        """One array of one shard; its pages are read when they are looked at."""
        found = self._mapped.get((file, name))
        if found is None:
            if len(self._mapped) >= OPEN_FILES * (len(self.sites) + 1):
                self._mapped.clear()
            try:
                with safe_open(self.folder / file, framework="pt") as opened:
                    found = opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UsageError(
                    f"{self.folder / file} is damaged ({error!s:.80}); record the store anew"
                ) from error
            self._mapped[file, name] = found
        return found


class Rows:
    """All rows of one site as one array [row, ..] that is read from disk where it is indexed along the rows."""

    def __init__(self, store: ActivationStore, name: str):
        self.store, self.name = store, name
        self._ends = np.cumsum([shard.n_rows for shard in store.index.done])

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, and what a row holds."""
        return len(self.store), *self.store.index.shapes[self.name]

    def __len__(self) -> int:
        """Rows."""
        return len(self.store)

    def __repr__(self) -> str:
        """Site and shape."""
        return f"Rows({self.name}, {list(self.shape)}, {self.store.index.dtype})"

    def __getitem__(self, rows: Any) -> Tensor:
        """By number, slice, numbers or booleans, in the order asked, in the dtype of the store."""
        numbers = np.arange(len(self))[rows.cpu().numpy() if isinstance(rows, Tensor) else rows]
        flat = np.atleast_1d(numbers)
        owner = np.searchsorted(self._ends, flat, side="right")
        found = torch.empty(len(flat), *self.shape[1:], dtype=getattr(torch, self.store.index.dtype))
        for shard in np.unique(owner):
            mine = owner == shard
            first = self._ends[shard] - self.store.index.done[shard].n_rows
            whole = self.store.mapped(self.store.index.done[shard].file, self.name)
            found[torch.from_numpy(mine)] = whole[torch.from_numpy(flat[mine] - first)]
        return found if np.ndim(numbers) else found[0]
