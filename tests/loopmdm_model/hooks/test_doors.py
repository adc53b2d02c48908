"""What people with TransformerLens' habits type works, or says in one line what to do instead."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformer_lens import patching

from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.doors import Output
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import MaskedBatch
from loopmdm.model.network.checkpoints import RECORD, weights_hash
from loopmdm.model.stopping.rules import StateDelta
from tests.conftest import toy_model

TEXT = "The state of our union is strong"


@pytest.fixture(scope="module")
def m():
    return HookedLoopMDM.from_pretrained("sotu-loop")


@pytest.fixture(scope="module")
def b(m):
    return m.mask(TEXT, ratio=0.5)


# --- [MASK]'s logit ---


def test_the_masks_logit_is_minus_infinity_unless_left_away(hooked, batch):
    logits, short = hooked(batch.tokens), hooked(batch.tokens, mask_logit=False)
    assert torch.equal(logits, hooked.model(batch.tokens)) and type(logits) is torch.Tensor
    assert bool((logits[..., 22] == -math.inf).all())
    assert torch.equal(short, logits[..., :22]) and bool(short.isfinite().all())
    assert torch.equal(hooked.run_with_cache(batch.tokens, mask_logit=False, names_filter="hook_embed")[0], short)
    assert torch.equal(hooked.run_with_hooks(batch.tokens, fwd_hooks=[], mask_logit=False), short)


@pytest.fixture(params=["looped", "unrolled"])
def finite(request, hooked):
    """A run whose logits are finite, in both forms."""
    unrolled = hooked.unrolled(3)
    looped = {"mask_logit": False}
    return (lambda x: hooked(x, 3, **looped)) if request.param == "looped" else unrolled


def exact(hooked, batch):
    """Log-probabilities of all ids that can be outputs, in double precision."""
    return hooked.model(batch.tokens, 3).double().log_softmax(-1)[..., :22]


def test_entropy_as_p_log_p_is_right(finite, hooked, batch):
    p = finite(batch.tokens).softmax(-1)
    wanted = exact(hooked, batch)
    torch.testing.assert_close(-(p * p.log()).sum(-1), -(wanted.exp() * wanted).sum(-1).float())


def test_centring_over_the_vocabulary_is_right(finite, hooked, batch):
    logits = finite(batch.tokens)
    centred = logits - logits.mean(-1, keepdim=True)
    wanted = exact(hooked, batch)
    torch.testing.assert_close(centred, (wanted - wanted.mean(-1, keepdim=True)).float(), atol=1e-5, rtol=1e-5)
    assert (finite(batch.tokens) - finite(batch.tokens)).abs().max() == 0


def test_cross_entropy_against_input_ids_is_an_error_and_against_the_clean_ones_right(finite, hooked, batch):
    logits = finite(batch.tokens)
    with pytest.raises(IndexError, match="Target 22 is out of bounds"):
        F.cross_entropy(logits.flatten(0, 1), batch.tokens.flatten())
    losses = F.cross_entropy(logits.flatten(0, 1), batch.clean.flatten(), reduction="none")
    wanted = -exact(hooked, batch).gather(-1, batch.clean[..., None]).flatten()
    torch.testing.assert_close(losses, wanted.float())


# --- losses and return types ---


def test_the_loss_is_the_mean_over_masked_positions(hooked, batch):
    logits = hooked(batch.tokens, n_loops=2)
    wanted = F.cross_entropy(logits[batch.masked].double(), batch.clean[batch.masked])
    near = {"atol": 0.0, "rtol": 1e-6}  # losses are taken in float32
    for x in (hooked, hooked.unrolled(2)):
        runs = {"n_loops": 2} if x is hooked else {}
        torch.testing.assert_close(x(batch, return_type="loss", **runs), wanted, **near)
        out = x(batch, return_type="both", **runs)
        assert isinstance(out, Output) and torch.equal(out.logits[..., :22], logits[..., :22])
        assert x(batch, return_type=None, **runs) is None
        torch.testing.assert_close(x.run_with_cache(batch, return_type="loss", **runs)[0], wanted, **near)
        torch.testing.assert_close(
            x.run_with_hooks(batch, return_type="loss", fwd_hooks=[], **runs), wanted, **near
        )
    losses = hooked.loss_fn(logits, batch, per_token=True)
    assert losses.shape == (int(batch.masked.sum()),)
    torch.testing.assert_close(losses.mean(), wanted, **near)


def test_a_loss_needs_to_know_what_was_masked(hooked, batch):
    for x in (hooked, hooked.unrolled(2)):
        with pytest.raises(UsageError, match=r"needs a MaskedBatch, got Tensor; .*m\.mask\(text, ratio=0\.5\)"):
            x(batch.tokens, return_type="loss")
        with pytest.raises(UsageError, match='return_type must be "logits", "loss", "both" or None'):
            x(batch, return_type="predictions")
    with pytest.raises(UsageError, match="MaskedBatch that was run"):
        hooked.loss_fn(hooked(batch), batch.tokens)
    nothing = MaskedBatch(batch.clean, batch.clean, torch.zeros_like(batch.masked))
    with pytest.raises(UsageError, match="nothing is masked"):
        hooked(nothing, return_type="loss")


def test_gradients_of_the_loss_come_with_the_cache(hooked, batch):
    with torch.enable_grad():
        _, cache = hooked.run_with_cache(batch, return_type="loss", incl_bwd=True)
        state = cache["loop.2.hook_out"].clone().requires_grad_()
        logits = hooked.model.readout(state, hooked.model.context(batch.tokens))
        (wanted,) = torch.autograd.grad(hooked.loss_fn(logits, batch), state)
    torch.testing.assert_close(cache["loop.2.hook_out_grad"], wanted, atol=1e-6, rtol=1e-4)


# --- what goes in ---


def test_ids_may_come_as_lists_arrays_rows_and_batches(hooked, batch):
    wanted = hooked(batch.tokens)
    for given in (batch.tokens.tolist(), batch.tokens.numpy(), batch, tuple(batch.tokens.tolist())):
        assert torch.equal(hooked(given), wanted)
        assert torch.equal(hooked.run_with_cache(given, attn_path="sdpa", names_filter="hook_embed")[0], wanted)
        assert torch.equal(hooked.unrolled(3)(given), wanted[..., :22])
    assert torch.equal(hooked(batch.tokens[0]), wanted[:1]) and torch.equal(
        hooked(batch.tokens[0].tolist()), wanted[:1]
    )
    with pytest.raises(UsageError, match="rows of one length"):
        hooked([[1, 2], [3]])
    with pytest.raises(UsageError, match="integer tensor"):
        hooked([0.5, 1.5])


def test_padding_in_a_batch_is_kept(m):
    batch = m.mask(["Hi there", TEXT], ratio=0.5)
    assert batch.attention_mask is not None
    torch.testing.assert_close(m(batch), m(batch.tokens, attention_mask=batch.attention_mask))
    torch.testing.assert_close(m.unrolled(4)(batch), m(batch, n_loops=4, mask_logit=False))


def test_names_may_come_as_lists(hooked, batch):
    names, seen = ["loop.0.hook_in", "loop.2.hook_out"], []

    def note(x, hook):
        seen.append(hook.name)

    hooked.run_with_hooks(batch.tokens, fwd_hooks=[(names, note)])
    hooked.add_hook(names, note)
    hooked(batch.tokens)
    hooked.reset_hooks()
    assert seen == names * 2
    _, cache = hooked.run_with_cache(batch.tokens, names_filter=names)
    assert list(cache) == names
    with pytest.raises(KeyError, match="did you mean"):
        hooked.add_hook(["loop.0.hook_in", "loop.0.hook_inn"], note)


def test_points_know_their_layer_and_loop(hooked):
    points = hooked.hook_dict
    deep = points["loop.2.blocks.1.attn.hook_pattern"]
    assert (deep.layer(), deep.loop()) == (1, 2)
    assert (points["blocks.3.hook_resid_pre"].layer(), points["blocks.3.hook_resid_pre"].loop()) == (3, None)
    assert points["loop.1.hook_in"].loop() == 1
    with pytest.raises(UsageError, match="belongs to no layer"):
        points["loop.1.hook_in"].layer()


# --- saving, loading ---


def test_what_was_loaded_can_be_saved_and_loaded_again(m, b, tmp_path):
    m.save_pretrained(tmp_path / "copy")
    copy = HookedLoopMDM.from_pretrained(tmp_path / "copy")
    assert torch.equal(copy(b), m(b)) and copy.to_tokens(TEXT).tolist() == m.to_tokens(TEXT).tolist()
    kept = {key: value for key, value in m.record.items() if key != "evaluation"}
    kept["weights_sha256"] = weights_hash(tmp_path / "copy")  # float32 where fp16 is shipped: another file
    assert copy.record == kept and (tmp_path / "copy" / RECORD).is_file()
    m.save_pretrained(tmp_path / "same", torch.float16)
    same = HookedLoopMDM.from_pretrained(tmp_path / "same")
    assert same.record == m.record and repr(same).replace("(same", "(sotu-loop") == repr(m)


def test_a_bare_model_is_saved_bare(hooked, batch, tmp_path):
    hooked.save_pretrained(tmp_path)
    copy = HookedLoopMDM.from_pretrained(tmp_path)
    assert copy.tokenizer is None and copy.record == {} and torch.equal(copy(batch), hooked(batch))


def test_loading_in_a_dtype_keeps_rotary_tables(m, b):
    for dtype in (torch.bfloat16, "bfloat16"):
        half = HookedLoopMDM.from_pretrained("sotu-loop", dtype=dtype, device="cpu")
        assert half.dtype == torch.bfloat16 and half.device.type == "cpu"
        assert half.model.rotary_cos.dtype == torch.float32
        apart = half(b, mask_logit=False).float() - m(b, mask_logit=False)
        assert 0 < apart.abs().max() < 0.5
    with pytest.raises(UsageError, match="floating torch dtype"):
        HookedLoopMDM.from_pretrained("sotu-loop", dtype="int8")


def test_models_are_in_the_mode_of_what_they_hold():
    assert not HookedLoopMDM.from_pretrained("markov-loop").training
    plain = toy_model()
    assert not HookedLoopMDM(plain).training
    assert HookedLoopMDM(plain.train()).training


# --- the long list, as typed: m is a HookedLoopMDM, u = m.unrolled(3), c its cache, b a MaskedBatch ---

WORKS = """
m(b.tokens).shape == (*b.tokens.shape, m.cfg.d_vocab)
torch.equal(m(TEXT), m(b.clean))
torch.equal(m([1, 2, 3]), m(torch.tensor([[1, 2, 3]])))
m(b, return_type="loss").ndim == 0
torch.equal(m(b, return_type="both")[1], m.loss_fn(m(b), b))
m(b, return_type=None) is None
torch.equal(m(b, stop_at_layer=1), m.model.prelude(b.tokens, m.model.context(b.tokens)))
m.loss_fn(m(b), b, per_token=True).shape == (5,)
torch.equal(*(lambda run: (run[0], run[1]["hook_logits"]))(m.run_with_cache(b)))
len(m.run_with_cache(b, names_filter=["hook_embed", "loop.0.hook_in"])[1]) == 2
m.run_with_cache(b, remove_batch_dim=True)[1]["hook_embed"].ndim == 2
m.run_with_hooks(b, fwd_hooks=[(["hook_embed"], lambda x, hook: x * 0)], mask_logit=False).std(1).max() < 1e-4
m.hooks([("hook_embed", lambda x, hook: None)]).__enter__() is m
m.add_hook(lambda name: name.endswith("resid_pre"), lambda x, hook: None) is None
m.add_perma_hook("hook_embed", lambda x, hook: None) is None
m.reset_hooks(including_permanent=True) is None
m.list_hooks() == {}
len(m.hook_dict) == len(list(m.hook_points())) > 100
m.hook_dict["loop.2.blocks.1.attn.hook_pattern"].layer() == 1
m.hook_dict["loop.2.blocks.1.attn.hook_pattern"].has_hooks() is False
torch.equal(m.to_tokens(TEXT, prepend_bos=False), b.clean)
"".join(m.to_str_tokens(TEXT)) == TEXT
m.to_string(m.to_tokens(TEXT)[0].tolist()) == TEXT
m.to_single_str_token(m.to_single_token(" the")) == " the"
m.get_token_position(b.clean[0, 7], b.clean) == 7
m.get_token_position(" the", "the the the", mode="last") == len(m.to_str_tokens("the the the")) - 1
m.tokenizer.get_vocab_size() == m.cfg.d_vocab
torch.equal(m.W_E[b.clean], m.embed(b.clean))
m.W_U.shape == (128, 1024) and m.b_U.shape == (1024,)
close(m.unembed(m.ln_final(m(b, stop_at_layer=-1)[0])), m.ln_final(m(b, stop_at_layer=-1)[0]) @ m.W_U + m.b_U)
m.W_Q.shape == m.W_K.shape == m.W_V.shape == (4, 4, 128, 32)
m.W_O.shape == (4, 4, 32, 128)
m.W_in.shape == (4, 128, 512) and m.W_out.shape == (4, 512, 128)
m.W_gate is None
m.b_Q.shape == m.b_K.shape == m.b_V.shape == (4, 4, 32) and m.b_O.shape == m.b_out.shape == (4, 128)
torch.equal(m.blocks[1].attn.W_Q, m.W_Q[1]) and torch.equal(m.blocks[1].mlp.W_out, m.W_out[1])
close(u.OV[1, 2].AB, m.W_V[1, 2] @ m.W_O[1, 2]) and close(u.QK[1, 2].AB, m.W_Q[1, 2] @ m.W_K[1, 2].T)
torch.equal(m.tokens_to_residual_directions(" the"), m.W_U[:, m.to_single_token(" the")])
close(m.accumulated_bias(4), (m.b_O + m.b_out).sum(0))
(m.device.type, m.dtype, m.training) == ("cpu", torch.float32, False)
(m.cfg.n_layers, m.cfg.d_model, m.cfg.n_heads, m.cfg.n_ctx) == (4, 128, 4, 64)
m.eval() is m and set(m.state_dict()) == {name for name, _ in m.named_parameters()}
HookedLoopMDM.from_pretrained("markov-loop", device="cpu", dtype="float16").dtype == torch.float16
m.run_with_cache(b)[1]["pattern", 0].shape == (1, 4, 10, 10)
m.run_with_cache(b)[1].to("cpu")["loop.2.hook_out"].shape == (1, 10, 128)
close(u(b), m(b, n_loops=3)[..., :-1])
u.cfg.n_layers == len(u.blocks) == 6 and u.cfg.device == u.device
c["pattern", -1].shape == c["blocks.5.attn.hook_pattern"].shape == (1, 4, 10, 10)
close(c.accumulated_resid(apply_ln=True)[-1] @ m.W_U[:, :-1] + m.b_U[:-1], m(b, n_loops=3)[..., :-1])
close(c.decompose_resid(apply_ln=True).sum(0) @ u.W_U + u.b_U, m(b, n_loops=3)[..., :-1])
close(c.logit_attrs(c.decompose_resid(), tokens=" the").sum(0) + u.b_U[the], u(b)[..., the])
c.accumulated_resid(return_labels=True)[1][1::2] == [*(f"loop {i}, layer 1, pre" for i in (0, 2)), "layer 3, pre"]
c.decompose_resid(return_labels=True)[1][:2] == ["embed", "layer 0, attn_out"]
c.stack_head_results(layer=2, return_labels=True)[1][-1] == "loop 0, layer 1, H3"
torch.equal(m.run_with_cache(b)[1]["attn", "loop", 2, 1], m.run_with_cache(b)[1]["pattern", "loop", 2, 1])
close(c.stack_head_results(layer=1).sum(0) + u.b_O[0], c["attn_out", 0])
c.stack_activation("z").shape == (6, 1, 10, 4, 32)
close(c.get_full_resid_decomposition(expand_neurons=False).sum(0), c["resid_post", -1])
close(c.get_neuron_results(2).sum(-2) + u.b_out[2], c["mlp_out", 2])
close(c.logit_lens(positions=None).values[-1], u(b))
close(c.apply_ln_to_stack(c.decompose_resid(2), layer=2).sum(0), c["normalized", 2, "ln1"])
m.run_with_cache(b)[1].unrolled().remove_batch_dim()["hook_embed"].ndim == 2
patching.get_act_patch_resid_pre(u, b.clean, c, lambda x: x[0, 0, 0]).shape == (6, 10)
"""

SAYS = {
    "m.generate(TEXT)": r"use loopmdm\.sample",
    "m.QK": r"m\.unrolled\(1\) has it",
    "m.W_pos": "positions are rotary",
    "m.set_use_attn_result(True)": r"name attn\.hook_result",
    "m.set_use_split_qkv_input(True)": r"hook attn\.hook_q",
    "m.set_use_hook_mlp_in(True)": "hook_resid_mid",
    "m.enable_compatibility_mode()": "norms folded in already",
    "m.to_tokens(TEXT, prepend_bos=True)": "no BOS",
    "m(TEXT, prepend_bos=False)": "no BOS",
    "m(b, loops=2)": "number of loops is n_loops=",
    "m.run_with_cache(b, S=2)": "number of loops is n_loops=",
    "m.run_with_cache(b, name_filter=None)": "did you mean names_filter",
    "m(b, start_at_layer=1)": "patch hook_resid_pre",
    "m(b, past_kv_cache=None)": "bidirectional",
    'm(b.tokens, return_type="loss")': "needs a MaskedBatch",
    'm(b, return_type="predictions")': 'must be "logits"',
    "m(b, stop_at_layer=99)": "at most",
    "m(b, stop=StateDelta(0.1, max_loops=4), stop_at_layer=1)": "fixed number of loops",
    "m.to_single_token(TEXT)": "is 10 tokens",
    "m.get_token_position(0, b.clean)": "not in the sequence",
    "m.tokens_to_residual_directions(m.cfg.mask_token_id)": "never an output",
    'm.add_hook("blocks.1.hook_resid_pre", print)': "give the iteration",
    'm.hook_dict["loop.2.hook_in"].layer()': "belongs to no layer",
    "m.run_with_cache(b)[1].decompose_resid()": r"use cache\.unrolled\(\)\.decompose_resid",
    "m.to_string(np.zeros((2, 2, 3), dtype=int))": "pick one step",
    r'm.to_tokens("a\ud800b")': "^the text holds half a surrogate pair",
    r'm.to_tokens(["fine", "a\ud800b"])': "^text 1 holds half a surrogate pair",
    r'm.to_tokens(("a\udfff", "fine"))': "^text 0 holds half a surrogate pair",
    r'm(["fine", "a\ud800b"])': "text 1 holds half a surrogate pair",
    r'm.mask(["fine", "a\ud800b"], 0.5)': "text 1 holds half a surrogate pair",
    r'm.to_str_tokens("a\ud800b")': "half a surrogate pair",
    r'u.to_tokens(["fine", "a\ud800b"])': "text 1 holds half a surrogate pair",
    r'HookedLoopMDM.from_pretrained("sudoku-loop").to_tokens(["1" * 36, "\ud800" * 36])': "text 1 holds half",
    "u(b, n_loops=2)": "unknown argument 'n_loops'",
}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    return True


@pytest.fixture(scope="module")
def typed(m, b):
    u = m.unrolled(3)
    c, the = m.run_with_cache(b, n_loops=3)[1].unrolled(), m.to_single_token(" the")
    tools = {"np": np, "torch": torch, "patching": patching, "close": close, "StateDelta": StateDelta}
    return {**tools, "HookedLoopMDM": HookedLoopMDM, "TEXT": TEXT, "m": m, "b": b, "u": u, "c": c, "the": the}


@pytest.mark.parametrize("line", WORKS.strip().splitlines())
def test_familiar_lines_work(typed, line):
    try:
        assert eval(line, typed)
    finally:
        typed["m"].reset_hooks(including_permanent=True)


@pytest.mark.parametrize(("line", "says"), SAYS.items(), ids=SAYS)
def test_other_familiar_lines_say_what_to_do(typed, line, says):
    with pytest.raises(UsageError, match=says) as caught:
        eval(line, typed)
    assert "\n" not in str(caught.value)


def test_enough_doors_are_tried_and_missing_ones_are_missing(m):
    assert len(WORKS.strip().splitlines()) >= 46
    assert not hasattr(m, "generate") and not hasattr(m, "W_pos")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = m.nonsense
