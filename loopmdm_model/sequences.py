"""Token sequences with what travels with them: what may be masked, what is padding, whose document each is.

`Sequences` are clean. A `MaskedBatch` is Sequences with some positions hidden. Both come in rows, which can be
chosen and run in batches; both know how many independent units (sequences, or documents) they hold. The rows of a
shard keep their place in the whole: masks and draws go by the number that a sequence has there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopmdm.model import means
from loopmdm.model.batching import size_of_batches
from loopmdm.model.errors import UsageError, check_count, check_data, check_model
from loopmdm.model.work import done

R = TypeVar("R", bound="_Rows")
T = TypeVar("T")
WHOLE_BATCHES = (64, 32, 1)
"""Shards begin at multiples of the first of these that leaves each one something: the usual batches stay whole."""


class Vocabulary(Protocol):
    """What is asked of a model's config: the ids it knows."""

    d_vocab: int
    mask_token_id: int


@dataclass(frozen=True)
class Place:
    """Rows that are part of a whole of `n`: from number `first` on. Batches of a whole end at its `cuts`."""

    first: int
    n: int
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Share:
    """Shard `number` of `of`, counted from 1: rows in one piece that know their place. 0: all, cut as they are."""

    number: int
    of: int

    def __post_init__(self):
        """One of them."""
        check_count("the number of shards", self.of)
        check_count("a shard", self.number, least=0)
        if self.number > self.of:
            raise UsageError(f"there is no shard {self.number}/{self.of}; shards count from 1/{self.of} on")

    def edges(self, n: int) -> tuple[int, ...]:
        """Where shards of `n` rows begin, and `n`; each has one row at least."""
        if n < self.of:
            raise UsageError(f"{n} sequences make {n} shards at most, not {self.of}; ask for fewer shards")
        unit = next(size for size in WHOLE_BATCHES if n >= size * self.of)
        steps = -(-n // unit)
        return tuple(min(n, unit * (steps * place // self.of)) for place in range(self.of + 1))

    def take(self, rows: R) -> R:
        """Its part of some rows."""
        n = len(rows)
        edges = self.edges(n)
        if not self.number:
            return replace(cast(Any, rows), place=Place(0, n, edges[1:-1]))
        first, last = edges[self.number - 1 : self.number + 1]
        return replace(cast(Any, rows.rows(slice(first, last))), place=Place(first, n))


class _Rows:
    """What sequences and masked batches share as rows of something."""

    tokens: Tensor
    clusters: np.ndarray | None
    place: Place | None

    def __len__(self) -> int:
        """Sequences."""
        return len(self.tokens)

    @property
    def n_units(self) -> int:
        """How many sequences are independent: documents, where they share one."""
        return means.count_units(len(self), self.clusters)

    @property
    def owners(self) -> np.ndarray:
        """The document of each sequence, or its own number where none is shared."""
        return np.arange(len(self)) if self.clusters is None else self.clusters

    def rows(self: R, keep: slice | Tensor | np.ndarray) -> R:
        """Some of the sequences, by slice, index or boolean."""
        return type(self)(*(_pick(getattr(self, field.name), keep) for field in fields(cast(Any, self))))

    def to(self: R, device: torch.device, pinned: bool = False) -> R:
        """The same there, unchecked as it was checked before; `pinned`: through pinned memory, without waiting."""
        if self.tokens.device == device:
            return self
        moved = object.__new__(type(self))
        for entry in fields(cast(Any, self)):
            part = getattr(self, entry.name)
            if isinstance(part, Tensor):
                part = part.pin_memory().to(device, non_blocking=True) if pinned else part.to(device)
            object.__setattr__(moved, entry.name, part)
        return moved

    @property
    def first(self) -> int:
        """Number of the first sequence in the whole that these are of: 0, unless they are a shard's."""
        return 0 if self.place is None else self.place.first

    def batches(self: R, batch_size: int) -> Iterator[tuple[int, R]]:
        """(index of the first sequence, rows) in pieces of `batch_size`, or as `at_a_time` wants."""
        size = size_of_batches(batch_size)
        cuts = () if self.place is None else self.place.cuts
        for begin, end in pairwise((0, *cuts, len(self))):
            for start in range(begin, end, size):
                yield start, self.rows(slice(start, min(start + size, end)))

    def each(self: R, batch_size: int, work: Callable[[R], T]) -> Iterator[tuple[slice, R, T]]:
        """(where they stand, rows that know their place, what `work` gives of them), `batch_size` at a time.

        In a measure by shards, `work` may have been done elsewhere (`work.py`): it must hang on nothing but its
        rows and what all shards are asked alike, and give numbers, words, arrays and tensors only.
        """
        whole = self if self.place is not None else replace(cast(Any, self), place=Place(0, len(self)))
        for start, part in whole.batches(batch_size):
            yield slice(start, start + len(part)), part, done(part, work)


@dataclass(frozen=True)
class Sequences(_Rows):
    """Clean sequences `tokens` [batch, pos]; make them with `Sequences.of`, which checks them.

    `maskable` [batch, pos]: what may be hidden, padding never (None: all that is real); `real` [batch, pos]: what
    is not padding (None: everything, and the model runs without an attention mask); `clusters` [batch]: the
    document of each (None: each its own); `place`: where they stand in a whole, if they are a shard of it.
    """

    tokens: Int[Tensor, "batch pos"]
    maskable: Bool[Tensor, "batch pos"] | None = None
    real: Bool[Tensor, "batch pos"] | None = None
    clusters: np.ndarray | None = None
    place: Place | None = None

    def __post_init__(self):
        """One shape."""
        if not isinstance(self.tokens, Tensor):
            raise UsageError(f"tokens must be an integer tensor [batch, pos], got {type(self.tokens).__name__}")
        for mask in (self.maskable, self.real):
            boolean = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == self.tokens.shape
            if mask is not None and not boolean:
                raise UsageError("masks must be boolean and of the tokens' shape; Sequences.of makes them so")
        check_clusters(self.clusters, len(self.tokens))

    @classmethod
    def of(
        cls,
        tokens: "Tensor | Sequences",
        maskable: Tensor | None = None,
        attention_mask: Tensor | None = None,
        clusters: Any = None,
    ) -> "Sequences":
        """Check what a caller gives; masks are boolean or integer, [batch, pos] or one row for all.

        Sequences come back as they are: what belongs to them is given once, inside or beside.
        """
        if isinstance(tokens, Sequences):
            beside = {"maskable": maskable, "attention_mask": attention_mask, "clusters": clusters}
            twice = [name for name, value in beside.items() if value is not None]
            if twice:
                raise UsageError(
                    f"{twice[0]} is given beside Sequences, which hold their own; give it to Sequences.of"
                )
            return tokens
        check_ids(tokens)
        real = None if attention_mask is None else _mask("attention_mask", attention_mask, tokens)
        allowed = None if maskable is None else _mask("maskable", maskable, tokens)
        if allowed is not None and real is not None:
            allowed = allowed & real
        return cls(tokens, allowed, real, check_clusters(clusters, len(tokens)))

    @cached_property
    def allowed(self) -> Bool[Tensor, "batch pos"]:
        """Where something may be hidden."""
        return _full(self.real if self.maskable is None else self.maskable, self.tokens)

    @cached_property
    def lengths(self) -> Int[Tensor, " batch"]:
        """How many positions of each sequence may be hidden."""
        return self.allowed.sum(-1)

    @property
    def attention_mask(self) -> Bool[Tensor, "batch pos"] | None:
        """What a model is told of padding: None without any, which is another attention kernel than all ones."""
        return self.real

    def columns(self, keep: Tensor) -> "Sequences":
        """The positions `keep` [pos] of all."""
        maskable, real = (part if part is None else part[:, keep] for part in (self.maskable, self.real))
        return Sequences(self.tokens[:, keep], maskable, real, self.clusters, self.place)

    def spread(self, n: int | None) -> "Sequences":
        """At most `n` of them, evenly spread."""
        if n is None or n >= len(self):
            return self
        return self.rows(torch.linspace(0, len(self) - 1, n).long())

    def clean_for(self, model: Any) -> "Sequences":
        """As `model` reads them, and where it is, its [PAD] told from tokens; refuses [MASK] and unknown ids."""
        check_model(model, "the likelihood")
        model.cfg.facts.need("masks", by="the likelihood")
        device = getattr(model, "device", self.tokens.device)
        if self.tokens.device != device:
            return self.to(device).clean_for(model)
        infer = getattr(model, "padding_mask", None)
        real = infer(self.tokens) if self.real is None and infer is not None else self.real
        words = getattr(model, "words", lambda tokens: None)(self.tokens) if self.maskable is None else None  # noqa: ARG005
        maskable = self.maskable if words is None else words
        unchanged = real is self.real and words is None
        known = self if unchanged else Sequences.of(self.tokens, maskable, real, self.clusters)
        known = replace(known, place=self.place)
        cfg: Vocabulary = model.cfg
        ids = self.tokens if known.real is None else self.tokens[known.real]
        if bool((ids == cfg.mask_token_id).any()):
            raise UsageError("tokens already hold [MASK]; the likelihood needs clean tokens")
        if bool(((ids < 0) | (ids >= cfg.d_vocab)).any()):
            raise UsageError(f"tokens hold ids outside 0..{cfg.d_vocab - 1}; use this model's own tokenizer")
        return known


@dataclass(frozen=True)
class MaskedBatch(_Rows):
    """Sequences with some positions hidden.

    `tokens` [batch, pos] is what the model sees, `clean` what was there, `masked` where they are
    hidden; `maskable` where they could have been, `attention_mask` which are real (None: all); `clusters` [batch]
    the document of each; `place` as of `Sequences`.
    """

    tokens: Int[Tensor, "batch pos"]
    clean: Int[Tensor, "batch pos"]
    masked: Bool[Tensor, "batch pos"]
    maskable: Bool[Tensor, "batch pos"] | None = None
    attention_mask: Tensor | None = None
    clusters: np.ndarray | None = None
    place: Place | None = None

    def __post_init__(self):
        """One shape; only maskable positions are hidden; the others show what was there."""
        check_ids(self.tokens)
        for name in ("clean", "masked", "maskable", "attention_mask"):
            self._check_part(name, getattr(self, name))
        if not torch.equal(self.tokens[~self.masked], self.clean[~self.masked]):
            raise UsageError("tokens and clean must be equal wherever nothing is masked; m.mask makes both")
        check_clusters(self.clusters, len(self.tokens))
        if self.maskable is not None and bool((self.masked & ~self.maskable).any()):
            raise UsageError("something is masked that is not maskable; widen maskable or masked &= maskable")

    def _check_part(self, name: str, part: Any) -> None:
        if part is None and name in ("maskable", "attention_mask"):
            return
        shape = list(self.tokens.shape)
        if not isinstance(part, Tensor) or list(part.shape) != shape:
            found = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise UsageError(f"a MaskedBatch has one shape: {name} is {found}, tokens {shape}")
        check_data(name, part)
        if name in ("masked", "maskable") and part.dtype != torch.bool:
            raise UsageError(f"{name} must be boolean, got {part.dtype}; compare ids with [MASK]'s")

    @cached_property
    def sequences(self) -> Sequences:
        """The clean sequences."""
        real = None if self.attention_mask is None else self.attention_mask != 0
        maskable = self.maskable if self.maskable is None or real is None else self.maskable & real
        return Sequences(self.clean, maskable, real, self.clusters, self.place)

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """Which positions are not padding."""
        return _full(self.sequences.real, self.tokens)

    @property
    def allowed(self) -> Bool[Tensor, "batch pos"]:
        """Which positions could have been hidden."""
        return self.sequences.allowed

    @cached_property
    def unknown(self) -> Bool[Tensor, "batch pos"]:
        """Where nobody knows what is hidden: `clean` shows what `tokens` show, as in a puzzle without solution."""
        return self.masked & (self.clean == self.tokens)

    def truth(self, by: str) -> Int[Tensor, "batch pos"]:
        """`clean`; UsageError, said by `by`, where nobody knows what is hidden."""
        if bool(self.unknown.any()):
            n, of = int(self.unknown.sum()), int(self.masked.sum())
            raise UsageError(
                f"{by} needs what is hidden, which is unknown at {n} of {of} masked positions; give it too: "
                "MaskedBatch(b.tokens, solution, b.masked)"
            )
        return self.clean

    @property
    def mask_ratio(self) -> float:
        """Realised share of maskable positions that are masked, over the whole batch."""
        total = int(self.allowed.sum())
        return int(self.masked.sum()) / total if total else float("nan")


def before_next(data: Sequences | MaskedBatch) -> MaskedBatch:
    """What a causal model is asked: at every token that has a next one, which that is.

    Those count as masked, though the model sees them; `clean` holds the next token there. UsageError where a
    sequence is of one token.
    """
    s = data.sequences if isinstance(data, MaskedBatch) else data
    real = torch.ones_like(s.allowed) if s.real is None else s.real
    told = real & torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], dim=1)
    if not bool(told.any(-1).all()):
        raise UsageError("a sequence has one token only: nothing to predict; leave it out")
    following = torch.where(told, s.tokens.roll(-1, 1), s.tokens)
    return MaskedBatch(s.tokens, following, told, None, s.real, s.clusters, s.place)


def as_batch(name: str, b: Any, clusters: Any = None) -> MaskedBatch:
    """The batch that the measure `name` is given, with `clusters` if they come beside it."""
    if not isinstance(b, MaskedBatch):
        raise UsageError(f"{name} takes a MaskedBatch; make one with m.mask(text, ratio=.5)")
    return b if clusters is None else replace(b, clusters=check_clusters(clusters, len(b)))


def check_ids(tokens: Any) -> None:
    """UsageError unless `tokens` are ids [batch, pos]."""
    wrong = not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.is_complex()
    if wrong or tokens.dtype == torch.bool:
        raise UsageError("tokens must be an integer tensor [batch, pos]; text goes through to_tokens")
    check_data("tokens", tokens)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise UsageError(f"tokens must be a non-empty [batch, pos] tensor, got shape {list(tokens.shape)}")


def check_clusters(clusters: Any, n: int) -> np.ndarray | None:
    """The documents of `n` sequences, as an array."""
    if clusters is None:
        return None
    try:
        names = np.asarray(clusters)
    except ValueError:
        raise UsageError(f"clusters must name one per sequence, got {clusters!r:.60}") from None
    if names.ndim != 1 or len(names) != n:
        size = len(names) if names.ndim else "a single one"
        raise UsageError(f"clusters must name one per sequence: {n} expected, got {size}")
    return names


def _mask(name: str, given: Any, tokens: Tensor) -> Bool[Tensor, "batch pos"]:
    wanted = f"{name} must be a boolean tensor of {tokens.shape[-1]} positions, one row or one a sequence"
    if not isinstance(given, Tensor) or given.is_floating_point():
        raise UsageError(f"{wanted}; got {given.dtype if isinstance(given, Tensor) else type(given).__name__}")
    check_data(f"entries of {name}", given)
    if given.shape not in (tokens.shape, tokens.shape[-1:], (1, tokens.shape[-1])):
        raise UsageError(f"{wanted}; got shape {list(given.shape)}")
    return (given != 0).to(tokens.device).expand_as(tokens)


def _full(mask: Tensor | None, tokens: Tensor) -> Bool[Tensor, "batch pos"]:
    return torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask


def _pick(part: Any, keep: slice | Tensor | np.ndarray) -> Any:
    """The rows `keep` of a tensor or an array; None stays None, and a place moves to where a slice begins."""
    if isinstance(part, Place):
        if isinstance(keep, slice) and (keep.start or 0) >= 0 and keep.step is None:
            return Place(part.first + (keep.start or 0), part.n)
        return None
    if isinstance(part, np.ndarray) and isinstance(keep, Tensor):
        keep = keep.cpu().numpy()
    return None if part is None else part[keep]
