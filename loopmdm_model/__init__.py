"""A minimal LoopMDM with hook points at every loop iteration, and all that makes one.

`HookedLoopMDM` is loaded on first use, as are `hook_model` and `open_model`, which build on it: it alone needs
TransformerLens.
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
from loopmdm_model.sites import Site, at
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
    from loopmdm_model.adapters import hook_model, open_model
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
    "Site",
    "StateDelta",
    "StoppingRule",
    "Trajectory",
    "UsageError",
    "at",
    "continuation_nelbo",
    "corpus_nelbo",
    "hook_model",
    "list_models",
    "mask_tokens",
    "nelbo",
    "nelbo_by_loop",
    "open_model",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name == "HookedLoopMDM":
        from loopmdm_model.hooked import HookedLoopMDM

        return HookedLoopMDM
    if name in ("hook_model", "open_model"):
        from loopmdm_model import adapters

        return getattr(adapters, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
