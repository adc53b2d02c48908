"""Arms beside the paper's model: nothing where they are off; where they are on, what their equations say."""

import json
import zlib
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from loopmdm.analysis.measures.interventions import skip
from loopmdm.model.errors import UsageError
from loopmdm.model.flops import forward_flops, training_flops
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.layout import Facts
from loopmdm.model.network.config import STABILISERS, LoopMDMConfig
from loopmdm.model.network.layers import Injection
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.stopping.rules import KLDelta, StateDelta
from loopmdm.model.taps import explicit_taps
from tests.conftest import toy_config, toy_model
from tests.loopmdm_model.stopping.test_halting import between

INJECTED, SANDWICH, SCALED = {"input_injection": "decay"}, {"sandwich_norm": True}, {"scaled_residual": True}
ARMS = {
    "injected": INJECTED,
    "sandwich": SANDWICH,
    "scaled": SCALED,
    "injected, sandwich": INJECTED | SANDWICH,
    "injected, scaled": INJECTED | SCALED,
    "injected, RMS": INJECTED | {"normalization_type": "RMS"},
    "sandwich, RMS": SANDWICH | {"normalization_type": "RMS"},
    "scaled, biases": SCALED | {"attn_bias": True},
    "injected, no prelude": INJECTED | {"n_prelude_layers": 0},
    "injected, apart": INJECTED | {"forbid_mask_to_mask": ("loop",)},
    "sandwich, closed": SANDWICH | {"forbid_masked_keys": ("prelude", "loop")},
}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
"""The order of float32 sums."""


def uneven(model):
    """The model with norms, biases and decays that matter."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))  # alike in all arms
        if "ln" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 2.0, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(generator=generator)
        elif name == "injection.weight":
            parameter.uniform_(-2.0, 3.0, generator=generator)
    return model


@pytest.fixture(params=ARMS.values(), ids=ARMS)
def arm(request) -> LoopMDM:
    return uneven(toy_model(**request.param))


class Naive:
    """The equations, read off a state dict, with nothing of the model's code: no fused norm, attention or loop."""

    def __init__(self, model: LoopMDM):
        self.w, self.cfg = model.state_dict(), model.cfg

    def linear(self, x, name):
        out = x @ self.w[f"{name}.weight"].T
        return out + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else out

    def norm(self, x, name):
        if self.cfg.normalization_type == "LN":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.w[f"{name}.weight"]
        return x + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else x

    def turned(self, x):
        """Pairs (first half, second half) as complex numbers, turned by position."""
        half = x.shape[-1] // 2
        speed = self.cfg.rotary_base ** (-torch.arange(half) / half)
        turn = torch.polar(torch.ones(x.shape[1], half), torch.arange(x.shape[1])[:, None] * speed)
        pairs = torch.complex(x[..., :half], x[..., half:]) * turn[:, None]
        return torch.cat([pairs.real, pairs.imag], -1)

    def attention(self, x, name, allowed):
        q, k, v = self.linear(x, f"{name}.qkv").unflatten(-1, (3, self.cfg.n_heads, -1)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", self.turned(q), self.turned(k)) / self.cfg.d_head**0.5
        pattern = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        return self.linear(torch.einsum("bhqk,bkhd->bqhd", pattern, v).flatten(-2), f"{name}.out")

    def mlp(self, x, name):
        return self.linear(F.gelu(self.linear(x, f"{name}.up"), approximate="tanh"), f"{name}.out")

    def layer(self, x, number, tokens):
        cfg, name, looped = self.cfg, f"blocks.{number}", number in self.cfg.layers("loop")
        masked, itself = tokens == cfg.mask_token_id, torch.eye(tokens.shape[1], dtype=torch.bool)
        allowed = torch.ones(len(tokens), *itself.shape, dtype=torch.bool)
        if cfg.segment(number) in cfg.forbid_mask_to_mask:
            allowed = ~(masked[:, :, None] & masked[:, None, :]) | itself
        if cfg.segment(number) in cfg.forbid_masked_keys:
            allowed = ~masked[:, None, :] | itself
        for norm, part in (("ln1", "attn"), ("ln2", "mlp")):
            y = self.norm(x, f"{name}.{norm}")
            y = self.attention(y, f"{name}.attn", allowed) if part == "attn" else self.mlp(y, f"{name}.mlp")
            if looped and cfg.sandwich_norm:
                y = self.norm(y, f"{name}.{norm}_post")
            x = x + (y / cfg.max_loops**0.5 if looped and cfg.scaled_residual else y)
        return x

    def __call__(self, tokens, n_loops):
        x = self.w["embed.weight"][tokens]
        for number in self.cfg.layers("prelude"):
            x = self.layer(x, number, tokens)
        entered = x
        for _ in range(n_loops):
            if self.cfg.input_injection == "decay":
                decay = 1 / (1 + (-self.w["injection.weight"]).exp())
                x = decay * x + (1 - decay) * entered
            for number in self.cfg.layers("loop"):
                x = self.layer(x, number, tokens)
        for number in self.cfg.layers("coda"):
            x = self.layer(x, number, tokens)
        return self.linear(self.norm(x, "ln_final"), "unembed")[..., :-1]


# --- off ---


def test_where_they_are_off_weights_files_and_facts_are_what_they_were(tmp_path):
    plain = toy_model()
    assert not [name for name in plain.state_dict() if "post" in name or "injection" in name]
    plain.cfg.save(tmp_path / "config.json")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.keys() == {each.name for each in fields(LoopMDMConfig)} - STABILISERS.keys()
    assert (
        LoopMDMConfig.from_dict(written | STABILISERS) == LoopMDMConfig.load(tmp_path / "config.json") == plain.cfg
    )
    assert plain.facts == Facts(mask_token_id=22)


@pytest.mark.parametrize("changes", [INJECTED, SANDWICH, SCALED])
def test_all_arms_start_from_the_same_weights(changes):
    plain, other = toy_model().state_dict(), toy_model(**changes).state_dict()
    assert all(torch.equal(weight, other[name]) for name, weight in plain.items())


def test_at_their_limits_they_are_the_plain_model_bit_for_bit(batch):
    plain = uneven(toy_model())
    kept = uneven(toy_model(**INJECTED))
    assert torch.equal(kept(batch.tokens, n_loops=1), plain(batch.tokens, n_loops=1))  # whatever a is
    kept.injection.weight.fill_(torch.inf)  # a = 1
    assert torch.equal(kept(batch.tokens, n_loops=4), plain(batch.tokens, n_loops=4))
    once, scaled_once = uneven(toy_model(max_loops=1)), uneven(toy_model(max_loops=1, **SCALED))
    assert torch.equal(scaled_once(batch.tokens, n_loops=4), once(batch.tokens, n_loops=4))


# --- on ---


@pytest.mark.parametrize("n_loops", [1, 2, 5])
def test_the_model_is_its_equations(arm, batch, n_loops):
    expected = Naive(arm)(batch.tokens, n_loops)
    for taps in ({}, {"taps": explicit_taps}):
        torch.testing.assert_close(arm(batch.tokens, n_loops=n_loops, **taps)[..., :-1], expected, **CLOSE)


def test_arms_differ_from_the_plain_model(batch):
    plain = uneven(toy_model())(batch.tokens, n_loops=3)[..., :-1]
    for changes in (INJECTED, SANDWICH, SCALED):
        assert (uneven(toy_model(**changes))(batch.tokens, n_loops=3)[..., :-1] - plain).abs().max() > 0.1


def test_states_do_not_depend_on_n_loops_and_readout_is_the_shorter_model(arm, batch):
    for loop, (state, context) in enumerate(arm.states(batch.tokens, 4)):
        assert torch.equal(arm.readout(state, context), arm(batch.tokens, n_loops=loop + 1))


def test_what_is_carried_on_shrinks_and_rests_at_what_the_prelude_gave():
    """With silent layers H(i) - e = a^i (H(0) - e), and a lies below 1 whatever is learned."""
    injection, generator = Injection(6), torch.Generator().manual_seed(0)
    assert torch.allclose(injection.decay, torch.tensor(2.0).sigmoid())
    injection.weight.copy_(torch.tensor([-9.0, -1, 0, 1, 4, 9]))
    assert ((injection.decay > 0) & (injection.decay < 1)).all()
    entered, state = torch.randn(2, 2, 3, 6, generator=generator)
    assert torch.equal(injection(entered, entered), entered)
    for loop in range(1, 6):
        moved = injection(state, entered) if loop == 1 else injection(moved, entered)  # noqa: F821
        torch.testing.assert_close(moved - entered, injection.decay**loop * (state - entered), **CLOSE)


@pytest.mark.parametrize("kind", [StateDelta, KLDelta])
def test_held_tokens_skip_the_looped_layers(arm, batch, kind):
    """The cheap path against a twin that runs every token through every layer and puts held ones back."""
    record = arm.run(batch.tokens, stop=kind(0.0, max_loops=5, scope="token"))
    torch.testing.assert_close(record.logits, arm(batch.tokens, n_loops=5), **CLOSE)
    rule = kind(between(record.criterion[2]), max_loops=5, scope="token")
    run = arm.run(batch.tokens, stop=rule)
    assert run.token_loops.min() < 5 and len(run.token_loops.unique()) > 1
    context = arm.context(batch.tokens)
    x = entered = arm.prelude(batch.tokens, context)
    for loop in range(5):
        moving, before = (run.token_loops > loop)[..., None], x
        x = x if arm.injection is None else arm.injection(x, entered)
        for layer in arm.cfg.layers("loop"):
            x = torch.where(moving, arm.blocks[layer](x, context.rotary, context.allowed["loop"]), x)
        x = torch.where(moving, x, before)
    torch.testing.assert_close(run.logits, arm.readout(x, context), **CLOSE)
    slow = arm.run(batch.tokens, stop=rule, taps=explicit_taps)  # the path for listeners
    assert torch.equal(slow.token_loops, run.token_loops)
    torch.testing.assert_close(slow.logits, run.logits, **CLOSE)
    for row in range(4):  # rows of others are dropped as they stop
        alone = arm.run(batch.tokens[row : row + 1], stop=rule)
        torch.testing.assert_close(alone.logits[0], run.logits[row], **CLOSE)


def test_sequences_that_stop_match_fixed_runs(arm, batch):
    full = arm.run(batch.tokens, stop=StateDelta(0.0, max_loops=6))
    run = arm.run(batch.tokens, stop=StateDelta(float(full.criterion[3].median()) + 1e-5, max_loops=6))
    assert len(set(run.loops_used.tolist())) > 1
    for row, used in enumerate(run.loops_used.tolist()):
        alone = arm(batch.tokens[row : row + 1], n_loops=used)
        torch.testing.assert_close(run.logits[row : row + 1], alone, **CLOSE)


def test_rows_and_padding_change_nothing_else(arm, batch):
    rows = arm.run(batch.tokens, n_loops=3, rows=batch.masked).logits
    torch.testing.assert_close(rows, arm(batch.tokens, n_loops=3)[batch.masked], **CLOSE)
    padded = F.pad(batch.tokens, (0, 3), value=5)
    mask = F.pad(torch.ones_like(batch.tokens), (0, 3))
    found = arm(padded, n_loops=3, attention_mask=mask)[:, :10]
    torch.testing.assert_close(found, arm(batch.tokens, n_loops=3), **CLOSE)


def test_gradients_reach_every_parameter(arm, batch):
    with torch.enable_grad():
        F.cross_entropy(arm(batch.tokens, n_loops=3)[..., :-1].flatten(0, 1), batch.clean.flatten()).backward()
    for name, parameter in arm.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("n_loops", [1, 4])
def test_counts_agree_with_torch_within_one_percent(arm, batch, n_loops):
    with FlopCounterMode(display=False) as counter:
        arm(batch.tokens, n_loops=n_loops, taps=explicit_taps)
    assert abs(forward_flops(arm.cfg, 10, n_loops, batch=4) / counter.get_total_flops() - 1) < 0.01
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        arm(batch.tokens, n_loops=n_loops, taps=explicit_taps)[..., :22].sum().backward()
    assert abs(training_flops(arm.cfg, 10, n_loops, batch=4) / counter.get_total_flops() - 1) < 0.02


def test_saved_and_loaded_it_is_the_same(arm, batch, tmp_path):
    arm.save_pretrained(tmp_path)
    loaded = LoopMDM.from_pretrained(tmp_path)
    assert loaded.cfg == arm.cfg and torch.equal(loaded(batch.tokens, n_loops=3), arm(batch.tokens, n_loops=3))
    arm.save_pretrained(tmp_path, dtype=torch.float16)
    assert LoopMDM.from_pretrained(tmp_path)(batch.tokens)[..., :-1].isfinite().all()


def test_weights_of_another_arm_are_refused(tmp_path):
    toy_model(**INJECTED).save_pretrained(tmp_path)
    toy_config().save(tmp_path / "config.json")
    with pytest.raises(UsageError, match=r"has unexpected injection\.weight"):
        LoopMDM.from_pretrained(tmp_path)
    toy_model().save_pretrained(tmp_path)
    toy_config(**SANDWICH).save(tmp_path / "config.json")
    with pytest.raises(UsageError, match=r"lacks blocks\.1\.ln1_post\.bias"):
        LoopMDM.from_pretrained(tmp_path)


def test_a_model_in_double_is_double(arm, batch):
    assert arm.double()(batch.tokens, n_loops=3).dtype == torch.float64


def test_a_compiled_model_gives_the_same(arm, batch):
    whole = torch.compile(HookedLoopMDM(arm), backend="eager")  # by dynamo alone
    torch.testing.assert_close(whole(batch.tokens, n_loops=3), arm(batch.tokens, n_loops=3), **CLOSE)


# --- looping other layers ---


def test_other_layers_can_loop_where_every_layer_is_alike(batch):
    injected = uneven(toy_model(**INJECTED))
    other = injected.looping(0, 2, 5)
    assert torch.equal(other(batch.tokens, n_loops=1), injected(batch.tokens, n_loops=1))
    torch.testing.assert_close(other(batch.tokens, n_loops=3)[..., :-1], Naive(other)(batch.tokens, 3), **CLOSE)
    sandwich = uneven(toy_model(**SANDWICH))
    same = sandwich.looping(1, 2, 9)
    assert torch.equal(same(batch.tokens, n_loops=9), sandwich(batch.tokens, n_loops=9))


@pytest.mark.parametrize(
    ("changes", "place", "says"),
    [
        (SANDWICH, (0, 2, 3), r"only layers \[1, 2\] have norms after attention and MLP; no others can loop"),
        (SANDWICH, (1, 1, 3), r"only layers \[1, 2\] have norms"),
        (SCALED, (0, 2, 3), r"layers \[1, 2\] add 1 / sqrt\(3\) of what they compute"),
        (SCALED, (1, 2, 4), "max_loops must stay 3"),
    ],
)
def test_looping_what_is_not_alike_is_refused_in_one_line(changes, place, says):
    with pytest.raises(UsageError, match=says) as said:
        toy_model(**changes).looping(*place)
    assert "\n" not in str(said.value)


# --- seen from outside ---


def test_facts_say_what_holds(arm):
    cfg = arm.cfg
    assert arm.facts.additive == (cfg.input_injection == "none")
    assert arm.facts.linear_heads == (not cfg.sandwich_norm)
    assert arm.facts.nested and len(arm.facts.remarks) >= 1


def test_within_a_layer_the_stream_is_a_sum_and_between_loops_only_if_facts_say_so(arm, batch):
    m = HookedLoopMDM(arm)
    _, cache = m.run_with_cache(batch.tokens, n_loops=3)
    for loop in range(3):
        for layer in arm.cfg.layers("loop"):
            parts = [cache[f"loop.{loop}.blocks.{layer}.hook_{x}"] for x in ("resid_pre", "attn_out", "mlp_out")]
            torch.testing.assert_close(cache["resid_post", "loop", loop, layer], sum(parts), **CLOSE)
        first, state = arm.cfg.layers("loop")[0], cache[f"loop.{loop}.hook_in"]
        entering = cache["resid_pre", "loop", loop, first]
        assert torch.equal(entering, state) == (arm.facts.additive or loop == 0)


def test_shown_output_weights_are_those_the_stream_meets(arm, batch):
    m = HookedLoopMDM(arm)
    names = lambda name: name.endswith(("hook_z", "hook_result", "hook_attn_out", "mlp.hook_post", "hook_mlp_out"))  # noqa: E731
    _, cache = m.run_with_cache(batch.tokens, n_loops=2, names_filter=names)
    for layer in arm.cfg.layers("loop"):
        result, added = cache["result", "loop", 1, layer], cache["attn_out", "loop", 1, layer]
        by_head = torch.einsum("bphd,hdm->bphm", cache["z", "loop", 1, layer], m.W_O[layer])
        torch.testing.assert_close(result, by_head, **CLOSE)
        through = cache["z", "loop", 1, layer].flatten(-2) @ arm.output_weight(layer).T + arm.output_bias(layer)
        assert torch.allclose(added, through, **CLOSE) == arm.facts.linear_heads
        assert torch.equal(m.b_O[layer], arm.output_bias(layer))
        mlp = cache["post", "loop", 1, layer] @ m.W_out[layer] + m.b_out[layer]
        assert torch.allclose(cache["mlp_out", "loop", 1, layer], mlp, **CLOSE) == arm.facts.linear_heads


def test_unrolled_values_are_the_looped_models_and_sums_close_or_are_refused(arm, batch):
    m = HookedLoopMDM(arm)
    deep = m.unrolled(3)
    assert torch.equal(deep(batch.tokens), m(batch.tokens, n_loops=3)[..., :-1])
    _, cache = deep.run_with_cache(batch.tokens)
    last, layers = cache["resid_post", -1], deep.cfg.n_layers
    sums = {
        "decompose_resid": lambda: cache.decompose_resid(layers).sum(0),
        "stack_head_results": lambda: cache.stack_head_results(layers, incl_remainder=True).sum(0),
        "get_full_resid_decomposition": lambda: cache.get_full_resid_decomposition(layers).sum(0),
        "stack_neuron_results": lambda: cache.stack_neuron_results(layers, incl_remainder=True).sum(0),
    }
    for name, total in sums.items():
        lacking = "additive" if not arm.facts.additive else "linear_heads"
        if arm.facts.additive and (arm.facts.linear_heads or name == "decompose_resid"):
            torch.testing.assert_close(total(), last, **CLOSE)
            continue
        with pytest.raises(UsageError, match=rf"^{name} needs .*facts\.{lacking} = False") as said:
            total()
        assert "\n" not in str(said.value)
    if arm.facts.additive and arm.facts.linear_heads:
        deep.accumulated_bias(layers - 1)
    else:
        with pytest.raises(UsageError, match=r"^accumulated_bias needs"):
            deep.accumulated_bias(layers - 1)


def test_writing_in_place_into_the_first_state_is_returning_a_value(batch):
    def halved(value, hook):
        return value * 0.5

    def halved_in_place(value, hook):
        value.mul_(0.5)

    m, found = HookedLoopMDM(uneven(toy_model(**INJECTED))), []
    for hook in (halved, halved_in_place):
        with m.hooks([("loop.0.hook_in", hook)]):
            found.append(m(batch.tokens, n_loops=3))
    assert torch.equal(*found)


def test_a_loop_from_a_context_without_a_prelude_is_refused(batch):
    arm = toy_model(**INJECTED)
    context = arm.context(batch.tokens)
    with pytest.raises(UsageError, match=r"need what its prelude left: take state and context from m\.states"):
        arm.loop(arm.embed(batch.tokens), context, 0)


def test_skipping_layers_leaves_only_the_carry(batch):
    """With every looped layer skipped an injected state stays e, as a plain one does."""
    m = HookedLoopMDM(uneven(toy_model(**INJECTED)))
    with skip(m):
        states = [state for state, _ in m.states(batch.tokens, 3)]
    context = m.model.context(batch.tokens)
    torch.testing.assert_close(states[-1], m.model.prelude(batch.tokens, context), **CLOSE)


# --- refusals of the config, and logits of two loops ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"input_injection": "concat"}, 'input_injection must be "none" or "decay"'),
        ({"input_injection": True}, "input_injection"),
        ({"sandwich_norm": "yes"}, "sandwich_norm must be true or false"),
        ({"scaled_residual": 0.5}, "scaled_residual must be true or false"),
        (SANDWICH | SCALED, "take one of them"),
    ],
)
def test_senseless_arms_are_refused_in_one_line(changes, says):
    with pytest.raises(UsageError, match=says) as said:
        toy_config(**changes)
    assert "\n" not in str(said.value)


def test_logits_of_an_earlier_loop_come_with_the_last(arm, batch):
    both = arm(batch.tokens, n_loops=4, earlier=2)
    assert torch.equal(both, torch.stack([arm(batch.tokens, n_loops=n) for n in (2, 4)]))
    for earlier, says in ((4, "earlier must be below n_loops 4, got 4"), (0, "earlier"), (1.5, "earlier")):
        with pytest.raises(UsageError, match=says):
            arm(batch.tokens, n_loops=4, earlier=earlier)
