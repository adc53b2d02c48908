"""A minimal LoopMDM with hook points at every loop iteration, and all that makes one.

`HookedLoopMDM` is loaded on first use: it alone needs TransformerLens.
"""

from typing import TYPE_CHECKING, Any

from loopmdm_model.checkpoints import list_models
from loopmdm_model.config import LoopMDMConfig
from loopmdm_model.errors import UsageError
from loopmdm_model.likelihood import NelboResult, continuation_nelbo, corpus_nelbo, nelbo, nelbo_by_loop
from loopmdm_model.masking import mask_tokens
from loopmdm_model.model import LoopMDM
from loopmdm_model.orders import Order
from loopmdm_model.protocol import LoopOutput
from loopmdm_model.sampling import SampleResult, sample
from loopmdm_model.sequences import MaskedBatch, Sequences
from loopmdm_model.stopping import (
    ArgmaxStable,
    EntropyDelta,
    FixedLoops,
    KLDelta,
    NoiseSchedule,
    SecondDifference,
    StateDelta,
    StoppingRule,
)
from loopmdm_model.trajectories import Trajectory

if TYPE_CHECKING:
    from loopmdm_model.hooked import HookedLoopMDM

__all__ = [
    "ArgmaxStable",
    "EntropyDelta",
    "FixedLoops",
    "HookedLoopMDM",
    "KLDelta",
    "LoopMDM",
    "LoopMDMConfig",
    "LoopOutput",
    "MaskedBatch",
    "NelboResult",
    "NoiseSchedule",
    "Order",
    "SampleResult",
    "SecondDifference",
    "Sequences",
    "StateDelta",
    "StoppingRule",
    "Trajectory",
    "UsageError",
    "continuation_nelbo",
    "corpus_nelbo",
    "list_models",
    "mask_tokens",
    "nelbo",
    "nelbo_by_loop",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name == "HookedLoopMDM":
        from loopmdm_model.hooked import HookedLoopMDM

        return HookedLoopMDM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
