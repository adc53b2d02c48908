"""With a large vocabulary no measure makes a tensor of positions x vocabulary, for one loop or for all."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from loopmdm.analysis.measures.attention import mask_attention
from loopmdm.analysis.measures.interventions import cut
from loopmdm.analysis.measures.representation import representation_change
from loopmdm.analysis.measures.representation.settled import settled_loops
from loopmdm.analysis.measures.stopping import stopping_frontier
from loopmdm.model import blocks
from loopmdm.model.diffusion.likelihood import nelbo, nelbo_by_loop
from loopmdm.model.errors import NotFiniteError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.sequences import MaskedBatch
from tests.conftest import toy_model

VOCABULARY, BLOCK = 6_000, 24_000


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made, weights and their views aside."""

    def __init__(self, m: HookedLoopMDM):
        super().__init__()
        self.weights = {weight.untyped_storage().data_ptr() for weight in m.model.parameters()}
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(made)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.weights:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


def interrupted(m: HookedLoopMDM, b: MaskedBatch) -> torch.Tensor:
    with cut(m, "masked->masked", loops=slice(1, None)):
        return nelbo(m, b.clean, 3, n_samples=1).per_sequence


ASKED: dict[str, Callable[[HookedLoopMDM, MaskedBatch], Any]] = {
    "nelbo": lambda m, b: nelbo(m, b.clean, 3, n_samples=2).per_sequence,
    "nelbo_by_loop": lambda m, b: torch.stack([r.per_sequence for r in nelbo_by_loop(m, b.clean, 3, n_samples=1)]),
    "mask_attention": lambda m, b: mask_attention(m, b, 3),
    "representation_change": lambda m, b: representation_change(m, b, 3),
    "settled_loops": lambda m, b: settled_loops(m, b, 3),
    "stopping_frontier": lambda m, b: stopping_frontier(m, b.clean, n_samples=1, n_thresholds=3),
    "cut": interrupted,
}


@pytest.mark.parametrize("what", ASKED)
def test_memory_does_not_grow_with_positions_times_vocabulary(what, monkeypatch):
    m = HookedLoopMDM(toy_model(d_vocab=VOCABULARY, d_model=8, n_ctx=32))
    clean = torch.randint(0, VOCABULARY - 1, (4, 32), generator=torch.Generator().manual_seed(0))
    b = mask_tokens(clean, VOCABULARY - 1, mask_ratio=0.5)
    with Largest(m) as before:
        whole = ASKED[what](m, b)
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)
    with Largest(m) as largest:
        found = ASKED[what](m, b)
    assert before.numbers >= int(b.masked.sum()) * VOCABULARY > 10 * BLOCK  # else the test sees nothing
    assert largest.numbers <= BLOCK
    if isinstance(found, pd.DataFrame):
        pd.testing.assert_frame_equal(found, whole, rtol=1e-4, atol=1e-6)
    else:
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)


def test_every_block_is_checked(monkeypatch):
    m = HookedLoopMDM(toy_model(d_vocab=VOCABULARY, d_model=8, n_ctx=32))
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)
    clean = torch.randint(0, VOCABULARY - 1, (4, 32), generator=torch.Generator().manual_seed(0))
    b = mask_tokens(clean, VOCABULARY - 1, mask_ratio=0.5)

    def spoiled(state, hook):
        state[-1, -1] = torch.nan
        return state

    with m.hooks([("blocks.3.hook_resid_post", spoiled)]), pytest.raises(NotFiniteError):
        mask_attention(m, b, 3)


def test_blocks_are_the_rows_in_reading_order(monkeypatch):
    model = toy_model()
    clean = torch.randint(0, 22, (3, 9), generator=torch.Generator().manual_seed(0))
    b = mask_tokens(clean, 22, mask_ratio=0.6)
    ((state, context),) = model.states(b.tokens, 1)
    whole = model.readout(state, context, rows=b.masked)
    monkeypatch.setattr(blocks, "BLOCK", 4 * 23 + 5)
    reading = model.read(state, context, rows=b.masked)
    assert reading.whole is None and [len(logits) for _, logits in reading] == [4, 4, 4, 3] and len(reading) == 15
    torch.testing.assert_close(torch.cat([logits for _, logits in reading]), whole)
    nothing = model.read(state, context, rows=torch.zeros_like(b.masked))
    assert [logits.shape for _, logits in nothing] == [(0, 23)]
