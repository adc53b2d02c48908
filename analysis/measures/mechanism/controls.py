"""A model that has learned nothing: what a method finds in it comes from the architecture, not from training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loopmdm.model.errors import check_model, check_seed
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.network.model import LoopMDM


@contextmanager
def untrained(m: HookedLoopMDM, seed: int = 0) -> Iterator[HookedLoopMDM]:
    """`m` without what it learned: a LoopMDM of the same config, freshly initialised.

    Of somebody else's model, whose first weights nobody has, it is `m` itself, with the entries of each weight
    matrix in random order until the block ends: same sizes and scales, no structure.
    """
    check_model(m, "untrained", hooked=True)
    generator = torch.Generator().manual_seed(check_seed(seed))
    if isinstance(m.cfg, LoopMDMConfig):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = LoopMDM(m.cfg)
        fresh = fresh.to(m.model.device, m.model.dtype).eval().requires_grad_(False)
        yield HookedLoopMDM(fresh, m.tokenizer)
        return
    weights = [weight for weight in m.model.parameters() if weight.ndim > 1 and weight.is_floating_point()]
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                weight.copy_(before.flatten()[order].view_as(before))
        yield m
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)
