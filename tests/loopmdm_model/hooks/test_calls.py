"""What a call does belongs to the call: threads, generators and blocks closed in any order leave others alone."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch

from loopmdm.analysis.measures.interventions import cut, damp, freeze, patch, skip, stale
from loopmdm.model import sites
from loopmdm.model.diffusion.likelihood import nelbo
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sites import at
from loopmdm.model.stopping.rules import StateDelta
from tests.conftest import toy_config, toy_model

BLOCKS = {
    "cut": lambda m: cut(m, "masked->masked"),
    "stale": stale,
    "damp": lambda m: damp(m, 0.5),
    "freeze": freeze,
    "skip": lambda m: skip(m, 1),
    "patch": lambda m: patch(m, 0, torch.ones(4, 10, 16)),
    "path": lambda m: m.attention_path("eager"),
    "hooks": lambda m: m.hooks([("hook_embed", lambda x, hook: x + 1)]),
}


@pytest.fixture
def plain(hooked, batch):
    return hooked(batch.tokens, n_loops=3, attn_path="eager")


def read(m, batch):
    return m(batch.tokens, n_loops=3, attn_path="eager")


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_one_thread_does_not_reach_another(hooked, batch, plain, name):
    inside, done, found = threading.Event(), threading.Event(), {}

    def work():
        with BLOCKS[name](hooked), torch.no_grad():
            found["changed"] = read(hooked, batch)
            inside.set()
            done.wait(30)
            found["again"] = read(hooked, batch)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(30)
    assert torch.equal(read(hooked, batch), plain)
    assert hooked.attn_path == "auto"
    done.set()
    thread.join()
    assert torch.equal(found["changed"], found["again"])
    assert (name == "path") == torch.equal(found["changed"], plain)


def test_many_threads_cache_and_cut_one_model(hooked, batch, plain):
    expected = {}
    for name in ("cut", "damp", "hooks"):
        with BLOCKS[name](hooked):
            expected[name] = hooked.run_with_cache(batch.tokens, n_loops=3, attn_path="eager")[1]

    def work(number):
        name = ("cut", "damp", "hooks", None)[number % 4]
        with torch.no_grad():
            if name is None:
                return torch.equal(read(hooked, batch), plain)
            with BLOCKS[name](hooked):
                _, cache = hooked.run_with_cache(batch.tokens, n_loops=3, attn_path="eager")
            return all(torch.equal(cache[key], value) for key, value in expected[name].items())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(48)))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_generator_suspended_inside_a_block_leaves_other_calls_alone(hooked, batch, plain, name):
    def inside():
        with BLOCKS[name](hooked):
            while True:
                yield read(hooked, batch)

    walk = inside()
    changed = next(walk)
    assert torch.equal(read(hooked, batch), plain)
    assert hooked.attn_path == "auto"
    assert torch.equal(next(walk), changed)  # it still acts on what the generator itself calls
    assert (name == "path") == torch.equal(changed, plain)
    walk.close()
    assert torch.equal(read(hooked, batch), plain)


def test_a_block_opened_in_a_generator_that_reaches_nothing_says_so(hooked, batch):
    def inside():
        with cut(hooked):
            yield

    walk = inside()
    next(walk)
    read(hooked, batch)
    with pytest.warns(UserWarning, match="1 calls were left as they were"):
        walk.close()


def test_blocks_made_of_other_blocks_reach_their_body(hooked, batch, plain):
    @contextmanager
    def both():
        with cut(hooked), ExitStack() as stack:
            stack.enter_context(damp(hooked, 0.5))
            yield

    class Opened:
        def __enter__(self):
            self.block = cut(hooked)
            self.block.__enter__()

        def __exit__(self, *error):
            self.block.__exit__(*error)

    with cut(hooked), damp(hooked, 0.5):
        nested = read(hooked, batch)
    with both():
        assert torch.equal(read(hooked, batch), nested)
    with cut(hooked):
        one = read(hooked, batch)
    with Opened():
        assert torch.equal(read(hooked, batch), one)
    assert torch.equal(read(hooked, batch), plain)


def test_blocks_may_close_in_another_order_than_they_opened(hooked, batch, plain):
    first, second = cut(hooked), damp(hooked, 0.5)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with damp(hooked, 0.5):
        pass
    alone = read(hooked, batch)
    second.__exit__(None, None, None)
    with damp(hooked, 0.5):
        assert torch.equal(read(hooked, batch), alone)
    assert torch.equal(read(hooked, batch), plain)


@pytest.mark.parametrize("path", ["sdpa", "eager"])
def test_an_unfinished_trajectory_pins_nothing(hooked, batch, path):
    walk = hooked.states(batch.tokens, 6, attn_path=path)
    next(walk)
    assert hooked.attn_path == "auto"
    assert "loop.0.blocks.1.attn.hook_pattern" in hooked.run_with_cache(batch.tokens, n_loops=2)[1]


def test_a_trajectory_keeps_the_hooks_it_began_with(hooked, batch):
    with cut(hooked):
        whole = [state for state, _ in hooked.states(batch.tokens, 3)]
        begun = hooked.states(batch.tokens, 3)
    for state, (late, _) in zip(whole, begun, strict=True):
        assert torch.equal(state, late)


@pytest.mark.parametrize("name", ["damp", "freeze", "stale"])
def test_interleaved_runs_do_not_mix_what_an_intervention_remembers(hooked, batch, name):
    other = batch.tokens.flip(0)
    with BLOCKS[name](hooked):
        alone = [[state for state, _ in hooked.states(tokens, 3)] for tokens in (batch.tokens, other)]
        pairs = zip(hooked.states(batch.tokens, 3), hooked.states(other, 3), strict=True)
        for loop, ((one, _), (two, _)) in enumerate(pairs):
            assert torch.equal(one, alone[0][loop]) and torch.equal(two, alone[1][loop])


def test_the_context_is_that_of_the_call_whose_hook_runs(hooked, batch):
    seen = []

    def look(x, hook):
        outer = hooked.context.tokens
        if len(outer) == 4:  # a call inside a hook has a context of its own, and leaves this one
            hooked(batch.tokens[:2], n_loops=1)
        seen.append((len(outer), hooked.context.tokens is outer))

    hooked.run_with_hooks(batch.tokens, n_loops=1, fwd_hooks=[("loop.0.hook_in", look)])
    assert seen == [(2, True), (4, True)]
    with pytest.raises(UsageError, match="no hook of this model is running"):
        _ = hooked.context
    masked = []
    hooked.run_with_hooks(
        batch.tokens, fwd_hooks=[("hook_embed", lambda x, hook: masked.append(hooked.context.masked))]
    )
    assert torch.equal(masked[0], batch.masked)


def test_hooks_put_on_the_model_stay_and_reach_every_thread(hooked, batch, plain):
    hook = ("hook_embed", lambda x, hook: x + 1)
    changed = hooked.run_with_hooks(batch.tokens, n_loops=3, attn_path="eager", fwd_hooks=[hook])
    assert torch.equal(read(hooked, batch), plain)
    hooked.run_with_hooks(batch.tokens, fwd_hooks=[hook], reset_hooks_end=False)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: read(hooked, batch)).result(), changed)
    hooked.reset_hooks()
    assert torch.equal(read(hooked, batch), plain)


def test_resetting_inside_a_block_ends_its_hooks(hooked, batch, plain):
    with cut(hooked):
        hooked.reset_hooks()
        assert torch.equal(read(hooked, batch), plain)


def test_a_hook_remembers_in_its_ctx_until_it_is_cleared(hooked, batch):
    def note(x, hook):
        hook.ctx["norm"] = float(x.norm())

    hooked.run_with_hooks(batch.tokens, fwd_hooks=[("hook_embed", note)])
    assert hooked.hook_dict["hook_embed"].ctx["norm"] > 0
    hooked.run_with_hooks(batch.tokens, fwd_hooks=[("hook_embed", note)], clear_contexts=True)
    assert not hooked.hook_dict["hook_embed"].ctx


def test_hook_points_tell_layer_and_loop(hooked, batch):
    seen = []
    with hooked.hooks(
        [(lambda name: name.endswith("pattern"), lambda x, hook: seen.append((hook.layer(), hook.loop())))]
    ):
        hooked(batch.tokens, n_loops=2)
    assert seen == [(0, None), (1, 0), (2, 0), (1, 1), (2, 1), (3, None)]


def test_backward_hooks_of_a_block_fire(hooked, batch):
    gradients = []
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with hooked.hooks(bwd_hooks=[("loop.1.hook_out", lambda grad, hook: gradients.append(grad.clone()))]):
            hooked(batch.tokens, n_loops=2)[..., :22].sum().backward()
    assert len(gradients) == 1 and gradients[0].shape == (4, 10, 16)


def test_likelihood_in_one_thread_is_not_touched_by_a_cut_in_another(model, clean):
    m = HookedLoopMDM(model)
    alone = nelbo(m, clean, n_loops=3, n_samples=4)
    with cut(m):
        changed = nelbo(m, clean, n_loops=3, n_samples=4)

    def work(cutting):
        if not cutting:
            return nelbo(m, clean, n_loops=3, n_samples=4).mean
        with cut(m):
            return nelbo(m, clean, n_loops=3, n_samples=4).mean

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, [True, False] * 8))
    assert found == [changed.mean, alone.mean] * 8


# --- one tensor under several names ---


def halved(value, hook):
    return value * 0.5


def halved_in_place(value, hook):
    value.mul_(0.5)


@pytest.mark.parametrize("name", sites.all_names(toy_config(gated_mlp=True), 3))
def test_writing_in_place_is_returning_a_value(name, batch):
    m = HookedLoopMDM(toy_model(gated_mlp=True))
    caches, runs = [], []
    for hook in (halved, halved_in_place):
        with m.hooks([(name, hook)]):
            caches.append(m.run_with_cache(batch.tokens, n_loops=3, names_filter=lambda name: True)[1])
            runs.append(m.run(batch.tokens, stop=StateDelta(0.3, max_loops=3), attn_path="eager"))
    assert caches[0].keys() == caches[1].keys()
    for each in caches[0]:
        assert torch.equal(caches[0][each], caches[1][each]), each
    torch.testing.assert_close(runs[0].criterion, runs[1].criterion, equal_nan=True, rtol=0, atol=0)
    m.add_hook(name, halved_in_place)
    _, again = m.run_with_cache(batch.tokens, n_loops=3, names_filter=lambda name: True)
    assert all(torch.equal(again[each], caches[0][each]) for each in again)


@pytest.mark.parametrize("name", ["damp", "freeze", "stale"])
def test_what_interventions_remember_is_not_written_into(hooked, batch, name):
    found = []
    for hook in (halved, halved_in_place):
        with BLOCKS[name](hooked), hooked.hooks([("loop.1.hook_in", hook), ("loop.1.blocks.1.attn.hook_v", hook)]):
            found.append(read(hooked, batch))
    assert torch.equal(found[0], found[1])


def test_a_cache_and_a_donor_stay_what_they_were(hooked, batch):
    logits, cache = hooked.run_with_cache(batch.tokens, n_loops=3, names_filter=lambda name: True)
    before = {name: value.clone() for name, value in cache.items()}
    logits.zero_()
    cache["loop.0.hook_out"].add_(1)
    before["loop.0.hook_out"] += 1
    donor = cache["loop.2.hook_out"]
    with patch(hooked, 1, donor), hooked.hooks([(at(leaf="hook_in"), halved_in_place)]):
        read(hooked, batch)
    for name, value in cache.items():
        assert torch.equal(value, before[name]), name
    whole = [state.clone() for state, _ in hooked.states(batch.tokens, 3)]
    for state, (changed, _) in zip(whole, hooked.states(batch.tokens, 3), strict=True):
        assert torch.equal(state, changed)
        changed.zero_()
