"""Attention in tiles is torch's fused attention, and the tiles are the rows of its pattern."""

import pytest
import torch
import torch.nn.functional as F

from loopmdm.model import tiles
from loopmdm.model.precision import wide
from loopmdm.model.tiles import Asked, attend, tiles_of

N = 7
CLOSE = {"rtol": 0.0, "atol": 1e-6}  # float32 sums of seven numbers of order 1


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(n=N, dtype=torch.float32):
    return (draw(2, 3, n, 8, seed=seed).to(dtype) for seed in range(3))


EDGES = draw(2, 1, N, N, seed=4) < 0.5
EDGES[0, 0, 2] = False  # a query without any key
MASKS = {
    "plain": {},
    "causal": {"is_causal": True},
    "edges": {"attn_mask": EDGES},
    "edges by head": {"attn_mask": draw(2, 3, N, N, seed=5) < 0.8},
    "edges alike": {"attn_mask": EDGES[1, 0]},
    "keys": {"attn_mask": EDGES[:, :, 1:2]},
    "bias": {"attn_mask": draw(2, 3, N, N, seed=6)},
    "bias of heads": {"attn_mask": draw(1, 3, 1, N, seed=7)},
    "minus infinity": {"attn_mask": torch.zeros(2, 1, N, N).masked_fill(~EDGES, float("-inf"))},
    "scale": {"scale": 1.5, "attn_mask": EDGES[:, :, 1:2]},
}


@pytest.fixture(params=[1, 2 * N, 3 * N + 1, 5 * N * N, None], ids=lambda size: f"size {size}")
def size(request, monkeypatch):
    """Tiles of one row, of two, of three that do not add up, of five heads, and one for all."""
    if request.param is not None:
        monkeypatch.setattr(tiles, "IN_CACHE", request.param)


def pattern_of(asked: Asked, shown=None):
    """The tiles of an attention put together, and z."""
    whole = torch.full((6, asked.query.shape[2], asked.key.shape[2]), torch.nan, dtype=wide(asked.query).dtype)

    def see(tile):
        assert whole[tile.pairs, tile.rows].isnan().all()  # each row comes once
        whole[tile.pairs, tile.rows] = tile.pattern
        tile.pattern.fill_(torch.nan)  # a tile is whoever sees it may write into

    z = attend(asked, see)
    return whole.unflatten(0, (2, 3)), z


@pytest.mark.parametrize("mask", MASKS)
def test_it_gives_what_torch_gives(mask, size):
    q, k, v = inputs()
    pattern, z = pattern_of(Asked(q, k, v, **MASKS[mask]))
    torch.testing.assert_close(z, F.scaled_dot_product_attention(q, k, v, **MASKS[mask]), **CLOSE)
    torch.testing.assert_close(pattern @ v, z, **CLOSE)
    sums = pattern.sum(-1)
    blind = (sums == 0).nonzero()[:, [0, 2]].unique(dim=0).tolist()
    assert blind == ([[0, 2]] if mask in ("edges", "minus infinity") else [])
    torch.testing.assert_close(sums[sums > 0], torch.ones_like(sums[sums > 0]), **CLOSE)


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.half, 1e-6)]
)
def test_patterns_are_in_float32_or_wider_whatever_the_model_is_in(dtype, near):
    q, k, v = inputs(dtype=dtype)
    pattern, z = pattern_of(Asked(q, k, v))
    exact = (q.double() @ k.double().mT * 8**-0.5).softmax(-1)
    assert pattern.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and z.dtype == dtype
    torch.testing.assert_close(pattern.double(), exact, rtol=0, atol=near)
    torch.testing.assert_close(z.double(), exact @ v.double(), rtol=torch.finfo(dtype).eps, atol=near)


def test_tiles_of_a_pattern_are_copies(size):
    pattern = draw(2, 3, N, N).softmax(-1)
    before, found = pattern.clone(), torch.zeros(6, N, N)
    for tile in tiles_of(pattern):
        found[tile.pairs, tile.rows] += tile.pattern
        tile.pattern.zero_()
    assert torch.equal(pattern, before) and torch.equal(found, pattern.flatten(0, 1))
    half = list(tiles_of(pattern.half()))
    assert {tile.pattern.dtype for tile in half} == {torch.float32}


@pytest.mark.parametrize(("pairs", "length"), [(6, 5), (6, 300), (1, 1024), (96, 64), (12, 2000)])
def test_no_tile_is_larger_than_its_room_unless_a_row_is(pairs, length, monkeypatch):
    monkeypatch.setattr(tiles, "IN_CACHE", 1500)
    seen = list(tiles.cuts(pairs, length, length, torch.device("cpu")))
    count = torch.zeros(pairs, length)
    for pair, row in seen:
        count[pair, row] += 1
        area = (pair.stop - pair.start) * (row.stop - row.start) * length
        assert area <= max(1500 * torch.get_num_threads(), length)
    assert bool((count == 1).all())


def test_what_is_not_finite_stays_so():
    q, k, v = inputs()
    q[0, 1, 3, 2] = torch.nan
    k[1, 0, 2, 0] = torch.inf
    pattern, _ = pattern_of(Asked(q, k, v))
    lost = pattern.isnan().any(-1)
    assert torch.equal(lost, pattern.isnan().all(-1))  # a row as a whole, or not at all
    assert bool(lost[0, 1, 3]) and int(lost[0].sum()) == 1 and bool(lost[1, 0].any())
