"""A minimal LoopMDM with hook points at every loop iteration, and all that makes one.

`HookedLoopMDM` is loaded on first use: it alone needs TransformerLens.
"""

from typing import TYPE_CHECKING, Any

from loopmdm_model.checkpoints import list_models
from loopmdm_model.config import LoopMDMConfig
from loopmdm_model.errors import UsageError
from loopmdm_model.likelihood import NelboResult, nelbo
from loopmdm_model.masking import MaskedBatch, mask_tokens
from loopmdm_model.model import LoopMDM, LoopOutput
from loopmdm_model.stopping import FixedLoops, StateDelta, StoppingRule

if TYPE_CHECKING:
    from loopmdm_model.hooked import HookedLoopMDM

__all__ = [
    "FixedLoops",
    "HookedLoopMDM",
    "LoopMDM",
    "LoopMDMConfig",
    "LoopOutput",
    "MaskedBatch",
    "NelboResult",
    "StateDelta",
    "StoppingRule",
    "UsageError",
    "list_models",
    "mask_tokens",
    "nelbo",
]


def __getattr__(name: str) -> Any:
    if name == "HookedLoopMDM":
        from loopmdm_model.hooked import HookedLoopMDM

        return HookedLoopMDM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
