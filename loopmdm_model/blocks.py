"""Logits at many positions, block by block: with a large vocabulary they are the largest tensors there are.

A read-out of R positions has R x V logits; what is made of them, a loss or an entropy, is one number a position.
`RowLogits` makes them a block at a time, from states that are R x d, so that memory hangs on neither R nor the
number of read-outs that are compared. What fits into one block is made once and kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.model.precision import check_logits, wide

T = TypeVar("T")
BLOCK = 2**25
"""Logits that are made at a time: 128 MiB in float32."""


@dataclass(frozen=True)
class RowLogits:
    """Logits at the positions `rows` [batch, pos] of a read-out, in reading order: `whole`, or by `unembed`."""

    rows: Bool[Tensor, "batch pos"]
    d_vocab: int
    whole: Float[Tensor, "row d_vocab"] | None
    unembed: Callable[[Bool[Tensor, "batch pos"]], Tensor] | None = None

    @classmethod
    def of(cls, unembed: Callable[[Tensor], Tensor], rows: Tensor, d_vocab: int) -> "RowLogits":
        """From what unembeds chosen positions; made at once if one block holds them."""
        if int(rows.sum()) * d_vocab <= BLOCK:
            return cls(rows, d_vocab, unembed(rows))
        return cls(rows, d_vocab, None, unembed)

    def __len__(self) -> int:
        """Positions."""
        return int(self.rows.sum()) if self.whole is None else len(self.whole)

    @property
    def spans(self) -> list[slice]:
        """The blocks, as slices of the rows; one if there are none."""
        size = len(self) if self.whole is not None else max(1, BLOCK // self.d_vocab)
        return [slice(start, start + size) for start in range(0, len(self), max(1, size))] or [slice(0, 0)]

    def __getitem__(self, span: slice) -> Float[Tensor, "row d_vocab"]:
        """One block."""
        if self.whole is not None:
            return self.whole if span.stop >= len(self.whole) and not span.start else self.whole[span]
        assert self.unembed is not None
        chosen = torch.zeros_like(self.rows)
        row, position = self.rows.nonzero()[span].T
        chosen[row, position] = True
        return self.unembed(chosen)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits) of each block; NotFiniteError if logits say nothing."""
        for span in self.spans:
            logits = self[span]
            check_logits(logits)
            yield span, logits

    def each(self, make: Callable[[slice, Tensor], Float[Tensor, " row"]]) -> Float[Tensor, " row"]:
        """A number a position, made block by block."""
        parts = [make(span, logits) for span, logits in self]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of a read-out, float32 or wider, block by block of its rows.

    Those that fit into one block are `kept` in place of their logits, others are made whenever they are looked at.
    """

    logits: RowLogits
    kept: Float[Tensor, "row d_vocab"] | None = None

    @classmethod
    def of(cls, logits: RowLogits) -> "LogProbs":
        """NotFiniteError if the logits say nothing."""
        if logits.whole is None:
            return cls(logits)
        return cls.held(logits, _log_probs(logits.whole) if len(logits) else logits.whole)

    @classmethod
    def held(cls, logits: RowLogits, kept: Float[Tensor, "row d_vocab"]) -> "LogProbs":
        """Of one block, whose log-probabilities were made elsewhere; the logits themselves may go."""
        return cls(replace(logits, whole=kept), kept)

    @property
    def spans(self) -> list[slice]:
        """The blocks, as slices of the rows."""
        return self.logits.spans

    def __getitem__(self, span: slice) -> Float[Tensor, "row d_vocab"]:
        """One block."""
        return _log_probs(self.logits[span]) if self.kept is None else self.kept[span]

    def all(self) -> Float[Tensor, "row d_vocab"]:
        """All of them at once."""
        return torch.cat([self[span] for span in self.spans]) if self.kept is None else self.kept


def _log_probs(logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, "row d_vocab"]:
    check_logits(logits)
    return wide(logits).log_softmax(-1)
