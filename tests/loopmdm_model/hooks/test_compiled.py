"""A compiled model gives what the same model gives uncompiled, whatever listens or acts on it afterwards."""

from contextlib import contextmanager

import pytest
import torch

from loopmdm.analysis.measures.interventions import cut, damp, freeze, patch, skip, stale
from loopmdm.model.adapters import hook_model
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from tests.conftest import toy_model


def compiled(function, **options):
    """By dynamo alone: no C++ compiler is needed."""
    return torch.compile(function, backend="eager", **options)


@contextmanager
def standing(m):
    m.add_hook("blocks.0.attn.hook_z", nothing)
    try:
        yield
    finally:
        m.reset_hooks()


def nothing(value, hook):
    return torch.zeros_like(value)


def in_place(value, hook):
    value.mul_(0.5)


ACTS = {
    "damp": lambda m: damp(m, 0.3),
    "skip": skip,
    "freeze": lambda m: freeze(m, "clean"),
    "stale": stale,
    "cut": cut,
    "patch": lambda m: patch(m, 1, torch.ones(4, 10, 16)),
    "name": lambda m: m.hooks([("loop.1.blocks.1.hook_mlp_out", nothing)]),
    "predicate": lambda m: m.hooks([(lambda name: name.endswith("hook_pattern"), nothing)]),
    "in place": lambda m: m.hooks([("loop.1.hook_out", in_place)]),
    "standing": standing,
}


def whole(m):
    return compiled(m)


def by_a_function(m):
    return compiled(lambda tokens, n_loops: m(tokens, n_loops))


def by_run(m):
    return compiled(lambda tokens, n_loops: m.run(tokens, n_loops).logits)


def in_blocks(m):
    for block in m.model.blocks:
        block.compile(backend="eager", dynamic=False)
    return m


def in_place_core(m):
    m.model.compile(backend="eager")
    return m


def replaced_core(m):
    m.model = compiled(m.model)
    return m


OTHERS = [pytest.param(way, marks=pytest.mark.slow) for way in (by_a_function, by_run, in_place_core)]


@pytest.mark.parametrize("compile_", [whole, in_blocks, replaced_core, *OTHERS])
def test_hooks_and_interventions_act_on_a_compiled_model(compile_, batch):
    torch.compiler.reset()
    m, reference = HookedLoopMDM(toy_model()), HookedLoopMDM(toy_model())
    fast, plain = compile_(m), reference(batch.tokens, 3)[..., :-1]
    torch.testing.assert_close(fast(batch.tokens, 3)[..., :-1], plain)
    for name, act in ACTS.items():
        with act(m), act(reference):
            found, wanted = fast(batch.tokens, 3)[..., :-1], reference(batch.tokens, 3)[..., :-1]
        assert not torch.allclose(wanted, plain, atol=1e-3), name
        torch.testing.assert_close(found, wanted, msg=name)
    torch.testing.assert_close(fast(batch.tokens, 3)[..., :-1], plain)


def test_a_compiled_run_fills_its_cache(batch):
    torch.compiler.reset()
    m, reference = HookedLoopMDM(toy_model()), HookedLoopMDM(toy_model())
    run = compiled(lambda tokens: dict(m.run_with_cache(tokens, 3)[1]))
    found, wanted = run(batch.tokens), dict(reference.run_with_cache(batch.tokens, 3)[1])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_a_block_opened_inside_compiled_code_acts(batch):
    torch.compiler.reset()
    m = HookedLoopMDM(toy_model())

    def damped(tokens):
        with damp(m, 0.3):
            return m(tokens, 3)[..., :-1]

    torch.testing.assert_close(compiled(damped)(batch.tokens), damped(batch.tokens))


def test_the_unrolled_model_hears_when_compiled(batch):
    torch.compiler.reset()
    u = HookedLoopMDM(toy_model()).unrolled(3)
    fast, plain = compiled(u), u(batch.tokens)
    torch.testing.assert_close(fast(batch.tokens), plain)
    with u.hooks([("blocks.2.hook_resid_post", nothing)]):
        found, wanted = fast(batch.tokens), u(batch.tokens)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    torch.testing.assert_close(found, wanted)


def test_somebody_elses_compiled_parts_are_refused_before_and_after_hooking():
    from tests.loopmdm_model.adapters.natives import native, tokens

    given = native("Bert")
    m = hook_model(given, loop=(1, 2), max_loops=3, mask_token_id=4)
    m(tokens())
    given.bert.encoder.layer[1].compile(backend="eager")
    with pytest.raises(UsageError, match=r"bert\.encoder\.layer\.1 is compiled and hears nobody"):
        m(tokens())
    replaced = native("Bert")
    m = hook_model(replaced, loop=(1, 2), max_loops=3, mask_token_id=4)
    replaced.bert.encoder.layer[2] = compiled(replaced.bert.encoder.layer[2])
    with pytest.raises(UsageError, match=r"bert\.encoder\.layer\.2 is compiled and hears nobody"):
        m(tokens())
    with pytest.raises(UsageError, match="is compiled and hears nobody; give the model as it was before"):
        hook_model(given, loop=(1, 2), max_loops=3, mask_token_id=4)
    with pytest.raises(UsageError, match="is compiled and hears nobody"):
        hook_model(compiled(native("Bert")), loop=(1, 2), mask_token_id=4)
