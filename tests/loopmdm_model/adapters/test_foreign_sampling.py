"""Sampling from other people's models: every order, alone and in batches, and where a shifted model answers."""

from functools import cache

import pytest
import torch

from loopmdm.model import KLDelta, sample
from loopmdm.model.adapters import hook_model
from loopmdm.model.diffusion.orders import ORDERS, as_order
from tests.loopmdm_model.adapters import natives, standins

ORDERS_AND_MORE = [*ORDERS, "blocks:3:threshold:0.3", "threshold:0.2", "entropy-bound:2", "path-planning:4"]


@cache
def made(name):
    if name == "Bert":
        return hook_model(natives.native("Bert"), mask_token_id=103, loop=(1, 2), max_loops=3)
    return hook_model(standins.prepared(getattr(standins, name)()), loop=(1, 1), max_loops=3)


NAMES = ["LLaDAModelLM", "LLaDA2MoeModelLM", "DreamModel", "MDLM", "BD3LM", "Bert"]


@pytest.mark.parametrize("order", ORDERS_AND_MORE)
@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_alone_is_the_sequence_in_a_batch(name, order):
    m = made(name)
    clues = torch.full((5, 9), -1)
    clues[1:, 4], clues[3:, 0] = 7, 9
    arguments = {"steps": 4, "order": order, "seed": 5, "n_loops": 2, "guidance": 0.5, "suppress": [5, 6]}
    together = sample(m, clues=clues, batch_size=5, **arguments)
    assert not bool((together.tokens == m.cfg.mask_token_id).any())
    assert torch.equal(together.tokens[clues >= 0], clues[clues >= 0])
    assert not bool(torch.isin(together.tokens[clues < 0], torch.tensor([5, 6])).any())
    if not as_order(order, 9).hides:
        assert len(together.events) == int((clues < 0).sum())
    for row in (0, 4):
        alone = sample(m, clues=clues[row], first_index=row, **arguments)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert alone.flops == float(together.step_flops[:, row].sum())


@pytest.mark.parametrize("name", NAMES)
def test_a_stopping_rule_and_an_end(name):
    m = made(name)
    arguments = {"n": 6, "length": 9, "order": "left-to-right", "steps": 9, "seed": 1}
    rule = KLDelta(1e9, max_loops=3)
    plain, stopped = (sample(m, **arguments, stop=rule, end=end) for end in ([], range(20)))
    assert set(plain.loops_used.flatten().tolist()) == {2} and stopped.forwards < plain.forwards
    for before, after in zip(plain.tokens.tolist(), stopped.tokens.tolist(), strict=True):
        first = next((at for at, token in enumerate(after) if token < 20), 9)
        assert after[: first + 1] == before[: first + 1] and len(set(after[first:])) <= 1


@pytest.mark.parametrize("order", ["confidence", "drawn-confidence", "left-to-right"])
def test_a_shifted_model_draws_where_it_predicts(order):
    """Greedy decoding by hand, from the native logits one position before each [MASK]."""
    m = made("DreamModel")
    native, mask = m.model.native, m.cfg.mask_token_id
    ids = torch.full((1, 9), mask)
    ids[0, 3] = 8
    drawn = sample(m, clues={3: 8}, length=9, steps=9, order=order, n_loops=1, temperature=0)
    for step in range(8):
        logits = native(ids, attention_mask="full", use_cache=False).logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1).index_fill(
            -1, torch.tensor(mask), float("-inf")
        )
        sure = logits.softmax(-1).amax(-1)[0].masked_fill(ids[0] != mask, -1.0)
        (where,) = (drawn.history[step + 1] != drawn.history[step])[0].nonzero().flatten()
        first = int((ids[0] == mask).nonzero()[0, 0])
        if order == "left-to-right":
            assert int(where) == first
        else:
            assert float(sure[where]) >= float(sure.max()) - 2e-6
        ids[0, where] = logits[0, where].argmax()
        assert torch.equal(ids, drawn.history[step + 1])
