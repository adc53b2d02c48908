"""The control: the same dictionary, trained in the same way on a model that has learned nothing.

Sparse dictionaries find directions, and variables of the input, in random networks, too (Heap et al. 2025, "Sparse
autoencoders can interpret randomly initialized transformers"): what is found says something of training only as
far as it goes beyond this.
"""

from copy import deepcopy

import torch

from loopmdm.model.errors import check_model, check_seed
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.model import LoopMDM


@torch.no_grad()
def untrained(m: HookedLoopMDM, seed: int = 0) -> HookedLoopMDM:
    """The model before training: ours initialised anew; of others every weight matrix has its entries shuffled."""
    check_model(m, "untrained", hooked=True)
    check_seed(seed)
    if type(m.model) is LoopMDM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            core = LoopMDM(m.model.cfg)
        core = core.to(m.model.device, m.model.dtype)
    else:
        core = deepcopy(m.model)
        generator = torch.Generator().manual_seed(seed)
        for weight in core.parameters():
            if weight.ndim > 1:
                order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                weight.copy_(weight.flatten()[order].view_as(weight))
    made = type(m)(core.eval(), m.tokenizer)
    made.model_name, made.record = f"{m.model_name} untrained", m.record
    return made
