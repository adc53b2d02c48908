"""Computing in float32 whatever the model's dtype, and in float64 where the model does."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in float32 if it is narrower; float64 stays what it is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
