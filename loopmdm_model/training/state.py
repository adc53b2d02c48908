"""A run's resumable state in one safetensors file: tensors, with counters as JSON in its header."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from loopmdm_model.checkpoints import write_tensors
from loopmdm_model.errors import UsageError

STATE_FILE = "state/state.safetensors"


@dataclass
class Progress:
    """Counters of a run; `rows` are the metrics rows so far, `window` sums since the last row."""

    step: int = 0
    flops: float = 0.0
    tokens: int = 0
    loops: int = 0
    seconds: float = 0.0
    finished: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    window: dict[str, float] = field(default_factory=dict)


def gather(model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors a resumed run needs, by name."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def scatter(
    tensors: dict[str, Tensor], model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Inverse of `gather`."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    model.load_state_dict(part("model."))
    ema.load_state_dict(part("ema."))
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            key: value.to(parameter.device) for key, value in part(f"optimizer.{name}.").items()
        }


def save(folder: Path, tensors: dict[str, Tensor], progress: Progress, identity: dict[str, Any]) -> None:
    """Write the state atomically; `identity` is what must not change on resume."""
    header = {"progress": json.dumps(asdict(progress)), "identity": json.dumps(identity)}
    write_tensors(folder / STATE_FILE, tensors, header)


def load(folder: Path, identity: dict[str, Any]) -> tuple[dict[str, Tensor], Progress] | None:
    """The last state, None if there is none; UsageError if it is damaged or of another run."""
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged ({error}); delete {path.parent} to start again") from error
    before = json.loads(header["identity"])
    changed = [name for name in identity if json.loads(json.dumps(identity[name])) != before.get(name)]
    if changed:
        name = changed[0]
        raise UsageError(
            f"{folder} belongs to another run: {name} was {before.get(name)!r}, is {identity[name]!r}; "
            "give another --out or restore it"
        )
    return tensors, Progress(**json.loads(header["progress"]))
