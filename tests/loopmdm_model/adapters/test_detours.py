"""What recorders and listeners do belongs to the call that put them there."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from loopmdm.model import sites
from loopmdm.model.adapters import hook_model
from loopmdm.model.adapters.detours import Detour, aside
from tests.loopmdm_model.adapters import natives

INSIDE = ("hook_attn_out", "hook_mlp_out", "attn.hook_q", "attn.hook_pattern", "attn.hook_result", "attn.hook_z")


@pytest.fixture(scope="module")
def native():
    return natives.native("Llama")


@pytest.fixture(scope="module")
def m(native):
    return hook_model(native, loop=(1, 2), max_loops=3)


def doubled(native, x):
    return 2 * native(x)


def test_a_detour_ends_where_it_closes():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    plain = layer(x)
    with Detour({layer: doubled}).open():
        assert torch.equal(layer(x), 2 * plain)
        with aside():
            assert torch.equal(layer(x), plain)
        with Detour({}).open():  # the innermost is in force
            assert torch.equal(layer(x), plain)
    assert "forward" not in layer.__dict__ and torch.equal(layer(x), plain)


def test_another_librarys_forward_comes_back():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    theirs = lambda x: nn.Linear.forward(layer, x) + 1  # noqa: E731
    layer.forward = theirs
    plain = layer(x)
    with Detour({layer: doubled}).open():
        assert torch.equal(layer(x), 2 * plain)
    assert layer.__dict__["forward"] is theirs and torch.equal(layer(x), plain)


def test_a_forward_put_on_top_meanwhile_stays():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    theirs = lambda x: x  # noqa: E731
    with Detour({layer: doubled}).open():
        layer.forward = theirs
    assert layer.__dict__["forward"] is theirs and torch.equal(layer(x), x)


def test_detours_of_two_threads_over_one_module_close_in_any_order():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    plain, opened, closed = layer(x), threading.Event(), threading.Event()
    found = {}

    def work():
        with torch.no_grad(), Detour({layer: lambda native, x: 3 * native(x)}).open():
            opened.set()
            closed.wait(30)
            found["theirs"] = layer(x)

    thread = threading.Thread(target=work)
    with Detour({layer: doubled}).open():
        thread.start()
        opened.wait(30)
        assert torch.equal(layer(x), 2 * plain)
    assert torch.equal(layer(x), plain)
    closed.set()
    thread.join()
    assert torch.equal(found["theirs"], 3 * plain)
    assert "forward" not in layer.__dict__


def test_a_native_call_of_another_thread_is_the_native_one(m, native):
    tokens = natives.tokens()
    plain = native(tokens, use_cache=False).logits
    inside, done = threading.Event(), threading.Event()

    def wait(x, hook):
        inside.set()
        done.wait(30)
        return x * 0

    def work():
        with torch.no_grad():
            m.run_with_hooks(tokens, 1, fwd_hooks=[(f"loop.0.blocks.1.{leaf}", wait) for leaf in INSIDE])

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(30)
    assert torch.equal(native(tokens, use_cache=False).logits, plain)
    assert torch.equal(m(tokens, 1), plain)
    done.set()
    thread.join()


def test_many_threads_enter_listen_and_call_natively(m, native):
    tokens = [natives.tokens(batch=2 + i % 2, seed=i, length=6 + i) for i in range(4)]
    plain = [native(ids, use_cache=False).logits for ids in tokens]
    hooks = [(sites.at(leaf=INSIDE), lambda x, hook: x * 0.5)]
    edited = [m.run_with_hooks(ids, 2, fwd_hooks=hooks) for ids in tokens]

    def work(number):
        ids, kind = tokens[number % 4], number // 4 % 3
        with torch.no_grad():
            if kind == 0:
                return torch.equal(native(ids, use_cache=False).logits, plain[number % 4])
            if kind == 1:
                return torch.equal(m.run_with_hooks(ids, 2, fwd_hooks=hooks), edited[number % 4])
            return torch.equal(m(ids, 1), plain[number % 4])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(120)))
    assert not any("forward" in module.__dict__ for module in native.modules())


@pytest.mark.parametrize("leaf", INSIDE)
def test_a_hook_may_call_the_model_itself(m, native, leaf):
    tokens = natives.tokens()
    plain, whole = native(tokens, use_cache=False).logits, m(tokens, 3)
    seen = []

    def look(x, hook):
        seen.append(torch.equal(native(tokens, use_cache=False).logits, plain))
        with m.hooks([]):
            seen.append(torch.equal(m.model(tokens, 3), whole))

    m.run_with_hooks(tokens, 1, fwd_hooks=[(f"loop.0.blocks.1.{leaf}", look)])
    assert seen == [True, True]


def test_what_a_hook_calls_is_not_heard_by_another(m, native):
    tokens, heard = natives.tokens(), []

    def look(x, hook):
        native(tokens, use_cache=False)
        m.model(tokens, 3)

    hooks = [("loop.0.blocks.1.attn.hook_q", look)]
    hooks += [("loop.0.blocks.1.attn.hook_pattern", lambda x, hook: heard.append(hook.name))]
    m.run_with_hooks(tokens, 1, fwd_hooks=hooks)
    assert len(heard) == 1


def test_an_unfinished_trajectory_leaves_the_native_model_alone(m, native):
    tokens = natives.tokens()
    plain = native(tokens, use_cache=False).logits
    walk = m.states(tokens, 3)
    next(walk)
    assert torch.equal(native(tokens, use_cache=False).logits, plain)
    assert not any("forward" in module.__dict__ for module in native.modules())
