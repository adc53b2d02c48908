"""A run's resumable state in one safetensors file: tensors, with counters and a hash of both in its header."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from loopmdm.model.corpora.own_files import FILES
from loopmdm.model.errors import UsageError
from loopmdm.model.network.checkpoints import write_tensors
from loopmdm.model.training.ema import Ema
from loopmdm.model.training.spec import RunSpec

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

STATE_FILE = "state/state.safetensors"
HASH = "sha256"


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


def identity_of(spec: RunSpec) -> dict[str, Any]:
    """What must not change on resume; own files are told by their content, not by how their path was written."""
    values = spec.to_dict()
    if spec.data.corpus.startswith(FILES):
        values["data"] = values["data"] | {"corpus": FILES}
    return values


def _whole() -> "StateDictOptions":
    from torch.distributed.checkpoint.state_dict import StateDictOptions  # late: costs as much as torch

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def gather(model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> dict[str, Tensor]:
    """All tensors a resumed run needs, by name, whole and on the CPU, however they are sharded.

    Every process must call it; only the first is sure to get the tensors.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    tensors: dict[str, Any] = dict(_named("model.", get_model_state_dict(model, options=_whole())))
    with ema.swapped():
        averages = get_model_state_dict(model, options=_whole())
        tensors |= {name: value.clone() for name, value in _named("ema.", averages)}
    moments: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=_whole()))
    for name, kept in moments.get("state", {}).items():
        tensors |= _named(f"optimizer.{name}.", kept)
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _named(prefix: str, values: Any) -> list[tuple[str, Any]]:
    return [(prefix + name, value) for name, value in values.items()]


def scatter(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> None:
    """Inverse of `gather`; `ema.n` must be set besides."""

    def part(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    from torch.distributed.checkpoint import state_dict as sharded

    _check_tensors(tensors, model, optimizer)
    whole = _whole()
    with ema.swapped():
        sharded.set_model_state_dict(model, part("ema."), options=whole)
    sharded.set_model_state_dict(model, part("model."), options=whole)
    moments: dict[str, Any] = dict(sharded.get_optimizer_state_dict(model, optimizer))
    moments["state"] = {}
    for name, value in part("optimizer.").items():
        parameter, _, key = name.rpartition(".")
        moments["state"].setdefault(parameter, {})[key] = value
    sharded.set_optimizer_state_dict(model, optimizer, moments, options=whole)


def _check_tensors(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """UsageError for a tensor that the run needs and the state lacks, or has in another shape or too many."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    weights = get_model_state_dict(model)
    expected: dict[str, Any] = {f"{kind}.{name}": w for kind in ("model", "ema") for name, w in weights.items()}
    moments: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer))
    for name, kept in moments.get("state", {}).items():
        expected |= _named(f"optimizer.{name}.", kept)
    odd = sorted(expected.keys() ^ tensors.keys())
    odd += [name for name, value in expected.items() if name in tensors and value.shape != tensors[name].shape]
    if odd:
        found = f"has shape {list(tensors[odd[0]].shape)}" if odd[0] in tensors else "is missing"
        what = f"{odd[0]} {found if odd[0] in expected else 'does not belong to this run'}"
        raise UsageError(f"{STATE_FILE} is damaged: {what}; delete its folder to start again")


def save(folder: Path, tensors: dict[str, Tensor], progress: Progress, identity: dict[str, Any]) -> None:
    """Write the state atomically; `identity` is what must not change on resume."""
    header = {"progress": json.dumps(asdict(progress)), "identity": json.dumps(identity)}
    write_tensors(folder / STATE_FILE, tensors, header | {HASH: _hash(tensors, header)})


def _hash(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """sha256 over counters, identity, and every tensor with its name."""
    digest = hashlib.sha256("\0".join(header[name] for name in ("progress", "identity")).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _differences(before: dict[str, Any], now: dict[str, Any], changed: list[str]) -> str:
    """Each key that differs, with both values; of tables the keys inside."""
    told = []
    for name in changed:
        was, is_now = before.get(name), json.loads(json.dumps(now[name]))
        if isinstance(was, dict) and isinstance(is_now, dict):
            inner = [key for key in {**was, **is_now} if was.get(key) != is_now.get(key)]
            told += [f"{name}.{key} was {was.get(key)!r:.60}, is {is_now.get(key)!r:.60}" for key in inner]
        else:
            told.append(f"{name} was {was!r:.60}, is {is_now!r:.60}")
    return ", ".join(told[:3]) + (f" and {len(told) - 3} more" if len(told) > 3 else "")


def load(folder: Path, identity: dict[str, Any]) -> tuple[dict[str, Tensor], Progress] | None:
    """The last state, None if there is none; UsageError if it is damaged or of another run."""
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        before, progress = json.loads(header["identity"]), Progress(**json.loads(header["progress"]))
        _check_progress(progress)
        if not isinstance(before, dict):
            raise TypeError("it does not say of which run it is")
        if HASH in header and header[HASH] != _hash(tensors, header):  # states of old have none
            raise ValueError("its sha256 is another than when it was written")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error}); delete {path.parent} to start again") from error
    changed = [name for name in identity if json.loads(json.dumps(identity[name])) != before.get(name)]
    if changed:
        raise UsageError(f"{folder} belongs to another run: {_differences(before, identity, changed)}; "
                         "give another --out or restore it")  # fmt: skip
    return tensors, progress


def _check_progress(progress: Progress) -> None:
    """TypeError for counters that are none."""
    for entry in fields(Progress):
        value, default = getattr(progress, entry.name), getattr(Progress(), entry.name)
        known = int | float if isinstance(default, float) else type(default)
        if not isinstance(value, known) or isinstance(value, bool) != isinstance(default, bool):
            raise TypeError(f"its {entry.name} is {value!r:.40}")
