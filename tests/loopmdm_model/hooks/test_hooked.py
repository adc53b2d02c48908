"""Values and gradients at every (loop, layer) are those of the unrolled copy; wrong names are refused."""

import warnings

import pytest
import torch

from loopmdm.model import sites
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.stopping.rules import StateDelta
from tests.conftest import toy_config, toy_model
from tests.loopmdm_model.network.test_model import unrolled_copy


def loss_of(logits):
    return logits[..., :22].log_softmax(-1)[..., 3].sum()


@pytest.fixture
def twins(model):
    """The looped model and its unrolled copy at S = 3, both hooked."""
    return HookedLoopMDM(model), HookedLoopMDM(unrolled_copy(model, 3))


def test_every_value_and_gradient_equals_the_unrolled_copys(twins, batch):
    looped, plain = twins
    arguments = {"incl_bwd": True, "loss_fn": loss_of, "names_filter": lambda name: True}
    with torch.enable_grad():
        _, ours = looped.run_with_cache(batch.tokens, n_loops=3, **arguments)
        _, theirs = plain.run_with_cache(batch.tokens, n_loops=1, **arguments)
    compared = 0
    for depth, (prefix, _) in enumerate(sites.applications(looped.cfg, 3)):
        for leaf in looped.cfg.leaves:
            for suffix in ("", "_grad"):
                ours_name, theirs_name = f"{prefix}{leaf}{suffix}", f"blocks.{depth}.{leaf}{suffix}"
                assert torch.equal(ours[ours_name], theirs[theirs_name]), ours_name
                compared += 1
    assert compared == 8 * 20 * 2


def test_iterations_have_different_gradients_and_parameters_keep_theirs(hooked, batch):
    with torch.enable_grad():
        hooked.model.embed.weight.grad = torch.ones_like(hooked.model.embed.weight)
        _, cache = hooked.run_with_cache(
            batch.tokens,
            n_loops=3,
            incl_bwd=True,
            loss_fn=loss_of,
            names_filter=lambda n: n.endswith("hook_out"),
        )
    first, last = cache["loop.0.hook_out_grad"], cache["loop.2.hook_out_grad"]
    assert not torch.allclose(first, last)
    assert (hooked.model.embed.weight.grad == 1).all()


def test_listening_changes_no_result(hooked, batch):
    silent = hooked(batch.tokens, n_loops=4, attn_path="eager")
    heard, cache = hooked.run_with_cache(
        batch.tokens, n_loops=4, names_filter=lambda n: "ln" not in n and "result" not in n
    )
    assert torch.equal(silent, heard)
    assert torch.equal(cache["hook_logits"], heard)


def test_a_hook_changes_one_loop_only(hooked, batch):
    def silence(pattern, hook):
        return torch.zeros_like(pattern)

    name = "loop.1.blocks.1.attn.hook_pattern"
    changed = hooked.run_with_hooks(batch.tokens, n_loops=3, fwd_hooks=[(name, silence)])
    assert not torch.allclose(changed[..., :22], hooked(batch.tokens, n_loops=3)[..., :22])
    one_path = {"n_loops": 3, "names_filter": lambda n: n.endswith("hook_out"), "attn_path": "eager"}
    with hooked.hooks([(name, silence)]):
        _, cache = hooked.run_with_cache(batch.tokens, **one_path)
    _, plain = hooked.run_with_cache(batch.tokens, **one_path)
    assert torch.equal(cache["loop.0.hook_out"], plain["loop.0.hook_out"])
    assert not torch.equal(cache["loop.1.hook_out"], plain["loop.1.hook_out"])
    assert not any(point._forward_hooks for point in hooked.hook_dict.values())


def test_rules_reach_loops_born_later_and_end_with_their_context(hooked, batch):
    seen = []
    with hooked.hooks([(lambda name: name.endswith("hook_out"), lambda x, hook: seen.append(hook.name))]):
        hooked(batch.tokens, n_loops=9)
    assert seen == [f"loop.{loop}.hook_out" for loop in range(9)]
    hooked(batch.tokens, n_loops=12)
    assert len(seen) == 9


def test_permanent_hooks_stay_until_told_otherwise(hooked, batch):
    seen = []
    hooked.add_hook(lambda name: name == "hook_embed", lambda x, hook: seen.append(1), is_permanent=True)
    hooked.reset_hooks()
    hooked(batch.tokens, n_loops=1)
    hooked.reset_hooks(including_permanent=True)
    hooked(batch.tokens, n_loops=1)
    assert seen == [1]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("loop.1.blocks.1.attn.hook_patern", "loop.1.blocks.1.attn.hook_pattern"),
        ("blocks.1.attn.hook_pattern", "loop.0.blocks.1.attn.hook_pattern"),
        ("hook_logit", "hook_logits"),
        ("loop.7.blocks.3.hook_resid_pre", "loop.7.blocks.1.hook_resid_pre"),
    ],
)
def test_unknown_names_offer_near_ones_and_add_nothing(hooked, batch, name, near):
    for call in (
        lambda: hooked.run_with_cache(batch.tokens, names_filter=name),
        lambda: hooked.run_with_hooks(batch.tokens, fwd_hooks=[("hook_embed", print), (name, print)]),
        lambda: hooked.add_hook(name, print),
    ):
        with pytest.raises(KeyError, match=near.replace(".", r"\.")):
            call()
    assert not any(point._forward_hooks for point in hooked.hook_dict.values())


def test_a_filter_that_matches_nothing_is_an_error(hooked, batch):
    with pytest.raises(KeyError, match=r"attn\.hook_pattern"):
        hooked.run_with_cache(batch.tokens, names_filter=lambda name: "hook_patern" in name)


def test_hooks_that_never_fired_are_named(hooked, batch):
    with pytest.warns(UserWarning, match=r"never fired: loop\.5\.hook_out \(2 loops ran\)"):
        hooked.run_with_hooks(batch.tokens, n_loops=2, fwd_hooks=[("loop.5.hook_out", lambda x, hook: None)])
    with pytest.warns(UserWarning, match=r"loop\.4\.hook_in"):
        hooked.run_with_cache(batch.tokens, n_loops=2, names_filter=["loop.4.hook_in", "loop.0.hook_in"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hooked.run_with_hooks(batch.tokens, n_loops=2, fwd_hooks=[("loop.1.hook_out", lambda x, hook: None)])


def test_an_absurd_loop_is_a_slip_and_gradients_need_gradients(hooked, batch):
    with pytest.raises(UsageError, match="beyond 512"):
        hooked.run_with_hooks(batch.tokens, fwd_hooks=[("loop.3000.hook_in", lambda x, hook: None)])
    assert hooked.n_grown < 10
    with pytest.raises(UsageError, match="enable_grad"):
        hooked.run_with_cache(batch.tokens, incl_bwd=True, loss_fn=loss_of)


def test_padding_is_seen_in_token_tensors_too():
    m = HookedLoopMDM.from_pretrained("sotu-loop")
    texts = ["Hi there", "The state of our union is strong"]
    tokens = m.to_tokens(texts)
    torch.testing.assert_close(m(tokens), m(texts))
    short = m.to_tokens(texts[0])
    torch.testing.assert_close(m(tokens)[:1, : short.shape[1]], m(short), atol=2e-5, rtol=1e-4)
    b = m.mask(tokens, ratio=1.0)
    assert int(b.masked[0].sum()) == short.shape[1] and b.mask_ratio == 1.0


def test_a_wrong_shape_is_refused_not_broadcast(hooked, batch):
    with pytest.raises(UsageError, match="returned shape"):
        hooked.run_with_hooks(batch.tokens, fwd_hooks=[("hook_embed", lambda x, hook: x[:, :1])])


def test_patterns_do_not_exist_on_the_fused_path(hooked, batch):
    with pytest.raises(UsageError, match="attn_path"):
        hooked.run_with_cache(batch.tokens, names_filter=lambda n: n.endswith("pattern"), attn_path="sdpa")
    _, cache = hooked.run_with_cache(batch.tokens, attn_path="sdpa")
    assert not [name for name in cache if name.endswith("pattern")]
    with pytest.raises(UsageError, match="attn_path"):
        hooked(batch.tokens, attn_path="flash")


@pytest.mark.parametrize("gated", [False, True])
def test_size_estimate_is_exact(batch, gated):
    m = HookedLoopMDM(toy_config(gated_mlp=gated, norm_bias=False))
    for names_filter in (None, lambda n: True, "loop.1.hook_out"):
        _, cache = m.run_with_cache(batch.tokens, n_loops=3, names_filter=names_filter)
        assert cache.n_bytes == m.estimate_cache(4, 10, 3, names_filter)


def test_what_is_kept_can_change_dtype_slice_and_batch_axis(hooked, batch):
    _, full = hooked.run_with_cache(batch.tokens[:1], n_loops=2)
    _, cache = hooked.run_with_cache(
        batch.tokens[:1], n_loops=2, dtype=torch.float16, pos_slice=3, remove_batch_dim=True
    )
    for name, value in cache.items():
        axis = sites.position_axis(name)
        expected = full[name].select(axis, 3)[0].half() if value.ndim < full[name].ndim - 1 else None
        assert value.dtype == torch.float16
        assert expected is None or torch.equal(value, expected), name
    with pytest.raises(UsageError, match="one sequence"):
        hooked.run_with_cache(batch.tokens, remove_batch_dim=True)


def test_adaptive_runs_are_cached_whole(hooked, batch):
    full = hooked.run(batch.tokens, stop=StateDelta(0.0, max_loops=8))
    threshold = float(full.criterion[3].median()) + 1e-5
    rule = StateDelta(threshold, max_loops=8)
    _, cache = hooked.run_with_cache(batch.tokens, stop=rule)
    assert cache.n_loops == int(cache.loops_used.max()) and len(set(cache.loops_used.tolist())) > 1
    stacked = cache.stack("pattern", layer=2)
    for loop, row in [(i, r) for i in range(cache.n_loops) for r in range(4)]:
        assert stacked[loop, row].isnan().all() == (loop >= cache.loops_used[row])
    with pytest.raises(UsageError, match="stopped at different loops"):
        cache.unrolled()


def test_model_without_loop_layers_works_and_ignores_n_loops(batch):
    m = HookedLoopMDM(toy_model(n_loop_layers=0))
    _, cache = m.run_with_cache(batch.tokens, n_loops=3)
    assert torch.equal(cache["loop.0.hook_in"], cache["loop.2.hook_out"])
    assert "blocks.1.attn.hook_pattern" in cache


def test_text_goes_in_and_out():
    m = HookedLoopMDM.from_pretrained("sudoku-loop")
    tokens = m.to_tokens("123456")
    assert tokens.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert m.to_str_tokens(tokens) == list("123456")
    b = m.mask("123456", ratio=0.5, seed=3)
    assert int(b.masked.sum()) == 3 and torch.equal(b.clean, tokens)
    assert m("123456", n_loops=2).shape == (1, 6, 7)
    for wrong in ([], [1, 2]):
        with pytest.raises(UsageError, match="list of texts"):
            m.to_tokens(wrong)
    with pytest.raises(UsageError, match="one length"):
        m.to_tokens(["12", "123"])
    with pytest.raises(UsageError, match="no tokenizer"):
        HookedLoopMDM(toy_config()).to_tokens("a")
    assert "1 + 1 x S + 1 layers, S_max = 6" in repr(m)
