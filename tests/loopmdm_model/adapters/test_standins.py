"""Records of models whose code lies beside their weights, on stand-ins with the same trees and calls."""

import ast
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from loopmdm.model import KLDelta, UsageError, sites
from loopmdm.model.adapters import families, hook_model
from tests.loopmdm_model.adapters import standins

CLOSE = {"rtol": 0.0, "atol": 1e-5}
MDMS = {
    "LLaDAModelLM": "llada",
    "LLaDA2MoeModelLM": "llada2",
    "DreamModel": "dream",
    "MDLM": "mdlm",
    "BD3LM": "bd3lm",
}
LOOPED = {"RavenForCausalLM": None, "Retrofitted": "retrofitted", "OuroForCausalLM": None, "TwoStates": "trm"}


def made(name, **how):
    native = standins.prepared(getattr(standins, name)())
    return hook_model(native, **({"family": LOOPED.get(name)} | how)), native


def tokens(m, batch=3):
    ids = torch.randint(4, 20, (batch, 8), generator=torch.Generator().manual_seed(1))
    return ids if m.cfg.mask_token_id is None else ids.masked_fill(ids % 3 == 0, m.cfg.mask_token_id)


def native_logits(native, out):
    return out["logits"] if isinstance(out, dict) else getattr(out, "logits", out)


def test_every_record_is_short():
    found = {}
    for node in ast.parse(Path(families.__file__).read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            found[node.targets[0].id] = node.end_lineno - node.lineno + 1
    assert {name.upper() for name in MDMS.values()} | {"BERT", "RAVEN", "OURO", "TRM"} <= found.keys()
    assert max(found.values()) <= 15


@pytest.mark.parametrize("name", MDMS)
def test_a_masked_model_as_its_record_says(name):
    m, _ = made(name, loop=(1, 1), max_loops=3)
    assert m.record["family"] == MDMS[name] and m.record["checks"]["logits"] == 0.0
    assert not m.facts.causal and m.facts.shifted == (name == "DreamModel")
    ids = tokens(m)
    _, kept = m.run_with_cache(ids, 2, attn_path="eager")
    torch.testing.assert_close(kept["hook_logits"], m(ids, 2), **CLOSE)
    for loop, (state, context) in enumerate(m.states(ids, 3)):
        assert torch.equal(m.readout(state, context), m(ids, loop + 1))


def test_the_sites_of_eight_billion_parameters_without_weights():
    sizes = {"d_model": 4096, "n_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288, "mask_token_id": 126336}
    sizes |= {"vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096}
    with torch.device("meta"):
        native = standins.LLaDAModelLM(**sizes)
    m = hook_model(native, loop=(12, 8), max_loops=4)
    assert 8.0e9 < m.model.n_parameters < 8.1e9 and all(weight.is_meta for weight in native.parameters())
    lines = sites.listing(m.cfg, 4, 1, 100).splitlines()
    named = dict(line.split(maxsplit=1) for line in lines)
    assert list(named) == sites.all_names(m.cfg, 4)
    assert named["loop.3.blocks.19.attn.hook_pattern"] == "[1, 32, 100, 100]"
    assert named["blocks.31.hook_mlp_out"] == "[1, 100, 4096]" and named["hook_logits"] == "[1, 100, 126464]"


def test_a_shifted_model_answers_where_it_predicts():
    m, native = made("DreamModel", loop=(1, 1), max_loops=2)
    ids = tokens(m)
    given = native(ids, attention_mask="full", use_cache=False).logits
    logits = m(ids, 1)
    other = torch.arange(standins.V) != m.cfg.mask_token_id
    assert torch.equal(logits[:, 1:, other], given[:, :-1, other])
    assert torch.equal(logits[:, 0][:, other], given[:, 0][:, other])
    rows = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    torch.testing.assert_close(m.run(ids, 2, rows=rows).logits, m(ids, 2)[rows], **CLOSE)
    run = m.run(ids, stop=KLDelta(1e9, max_loops=3, positions="all"), rows=rows)  # reads the coda at every loop
    assert run.loops_used.tolist() == [2, 2, 2]
    torch.testing.assert_close(run.logits, m(ids, 2)[rows], **CLOSE)
    before, after = (m(ids, n).float().log_softmax(-1) for n in (1, 2))
    kl = (after.exp() * (after - before).nan_to_num(0.0)).sum(-1).mean(-1)
    torch.testing.assert_close(run.criterion[1], kl, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="the state before each row"):
        m.model.unembedding(torch.zeros(3, standins.D))


def test_padded_queries_without_a_key_do_not_reach_real_ones():
    m, _ = made("DreamModel")
    ids = tokens(m)
    keys = torch.ones_like(ids, dtype=torch.bool)
    keys[0, 5:] = False
    for path in ("sdpa", "eager"):
        logits = m(ids, 1, attention_mask=keys, attn_path=path)
        assert not bool(logits.isnan().any())
        torch.testing.assert_close(logits[0, :5], m(ids[:1, :5], 1)[0], **CLOSE)
    _, kept = m.run_with_cache(ids, 1, attention_mask=keys, names_filter=sites.at(leaf="pattern"))
    assert all(bool((pattern[0, :, 5:] == 0).all()) for pattern in kept.values())


def test_a_model_that_knows_no_padding_says_so():
    m, _ = made("MDLM")
    ids = tokens(m)
    keys = torch.ones_like(ids, dtype=torch.bool)
    assert torch.equal(m(ids, 1, attention_mask=keys), m(ids, 1))
    keys[0, 5:] = False
    with pytest.raises(UsageError, match="knows no padding"):
        m(ids, 1, attention_mask=keys)


def test_of_the_experts_those_count_that_a_token_meets():
    m, _ = made("LLaDA2MoeModelLM")
    d, n = standins.D, 8
    attention = 2 * 4 * d * d * n + 4 * n * n * d
    dense = 2 * 3 * d * 24 * n
    experts = (2 * 4 * d + 2 * 3 * d * 8 * (2 + 1)) * n
    assert float(m.model.layer_flops(n)) == pytest.approx(
        (3 * attention + dense + 2 * experts) / 3, rel=1e-3
    )  # whole weights


# --- loops of their own ---


@pytest.mark.parametrize("name", LOOPED)
def test_a_looped_model_at_its_own_number_of_loops(name):
    m, _ = made(name)
    assert m.cfg.max_loops == {"OuroForCausalLM": 3, "TwoStates": 6}.get(name, 4)
    assert m.record["checks"]["logits"] <= (1e-5 if name == "TwoStates" else 0.0)  # its e is a difference
    ids = tokens(m)
    states = list(m.model.states(ids, m.cfg.max_loops))
    for loop, (state, context) in enumerate(states):
        torch.testing.assert_close(m.readout(state, context), m(ids, loop + 1), rtol=0.0, atol=0.0)
    with pytest.raises(UsageError, match="more between its loops"):
        m.model.looping(0, 1)
    first, n = m.cfg.n_prelude_layers, m.cfg.n_loop_layers
    assert m.model.looping(first, n, 9).cfg.max_loops == 9


@pytest.mark.parametrize("name", LOOPED)
def test_sequences_that_go_on_keep_what_is_injected(name):
    m, _ = made(name)
    ids, keep = tokens(m), torch.tensor([True, False, True])
    context = m.model.context(ids)
    state = m.model.loop(m.model.prelude(ids, context), context, 0)
    part = context.rows(keep)
    alone = m.model.loop(state[keep], part, 1)
    torch.testing.assert_close(alone, m.model.loop(state, context, 1)[keep], **CLOSE)


@pytest.mark.parametrize("name", ["RavenForCausalLM", "Retrofitted"])
def test_a_random_start_is_that_of_its_row_and_seed(name):
    m, native = made(name)
    ids = tokens(m)
    before = torch.random.get_rng_state()
    whole = m(ids, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(m(ids[:1], 3)[0], whole[0])
    with m.model.cycle.drawn(0, 0):
        assert torch.equal(native(ids[:1], num_steps=(3, 0))["logits"], m(ids[:1], 3))
    m.model.seed = 1
    assert not torch.equal(m(ids, 3), whole)
    assert m.facts.random_start and m.facts.causal and m.facts.mask_token_id is None


def test_held_tokens_are_not_injected_into():
    m, _ = made("RavenForCausalLM")
    ids = tokens(m)
    held = torch.zeros_like(ids, dtype=torch.bool)
    held[:, 2] = True
    context = m.model.context(ids)
    state = m.model.prelude(ids, context)
    assert torch.equal(m.model.loop(state, context.hold(held), 0)[held], state[held])


def test_the_gate_is_the_models_own():
    m, native = made("OuroForCausalLM")
    ids = tokens(m)
    native(ids, use_cache=False)
    for (state, _), gate in zip(m.model.states(ids, 3), native.gates, strict=True):
        torch.testing.assert_close(m.model.exit_gate(state), gate.sigmoid()[..., 0], **CLOSE)
    assert made("DreamModel")[0].model.exit_gate(state) is None
    for n_loops in (1, 2):
        native.config.total_ut_steps = n_loops
        assert torch.equal(native(ids, use_cache=False).logits, m(ids, n_loops))


def test_only_every_third_loop_moves_the_state_that_is_read():
    m, _ = made("TwoStates")
    ids = tokens(m)
    states = [state for state, _ in m.model.states(ids, 6)]
    moved = [not torch.equal(one, two) for one, two in pairwise(states)]
    assert moved == [False, True, False, False, True]
