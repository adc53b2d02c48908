"""What is nearly right ends in one line that names the argument, never in words of Python or torch."""

import copy
import multiprocessing

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis import read_loops
from loopmdm.analysis.measures import Access
from loopmdm.analysis.plots.attention import plot_mass_by_loop
from loopmdm.analysis.plots.quality import plot_nll_by_loops
from loopmdm.model.adapters import open_model
from loopmdm.model.diffusion.likelihood import nelbo
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.sequences import MaskedBatch
from tests.conftest import toy_model

META = torch.zeros(1, 10, dtype=torch.long, device="meta")


@pytest.fixture(scope="module")
def sotu():
    return HookedLoopMDM.from_pretrained("sotu-loop")


def refused(says, ask):
    with pytest.raises(UsageError, match=says) as told:
        ask()
    assert type(told.value).__module__ == "loopmdm.model.errors" and "\n" not in str(told.value)


def test_a_masked_batch_goes_in_wherever_ids_do(hooked, batch):
    wanted = hooked(batch.tokens, n_loops=2)
    assert torch.equal(hooked(batch, n_loops=2), wanted)
    assert torch.equal(hooked.run(batch, n_loops=2).logits, wanted)
    torch.testing.assert_close(hooked.run_with_cache(batch, n_loops=2)[0], wanted, atol=1e-3, rtol=1e-3)
    assert len(list(hooked.states(batch, 2))) == 2
    m = HookedLoopMDM.from_pretrained("sudoku-loop")
    b = m.mask("123456456123231564564231312645645312", 0.5)
    assert torch.equal(m(b), m(b.tokens))


@pytest.mark.parametrize(
    "ids", [5.0, [1.5], "abc", None, [[1], [2, 3]], torch.ones(3), [True], 2**70, [-1], [99_999]]
)
def test_ids_to_text(sotu, ids):
    for ask in (sotu.to_string, *([] if ids == "abc" else [sotu.to_str_tokens])):
        refused("ids must be integers|token id .* is outside|one sequence", lambda ask=ask: ask(ids))


def test_to_string_and_back_by_hand(sotu):
    refused(r"\[pos\] or \[batch, pos\]", lambda: sotu.to_string(5))
    refused("one sequence, got 2", lambda: sotu.to_str_tokens(torch.zeros(2, 3, dtype=torch.long)))
    refused("ids must be integers", lambda: sotu.to_str_tokens(["a", "b"]))
    assert sotu.to_string(np.array([64, 65])) == sotu.to_string([64, 65]) == "ab"
    for given in (None, 5, b"abc", [], [1, "a"]):
        refused("give a text or a list of texts", lambda given=given: sotu.to_tokens(given))
    for ask in (lambda: sotu.to_single_str_token("a"), lambda: sotu.get_token_position([1, 2], "a")):
        refused("must be an integer", ask)


@pytest.mark.parametrize("seed", [-1, 1.5, "a", None, True, 2**128, 2**130, float("nan"), torch.tensor([1, 2])])
def test_odd_seeds(model, clean, seed):
    for ask in (
        lambda: mask_tokens(clean, 22, mask_ratio=0.5, seed=seed),
        lambda: sample(model, steps=1, seed=seed),
        lambda: nelbo(model, clean, n_samples=1, seed=seed),
    ):
        refused("^seed must be", ask)


def test_the_largest_seed_is_one(model, clean):
    assert mask_tokens(clean, 22, mask_ratio=0.5, seed=2**63 - 1).masked.any()
    refused("first_index must be at most", lambda: sample(model, steps=1, first_index=2**64))
    refused("steps must be at most", lambda: sample(model, steps=10**30))


def test_tensors_without_values(hooked, sotu, clean):
    real = torch.ones(4, 10, dtype=torch.bool, device="meta")
    for ask in (
        lambda: hooked(META),
        lambda: hooked.run(META),
        lambda: hooked.run_with_cache(META),
        lambda: hooked.mask(META, 0.5),
        lambda: nelbo(hooked, META),
        lambda: mask_tokens(META, 22, mask_ratio=0.5),
        lambda: sample(hooked, prompt=META),
        lambda: sample(hooked, clues=META),
        lambda: sotu.to_string(META),
        lambda: sotu.to_str_tokens(META),
        lambda: hooked(clean, attention_mask=real),
        lambda: hooked.mask(clean, 0.5, maskable=real),
        lambda: MaskedBatch(META, META, META == 22),
    ):
        refused('on the device "meta" and have no values', ask)


@pytest.mark.parametrize("device", ["xyz", "cuda:99", 5.5])
def test_devices_that_are_not_here(hooked, batch, device):
    for ask in (
        lambda: LoopMDM.from_pretrained("markov-loop", device),
        lambda: HookedLoopMDM.from_pretrained("markov-loop", device),
        lambda: open_model("markov-loop", device),
        lambda: Access(device=device).open("markov-loop"),
        lambda: hooked.run_with_cache(batch.tokens, device=device),
        lambda: hooked.run_with_cache(batch.tokens)[1].to(device),
        lambda: hooked.unrolled(1).run_with_cache(batch.tokens, device=device),
    ):
        refused("device .* cannot be used here .*; there is .*cpu$", ask)


def test_a_device_may_be_left_to_what_is_there(hooked, batch):
    """Wherever a device is named, "auto" is a GPU if there is one."""
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    for found in (
        LoopMDM.from_pretrained("markov-loop", "auto").device,
        HookedLoopMDM.from_pretrained("markov-loop", "auto").device,
        open_model("markov-loop", "auto").device,
        Access(device="auto").open("markov-loop").device,
        hooked.run_with_cache(batch.tokens, device="auto")[1]["hook_embed"].device,
        hooked.run_with_cache(batch.tokens)[1].to("auto")["hook_embed"].device,
        hooked.unrolled(1).run_with_cache(batch.tokens, device="auto")[1]["hook_embed"].device,
    ):
        assert found.type == wanted


@pytest.mark.parametrize("mask_id", [None, "a", 6.5, -1, 2**70])
def test_ids_of_mask(clean, mask_id):
    refused("mask_token_id must be", lambda: mask_tokens(clean, mask_id, mask_ratio=0.5))


def test_what_a_sampler_is_given(model):
    for callback in (3, [3], "a"):
        refused("callback must be a function", lambda callback=callback: sample(model, steps=1, callback=callback))
    refused("sample takes a LoopMDM", lambda: sample(None))
    refused("nelbo takes a LoopMDM", lambda: nelbo("sotu-loop", META))
    refused("the size of blocks must be at most", lambda: sample(model, steps=1, order=f"blocks:{2**70}"))


def test_batches_that_do_not_fit(clean):
    masked = clean == 6
    for fields, says in (
        ((clean, clean[:, :5], masked), r"one shape: clean is \[4, 5\], tokens \[4, 10\]"),
        ((clean, clean, masked[:2]), r"masked is \[2, 10\]"),
        ((clean, clean, None), "masked is NoneType"),
        ((clean, clean, masked.long()), "masked must be boolean"),
        ((clean, clean + 1, masked), "equal wherever nothing is masked"),
        ((clean, clean, masked | True, masked), "not maskable"),
        ((clean, clean, masked, None, None, np.arange(3)), "clusters must name one per sequence"),
        ((clean.float(), clean, masked), "integer tensor"),
    ):
        refused(says, lambda fields=fields: MaskedBatch(*fields))


def test_what_hooks_return(hooked, batch):
    for give, says in (
        (lambda x, hook: (x,), "returned a tuple, expected a tensor of torch.float32"),
        (lambda x, hook: 3, "returned a int, expected"),
        (lambda x, hook: x.double(), "returned torch.float64, expected a tensor of torch.float32"),
        (lambda x, hook: x[:, :1], "returned shape"),
    ):
        hooks = [("loop.0.hook_in", give)]
        refused(says, lambda hooks=hooks: hooked.run_with_hooks(batch.tokens, fwd_hooks=hooks))


def total(logits):
    return logits[..., :22].log_softmax(-1)[..., 3].sum()


def test_gradients_of_frozen_models_are_those_of_free_ones(batch):
    m, frozen, partly = (HookedLoopMDM(toy_model()) for _ in range(3))
    frozen.requires_grad_(False)
    partly.model.embed.requires_grad_(False)
    with torch.enable_grad():
        free, *others = (
            each.run_with_cache(batch.tokens, 3, incl_bwd=True, loss_fn=total)[1] for each in (m, frozen, partly)
        )
        got = []
        with frozen.hooks(bwd_hooks=[("loop.1.hook_out", lambda x, hook: got.append(x.clone()))]):
            total(frozen(batch.tokens, 3)).backward()
        unrolled = frozen.unrolled(3).run_with_cache(batch, incl_bwd=True, return_type="loss")[1]
    for other in others:
        assert other.keys() == free.keys()
        for name, value in free.items():
            torch.testing.assert_close(other[name], value)
    torch.testing.assert_close(got[0], free["loop.1.hook_out_grad"])
    assert "blocks.0.hook_resid_pre_grad" in unrolled


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (None, "needs loss_fn="),
        (3, "needs loss_fn="),
        (lambda logits: logits, r"one number that depends on the logits, got \[4, 10, 23\]"),
        (lambda logits: None, "got NoneType"),
        (lambda logits: total(logits).detach(), "without gradient"),
    ],
)
def test_conditions_of_incl_bwd(hooked, batch, loss, says):
    with torch.enable_grad():
        refused(says, lambda: hooked.run_with_cache(batch.tokens, 2, incl_bwd=True, loss_fn=loss))
        refused('return_type="loss"', lambda: hooked.unrolled(2).run_with_cache(batch, incl_bwd=True))
    refused("enable_grad", lambda: hooked.run_with_cache(batch.tokens, 2, incl_bwd=True, loss_fn=total))
    refused("enable_grad", lambda: hooked.unrolled(2).run_with_cache(batch, incl_bwd=True, return_type="loss"))


def test_plots_without_rows(hooked, batch):
    for plot in (plot_mass_by_loop, plot_nll_by_loops):
        with pytest.raises(ValueError, match=f"{plot.__name__}: the frame has no rows"):
            plot(pd.DataFrame())
        with pytest.raises(ValueError, match=r"plot_\w+: the frame has no column"):
            plot(pd.DataFrame({"x": [1]}))
    refused("sequence 9 is not among the 4", lambda: read_loops(hooked, batch, n_loops=2).plot(sequence=9))


def answer(m, tokens):
    with torch.no_grad():
        return m(tokens, n_loops=2)


@pytest.mark.slow
def test_a_model_goes_to_a_spawned_process_and_back(batch):
    m = HookedLoopMDM(toy_model())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(answer, (m, batch.tokens))
    torch.testing.assert_close(found, m(batch.tokens, n_loops=2))


def test_copies_hear_for_themselves(hooked, batch):
    twin, plain = copy.deepcopy(hooked), hooked(batch.tokens, 2)
    with twin.hooks([("loop.0.hook_out", lambda x, hook: x * 0)]):
        assert torch.equal(hooked(batch.tokens, 2), plain)
        assert not torch.equal(twin(batch.tokens, 2), plain)
