"""Untrained twins: a model of the same shape that has learned nothing, the null of what a measure finds.

A LoopMDM is initialised anew. Of any other model every matrix keeps its numbers and loses their order, so that
sizes stay and what was learned does not. Sparse dictionaries and probes find something in random networks, too
(Heap et al. 2025; Hewitt & Liang 2019): what is found says something of training only as far as it goes beyond.
"""

from copy import deepcopy

import torch

from loopmdm.model.errors import check_model, check_seed
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.protocol import Core


def untrained(m: HookedLoopMDM, seed: int = 0) -> HookedLoopMDM:
    """A twin of `m` with weights that learned nothing, a function of `seed`; no hooks go along.

    >>> lm.untrained(m)(b, n_loops=2).shape
    torch.Size([2, 36, 7])
    """
    check_model(m, "untrained", hooked=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(check_seed(seed))
        core = _anew(m) if type(m.model) is LoopMDM else _shuffled(m)
    twin = type(m)(core.eval().requires_grad_(False), m.tokenizer)
    twin.model_name, twin.record = f"{m.model_name} untrained".strip(), m.record
    return twin


def _anew(m: HookedLoopMDM) -> LoopMDM:
    assert isinstance(m.model, LoopMDM)
    return LoopMDM(m.model.cfg).to(m.model.device, m.model.dtype)


def _shuffled(m: HookedLoopMDM) -> Core:
    core = deepcopy(m.model)
    with torch.no_grad():
        for parameter in core.parameters():
            if parameter.ndim > 1:
                order = torch.randperm(parameter.numel()).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return core
