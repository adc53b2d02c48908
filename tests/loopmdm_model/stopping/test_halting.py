"""Whoever stops is what a fixed run of as many loops gives; nothing depends on who else is in the batch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from loopmdm.model.errors import UsageError
from loopmdm.model.flops import forward_flops
from loopmdm.model.stopping.rules import (
    ArgmaxStable,
    EntropyDelta,
    KLDelta,
    NoiseSchedule,
    SecondDifference,
    StateDelta,
)
from loopmdm.model.taps import explicit_taps
from tests.conftest import toy_model

RULES = [
    (StateDelta, {}),
    (StateDelta, {"positions": "masked"}),
    (StateDelta, {"patience": 2, "min_loops": 3}),
    (SecondDifference, {}),
    (KLDelta, {}),
    (KLDelta, {"lens": "direct"}),
    (EntropyDelta, {"positions": "all"}),
    (ArgmaxStable, {"patience": 1}),
    (ArgmaxStable, {"patience": 2, "lens": "direct"}),
]
MOST = 6


def same(left, right):
    torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-4, equal_nan=True)


def between(criterion: torch.Tensor) -> float:
    """A threshold in the widest gap between the middle values: far from every criterion."""
    values = criterion[criterion.isfinite()].unique()
    if len(values) < 3:
        return 1e-6
    middle = values[len(values) // 4 : 3 * len(values) // 4 + 2]
    gap = int(middle.diff().argmax())
    return float(middle[gap] + middle[gap + 1]) / 2


@pytest.mark.parametrize(("kind", "arguments"), RULES)
def test_replay_stops_where_the_rule_stops_and_logits_are_those_of_fixed_runs(model, batch, kind, arguments):
    record = model.run(batch.tokens, stop=kind(0.0, max_loops=MOST, **arguments))
    assert record.loops_used.tolist() == [MOST] * 4
    same(record.logits, model(batch.tokens, n_loops=MOST))
    rule = kind(between(record.criterion), max_loops=MOST, **arguments)
    run = model.run(batch.tokens, stop=rule)
    assert run.loops_used.tolist() == rule.replay(record.criterion).tolist()
    assert run.loops_used.min() < MOST  # somebody stops
    for row, used in enumerate(run.loops_used.tolist()):
        same(run.logits[row : row + 1], model(batch.tokens[row : row + 1], n_loops=used))
        same(run.criterion[:used, row], record.criterion[:used, row])
        assert run.criterion[used:, row].isnan().all()


@pytest.mark.parametrize(("kind", "arguments"), RULES)
@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_infinite_threshold_gives_the_minimum(model, batch, kind, arguments, scope):
    rule = kind(float("inf"), max_loops=MOST, scope=scope, **arguments)
    first = 2 if kind is SecondDifference else 1  # loop at which the criterion first exists
    least = max(rule.min_loops, first + rule.patience)
    run = model.run(batch.tokens, stop=rule)
    assert run.loops_used.tolist() == [least] * 4
    if scope == "token":
        assert (run.token_loops == least).all()


@pytest.mark.parametrize(("kind", "arguments"), RULES)
def test_token_scope_with_threshold_zero_is_the_full_run(model, batch, kind, arguments):
    run = model.run(batch.tokens, stop=kind(0.0, max_loops=MOST, scope="token", **arguments))
    same(run.logits, model(batch.tokens, n_loops=MOST))
    assert (run.token_loops == MOST).all()


@pytest.mark.parametrize("changes", [{}, {"forbid_mask_to_mask": ("loop",)}, {"attn_bias": True}])
@pytest.mark.parametrize(("kind", "arguments"), RULES)
def test_held_tokens_skip_the_looped_layers(batch, kind, arguments, changes):
    """The cheap path against a twin that runs every token through every layer and puts held ones back."""
    model = toy_model(**changes)
    record = model.run(batch.tokens, stop=kind(0.0, max_loops=MOST, scope="token", **arguments))
    rule = kind(between(record.criterion), max_loops=MOST, scope="token", **arguments)
    run = model.run(batch.tokens, stop=rule)
    assert run.token_loops.min() < MOST
    context = model.context(batch.tokens)
    x = model.prelude(batch.tokens, context)
    for loop in range(MOST):
        moving = (run.token_loops > loop)[..., None]
        for layer in model.cfg.layers("loop"):
            new = model.blocks[layer](x, context.rotary, context.allowed["loop"])
            x = torch.where(moving, new, x)
    same(run.logits, model.readout(x, context))
    slow = model.run(batch.tokens, stop=rule, taps=explicit_taps)  # the path for listeners
    assert torch.equal(slow.token_loops, run.token_loops)
    same(slow.logits, run.logits)


@pytest.mark.parametrize(("kind", "arguments"), RULES)
@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_a_sequence_alone_is_the_sequence_in_a_batch(model, batch, kind, arguments, scope):
    record = model.run(batch.tokens, stop=kind(0.0, max_loops=MOST, scope=scope, **arguments))
    rule = kind(between(record.criterion), max_loops=MOST, scope=scope, **arguments)
    together = model.run(batch.tokens, stop=rule)
    for row in range(4):
        alone = model.run(batch.tokens[row : row + 1], stop=rule)
        assert alone.loops_used == together.loops_used[row]
        assert alone.flops == together.flops[row]
        same(alone.logits[0], together.logits[row])


def test_noise_schedule_runs_what_it_planned(model, clean):
    tokens = clean.clone()
    for row, count in enumerate((1, 4, 6, 10)):
        tokens[row, :count] = 22
    run = model.run(tokens, stop=NoiseSchedule(loops=(1, 2, 5)))
    assert run.loops_used.tolist() == [1, 2, 2, 5]
    assert NoiseSchedule(loops=(1, 2, 5)).replay(run.criterion.nan_to_num(-1.0)).tolist() == [1, 2, 2, 5]


def test_rows_choose_where_logits_are_computed(model, hooked, batch):
    full = model(batch.tokens, n_loops=2)
    for runner in (model, hooked):
        same(runner.run(batch.tokens, n_loops=2, rows=batch.masked).logits, full[batch.masked])
    for name in ("hook_logits", "ln_final.hook_normalized", "blocks.3.hook_resid_post"):
        _, whole = hooked.run_with_cache(batch.tokens, n_loops=2, names_filter=name)
        seen = []
        with hooked.hooks(fwd_hooks=[(name, lambda value, hook: seen.append(value))]):  # noqa: B023
            same(hooked.run(batch.tokens, n_loops=2, rows=batch.masked).logits, full[batch.masked])
        same(seen[0], whole[name])  # who listens sees every position
    with pytest.raises(UsageError, match="rows must be boolean"):
        model.run(batch.tokens, rows=batch.masked.long())


def test_a_hooked_model_costs_what_it_says(model, hooked, batch):
    rule = KLDelta(0.0, max_loops=3)
    with FlopCounterMode(display=False) as plain:
        expected = model.run(batch.tokens, stop=rule)
    with FlopCounterMode(display=False) as counter:
        run = hooked.run(batch.tokens, stop=rule)
    assert counter.get_total_flops() == plain.get_total_flops()
    assert torch.equal(run.flops, expected.flops)


def test_hooks_see_no_update_of_held_tokens(hooked, batch):
    record = hooked.run(batch.tokens, stop=StateDelta(0.0, max_loops=MOST, scope="token"))
    rule = StateDelta(between(record.criterion), max_loops=MOST, scope="token")
    _, cache = hooked.run_with_cache(batch.tokens[:1], stop=rule)
    for loop in range(cache.n_loops):
        held = cache.token_loops[0] <= loop
        for layer in hooked.cfg.layers("loop"):
            prefix = f"loop.{loop}.blocks.{layer}."
            total = sum(cache[prefix + leaf] for leaf in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"))
            same(cache[prefix + "hook_resid_post"], total)
            assert not cache[prefix + "hook_mlp_out"][0, held].any()
        assert torch.equal(cache[prefix + "hook_resid_post"], cache[f"loop.{loop}.hook_out"])
    with pytest.raises(UsageError, match="tokens stopped"):
        cache.unrolled()


def test_criteria_are_those_of_the_states(model, batch):
    """The bookkeeping of previous states and readings, against the whole trajectory."""
    states = [model.prelude(batch.tokens, model.context(batch.tokens))]
    states += [state for state, _ in model.states(batch.tokens, MOST)]
    context = model.context(batch.tokens)
    second = model.run(batch.tokens, stop=SecondDifference(0.0, max_loops=MOST)).criterion
    kl = model.run(batch.tokens, stop=KLDelta(0.0, max_loops=MOST)).criterion
    for loop in range(2, MOST):
        now, previous, earlier = states[loop + 1], states[loop], states[loop - 1]
        expected = ((now - 2 * previous + earlier).norm(dim=-1) / now.norm(dim=-1)).mean(-1)
        same(second[loop], expected)
        p, q = (model.readout(x, context)[..., :22].log_softmax(-1) for x in (now, previous))
        divergence = ((p.exp() * (p - q)).sum(-1) * batch.masked).sum(-1) / batch.masked.sum(-1)
        same(kl[loop], divergence)
    assert second[:2].isnan().all() and kl[:1].isnan().all()


def test_flops_are_those_torch_counts(model, batch):
    cfg, tokens = model.cfg, batch.tokens[:1]

    def counted(**arguments) -> float:
        with FlopCounterMode(display=False) as counter:
            model.run(tokens, taps=explicit_taps, **arguments)
        return counter.get_total_flops()

    fixed = model.run(tokens, n_loops=3)
    assert float(fixed.flops) == forward_flops(cfg, 10, 3) == counted(n_loops=3)
    few = model.run(tokens, n_loops=3, rows=batch.masked[:1])
    with FlopCounterMode(display=False) as counter:
        model.run(tokens, n_loops=3, rows=batch.masked[:1])
    attention = (1 + 3 * cfg.n_loop_layers) * 4 * 10 * 10 * 16 + 4 * 5 * 10 * 16  # fused: not counted by torch
    assert float(few.flops) == counter.get_total_flops() + attention < float(fixed.flops)
    direct = KLDelta(0.0, max_loops=3, lens="direct")
    assert float(model.run(tokens, stop=direct).flops) == counted(stop=direct)
    through = KLDelta(0.0, max_loops=3)
    with FlopCounterMode(display=False) as counter:  # no listener: the last reading is the read-out
        model.run(tokens, stop=through)
    applications = cfg.n_prelude_layers + 3 * cfg.n_loop_layers + 3 * cfg.n_coda_layers
    fused = applications * 4 * 10 * 10 * cfg.n_heads * cfg.d_head  # attention that torch does not count
    assert float(model.run(tokens, stop=through).flops) == counter.get_total_flops() + fused


def test_held_tokens_cost_keys_and_values_only(model, batch):
    record = model.run(batch.tokens, stop=StateDelta(0.0, max_loops=MOST, scope="token"))
    rule = StateDelta(between(record.criterion), max_loops=MOST, scope="token")
    run = model.run(batch.tokens[:1], stop=rule)
    with FlopCounterMode(display=False) as counter:
        model.run(batch.tokens[:1], stop=rule)
    d, n = 16, 10
    moving = int(run.token_loops.sum()) * model.cfg.n_loop_layers
    attention = (moving + 2 * n) * 4 * n * d  # fused: not counted by torch
    assert float(run.flops) == counter.get_total_flops() + attention


def test_on_loop_sees_every_loop_of_who_still_runs(model, batch):
    seen = []
    record = model.run(batch.tokens, stop=StateDelta(0.0, max_loops=MOST))
    rule = StateDelta(between(record.criterion), max_loops=MOST)
    run = model.run(batch.tokens, stop=rule, on_loop=lambda view: seen.append((view.loop, view.running.tolist())))
    for loop, rows in seen:
        assert rows == (run.loops_used > loop).nonzero().flatten().tolist()
    assert len(seen) == run.loops_used.max()


def test_a_read_out_that_nobody_asks_for_is_not_computed(model, batch, monkeypatch):
    monkeypatch.setattr(model, "coda", None)
    with pytest.raises(TypeError):
        model.run(batch.tokens, n_loops=2, rows=batch.masked)
    run = model.run(batch.tokens, n_loops=2, rows=torch.zeros_like(batch.masked))
    assert run.logits.shape == (0, model.cfg.d_vocab) and run.loops_used.tolist() == [2] * len(batch.tokens)
