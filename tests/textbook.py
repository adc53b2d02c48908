"""What ours is compared with, in law and in speed: the sampler as usually written, the NELBO by enumeration."""

import itertools
import math

import torch
from jaxtyping import Int
from torch import Tensor

from loopmdm.model.diffusion.likelihood import masked_cross_entropy
from loopmdm.model.masking import hide
from loopmdm.model.network.model import LoopMDM


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


@torch.no_grad()
def enumerated_nelbo(model: LoopMDM, sequence: Int[Tensor, " pos"], n_loops: int) -> float:
    """Exact NELBO in nats per token of a short sequence: all 2^L - 1 masks, weighted 1 / (L * C(L, l)) each."""
    length = len(sequence)
    masks = torch.tensor([mask for mask in itertools.product([False, True], repeat=length) if any(mask)])
    batch = hide(sequence.expand(len(masks), -1), masks, model.cfg.mask_token_id)
    losses = masked_cross_entropy(model(batch.tokens, n_loops=n_loops), batch)
    weights = torch.tensor([1 / (length * math.comb(length, int(mask.sum()))) for mask in masks])
    return float((losses.double() * weights.double()).sum())
