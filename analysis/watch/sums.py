"""What is summed over a pattern while its rows pass by, so that the pattern itself is not needed.

For queries q, keys k and groups Q of queries, with A [query, key] and w(q, Q) = 1 / |Q| for queries in Q,

    own(q) = A(q, q),      others(Q, k) = sum over q != k of w(q, Q) A(q, k)
    entropy(q) = -sum_k A ln A,      distance(q) = sum_k A |q - k|
    content(q, K) = || sum over k in K, k != q, of A(q, k) (v_k - mean_K v) W_O ||

The first two are always kept, the others where somebody asks. A query's own key is taken out of the row before
anything is added up: what is left beside an own mass near 1 is not a difference of two large numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.model.information import entropy
from loopmdm.model.precision import wide, width
from loopmdm.model.tiles import Tile


@dataclass(frozen=True)
class Moved:
    """Content that somebody asks for: between which groups of keys, through which output.

    `keys` [batch, head or 1, key, group]; `gram` [head, d_head, d_head] is W_O W_O^T, so that ||z W_O||^2 is
    z gram z^T.
    """

    keys: Float[Tensor, "batch one key group"]
    gram: Float[Tensor, "head d_head d_head"]


@dataclass(frozen=True)
class Asks:
    """What is asked of one layer application beside own and received masses."""

    shape: bool = False
    moved: Moved | None = None


class PatternSums:
    """Sums over the tiles of one layer application; `weights` [batch, query, 2] are w(q, Q).

    `own`, `row_entropy`, `distance` [batch, head, query], `others` [batch, head, 2, key]; `contents`, one for each
    of `asks` (None where it asks for none), [batch, head, query, group]. In float32 or wider.
    """

    def __init__(
        self,
        weights: Float[Tensor, "batch query 2"],
        n_heads: int,
        asks: Sequence[Asks],
        value: Float[Tensor, "batch head key d_head"] | None,
        dtype: torch.dtype,
    ):
        self.n_heads, self.asks, dtype = n_heads, asks, width(dtype)
        batch, length = weights.shape[:2]
        self._weights = weights.to(dtype).transpose(1, 2).repeat_interleave(n_heads, dim=0)
        self._value = None if value is None else wide(value).flatten(0, 1)
        per_query = lambda: weights.new_zeros(batch * n_heads, length, dtype=dtype)  # noqa: E731
        self._own, self._others = per_query(), torch.zeros_like(self._weights)
        self._shape = (per_query(), per_query()) if any(ask.shape for ask in asks) else None
        self._contents = [self._room(ask.moved, per_query()) for ask in asks]

    @staticmethod
    def _room(moved: Moved | None, per_query: Tensor) -> Tensor | None:
        return None if moved is None else per_query[..., None].repeat(1, 1, moved.keys.shape[-1])

    def see(self, tile: Tile) -> None:
        """Take in a tile, and write into it."""
        pattern, pairs, rows = tile.pattern, tile.pairs, tile.rows
        if self._shape is not None:
            self._shape[0][pairs, rows] = entropy(pattern.log(), pattern)
            self._shape[1][pairs, rows] = _distance(pattern, rows.start)
        itself = pattern.diagonal(rows.start, 1, 2)
        self._own[pairs, rows] = itself
        itself.zero_()
        self._others[pairs].baddbmm_(self._weights[pairs, :, rows], pattern)
        for ask, found in zip(self.asks, self._contents, strict=True):
            if found is not None and ask.moved is not None:
                found[pairs, rows] = self._content(tile, ask.moved)

    def _content(self, tile: Tile, moved: Moved) -> Float[Tensor, "pair row group"]:
        """Norm of what each group of others moves to each query, their mean value taken off."""
        assert self._value is not None
        pair = torch.arange(tile.pairs.start, tile.pairs.stop, device=tile.pattern.device)
        sequence, head = pair // self.n_heads, pair % self.n_heads
        keys = moved.keys[sequence, head if moved.keys.shape[1] > 1 else 0].to(self._value.dtype)
        gram, norms = moved.gram[head].to(keys.dtype), []
        masses = tile.pattern @ keys
        for group, mass in zip(keys.split(1, dim=-1), masses.split(1, dim=-1), strict=True):
            value = self._value[tile.pairs] * group
            rest = group.sum(1, keepdim=True) - group[:, tile.rows]
            centre = (value.sum(1, keepdim=True) - value[:, tile.rows]) / rest.clamp(min=1)
            moving = torch.baddbmm(mass * centre, tile.pattern, value, beta=-1)
            norms.append(((moving @ gram) * moving).sum(-1).clamp(min=0).sqrt())
        return torch.stack(norms, dim=-1)

    # --- by head ---

    @property
    def own(self) -> Float[Tensor, "batch head query"]:
        """Attention of each position to itself."""
        return self._by_head(self._own)

    @property
    def others(self) -> Float[Tensor, "batch head 2 key"]:
        """Mean attention that each key gets from the other queries of each group."""
        return self._by_head(self._others)

    @property
    def received(self) -> Float[Tensor, "batch head 2 key"]:
        """Mean attention that each key gets from the queries of each group, itself among them."""
        return self._by_head(self._others + self._weights * self._own[:, None])

    @property
    def row_entropy(self) -> Float[Tensor, "batch head query"]:
        """Entropy of each row, in nats."""
        assert self._shape is not None
        return self._by_head(self._shape[0])

    @property
    def distance(self) -> Float[Tensor, "batch head query"]:
        """Mean distance of what each query attends to, in positions."""
        assert self._shape is not None
        return self._by_head(self._shape[1])

    @property
    def contents(self) -> list[Float[Tensor, "batch head query group"] | None]:
        """Norms of what moves, by who asks."""
        return [None if found is None else self._by_head(found) for found in self._contents]

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.n_heads))


def _distance(pattern: Float[Tensor, "pair row key"], first: int) -> Float[Tensor, "pair row"]:
    """Mean |q - k| of rows `first`, `first` + 1, ..: what is left of them, right of them, and among them."""
    n_rows, n_keys = pattern.shape[1:]
    key = torch.arange(n_keys, device=pattern.device, dtype=pattern.dtype)
    last = first + n_rows
    apart = (key[first:last, None] - key[first:last]).abs()
    total = (pattern[..., first:last] * apart).sum(-1)
    for side, sign in ((slice(0, first), 1), (slice(last, n_keys), -1)):
        if side.start < side.stop:
            sums = pattern[..., side] @ torch.stack([torch.ones_like(key[side]), key[side]], dim=-1)
            total += sign * (key[first:last] * sums[..., 0] - sums[..., 1])
    return total
