import pytest
import torch

from loopmdm.model.errors import UsageError


@pytest.fixture
def cache(hooked, batch):
    return hooked.run_with_cache(batch.tokens, n_loops=4, names_filter=lambda name: True)[1]


def test_keys_lead_to_the_same_tensor(cache):
    expected = cache["loop.3.blocks.2.attn.hook_pattern"]
    for key in (("pattern", "loop", 3, 2), ("pattern", "loop", -1, 2), ("attn.hook_pattern", "loop", -1, -2)):
        assert cache[key] is expected
    assert cache["pattern", 0] is cache["blocks.0.attn.hook_pattern"]
    assert cache["pattern", -1] is cache["blocks.3.attn.hook_pattern"]
    assert cache["out", "loop", 1] is cache["loop.1.hook_out"]
    assert cache["scale", "loop", 0, 1, "ln2"] is cache["loop.0.blocks.1.ln2.hook_scale"]
    assert cache["embed"] is cache["hook_embed"]
    assert cache["hook_out", "loop", 1] is cache["loop.1.hook_out"]
    assert ("scale", 0) not in cache and ("pattern", "loop", 9, 1) not in cache


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (("patern", "loop", 0, 1), "pattern"),
        (("pattern", "loop", 4, 1), "there are 4"),
        (("pattern", "loop"), "give the iteration"),
        (("pattern", 1), "looped"),
        (("pattern", 9), "there are 4"),
        (("scale", 0), "ln1 and ln2"),
        (3, "no key"),
        ((), "no key"),
        ("loop.9.hook_out", "only 4 loops ran"),
        ("nothing", "unknown hook"),
    ],
)
def test_wrong_keys_say_why(cache, key, says):
    with pytest.raises((KeyError, UsageError), match=says):
        cache[key]


def test_left_out_activations_are_told_apart_from_unknown_ones(hooked, batch):
    _, cache = hooked.run_with_cache(batch.tokens, n_loops=2, names_filter="hook_embed")
    with pytest.raises(KeyError, match="names_filter left it out"):
        cache["pattern", "loop", 0, 1]


def test_stack_is_the_entries_in_order(cache):
    stacked = cache.stack("pattern", layer=1)
    assert stacked.shape == (4, 4, 2, 10, 10)
    for loop in range(4):
        assert torch.equal(stacked[loop], cache["pattern", "loop", loop, 1])
    assert torch.equal(cache.stack("out")[:-1], cache.stack("in")[1:])
    with pytest.raises(UsageError, match="not looped"):
        cache.stack("pattern", layer=0)


def test_rows_of_all_patterns_sum_to_one(cache):
    patterns = [value for name, value in cache.items() if name.endswith("hook_pattern")]
    assert len(patterns) == 2 + 4 * 2
    for pattern in patterns:
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))


def test_unrolled_decompositions_close(hooked, model, batch):
    model.ln_final.weight.uniform_(0.5, 2.0)  # a norm whose weight and bias matter
    model.ln_final.bias.normal_()
    cache = hooked.run_with_cache(batch.tokens, n_loops=4, names_filter=lambda name: True)[1]
    unrolled = cache.unrolled()
    final = cache["resid_post", -1]
    assert unrolled.model.cfg.n_layers == 10
    parts = unrolled.decompose_resid()
    torch.testing.assert_close(parts.sum(0), final, atol=1e-4, rtol=1e-4)
    heads = unrolled.get_full_resid_decomposition(expand_neurons=False)
    torch.testing.assert_close(heads.sum(0), final, atol=1e-4, rtol=1e-4)
    accumulated = unrolled.accumulated_resid()
    torch.testing.assert_close(accumulated[3], cache["loop.1.blocks.1.hook_resid_pre"])
    results = unrolled.stack_head_results(layer=3)
    by_layer = results.view(3, 2, *results.shape[1:]).sum(1)
    torch.testing.assert_close(by_layer[2], cache["attn_out", "loop", 0, 2], atol=1e-5, rtol=1e-4)
    total = unrolled.logit_attrs(
        parts, tokens=torch.full((4, 10), 3), incorrect_tokens=torch.full((4, 10), 5)
    ).sum(0)
    apart = cache["hook_logits"][..., 3] - cache["hook_logits"][..., 5]
    constant = unrolled.model.b_U[3] - unrolled.model.b_U[5]
    torch.testing.assert_close(total + constant, apart, atol=1e-4, rtol=1e-4)
