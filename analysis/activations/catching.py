"""What a run shows at chosen sites and positions, as rows: one row a position, one array a site.

A row is a vector (or what else a site holds of one position, such as an attention row) of one sequence, at one
mask ratio or denoising step. All sites share the rows, so H(0), H(1), .. of one position stand side by side.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from loopmdm.analysis.activations.identity import Identity, identity
from loopmdm.model import sites
from loopmdm.model.errors import UsageError, check_count, check_model, check_seed, check_word, unknown_name
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.sites import Site

Positions = Literal["masked", "clean", "all"]
LOOPS = "loop.*.hook_out"
"""H(0), H(1), ..: the states after every loop."""
Sites = str | Site | sites.Names | Iterable[str | Site]
Setting = tuple[str, float, MaskedBatch]
"""What tells batches apart (mask ratio or step), its value, and the batch."""
COLUMNS = ("sample", "setting", "position", "masked", "token", "true")


@runtime_checkable
class Source(Protocol):
    """A model with batches, as a measure's `Case` is."""

    @property
    def m(self) -> HookedLoopMDM:
        """The model."""
        ...

    @property
    def n_loops(self) -> int:
        """How far it is read."""
        ...

    def batches(self) -> Iterator[Setting]:
        """What it is read on."""
        ...


@dataclass(frozen=True)
class Given:
    """A model on one batch of one's own."""

    m: HookedLoopMDM
    n_loops: int
    batch: MaskedBatch

    def batches(self) -> Iterator[Setting]:
        """The batch, by its realised mask ratio."""
        yield "mask_ratio", self.batch.mask_ratio, self.batch


@dataclass(frozen=True)
class Wanted:
    """What is kept: `sites` (names with "*", a filter such as at(leaf="resid_post"), or several), `positions`.

    Positions go by what they hold: "masked", "clean" or "all" that are no padding. `batch_size` sequences run at a
    time.
    """

    sites: Any = LOOPS
    positions: Positions = "masked"
    batch_size: int = 64

    def __post_init__(self):
        """Words and counts."""
        check_word("positions", self.positions, get_args(Positions))
        check_count("batch_size", self.batch_size)

    def names(self, m: HookedLoopMDM, n_loops: int) -> list[str]:
        """Hook names in running order; UsageError for what means none."""
        every = sites.all_names(m.cfg, check_count("n_loops", n_loops))
        if callable(self.sites) and not isinstance(self.sites, Site):
            found = [name for name in every if self.sites(name)]
            if not found:
                raise UsageError(f"sites: {self.sites!r:.60} means no site of this model at {n_loops} loops")
            return found
        listed = [self.sites] if isinstance(self.sites, str | Site) else list(self.sites)
        patterns = [str(item) for item in listed]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in every):
                raise unknown_name("site", pattern, every)
        return [name for name in every if any(fnmatchcase(name, pattern) for pattern in patterns)]

    def members(self, m: HookedLoopMDM, b: MaskedBatch) -> Bool[Tensor, "batch pos"]:
        """Which positions give a row."""
        hidden = m.cfg.hidden(b.tokens)
        return {"masked": hidden, "clean": ~hidden, "all": torch.ones_like(hidden)}[self.positions] & b.real

    def check(self, m: HookedLoopMDM) -> None:
        """UsageError where the model has no such positions."""
        if self.positions == "masked":
            m.facts.need("masks", by='positions="masked"')

    def asked(self) -> dict[str, Any]:
        """In plain JSON."""
        given = self.sites
        listed = isinstance(given, list | tuple | set)
        written = [str(item) for item in given] if listed else str(given)
        return {"sites": written, "positions": self.positions, "batch_size": self.batch_size}


def as_source(given: Source | HookedLoopMDM, batch: MaskedBatch | None, n_loops: int | None, by: str) -> Source:
    """A case as it is, or a model with the batch that comes beside it."""
    if isinstance(given, Source) and not isinstance(given, HookedLoopMDM):
        if batch is not None:
            raise UsageError(f"{by}: a case brings its own batches; give the model to read another batch")
        return given
    check_model(given, by, hooked=True)
    if not isinstance(batch, MaskedBatch):
        raise UsageError(f"{by}: a model needs batch=, a MaskedBatch (m.mask, mask_tokens); or give a Case")
    n_loops = given.cfg.max_loops if n_loops is None else n_loops  # pyright: ignore
    return Given(given, check_count("n_loops", n_loops), batch)  # pyright: ignore


def shape_of(m: HookedLoopMDM, name: str, length: int) -> list[int]:
    """What a site holds of one position of sequences of `length` tokens."""
    whole = list(sites.shape(m.cfg, name, 1, length))
    del whole[len(whole) + sites.position_axis(name)]
    return whole[1:]


@torch.no_grad()
def catch(
    m: HookedLoopMDM, b: MaskedBatch, n_loops: int, names: list[str], rows: Bool[Tensor, "batch pos"]
) -> dict[str, Tensor]:
    """By site, [row, ..] of the positions `rows` in reading order, in the model's dtype.

    Coda and unembedding run only where a site of theirs is asked for.
    """
    found: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        axis = value.ndim + sites.position_axis(hook.name)
        found[hook.name] = value.movedim(axis, 1)[rows].clone()

    wanted = set(names)
    with m.hooks([(wanted.__contains__, keep)]):
        *_, last = m.states(b.tokens, n_loops, b.attention_mask)
        if wanted - found.keys():
            m.readout(*last)
    return {name: found[name] for name in names}


def row_columns(m: HookedLoopMDM, b: MaskedBatch, rows: Tensor, start: int, setting: float) -> dict[str, Tensor]:
    """What is known of each row; `start` is the first sequence's number, `true` is -1 where nobody knows."""
    sample, position = rows.nonzero(as_tuple=True)
    true = b.clean.masked_fill(b.unknown, -1)
    return {
        "sample": sample + start,
        "setting": torch.full_like(sample, setting, dtype=torch.float64),
        "position": position.int(),
        "masked": m.cfg.hidden(b.tokens)[rows],
        "token": b.tokens[rows].int(),
        "true": true[rows].int(),
    }


def frame_of(columns: dict[str, Tensor], setting: str) -> pd.DataFrame:
    """The index: sample, `setting` (nominal_mask_ratio, mask_ratio or step), position masked token true."""
    return pd.DataFrame({setting if name == "setting" else name: columns[name].cpu().numpy() for name in COLUMNS})


@dataclass(frozen=True, eq=False)
class Gathered:
    """Rows in memory: `values` [row, site, ..] in float32 or wider, their `frame`, and whose they are."""

    values: Tensor
    frame: pd.DataFrame
    sites: list[str]
    model: Identity
    wanted: Wanted
    n_loops: int

    @property
    def positions(self) -> str:
        """Which positions have rows: "masked", "clean" or "all"."""
        return self.wanted.positions

    def __len__(self) -> int:
        """Rows."""
        return len(self.values)

    def batches(self, size: int, seed: int = 0, epochs: int | None = 1) -> Iterator[Tensor]:
        """[row, site, ..] in an order of its own each epoch (None: for ever); the rest of an epoch is left out."""
        for picked in shuffled(len(self), size, seed, epochs):
            yield self.values[picked]


def shuffled(n: int, size: int, seed: int, epochs: int | None) -> Iterator[Tensor]:
    """Row numbers in batches of `size`, sorted within; at least one batch an epoch."""
    check_count("size", size)
    check_seed(seed)
    epoch = 0
    while epochs is None or epoch < epochs:
        order = np.random.default_rng([seed, epoch]).permutation(n)
        for start in range(0, max(n - size, 0) + 1, size):
            yield torch.from_numpy(np.sort(order[start : start + size]))
        epoch += 1


def gather(
    source: Source | HookedLoopMDM,
    wanted: Wanted | None = None,
    *,
    batch: MaskedBatch | None = None,
    n_loops: int | None = None,
) -> Gathered:
    """Rows of a case, or of a model on `batch`, in the machine's memory; all sites must hold the same shape.

    `record` writes them to disk instead. UsageError where no position is chosen.
    """
    found, wanted = as_source(source, batch, n_loops, "gather"), wanted or Wanted()
    m = found.m
    wanted.check(m)
    names, values, columns, setting = wanted.names(m, found.n_loops), [], [], ""
    for name, value, whole in found.batches():
        setting = name
        for start, part in whole.batches(wanted.batch_size):
            rows = wanted.members(m, part)
            caught = catch(m, part, found.n_loops, names, rows)
            values.append(torch.stack(same_shape(list(caught.values())), 1).float().cpu())
            columns.append(row_columns(m, part, rows, start, value))
    if not sum(map(len, values)):
        raise UsageError(f"no position is {wanted.positions}, so there is nothing to gather; mask some")
    joined = {name: torch.cat([part[name] for part in columns]) for name in COLUMNS}
    frame = frame_of(joined, setting)
    return Gathered(torch.cat(values), frame, names, identity(m), wanted, found.n_loops)


def same_shape(arrays: list[Tensor]) -> list[Tensor]:
    """The arrays; UsageError unless what they hold of a row is of one shape."""
    shapes = {tuple(array.shape[1:]) for array in arrays}
    if len(shapes) > 1:
        raise UsageError(f"sites of one shape stand side by side, these hold {sorted(shapes)}; choose one kind")
    return arrays
