"""Attention a tile at a time: whole rows of the pattern pass by, and the whole pattern never stands anywhere.

    pattern = softmax(scale q k^T + mask),   z = pattern v

A tile is some queries of some heads against all keys, small enough to stay in a core's cache. So whatever is a sum
over a pattern is taken while its rows are at hand, and what costs on the explicit path, writing and reading a
tensor of length^2, is never done. (Fused kernels save the same traffic, but show no row: Dao et al., 2022,
"FlashAttention", arXiv 2205.14135.) Rows are whole, so a plain softmax does: no sum is corrected later, masks may
be of any kind, and the smallest masses are as exact as on the explicit path. All is computed in float32 or wider.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.model.precision import wide

IN_CACHE = 2**18
"""Numbers in a tile, for each thread: 1 MiB of float32, about what stays near one core."""
ON_DEVICE = 2**24
"""Numbers in a tile elsewhere: 64 MiB, enough work for one kernel, little beside a model."""


@dataclass
class Asked:
    """The arguments of `scaled_dot_product_attention`, by its own names and in its order.

    `query`, `key`, `value` [batch, head, pos, d_head]; a boolean mask is True where a query may attend.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def factor(self) -> float:
        """What scores are scaled by."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class Tile:
    """Rows of a pattern: `pattern` [pair, row, key], which lasts until the next tile and may be written into.

    `pairs` are places in the heads of all sequences in turn (sequence x n_heads + head), `rows` queries.
    """

    pairs: slice
    rows: slice
    pattern: Float[Tensor, "pair row key"]


See = Callable[[Tile], None]
Attend = Callable[[Asked], Tensor]
"""Computes z [batch, head, query, d_head] in its own way."""


def cuts(n_pairs: int, n_rows: int, n_keys: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Pairs and rows of each tile: as many rows as fit, then as many pairs."""
    size = IN_CACHE * torch.get_num_threads() if device.type == "cpu" else ON_DEVICE
    height = min(n_rows, max(1, size // n_keys))
    many = min(n_pairs, max(1, size // (height * n_keys)))
    for pair in range(0, n_pairs, many):
        for row in range(0, n_rows, height):
            yield slice(pair, min(pair + many, n_pairs)), slice(row, min(row + height, n_rows))


def attend(asked: Asked, see: See) -> Float[Tensor, "batch head query d_head"]:
    """Softmax attention as asked, without gradients; `see` is shown each tile after its z was made.

    Queries without any key have rows of 0, as in the fused kernels.
    """
    q, k, v = (wide(x).flatten(0, 1) for x in (asked.query, asked.key, asked.value))
    (n_pairs, n_rows), n_keys = q.shape[:2], k.shape[1]
    q, k, z = q * asked.factor, k.transpose(1, 2), q.new_empty(n_pairs, n_rows, v.shape[-1])
    spare: list[Tensor] = []
    for pairs, rows in cuts(n_pairs, n_rows, n_keys, q.device):
        shape = pairs.stop - pairs.start, rows.stop - rows.start, n_keys
        if not spare:  # the first tile is the largest: the others live where it did
            spare = [q.new_empty(torch.Size(shape).numel()) for _ in range(2)]
        scores, pattern = (room[: torch.Size(shape).numel()].view(shape) for room in spare)
        torch.bmm(q[pairs, rows], k[pairs], out=scores)
        blind = _mask(scores, asked, pairs, rows)
        torch.softmax(scores, -1, out=pattern)
        if blind is not None:
            pattern.masked_fill_(blind, 0.0)
        torch.bmm(pattern, v[pairs], out=z[pairs, rows])
        see(Tile(pairs, rows, pattern))
    return z.view(*asked.query.shape[:-1], -1).to(asked.value.dtype)


def tiles_of(pattern: Float[Tensor, "batch head query key"]) -> Iterator[Tile]:
    """The tiles of a pattern that stands somewhere, each a copy in float32 or wider."""
    flat = pattern.flatten(0, 1)
    n_pairs, n_rows, n_keys = flat.shape
    for pairs, rows in cuts(n_pairs, n_rows, n_keys, flat.device):
        part = flat[pairs, rows]
        yield Tile(pairs, rows, part.clone() if wide(part) is part else wide(part))


def _mask(scores: Tensor, asked: Asked, pairs: slice, rows: slice) -> Tensor | None:
    """Write into scores [pair, row, key] what the masks say; [pair, row, 1] of queries that see nothing."""
    if asked.is_causal:
        query, key = (torch.arange(n, device=scores.device) for n in (rows.stop, scores.shape[-1]))
        scores.masked_fill_(key > query[rows.start :, None], float("-inf"))
    if asked.attn_mask is None:
        return None
    mask = _part(asked.attn_mask, asked.query.shape[1], pairs, rows)
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, float("-inf"))
    else:
        scores += mask
    return scores.amax(-1, keepdim=True) == float("-inf")


def _part(mask: Tensor, n_heads: int, pairs: slice, rows: slice) -> Tensor:
    """A tile's part of a mask that broadcasts to [batch, head, query, key]."""
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    place = torch.arange(pairs.start, pairs.stop, device=mask.device)
    sequence = torch.zeros_like(place) if mask.shape[0] == 1 else place // n_heads
    head = torch.zeros_like(place) if mask.shape[1] == 1 else place % n_heads
    return mask[sequence, head]
