"""The textbook sampler that ours is compared with, in law and in speed."""

import torch
from jaxtyping import Int
from torch import Tensor

from loopmdm_model.model import LoopMDM


@torch.no_grad()
def textbook_sample(
    model: LoopMDM, n: int, length: int, steps: int, n_loops: int, seed: int = 0
) -> Int[Tensor, "n pos"]:
    """Ancestral sampling as usually written.

    Every step has logits at every position and draws token-or-[MASK] jointly with float64 Gumbel noise;
    the forward is skipped when no id changed.
    """
    mask_id = model.cfg.mask_token_id
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((n, length), mask_id)
    probabilities = None
    for step in range(steps):
        t, s = 1 - step / steps, 1 - (step + 1) / steps
        if probabilities is None:
            probabilities = model(ids, n_loops=n_loops).double().softmax(-1)
        joint = probabilities * ((t - s) / t)
        joint[..., mask_id] = s / t
        noise = torch.rand(joint.shape, dtype=torch.float64, generator=generator).log_().neg_()
        drawn = (joint / noise).argmax(-1)
        following = torch.where(ids == mask_id, drawn, ids)
        if not torch.equal(following, ids):
            probabilities = None
        ids = following
    return ids
