"""Other people's weights in a LoopMDM: the same logits, likelihoods and samples; everything else is refused."""

import pytest
import torch
from torch import nn

from loopmdm.model import HookedLoopMDM, LoopMDM, UsageError, nelbo, sample
from loopmdm.model.adapters import hook_model, to_loopmdm
from loopmdm.model.adapters.convert import traded
from tests.conftest import toy_model
from tests.loopmdm_model.adapters import natives, standins

LOOPED = {"loop": (1, 1), "max_loops": 3}


def opened(name, how=LOOPED, **sizes):
    native = standins.prepared(getattr(standins, name)(**sizes))
    for parameter in native.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.rand(len(parameter), generator=torch.Generator().manual_seed(3)) * 0.3
    return hook_model(native, **how)


@pytest.fixture(params=["LLaDAModelLM", "MDLM"])
def pair(request):
    m = opened(request.param)
    return m, to_loopmdm(m)


def words(m, batch=4):
    """Ids that neither [MASK] nor the last id is among, so both models call them the same."""
    return torch.randint(0, 20, (batch, 8), generator=torch.Generator().manual_seed(1))


def test_logits_are_those_of_the_weights_as_they_were(pair):
    m, ours = pair
    assert isinstance(ours.model, LoopMDM) and ours.cfg.mask_token_id == m.cfg.d_vocab - 1
    assert (ours.cfg.n_prelude_layers, ours.cfg.n_loop_layers, ours.cfg.n_coda_layers) == (1, 1, 1)
    assert ours.record["converted"] == m.record["family"]
    ids = words(m).masked_fill(words(m) % 3 == 0, m.cfg.mask_token_id)
    back = traded(torch.arange(m.cfg.d_vocab), m.cfg)
    keep = torch.ones_like(ids)
    keep[0, 5:] = 0
    for n_loops in (1, 2, 3):
        torch.testing.assert_close(
            ours(traded(ids, m.cfg), n_loops)[..., back], m(ids, n_loops), rtol=0.0, atol=1e-5
        )
    if m.record["family"] == "llada":  # MDLM knows no padding
        padded = ours(traded(ids, m.cfg), 2, attention_mask=keep)[..., back]
        torch.testing.assert_close(padded[0, :5], m(ids, 2, attention_mask=keep)[0, :5], rtol=0.0, atol=1e-5)
    assert torch.equal(traded(traded(ids, m.cfg), m.cfg), ids)


def test_likelihoods_are_the_same(pair):
    m, ours = pair
    theirs, converted = (nelbo(each, words(m), n_loops=2, n_samples=4, seed=0) for each in (m, ours))
    torch.testing.assert_close(converted.per_sequence, theirs.per_sequence, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "order", ["random", "confidence", "threshold:0.3", "path-planning", "blocks:4:entropy-bound:1"]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_are_the_same(pair, order, temperature):
    """Kept from drawing the id that traded places, both models draw from the same ids in the same order."""
    m, ours = pair
    last = m.cfg.d_vocab - 1
    arguments = {"n": 4, "length": 8, "steps": 4, "n_loops": 2, "order": order, "temperature": temperature}
    theirs = sample(m, **arguments, clues={2: 7}, suppress=[last])
    converted = sample(ours, **arguments, clues={2: 7}, suppress=[m.cfg.mask_token_id])
    assert torch.equal(converted.tokens, theirs.tokens) and torch.equal(converted.loops_used, theirs.loops_used)
    assert torch.equal(traded(converted.start, m.cfg), theirs.start)


def test_what_only_a_loopmdm_can_do(pair, tmp_path):
    m, ours = pair
    ids = traded(words(m).masked_fill(words(m) % 3 == 0, m.cfg.mask_token_id), m.cfg)
    logits, cache = ours.run_with_cache(ids, n_loops=2)
    unrolled = cache.unrolled()
    stream, _ = unrolled.accumulated_resid(return_labels=True, apply_ln=True)
    found = stream[-1] @ ours.W_U + ours.b_U
    torch.testing.assert_close(found[..., :-1], logits[..., :-1], rtol=0.0, atol=1e-5)
    ours.model.save_pretrained(tmp_path)
    again = HookedLoopMDM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids, 2), ours(ids, 2))
    before = [parameter.clone() for parameter in m.model.native.parameters()]
    with torch.enable_grad():
        ours(ids, 2)[..., 0].sum().backward()
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter += 1.0  # copies: the model that was opened stays what it was
    assert all(torch.equal(one, two) for one, two in zip(before, m.model.native.parameters(), strict=True))


def test_what_the_model_knows_of_texts_goes_along():
    m = opened("LLaDAModelLM")
    last = m.cfg.d_vocab - 1
    m.pad, m.special, m.gap_words = "<pad>", frozenset({3, last}), ("[MASK]", "_")
    ours = to_loopmdm(m)
    assert (ours.pad, ours.gap_words, ours.special) == ("<pad>", ("[MASK]", "_"), {3, m.cfg.mask_token_id})
    ids = traded(words(m), m.cfg)
    theirs, converted = (sample(each, 2, 8, steps=3, n_loops=2, temperature=0) for each in (m, ours))
    assert torch.equal(traded(converted.tokens, m.cfg), theirs.tokens)
    assert torch.equal(ours.words(ids), m.words(words(m)))


def test_a_model_in_float64_converts_as_far_as_its_rotary_tables_go():
    native = standins.prepared(standins.LLaDAModelLM()).double()
    m = hook_model(native, **LOOPED)
    ours = to_loopmdm(m)
    assert ours.model.dtype == torch.float64
    order = traded(torch.arange(m.cfg.d_vocab), m.cfg)
    torch.testing.assert_close(ours(words(m), 3)[..., order], m(words(m), 3), rtol=0.0, atol=1e-3)


def test_a_model_in_which_nothing_loops():
    m = opened("LLaDAModelLM", {})
    ours = to_loopmdm(m.model)  # a core will do
    assert ours.cfg.n_loop_layers == 0 and ours.cfg.n_prelude_layers == 3
    ids = words(m)
    order = traded(torch.arange(m.cfg.d_vocab), m.cfg)
    torch.testing.assert_close(ours(ids)[..., order], m(ids), rtol=0.0, atol=1e-5)


class Biased(standins.LLaDABlock):
    def __init__(self, sizes):
        super().__init__(sizes)
        self.q_norm = nn.RMSNorm(sizes.d_model)


def with_more(monkeypatch):
    monkeypatch.setattr(standins, "LLaDABlock", Biased)
    return opened("LLaDAModelLM")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda _: opened("LLaDAModelLM", rope=False), "has rope = False, a LoopMDM True"),
        (lambda _: opened("LLaDAModelLM", activation_type="gelu"), "activation_type = gelu, a LoopMDM silu"),
        (lambda _: opened("LLaDAModelLM", block_type="sequential"), "block_type = sequential, a LoopMDM llama"),
        (lambda _: opened("BD3LM"), r"BD3LM \(bd3lm\) is no LoopMDM; llada, mdlm convert"),
        (lambda _: opened("DreamModel"), r"DreamModel \(dream\) is no LoopMDM"),
        (lambda _: hook_model(natives.native("Bert"), mask_token_id=103), r"\(bert\) is no LoopMDM"),
        (lambda _: HookedLoopMDM(toy_model()), "LoopMDM is no model of somebody else's"),
        (with_more, "Biased has q_norm.weight, unlike what a LoopMDM can hold"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(make, says, monkeypatch):
    with pytest.raises(UsageError, match=says) as caught:
        to_loopmdm(make(monkeypatch))
    assert "\n" not in str(caught.value)


def test_a_model_that_computes_something_else_is_found_out():
    m = opened("LLaDAModelLM")
    m.model.native.config.rope_theta = 10_000.0  # what the config says is not what was run
    m.model.native.config = standins.SimpleNamespace(**vars(m.model.native.config))
    for block in m.model.blocks:
        block.sizes = standins.SimpleNamespace(**{**vars(block.sizes), "rope_theta": 500_000.0})
    with pytest.raises(UsageError, match="computes something else than a LoopMDM with its weights"):
        to_loopmdm(m)


def test_no_weights_no_conversion():
    with torch.device("meta"):
        m = hook_model(standins.LLaDAModelLM())
    with pytest.raises(UsageError, match="no weights on the meta device"):
        to_loopmdm(m)
