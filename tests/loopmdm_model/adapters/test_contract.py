"""What every core must hold, whoever wrote it: ours, other people's, and one written for this test."""

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from loopmdm.analysis import cut, mask_attention, read_loops, representation_change
from loopmdm.analysis.measures.interventions import record_values, replace_values
from loopmdm.model import FixedLoops, StateDelta, UsageError, nelbo, sample, sites
from loopmdm.model.adapters import hook_model
from loopmdm.model.adapters.cycles import Cycle
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.layout import NEEDS
from loopmdm.model.masking import hide
from tests.conftest import toy_model
from tests.loopmdm_model.adapters import natives
from tests.loopmdm_model.models import InjectedToy

CLOSE = {"rtol": 0.0, "atol": 1e-5}


@dataclass(frozen=True)
class Case:
    """An implementation: its hooked model, and the native one where there is one."""

    m: HookedLoopMDM
    native: Any = None
    eager: Any = None

    @property
    def core(self):
        return self.m.model

    @property
    def mask(self):
        return self.m.cfg.mask_token_id


FOREIGN = {
    "bert": ("Bert", {"mask_token_id": 103, "loop": (1, 2), "max_loops": 3}),
    "albert": ("Albert", {"mask_token_id": 4}),
    "modernbert": ("ModernBert", {"mask_token_id": 117, "loop": (1, 2), "max_loops": 3}),
    "roberta": ("Roberta", {"mask_token_id": 104, "loop": (1, 2), "max_loops": 3}),
    "qwen3-open": ("Qwen3", {"mask_token_id": 119, "bidirectional": True, "loop": (1, 2), "max_loops": 3}),
    "hrm-text-open": ("HrmText", {"mask_token_id": 119, "bidirectional": True, "max_loops": 3}),
    "llama": ("Llama", {"loop": (1, 2), "max_loops": 3}),
}
NAMES = ["loopmdm", "toy", *FOREIGN]
MASKED = [name for name in NAMES if name not in ("toy", "llama")]


@cache
def made(name: str) -> Case:
    if name == "loopmdm":
        return Case(HookedLoopMDM(toy_model()))
    if name == "toy":
        torch.manual_seed(0)
        return Case(HookedLoopMDM(InjectedToy().eval()))
    classes, how = FOREIGN[name]
    native = natives.native(classes)
    return Case(hook_model(native, **how), native, natives.native(classes, "eager"))


@pytest.fixture(params=NAMES)
def case(request) -> Case:
    return made(request.param)


@pytest.fixture(params=FOREIGN)
def foreign(request) -> Case:
    return made(request.param)


@pytest.fixture(params=MASKED)
def mdm(request) -> Case:
    return made(request.param)


def clean(case: Case, batch: int = 3, seed: int = 1) -> torch.Tensor:
    low, high = (0, case.m.cfg.d_vocab - 1) if case.native is None else (40, 100)
    return torch.randint(low, high, (batch, 12), generator=torch.Generator().manual_seed(seed))


def hidden(case: Case, batch: int = 3):
    tokens = clean(case, batch)
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    return hide(tokens, masked, case.mask)


def padded(case: Case):
    """Tokens, which of them are real, and the shorter sequence by itself."""
    tokens = clean(case)
    keys = torch.ones_like(tokens, dtype=torch.bool)
    keys[1, 8:] = False
    if case.native is not None and case.native.config.pad_token_id is not None:
        tokens = tokens.masked_fill(~keys, case.native.config.pad_token_id)
    return tokens, keys, tokens[1:2, :8]


# --- against the native forward ---


def without_mask(case: Case, logits: torch.Tensor) -> torch.Tensor:
    return logits if case.mask is None else logits.index_fill(-1, torch.tensor(case.mask), 0.0)


def native_arguments(case: Case, tokens, keys=None):
    return case.core.family.arguments(tokens, keys)


@pytest.mark.parametrize("with_padding", [False, True])
def test_logits_are_the_native_ones(foreign, with_padding):
    tokens, keys, _ = padded(foreign)
    keys = keys if with_padding else None
    native = foreign.native(tokens, **native_arguments(foreign, tokens, keys)).logits
    n_loops = foreign.m.cfg.native_loops
    fused = foreign.m(tokens, n_loops, attention_mask=keys)
    explicit = foreign.m(tokens, n_loops, attention_mask=keys, attn_path="eager")
    assert torch.equal(without_mask(foreign, fused), without_mask(foreign, native))
    torch.testing.assert_close(without_mask(foreign, explicit), without_mask(foreign, native), **CLOSE)
    if foreign.mask is not None:
        assert bool((fused[..., foreign.mask] == float("-inf")).all())


def test_patterns_are_those_of_the_native_eager_model(foreign):
    tokens = clean(foreign)
    arguments = native_arguments(foreign, tokens)
    said = foreign.eager(tokens, **arguments, output_attentions=True).attentions
    n_loops = foreign.m.cfg.native_loops
    _, kept = foreign.m.run_with_cache(tokens, n_loops, names_filter=sites.at(leaf="pattern"))
    assert len(said) == len(kept)
    for native, (prefix, _) in zip(said, sites.applications(foreign.m.cfg, n_loops), strict=True):
        name = f"{prefix}attn.hook_pattern"
        torch.testing.assert_close(kept[name], native, rtol=0.0, atol=1e-6)


# --- what is offered ---


def test_what_is_cached_has_its_shape_and_holds_together(case):
    tokens = clean(case)
    _, kept = case.m.run_with_cache(tokens, 2)
    every = [name for name in sites.all_names(case.m.cfg, 2) if not name.endswith(sites.ON_DEMAND)]
    assert set(kept) == set(every)
    for name, value in kept.items():
        if not name.startswith(("hook_logits",)):
            assert value.shape == sites.shape(case.m.cfg, name, *tokens.shape), name
    for prefix, _ in sites.applications(case.m.cfg, 2):
        pattern, v, z = (kept[f"{prefix}attn.hook_{leaf}"] for leaf in ("pattern", "v", "z"))
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]), **CLOSE)
        torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z, **CLOSE)


def test_an_edit_at_any_leaf_changes_the_logits(case):
    tokens = clean(case)
    plain = case.m(tokens, 2, attn_path="eager")
    layer = (case.m.cfg.layers("loop") or case.m.cfg.layers("prelude"))[0]

    def edit(x, hook):
        return x * torch.linspace(0.5, 1.5, x.shape[-1])

    for leaf in case.m.cfg.leaves:
        name = f"loop.1.blocks.{layer}.{leaf}"
        edited = case.m.run_with_hooks(tokens, 2, attn_path="eager", fwd_hooks=[(name, edit)])
        assert not torch.equal(edited, plain), leaf


def test_results_of_heads_sum_to_what_attention_gives(foreign):
    layer = foreign.m.cfg.layers("loop")[0]
    site = f"loop.0.blocks.{layer}."
    names = [f"{site}attn.hook_{leaf}" for leaf in ("result", "z")] + [f"{site}hook_attn_out"]
    _, kept = foreign.m.run_with_cache(clean(foreign), 1, names_filter=names)
    result, z, out = (kept[name] for name in names)
    bias = out[0, 0] - result.sum(-2)[0, 0]
    torch.testing.assert_close(result.sum(-2) + bias, out, **CLOSE)
    through = z.flatten(-2) @ foreign.core.output_weight(layer).T
    assert torch.allclose(through, result.sum(-2), **CLOSE) == foreign.m.facts.linear_heads


def test_every_loop_has_its_own_value_and_gradient(case):
    tokens, layer = clean(case), case.m.cfg.layers("loop")[0]
    names = [f"loop.{loop}.blocks.{layer}.hook_resid_post" for loop in range(3)]

    def loss(logits):
        return logits[..., :3].sum()

    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, kept = case.m.run_with_cache(tokens, 3, names_filter=names, incl_bwd=True, loss_fn=loss)
    for kind in ("", "_grad"):
        one, two, three = (kept[f"{name}{kind}"] if not kind else kept._activations[name + kind] for name in names)
        assert not torch.equal(one, two) and not torch.equal(two, three)


def test_nothing_is_left_behind(foreign):
    layer = foreign.m.cfg.layers("loop")[0]
    forwards = {name: "forward" in module.__dict__ for name, module in foreign.native.named_modules()}
    foreign.m.run_with_cache(clean(foreign), 2)
    with pytest.raises(RuntimeError, match="stop here"):
        foreign.m.run_with_hooks(
            clean(foreign), 1, fwd_hooks=[(f"loop.0.blocks.{layer}.hook_mlp_out", lambda x, hook: stop())]
        )
    assert forwards == {name: "forward" in module.__dict__ for name, module in foreign.native.named_modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in foreign.native.modules())


def stop():
    raise RuntimeError("stop here")


# --- loops, rows, padding, subsets ---


def test_reading_out_after_a_loop_is_the_model_at_that_many_loops(case):
    tokens = clean(case)
    assert case.core.facts.nested
    for loop, (state, context) in enumerate(case.core.states(tokens, 3)):
        assert torch.equal(case.core.readout(state, context), case.core(tokens, loop + 1))


def test_padding_changes_nothing_for_real_tokens(case):
    tokens, keys, alone = padded(case)
    logits = case.m(tokens, 2, attention_mask=keys)[1, :8]
    if not case.m.facts.random_start:  # alone it is another row, with another start
        torch.testing.assert_close(logits, case.m(alone, 2)[0], **CLOSE)
    if case.native is None:  # some native models know padding by its token, too
        other = tokens.masked_scatter(~keys, (tokens[~keys] + 1) % 20)
        torch.testing.assert_close(logits, case.m(other, 2, attention_mask=keys)[1, :8], **CLOSE)


@pytest.mark.parametrize("keep", [torch.tensor([True, False, True]), torch.tensor([2]), torch.tensor([False] * 3)])
def test_some_sequences_of_a_batch_go_on_as_they_would_have(case, keep):
    tokens, keys, _ = padded(case)
    context = case.core.context(tokens, keys)
    x = case.core.prelude(tokens, context)
    state = case.core.loop(x, context, 0)
    part = context.rows(keep)  # before the next loop: a second state moves with the first
    whole = case.core.loop(state, context, 1)
    assert torch.equal(part.tokens, tokens[keep]) and torch.equal(part.real, context.real[keep])
    if len(part.tokens):
        torch.testing.assert_close(case.core.loop(state[keep], part, 1), whole[keep], **CLOSE)


def test_held_tokens_keep_their_state_and_are_seen(case):
    tokens = clean(case)
    held = torch.zeros_like(tokens, dtype=torch.bool)
    held[:, 3] = True
    context = case.core.context(tokens)
    state = case.core.loop(case.core.prelude(tokens, context), context, 0)
    out = case.core.loop(state, context.hold(held), 1)
    free = case.core.loop(state, context, 1)
    assert torch.equal(out[held], state[held])
    same = torch.equal(out[:, 4:], free[:, 4:])
    assert same == (case.m.cfg.n_loop_layers == 1)  # a second layer sees another state at 3


def test_nothing_is_added_where_tokens_are_held(foreign):
    tokens, layer = clean(foreign), foreign.m.cfg.layers("loop")[0]
    held = torch.arange(tokens.shape[1]).expand_as(tokens) % 2 == 0
    seen = []
    hooks = [
        (f"loop.0.blocks.{layer}.{leaf}", lambda x, hook: seen.append(x))
        for leaf in ("hook_attn_out", "hook_mlp_out")
    ]
    context = foreign.core.context(tokens).hold(held)
    with foreign.m.hooks(hooks):
        foreign.m.loop(foreign.core.prelude(tokens, context), context, 0)
    for added in seen:
        assert bool((added[held] == 0).all()) and bool((added[~held] != 0).any())
    assert len(seen) == 2


def test_rows_are_a_choice_of_positions(case):
    tokens = clean(case)
    rows = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(5)) < 0.3
    whole = case.m(tokens, 2)
    torch.testing.assert_close(case.m.run(tokens, 2, rows=rows).logits, whole[rows], **CLOSE)
    state, _ = list(case.m.states(tokens, 2))[-1]
    torch.testing.assert_close(
        case.core.unembedding(state, rows=rows), case.core.unembedding(state)[rows], **CLOSE
    )


def test_no_rows_are_no_logits(case):
    tokens = clean(case)
    assert case.m.run(tokens, 1, rows=torch.zeros_like(tokens, dtype=torch.bool)).logits.shape == (
        0,
        case.m.cfg.d_vocab,
    )


def test_a_loop_without_its_prelude_is_named():
    core = made("hrm-text-open").core
    tokens = clean(made("hrm-text-open"))
    context = core.context(tokens)
    with pytest.raises(UsageError, match=r"take state and context from m.states"):
        core.loop(context.first, context, 0)


def test_other_layers_loop_on_the_same_weights(foreign):
    if foreign.m.cfg.n_layers == 1:
        return
    tokens = clean(foreign)
    if foreign.core.cycle.fixed:
        with pytest.raises(UsageError, match=r"only its own layers 0\.\.5 can loop"):
            foreign.core.looping(0, 1, 4)
        return
    other = foreign.core.looping(0, 1, 4)
    assert other.cfg.max_loops == 4 and list(other.cfg.layers("loop")) == [0]
    assert next(other.parameters()) is next(foreign.core.parameters())
    assert not other.training and not foreign.core.training
    assert torch.equal(other(tokens, 1), foreign.m(tokens, 1))
    assert not torch.equal(other(tokens, 2), foreign.m(tokens, 2))
    with pytest.raises(UsageError, match="do not fit"):
        foreign.core.looping(3, 2)


# --- facts ---


def test_the_facts_are_true(case):
    facts, tokens = case.m.facts, clean(case)
    other = tokens.clone()
    other[:, -1] = (tokens[:, -1] + 1) % 20
    moved = (case.m(tokens, 2) - case.m(other, 2))[:, :-1].nan_to_num(0.0).abs().max() > 1e-6
    assert bool(moved) != facts.causal
    for name, (holds, _) in NEEDS.items():
        if holds(facts):
            facts.need(name, by="a test")
        else:
            with pytest.raises(UsageError, match="a test needs"):
                facts.need(name, by="a test")


def test_an_additive_stream_is_a_sum(case):
    _, kept = case.m.run_with_cache(clean(case), 2)
    if not {"hook_attn_out", "hook_mlp_out"} <= set(case.m.cfg.leaves):
        return
    sums = True
    for p, _ in sites.applications(case.m.cfg, 2):
        total = kept[f"{p}hook_resid_pre"] + kept[f"{p}hook_attn_out"] + kept[f"{p}hook_mlp_out"]
        sums &= torch.allclose(total, kept[f"{p}hook_resid_post"], atol=1e-5)
    assert sums == case.m.facts.additive or getattr(case.core, "cycle", Cycle).fixed  # more between its loops


def test_the_vector_of_mask_is_what_the_stream_gets(mdm):
    assert mdm.core.mask_vector.shape == (mdm.m.cfg.d_model,)
    with pytest.raises(UsageError, match="mask_vector needs a model with a"):
        _ = made("llama").core.mask_vector


# --- what runs on top ---


@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_a_rule_that_never_stops_runs_all_loops(case, scope):
    tokens = clean(case)
    run = case.m.run(tokens, stop=StateDelta(0.0, max_loops=3, scope=scope))
    torch.testing.assert_close(run.logits, case.m(tokens, 3), **CLOSE)
    assert run.loops_used.tolist() == [3, 3, 3]


@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_a_rule_stops_each_where_it_says(case, scope):
    tokens = clean(case)
    raw = case.m.run(tokens, stop=StateDelta(0.0, max_loops=4, scope=scope)).criterion
    values = raw[torch.isfinite(raw)].sort().values
    run = case.m.run(tokens, stop=StateDelta(float(values[len(values) // 2]), max_loops=4, scope=scope))
    used = run.loops_used if scope == "sequence" else run.token_loops
    assert int(used.min()) < 4 and run.logits.isfinite().any()
    if scope == "sequence":
        for row, n_loops in enumerate(run.loops_used.tolist()):
            torch.testing.assert_close(run.logits[row], case.m(tokens, n_loops)[row], **CLOSE)


def test_flops_grow_by_one_layer_an_application(case):
    tokens = clean(case)
    cost = [float(case.m.run(tokens, stop=FixedLoops(max_loops=n)).flops[0]) for n in (1, 2, 3)]
    assert cost[2] - cost[1] == pytest.approx(cost[1] - cost[0])
    assert cost[1] - cost[0] == pytest.approx(case.m.cfg.n_loop_layers * case.core.layer_flops(tokens.shape[1]))


def test_likelihood_scores_a_mask_anywhere_in_the_vocabulary(mdm):
    tokens = clean(mdm)
    r = nelbo(mdm.m, tokens, n_loops=2, n_samples=2)
    assert torch.isfinite(r.per_sequence).all()
    batch = hidden(mdm)
    logits = mdm.m(batch.tokens, 2)
    assert not bool(logits.float().softmax(-1).isnan().any())


def test_sampling_fills_every_mask(mdm):
    drawn = sample(mdm.m, n=2, length=6, steps=3, n_loops=2, seed=0)
    assert drawn.tokens.shape == (2, 6) and not bool((drawn.tokens == mdm.mask).any())


def test_measures_run(mdm):
    batch = hidden(mdm)
    masses = mask_attention(mdm.m, batch, n_loops=2)
    assert (
        masses.groupby(["layer", "loop", "head", "query_group"], dropna=False)["mass"]
        .sum()
        .between(0.99, 1.01)
        .all()
    )
    assert masses["content"].notna().any() == mdm.m.facts.linear_heads
    change = representation_change(mdm.m, batch, n_loops=2)
    assert set(change["loop"]) == {0, 1} and change["value"].notna().any()
    read = read_loops(mdm.m, batch, n_loops=2)
    best = mdm.m(batch.tokens, 2).argmax(-1).flatten()
    assert read[read["loop"] == 1]["top1_id"].tolist() == best.tolist()


def test_another_sequences_values_change_the_masked_answers_and_ones_own_nothing(mdm):
    batch = hidden(mdm)
    with cut(mdm.m, "none"):
        plain, own = mdm.m(batch.tokens, 2), record_values(mdm.m, batch.tokens, 2)
    with replace_values(mdm.m, own):
        torch.testing.assert_close(mdm.m(batch.tokens, 2), plain, **CLOSE)
    with replace_values(mdm.m, {place: value.roll(1, 0) for place, value in own.items()}):
        assert not torch.allclose(mdm.m(batch.tokens, 2)[batch.masked], plain[batch.masked], **CLOSE)


def test_cutting_edges_changes_the_masked_answers(mdm):
    batch = hidden(mdm)
    plain = mdm.m(batch.tokens, 2, attn_path="eager")
    with cut(mdm.m, "masked->masked"):
        changed = mdm.m(batch.tokens, 2, attn_path="eager")
    with cut(mdm.m, "none"):
        same = mdm.m(batch.tokens, 2, attn_path="eager")
    assert torch.equal(same, plain) and not torch.equal(changed, plain)
