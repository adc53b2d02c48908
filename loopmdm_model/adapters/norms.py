"""The final norm and unembedding of somebody else's model as weights, told by what they compute, not by names.

logits = W (n(x) w + b) + bias,   n(x) = x / sqrt(mean(x^2) + eps), of x less its mean in a LayerNorm
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.folded import PlainNorm, weighted
from loopmdm.model.precision import width
from loopmdm.model.protocol import NormWeights

EPS = ("eps", "variance_epsilon")
CLOSE = 1e-4
"""Of what a norm gives; in half precision the rounding of one product more."""
COARSE = 2e-2


def read_readout(
    native: nn.Module, head: Sequence[str | Callable[[nn.Module, Tensor], Tensor]]
) -> tuple[NormWeights, nn.Linear]:
    """Norm and linear map of a head that is these two; UsageError that names what else it is."""
    steps = [native.get_submodule(step) if isinstance(step, str) else None for step in head]
    if len(steps) != 2 or steps[0] is None or not isinstance(steps[1], nn.Linear):
        found = ", ".join(type(step).__name__ if step is not None else "a function" for step in steps)
        raise UsageError(
            f"reading states by W_U needs a head of a norm and a linear map; that of {type(native).__name__} is "
            f"{found}: use m.readout or the lenses"
        )
    return read_norm(steps[0]), steps[1]


@torch.no_grad()
def read_norm(norm: nn.Module) -> NormWeights:
    """A norm's weights, which must reproduce what it gives on random vectors."""
    weight = getattr(norm, "weight", None)
    if getattr(weight, "is_meta", False):
        raise UsageError("there are no weights on the meta device; open the model on another")
    if isinstance(weight, Tensor) and weight.ndim == 1:
        bias = getattr(norm, "bias", None)
        for centred in (True, False):
            found = NormWeights(weight, bias, eps_of(norm), centred)
            if _gives(norm, found):
                return found
    raise UsageError(
        f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm with a weight and an {' or '.join(EPS)}, so "
        "W_U cannot hold it"
    )


def eps_of(norm: nn.Module) -> float:
    """A norm's epsilon: where it is None that of what torch computes in, LayerNorm's default without any."""
    eps = next((getattr(norm, name) for name in EPS if hasattr(norm, name)), 1e-5)
    return torch.finfo(width(norm.weight.dtype)).eps if eps is None else float(eps)  # pyright: ignore


def _gives(norm: nn.Module, seen: NormWeights) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(seen.weight), generator=generator) + 0.5
    x = torch.cat([x, x / 100]).to(seen.weight)  # in small vectors a wrong eps is seen
    wanted = weighted(seen, PlainNorm(seen)(x))
    off = (norm(x) - wanted).abs().max()
    close = CLOSE if seen.weight.dtype in (torch.float32, torch.float64) else COARSE
    return bool(off <= close * wanted.abs().max())
