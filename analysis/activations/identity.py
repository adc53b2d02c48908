"""Which model numbers on disk are of: its name, and the hashes of its weights and of its config.

As for files (`network.checkpoints.model_hash`) the first sixteen digits of each sha256 are kept, joined by a
colon; here they are of the weights in memory, names and dtypes included, so that any model has them: ours, other
people's, one whose weights were changed by hand.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM


@dataclass(frozen=True)
class Identity:
    """`name` as the model is called, `hash` of weights and config, `config` its numbers in plain JSON."""

    name: str
    hash: str
    config: dict[str, Any]

    def check(self, m: HookedLoopMDM, what: str) -> None:
        """UsageError, said of `what`, unless `m` is the model, in weights and config."""
        other = identity(m)
        if other.hash != self.hash and not self._older(m, other):
            raise UsageError(
                f"{what} is of {self.name or 'an unnamed model'} ({self.hash}), not of "
                f"{other.name or 'this model'} ({other.hash}); open that model, in that dtype, or make it anew"
            )

    def _older(self, m: HookedLoopMDM, other: "Identity") -> bool:
        """Whether `other` has these weights, and this config as it was before it had more keys with defaults."""
        same = self.hash.partition(":")[0] == other.hash.partition(":")[0]
        return (
            same and _defaults(m.cfg) | self.config == other.config and self.config.keys() <= other.config.keys()
        )


def identity(m: HookedLoopMDM) -> Identity:
    """Of a hooked model; reads all its weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(m.model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = _plain(m.cfg)
    told = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    return Identity(m.model_name, f"{digest.hexdigest()[:16]}:{told.hexdigest()[:16]}", config)


def _defaults(cfg: Any) -> dict[str, Any]:
    known = fields(cfg) if is_dataclass(cfg) else ()
    return json.loads(json.dumps({item.name: item.default for item in known}, default=str))


def _plain(cfg: Any) -> dict[str, Any]:
    known = asdict(cfg) if is_dataclass(cfg) and not isinstance(cfg, type) else dict(vars(cfg))
    return json.loads(json.dumps(known, default=str))
