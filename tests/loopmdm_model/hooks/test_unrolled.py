"""The unrolled model is the looped one, bit for bit; TransformerLens' arithmetic and patching are right on it."""

import pytest
import torch
from transformer_lens import ActivationCache, head_detector, patching
from transformer_lens.tools.analysis import direct_logit_attribution, logit_lens
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

from loopmdm.model import sites
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.sites import applications
from tests.conftest import toy_model

S = 3
SHAPES = {
    "LN": {},
    "LN, no bias": {"norm_bias": False},
    "RMS": {"normalization_type": "RMS"},
    "LN, biases, gated": {"attn_bias": True, "gated_mlp": True, "act_fn": "silu"},
    "RMS, biases, gated": {"normalization_type": "RMS", "attn_bias": True, "gated_mlp": True},
    "no biases": {"mlp_bias": False, "unembed_bias": False, "norm_bias": False},
    "no loop": {"n_loop_layers": 0},
    "nothing but the loop": {"n_prelude_layers": 0, "n_coda_layers": 0},
    "mask to mask forbidden in the loop": {"forbid_mask_to_mask": ("loop",)},
}


def uneven(model):
    """The model with norms and biases that matter."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "ln" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 2.0, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(generator=generator)
    return model


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def m(request):
    return HookedLoopMDM(uneven(toy_model(**request.param)))


@pytest.fixture
def plain_m():
    return HookedLoopMDM(uneven(toy_model()))


@pytest.fixture
def corrupted():
    clean = torch.randint(0, 22, (2, 10), generator=torch.Generator().manual_seed(2))
    return mask_tokens(clean, 22, mask_ratio=0.5, seed=3).tokens


def everything(name):
    return True


def test_values_are_those_of_the_looped_model_bit_for_bit(m, batch):
    u = m.unrolled(S)
    assert torch.equal(u(batch.tokens), m(batch.tokens, n_loops=S)[..., :-1])
    logits, ours = u.run_with_cache(batch.tokens, names_filter=everything)
    theirs_logits, theirs = m.run_with_cache(batch.tokens, n_loops=S, names_filter=everything)
    assert torch.equal(logits, theirs_logits[..., :-1]) and torch.equal(ours["hook_logits"], logits)
    for depth, (prefix, _) in enumerate(applications(m.cfg, S)):
        for leaf in m.cfg.leaves:
            if "normalized" not in leaf:
                assert torch.equal(ours[f"blocks.{depth}.{leaf}"], theirs[prefix + leaf]), (depth, leaf)


def test_the_cache_unrolled_is_the_unrolled_models_cache(m, batch):
    _, ours = m.unrolled(S).run_with_cache(batch.tokens, names_filter=everything)
    _, looped = m.run_with_cache(batch.tokens, n_loops=S, names_filter=everything)
    theirs = looped.unrolled()
    assert set(ours.keys()) == set(theirs.keys())
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_attributions_close_in_all_four_ways(m, batch):
    logits, looped = m.run_with_cache(batch.tokens, n_loops=S)
    wanted = logits[..., :-1]
    every = torch.arange(22)
    for cache, shown in ((looped.unrolled(), m), (m.unrolled(S).run_with_cache(batch.tokens)[1], m.unrolled(S))):
        last, parts = cache.accumulated_resid(apply_ln=True)[-1], cache.decompose_resid(apply_ln=True).sum(0)
        for stream in (last, parts):
            for weights in (shown.W_U[:, :22], shown.tokens_to_residual_directions(every).T):
                torch.testing.assert_close(stream @ weights + shown.b_U[:22], wanted, atol=1e-4, rtol=1e-4)


def test_heads_neurons_and_directions_close_too(m, batch):
    logits, cache = m.unrolled(S).run_with_cache(batch.tokens)
    parts = cache.get_full_resid_decomposition(expand_neurons=True)
    total = cache.logit_attrs(parts, tokens=batch.clean).sum(0) + cache.model.b_U[batch.clean]
    wanted = logits.gather(-1, batch.clean[..., None])[..., 0]
    torch.testing.assert_close(total, wanted, atol=1e-4, rtol=1e-4)


def test_shown_weights_act_on_the_shown_normalised_stream(m, batch):
    u = m.unrolled(S)
    logits, cache = u.run_with_cache(batch.tokens)
    torch.testing.assert_close(cache["ln_final.hook_normalized"] @ u.W_U + u.b_U, logits, atol=1e-4, rtol=1e-4)
    for depth in range(u.cfg.n_layers):
        n1, n2 = cache["normalized", depth, "ln1"], cache["normalized", depth, "ln2"]
        torch.testing.assert_close(n1, u.blocks[depth].ln1(cache["resid_pre", depth]), atol=1e-4, rtol=1e-4)
        for kind in "QKV":
            weight, bias = getattr(u, f"W_{kind}")[depth], getattr(u, f"b_{kind}")[depth]
            here = torch.einsum("bpm,hmd->bphd", n1, weight) + bias
            torch.testing.assert_close(here, cache[kind.lower(), depth], atol=1e-4, rtol=1e-4)
        written = torch.einsum("bphd,hdm->bpm", cache["z", depth], u.W_O[depth]) + u.b_O[depth]
        torch.testing.assert_close(written, cache["attn_out", depth], atol=1e-4, rtol=1e-4)
        into, bias = (u.W_in, u.b_in) if u.W_gate is None else (u.W_gate, u.b_gate)
        torch.testing.assert_close(n2 @ into[depth] + bias[depth], cache["pre", depth], atol=1e-4, rtol=1e-4)
        if u.W_gate is not None:
            linear = n2 @ u.W_in[depth] + u.b_in[depth]
            torch.testing.assert_close(linear, cache["pre_linear", depth], atol=1e-4, rtol=1e-4)
        out = cache["post", depth] @ u.W_out[depth] + u.b_out[depth]
        torch.testing.assert_close(out, cache["mlp_out", depth], atol=1e-4, rtol=1e-4)


def test_unembedding_the_final_norm_is_the_model(plain_m, batch):
    logits, cache = plain_m.run_with_cache(batch.tokens, n_loops=S)
    mine = plain_m.unembed(plain_m.ln_final(cache["resid_post", -1]))
    torch.testing.assert_close(mine, logits, atol=1e-4, rtol=1e-4)  # [MASK]'s -inf too


def test_a_norm_weight_of_zero_shows_zero_and_closes(plain_m, batch):
    plain_m.model.ln_final.weight[3] = 0.0
    u = plain_m.unrolled(S)
    logits, cache = u.run_with_cache(batch.tokens)
    shown = cache["ln_final.hook_normalized"]
    assert bool((shown[..., 3] == 0).all())
    torch.testing.assert_close(shown @ u.W_U + u.b_U, logits, atol=1e-4, rtol=1e-4)


# --- hooks ---


def test_a_hook_on_the_shown_normalised_stream_changes_what_it_feeds(plain_m, batch):
    u = plain_m.unrolled(S)

    def swap(x, hook):
        return x.flip(1)

    def swap_in_place(x, hook):
        x.copy_(x.flip(1).clone())

    theirs = plain_m.run_with_hooks(
        batch.tokens, n_loops=S, fwd_hooks=[("loop.1.blocks.2.ln2.hook_normalized", swap)]
    )
    for fn in (swap, swap_in_place):
        ours = u.run_with_hooks(batch.tokens, fwd_hooks=[("blocks.4.ln2.hook_normalized", fn)])
        torch.testing.assert_close(ours, theirs[..., :-1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, u(batch.tokens))


def test_listening_to_the_shown_stream_changes_no_bit(plain_m, batch):
    u = plain_m.unrolled(S)
    assert torch.equal(
        u(batch.tokens), u.run_with_cache(batch.tokens, names_filter="blocks.4.ln1.hook_normalized")[0]
    )


def test_gradients_are_the_looped_models_and_act_on_the_shown_stream(plain_m, batch):
    u = plain_m.unrolled(S)
    with torch.enable_grad():
        loss, ours = u.run_with_cache(batch, return_type="loss", incl_bwd=True)
        u.zero_grad()
        same, looped = plain_m.run_with_cache(batch, n_loops=S, return_type="loss", incl_bwd=True)
    assert torch.equal(loss, same)
    theirs = looped.unrolled()
    for leaf in ("hook_resid_pre", "attn.hook_z", "ln1.hook_normalized", "mlp.hook_post"):
        name = f"blocks.3.{leaf}_grad"
        assert ours[name].abs().max() > 0
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-3)


def test_hooks_of_the_two_are_apart_and_weights_are_shared(plain_m, batch):
    u, seen = plain_m.unrolled(S), []
    u.add_hook("blocks.2.hook_resid_pre", lambda x, hook: seen.append((hook.name, hook.layer())))
    plain_m(batch.tokens, n_loops=S)
    assert seen == []
    u(batch.tokens)
    assert seen == [("blocks.2.hook_resid_pre", 2)] and u.places[2] == (0, 2) and u.places[3] == (1, 1)
    before = u(batch.tokens)
    plain_m.model.blocks[1].mlp.out.weight.mul_(2)
    assert not torch.equal(u(batch.tokens), before)
    assert {id(p) for p in u.parameters()} == {id(p) for p in plain_m.model.parameters()}
    assert not u.training


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("loop.1.blocks.2.attn.hook_pattern", r"unrolled, it is blocks\.4\.attn\.hook_pattern"),
        ("loop.1.hook_out", "name of the looped model"),
        ("blocks.2.attn.hook_patern", r"blocks\.2\.attn\.hook_pattern"),
        (lambda name: "hook_patern" in name, "matches no hook name"),
        (lambda name: name.startswith("loop.3"), "matches no hook name"),
    ],
)
def test_wrong_names_say_so(plain_m, batch, name, says):
    u = plain_m.unrolled(S)
    for call in (
        lambda: u.run_with_cache(batch.tokens, names_filter=name),
        lambda: u.run_with_hooks(batch.tokens, fwd_hooks=[(name, print)]),
        lambda: u.add_hook(name, print),
    ):
        with pytest.raises(KeyError, match=says):
            call()


def test_what_is_kept_is_sliced_along_positions_and_copied(plain_m, batch):
    u = plain_m.unrolled(S)
    _, full = u.run_with_cache(batch.tokens[:1], names_filter=everything)
    _, one = u.run_with_cache(batch.tokens[:1], names_filter=everything, pos_slice=3, remove_batch_dim=True)
    for name in full:
        assert torch.equal(one[name], full[name].narrow(sites.position_axis(name), 3, 1)[0]), name
    with u.hooks([("blocks.3.hook_resid_pre", lambda x, hook: x.mul_(0.5))]):
        _, halved = u.run_with_cache(batch.tokens[:1])
    _, untouched = u.run_with_cache(batch.tokens[:1])
    assert torch.equal(halved["resid_post", 2], untouched["resid_post", 2])
    with pytest.raises(UsageError, match="one sequence"):
        u.run_with_cache(batch.tokens, remove_batch_dim=True)


# --- what TransformerLens builds on it ---


def metric_of(logits):
    return logits.log_softmax(-1)[:, 4, 3].mean()


@pytest.fixture
def caches(plain_m, batch, corrupted):
    u = plain_m.unrolled(S)
    _, clean = u.run_with_cache(batch.tokens[:2], names_filter=everything)
    return u, clean, plain_m.run_with_cache(batch.tokens[:2], n_loops=S, names_filter=everything)[1], corrupted


def by_hand(m, tokens, name, value, where):
    """The metric of the looped model with `value` put in at `where` of one activation."""

    def put(x, hook):
        x = x.clone()
        x[where] = value[where]
        return x

    return metric_of(m.run_with_hooks(tokens, n_loops=S, fwd_hooks=[(name, put)])[..., :-1])


ALL = slice(None)
SWEEPS = [
    ("get_act_patch_resid_pre", "hook_resid_pre", lambda i: (ALL, i[1])),
    ("get_act_patch_resid_mid", "hook_resid_mid", lambda i: (ALL, i[1])),
    ("get_act_patch_attn_out", "hook_attn_out", lambda i: (ALL, i[1])),
    ("get_act_patch_mlp_out", "hook_mlp_out", lambda i: (ALL, i[1])),
    ("get_act_patch_attn_head_out_by_pos", "attn.hook_z", lambda i: (ALL, i[1], i[2])),
    ("get_act_patch_attn_head_q_by_pos", "attn.hook_q", lambda i: (ALL, i[1], i[2])),
    ("get_act_patch_attn_head_k_by_pos", "attn.hook_k", lambda i: (ALL, i[1], i[2])),
    ("get_act_patch_attn_head_v_by_pos", "attn.hook_v", lambda i: (ALL, i[1], i[2])),
    ("get_act_patch_attn_head_pattern_by_pos", "attn.hook_pattern", lambda i: (ALL, i[1], i[2])),
    ("get_act_patch_attn_head_pattern_dest_src_pos", "attn.hook_pattern", lambda i: (ALL, i[1], i[2], i[3])),
    ("get_act_patch_attn_head_out_all_pos", "attn.hook_z", lambda i: (ALL, ALL, i[1])),
    ("get_act_patch_attn_head_q_all_pos", "attn.hook_q", lambda i: (ALL, ALL, i[1])),
    ("get_act_patch_attn_head_k_all_pos", "attn.hook_k", lambda i: (ALL, ALL, i[1])),
    ("get_act_patch_attn_head_v_all_pos", "attn.hook_v", lambda i: (ALL, ALL, i[1])),
    ("get_act_patch_attn_head_pattern_all_pos", "attn.hook_pattern", lambda i: (ALL, i[1])),
]


@pytest.mark.parametrize(("sweep", "leaf", "where"), SWEEPS, ids=[sweep[0] for sweep in SWEEPS])
def test_patching_equals_a_patch_by_hand_at_that_loop_and_layer(plain_m, caches, sweep, leaf, where):
    u, clean, looped, tokens = caches
    found = getattr(patching, sweep)(u, tokens, clean, metric_of)
    assert found.shape[0] == u.cfg.n_layers == 2 + 2 * S
    assert found.std() > 1e-4
    picks = torch.randint(0, found.numel(), (6,), generator=torch.Generator().manual_seed(0)).tolist()
    for pick in [*picks, found.numel() // 2]:
        index = [int(i) for i in torch.unravel_index(torch.tensor(pick), found.shape)]
        name = applications(plain_m.cfg, S)[index[0]][0] + leaf
        wanted = by_hand(plain_m, tokens, name, looped[name], where(index))
        torch.testing.assert_close(found[tuple(index)], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_sweeps_over_all_kinds_and_their_statistics_run(caches):
    u, clean, _, tokens = caches
    assert patching.get_act_patch_block_every(u, tokens, clean, metric_of).shape == (3, 8, 10)
    assert patching.get_act_patch_attn_head_all_pos_every(u, tokens, clean, metric_of).shape == (5, 8, 2)
    assert patching.get_act_patch_attn_head_by_pos_every(u, tokens, clean, metric_of).shape == (5, 8, 10, 2)
    result = patching.get_act_patch_resid_pre(
        u, tokens, clean, lambda x: x.log_softmax(-1)[:, 4, 3], reduce="none", baseline=True
    )
    assert torch.equal(result.baseline, u(tokens).log_softmax(-1)[:, 4, 3])


def test_direct_paths_are_refused_with_the_remedy(caches):
    u, clean, _, tokens = caches
    _, corrupted = u.run_with_cache(tokens)
    with pytest.raises(UsageError, match=r"set_use_split_qkv_input here; .*hook attn\.hook_q"):
        patching.get_act_patch_direct_path(u, tokens, clean, corrupted, metric_of, 0, 0, verbose=False)


def test_attribution_patching_is_the_gradient_times_the_difference(caches):
    u, clean, _, tokens = caches
    with torch.enable_grad():
        found = attribution_patch(u, clean_of(u, clean), tokens, metric_of).node_scores
    embed = u.model.embed(tokens).detach()

    def put(x, hook):
        return embed

    with torch.enable_grad():
        embed.requires_grad_()
        metric = metric_of(u.run_with_hooks(tokens, fwd_hooks=[("hook_embed", put)]))
        (gradient,) = torch.autograd.grad(metric, embed)
    wanted = ((clean["hook_embed"] - embed) * gradient).sum((0, -1))  # the metric is a mean over the batch already
    scores = torch.tensor([score for node, score in found.items() if node.kind == "embed"])
    torch.testing.assert_close(scores, wanted.detach(), atol=1e-5, rtol=1e-3)
    with pytest.raises(UsageError, match="set_use_attn_result"):
        attribution_patch(u, tokens, tokens, metric_of, EdgeAttributionConfig(granularity="edge"))


def clean_of(u, cache):
    """The tokens whose embeddings a cache holds."""
    return (cache["hook_embed"][:, :, None] - u.W_E).abs().sum(-1).argmin(-1)


def test_head_detection_refuses_or_counts_earlier_keys_only(plain_m):
    u = plain_m.unrolled(S)
    tokens = torch.tensor([[3, 4, 5, 3, 4, 5, 3]])
    u.to_tokens = lambda text: tokens
    earlier = head_detector.get_duplicate_token_head_detection_pattern(tokens)
    with pytest.raises(AssertionError):
        head_detector.detect_head(u, "any", earlier, error_measure="abs")
    found = head_detector.detect_head(u, "any", "duplicate_token_head", error_measure="mul")
    pattern = u.run_with_cache(tokens)[1]["pattern", 3][0]
    torch.testing.assert_close(found[3], (pattern * earlier).sum((-1, -2)) / pattern.sum((-1, -2)))


def test_logit_lens_is_the_readout_of_every_depth(plain_m, batch):
    u = plain_m.unrolled(S)
    logits, cache = u.run_with_cache(batch.tokens)
    lens = logit_lens(u, cache=cache, positions=None)
    torch.testing.assert_close(lens.values[-1], logits, atol=1e-4, rtol=1e-4)
    probabilities = logits.softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1)
    torch.testing.assert_close(lens.readout.entropy[-1], entropy, atol=1e-4, rtol=1e-4)
    direct = logit_lens(u, batch.tokens, positions=None)
    torch.testing.assert_close(direct.values, lens.values)


def test_direct_logit_attribution_sums_to_the_logit(plain_m, batch):
    u = plain_m.unrolled(S)
    for unit in ("component", "head"):
        found = direct_logit_attribution(u, batch.tokens, 3, 5, unit=unit, pos=4)
        logits = u(batch.tokens)[:, 4]
        wanted = logits[:, 3] - logits[:, 5] - (u.b_U[3] - u.b_U[5])
        torch.testing.assert_close(found.attribution.sum(0), wanted, atol=1e-4, rtol=1e-4)


def test_it_is_an_activation_cache_of_a_model_in_its_shape(plain_m, batch):
    u = plain_m.unrolled(S)
    _, cache = u.run_with_cache(batch.tokens)
    assert isinstance(cache, ActivationCache) and cache.model is u
    assert (u.cfg.n_layers, u.cfg.d_vocab, u.cfg.d_vocab_out, u.cfg.n_ctx) == (8, 23, 22, 16)
    assert (u.cfg.d_model, u.cfg.n_heads, u.cfg.d_head, u.cfg.d_mlp) == (16, 2, 8, 64)
    assert u.cfg.device == u.device and u.W_Q.shape == (8, 2, 16, 8) and u.W_U.shape == (16, 22)
    assert cache.stack_activation("pattern").shape == (8, 4, 2, 10, 10)


# --- where to stop ---


@pytest.mark.parametrize("depth", [0, 1, 4, 7, 8, -1, -8])
def test_stopping_at_a_depth_gives_the_stream_there(plain_m, batch, depth):
    u = plain_m.unrolled(S)
    resid = {"names_filter": lambda name: "resid" in name}  # listening elsewhere changes last bits
    _, cache = u.run_with_cache(batch.tokens, **resid)
    at = depth % 8 if depth < 8 else 8
    wanted = cache["resid_post", 7] if at == 8 else cache["resid_pre", at]
    seen = []
    u.add_hook(lambda name: name.endswith("resid_post"), lambda x, hook: seen.append(hook.layer()))
    for stream in (
        u(batch.tokens, stop_at_layer=depth),
        plain_m(batch.tokens, n_loops=S, stop_at_layer=depth),
        plain_m.run_with_cache(batch.tokens, n_loops=S, stop_at_layer=depth, **resid)[0],
    ):
        assert torch.equal(stream, wanted)
    assert seen == list(range(at))


def test_a_stopped_run_caches_what_ran(plain_m, batch):
    _, cache = plain_m.run_with_cache(batch.tokens, n_loops=S, stop_at_layer=4)
    assert cache.n_loops == 2 and "loop.1.blocks.1.hook_resid_post" in cache
    assert "loop.1.blocks.2.hook_resid_pre" not in cache and "hook_logits" not in cache
    for wrong, says in ((9, "at most 8"), (-9, "at least -8"), (1.5, "integer")):
        with pytest.raises(UsageError, match=says):
            plain_m(batch.tokens, n_loops=S, stop_at_layer=wrong)
