"""A minimal LoopMDM with hook points at every loop iteration, and all that makes one.

Names are loaded on first use: what lists names needs no torch, and `HookedLoopMDM` alone needs TransformerLens.
"""

from typing import TYPE_CHECKING, Any

from loopmdm.folders import hand_over, named

hand_over(__name__)

if TYPE_CHECKING:
    from loopmdm.model.adapters import hook_model, open_model
    from loopmdm.model.diffusion.likelihood import (
        NelboResult,
        continuation_nelbo,
        corpus_nelbo,
        nelbo,
        nelbo_by_loop,
    )
    from loopmdm.model.diffusion.orders import Order
    from loopmdm.model.diffusion.sampling import SampleResult, sample
    from loopmdm.model.diffusion.trajectories import Trajectory
    from loopmdm.model.errors import UsageError
    from loopmdm.model.hooks.hooked import HookedLoopMDM
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

_HOMES = {
    "ArgmaxStable": "loopmdm.model.stopping.rules",
    "EntropyDelta": "loopmdm.model.stopping.rules",
    "ExitGate": "loopmdm.model.stopping.rules",
    "FixedLoops": "loopmdm.model.stopping.rules",
    "HookedLoopMDM": "loopmdm.model.hooks.hooked",
    "KLDelta": "loopmdm.model.stopping.rules",
    "LoopMDM": "loopmdm.model.network.model",
    "LoopMDMConfig": "loopmdm.model.network.config",
    "LoopOutput": "loopmdm.model.protocol",
    "MaskedBatch": "loopmdm.model.sequences",
    "NelboResult": "loopmdm.model.diffusion.likelihood",
    "NoiseSchedule": "loopmdm.model.stopping.rules",
    "Order": "loopmdm.model.diffusion.orders",
    "SampleResult": "loopmdm.model.diffusion.sampling",
    "SecondDifference": "loopmdm.model.stopping.rules",
    "Sequences": "loopmdm.model.sequences",
    "Site": "loopmdm.model.sites",
    "StateDelta": "loopmdm.model.stopping.rules",
    "StoppingRule": "loopmdm.model.stopping.rules",
    "Trajectory": "loopmdm.model.diffusion.trajectories",
    "UsageError": "loopmdm.model.errors",
    "at": "loopmdm.model.sites",
    "continuation_nelbo": "loopmdm.model.diffusion.likelihood",
    "corpus_nelbo": "loopmdm.model.diffusion.likelihood",
    "hook_model": "loopmdm.model.adapters",
    "list_models": "loopmdm.model.network.checkpoints",
    "mask_tokens": "loopmdm.model.masking",
    "nelbo": "loopmdm.model.diffusion.likelihood",
    "nelbo_by_loop": "loopmdm.model.diffusion.likelihood",
    "open_model": "loopmdm.model.adapters",
    "sample": "loopmdm.model.diffusion.sampling",
}


def __getattr__(name: str) -> Any:
    return named(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
