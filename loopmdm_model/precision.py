"""Computing in float32 whatever the model's dtype, and in float64 where the model does; finite or not at all."""

import torch
from torch import Tensor

from loopmdm.model.errors import NotFiniteError


def width(dtype: torch.dtype) -> torch.dtype:
    """What is computed in for numbers of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in float32 if it is narrower; float64 stays what it is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()  # in every layer of every forward


def check_state(state: Tensor, real: Tensor, where: str) -> None:
    """NotFiniteError unless `state` [batch, pos, ..] is finite at the `real` positions [batch, pos]."""
    if bool(state.isfinite().all()):
        return
    finite = state[real].isfinite().flatten(1).all(-1)
    if not bool(finite.all()):
        n = int((~finite).sum())
        raise NotFiniteError(f"{where} is not finite at {n} of {len(finite)} positions; {OVERFLOWN}")


def check_logits(logits: Tensor) -> None:
    """NotFiniteError unless every row of logits [..., d_vocab] says something: no NaN or +inf, not all -inf."""
    best = logits.amax(-1)
    if not bool(best.isfinite().all()):
        n = int((~best.isfinite()).sum())
        raise NotFiniteError(f"logits are not finite at {n} of {best.numel()} positions; {OVERFLOWN}")


OVERFLOWN = "weights, a hook or a narrow dtype made them so: look for the first such state with run_with_cache"
