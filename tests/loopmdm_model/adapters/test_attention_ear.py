"""The explicit attention is torch's fused one, however that is asked."""

import pytest
import torch
import torch.nn.functional as F

from loopmdm.model.adapters.attention import LEAVES, AttentionEar

N = 6
CLOSE = {"rtol": 0.0, "atol": 1e-6}


def inputs(kv_heads=4, queries=N):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, queries, 8, generator=generator)
    return q, *(torch.randn(2, kv_heads, N, 8, generator=generator) for _ in range(2))


def ear(explicit=True, offer=lambda leaf, x: x, listening=True):
    return AttentionEar(offer, 4, explicit, lambda: listening)


MASK = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(1)) < 0.7
MASK[0, 0, 2] = False  # a query without any key
ASKED = {
    "plain": {},
    "causal": {"is_causal": True},
    "edges": {"attn_mask": MASK},
    "bias": {"attn_mask": torch.randn(2, 4, N, N, generator=torch.Generator().manual_seed(2))},
    "minus infinity": {"attn_mask": torch.zeros(2, 1, N, N).masked_fill(~MASK, float("-inf"))},
    "scale": {"scale": 0.5},
    "scale and keys": {"scale": 1.5, "attn_mask": MASK[:, :, 1:2]},
}


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("asked", ASKED)
def test_it_gives_what_torch_gives(asked, explicit):
    q, k, v = inputs()
    wanted = F.scaled_dot_product_attention(q, k, v, **ASKED[asked])
    with ear(explicit) as listener:
        by_place = F.scaled_dot_product_attention(q, k, v, **ASKED[asked])
        by_word = F.scaled_dot_product_attention(query=q, key=k, value=v, **ASKED[asked])
    torch.testing.assert_close(by_place, wanted, **CLOSE)
    assert torch.equal(by_place, by_word) and listener.heard == 2
    assert by_place.transpose(1, 2).is_contiguous()  # callers view it


@pytest.mark.parametrize("repeated", [True, False])
def test_key_heads_that_queries_share(repeated):
    q, k, v = inputs(kv_heads=2)
    wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    offered = {}
    with ear(offer=lambda leaf, x: offered.setdefault(leaf, x)):
        if repeated:
            k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        found = F.scaled_dot_product_attention(q, k, v, enable_gqa=not repeated)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert offered["attn.hook_rot_k"].shape == (2, N, 4, 8) and offered["attn.hook_pattern"].shape == (2, 4, N, N)


def test_one_query_of_grouped_heads_folded_into_rows():
    q, k, v = (x[:, :, :1] for x in inputs(kv_heads=2))
    folded = q.reshape(2, 2, 2, 8)
    wanted = F.scaled_dot_product_attention(folded, k, v)
    with ear():
        torch.testing.assert_close(F.scaled_dot_product_attention(folded, k, v), wanted, **CLOSE)


def test_everything_is_offered_in_order_and_can_be_edited():
    q, k, v = inputs()
    plain = F.scaled_dot_product_attention(q, k, v)
    offered = []
    with ear(offer=lambda leaf, x: offered.append(leaf) or x):
        F.scaled_dot_product_attention(q, k, v)
    assert offered == list(LEAVES)
    factor = torch.linspace(0.5, 1.5, 48).reshape(1, N, 1, 8)
    for leaf in LEAVES:
        edited = (
            factor if leaf not in ("attn.hook_attn_scores", "attn.hook_pattern") else torch.linspace(0.5, 1.5, N)
        )
        with ear(offer=lambda name, x, leaf=leaf, edited=edited: x * edited if name == leaf else x):
            assert not torch.allclose(F.scaled_dot_product_attention(q, k, v), plain)


def test_who_does_not_listen_hears_nothing():
    q, k, v = inputs()
    with ear(listening=False) as listener:
        found = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v)) and not listener.heard
