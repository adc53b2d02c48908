"""A minimal LoopMDM with hook points at every loop iteration, and all that makes one.

`HookedLoopMDM` is loaded on first use, as are `hook_model` and `open_model`, which build on it: it alone needs
TransformerLens.
"""

from typing import TYPE_CHECKING, Any

from loopmdm.folders import hand_over, moved
from loopmdm.model.diffusion.likelihood import NelboResult, continuation_nelbo, corpus_nelbo, nelbo, nelbo_by_loop
from loopmdm.model.diffusion.orders import Order
from loopmdm.model.diffusion.sampling import SampleResult, sample
from loopmdm.model.diffusion.trajectories import Trajectory
from loopmdm.model.errors import UsageError
from loopmdm.model.masking import mask_tokens
from loopmdm.model.network.checkpoints import list_models
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.protocol import LoopOutput
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.sites import Site, at
from loopmdm.model.stopping.rules import (
    ArgmaxStable,
    EntropyDelta,
    ExitGate,
    FixedLoops,
    KLDelta,
    NoiseSchedule,
    SecondDifference,
    StateDelta,
    StoppingRule,
)

hand_over(__name__)

if TYPE_CHECKING:
    from loopmdm.model.adapters import hook_model, open_model
    from loopmdm.model.hooks.hooked import HookedLoopMDM

__all__ = [
    "ArgmaxStable",
    "EntropyDelta",
    "ExitGate",
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
        from loopmdm.model.hooks.hooked import HookedLoopMDM

        return HookedLoopMDM
    if name in ("hook_model", "open_model"):
        from loopmdm.model import adapters

        return getattr(adapters, name)
    return moved(__name__, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
