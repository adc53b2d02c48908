"""Weights on disk: where a name leads, strict reading. No pickle is ever loaded."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from loopmdm.model.errors import NotFiniteError, UsageError, unknown_name
from loopmdm.model.files import is_file, is_folder, read_json, sha256, write_atomic, write_json
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.places import cache_folder

ZOO = Path(__file__).parents[1] / "zoo"
WEIGHTS, CONFIG, TOKENIZER, RECORD, METRICS = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "train.json",
    "metrics.jsonl",
)
FINISHED = (WEIGHTS, CONFIG, RECORD)
"""What a run writes at its end; tokenizer and metrics lie there before, and are left, too."""
WEIGHTS_HASH = "weights_sha256"
"""What the record calls the hash of the weights."""
EVALUATION = "evaluation"
"""What it calls what these weights reach."""


class Uninitialised(TorchFunctionMode):
    """Modules made inside stay as allocated: drawing weights on the meta device loads the compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What `torch.nn.init` is asked gives its tensor back."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


MANIFEST = "manifest.json"
"""Beside the runs in a wheel: sha256 and size of every file of every run, also of those that it lacks."""


def manifest() -> Mapping[str, Mapping[str, tuple[str, int]]]:
    """By run and file what this release consists of; empty in a checkout, where all of it lies in `ZOO`."""
    path = ZOO / MANIFEST
    return _manifest(path, path.stat().st_mtime_ns) if is_file(path) else {}


@lru_cache(maxsize=4)
def _manifest(path: Path, state: int) -> Mapping[str, Mapping[str, tuple[str, int]]]:  # noqa: ARG001
    return read_json(path)


def fetched_folder(name: str) -> Path:
    """Where a run of the manifest is once it is fetched, by its name and by what its files are."""
    path = ZOO / MANIFEST
    return cache_folder() / "models" / _digest(path, path.stat().st_mtime_ns, name)[:16] / name


@lru_cache(maxsize=1024)
def _digest(path: Path, state: int, name: str) -> str:
    """Hash of what a manifest says of a run."""
    return hashlib.sha256(json.dumps(_manifest(path, state)[name], sort_keys=True).encode()).hexdigest()


def is_fetched(name: str) -> bool:
    """Whether a run of the manifest was fetched, and every file of it is still there."""
    if name not in manifest():
        return False
    folder = fetched_folder(name)
    sizes = {folder / file: size for file, (_, size) in manifest()[name].items()}
    return all(is_file(path) and path.stat().st_size == size for path, size in sizes.items())


def list_models() -> list[str]:
    """Names of the shipped models whose weights are here: with the code, or fetched."""
    fetched = (name for name, files in manifest().items() if WEIGHTS in files and is_fetched(name))
    return sorted({*_in_zoo(WEIGHTS), *fetched})


def list_released() -> list[str]:
    """Names of the shipped models, here or to be fetched."""
    return sorted({*list_models(), *(name for name, files in manifest().items() if WEIGHTS in files)})


def list_runs() -> list[str]:
    """Names of all runs that are reported on: the shipped models, and those of which only the record is kept."""
    return sorted(_in_zoo(RECORD))


def _in_zoo(file: str) -> list[str]:
    """Runs of the zoo that have a file; asked for each table, where pathlib's globbing was most of the time."""
    if not ZOO.is_dir():
        return []
    with os.scandir(ZOO) as entries:
        return [entry.name for entry in entries if os.path.isfile(os.path.join(entry.path, file))]  # noqa: PTH113, PTH118


def is_shipped(name: str) -> bool:
    """Whether a run of that name is in the zoo, with its weights or as a record."""
    return name == Path(name).name and is_file(ZOO / name / RECORD)


def resolve(name: Path | str) -> Path:
    """The folder that a shipped name, a run folder or a hub id ("owner/name") leads to."""
    if not isinstance(name, str | Path):
        raise UsageError(f"a model is named by a word or a folder, got {name!r:.60}")
    if isinstance(name, str) and is_shipped(name):
        return fetched_folder(name) if is_fetched(name) else ZOO / name
    folder = Path(name)
    if is_folder(folder):
        return folder
    if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _from_hub(name)
    raise unknown_name("model", str(name), list_released(), "A run folder or a hub id owner/name works too.")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the hub client raises many kinds; all mean "not to be had"
        raise OSError(f"{name} is no folder here and was not to be had from the hub: {error}") from error


def need(folder: Path, file: str) -> Path:
    """`folder/file`, or UsageError if it is not there."""
    path = folder / file
    if not path.is_file():
        if file == WEIGHTS and _is_kept(folder):
            raise UsageError(_absent(folder.name))
        raise UsageError(f"{folder} has no {file}; a model folder holds {WEIGHTS} and {CONFIG}")
    return path


def read_record(folder: Path) -> dict[str, Any]:
    """A folder's train.json; UsageError if it is missing, damaged or no table."""
    record = read_json(need(folder, RECORD))
    if not isinstance(record, dict):
        raise UsageError(f"{folder / RECORD} is no record that names its corpus; restore the file")
    return record


def _is_kept(folder: Path) -> bool:
    """Whether a folder is that of a shipped run, with or without weights."""
    return folder.parent == ZOO or (is_shipped(folder.name) and folder == resolve(folder.name))


def _absent(name: str) -> str:
    """Why the weights of a shipped run are not here, and how to have them."""
    if WEIGHTS in manifest().get(name, ()):
        return f"the weights of {name} are not here; fetch them: `loopmdm models fetch {name}`"
    measured = name in manifest() and not is_fetched(name)
    more = f" (`loopmdm models fetch {name}` brings what was measured of it)" if measured else ""
    return f"{name} is kept as a record only, without weights{more}; {_again(name)}"


def _again(name: str) -> str:
    """How to train a run of which the record is kept."""
    spec = read_json(ZOO / name / RECORD)["spec"]
    file = spec["name"].removesuffix(f"-seed{spec['seed']}")  # what `loopmdm train --seed` adds
    return f"train it again with `loopmdm train {file} --seed {spec['seed']}`"


def weights_hash(folder: Path) -> str:
    """sha256 of a model's weights; of a run kept without them, what it was."""
    if (folder / WEIGHTS).is_file() or not _is_kept(folder):
        return sha256(need(folder, WEIGHTS))
    return read_record(folder)[WEIGHTS_HASH]


def model_hash(folder: Path) -> str:
    """Of weights and config, the first sixteen digits of each sha256, joined by a colon: what numbers are of."""
    return f"{weights_hash(folder)[:16]}:{sha256(need(folder, CONFIG))[:16]}"


def with_hash(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record that holds the hash of the weights in `folder`; what was measured on others goes."""
    now = sha256(need(folder, WEIGHTS))
    others = record.get(WEIGHTS_HASH, now) != now
    return {key: value for key, value in record.items() if not (others and key == EVALUATION)} | {
        WEIGHTS_HASH: now
    }


def check_hash(folder: Path) -> None:
    """UsageError if the record beside the weights holds another hash than theirs."""
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    known = record.get(WEIGHTS_HASH) if isinstance(record, dict) else None
    if known is not None and known != weights_hash(folder):
        raise UsageError(
            f"{folder / WEIGHTS} is not what {RECORD} beside it was written for (its sha256 is another): damaged "
            f"or replaced; copy or train it again, or take {WEIGHTS_HASH} out of {RECORD}"
        )


def check_device(device: Any) -> torch.device:
    """The device meant, "auto" being the current GPU if there is one; UsageError for none, or one not here.

    Losses, costs and samplers count in float64, which Apple's mps does not have: it is refused, and no "auto".
    """
    there = devices_here()
    if device == "auto":
        device = "cuda" if len(there) > 1 else "cpu"
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        known = ", ".join(there)
        raise UsageError(f"device {str(device)!r} cannot be used here ({why:.80}); there is {known}") from error
    if place.type == "mps":
        raise UsageError(f"device 'mps' has no float64, in which losses are summed; there is {', '.join(there)}")
    return place


def devices_here() -> list[str]:
    """Names of the devices that a model can run on, the fastest kind first; the CPU is always the last."""
    return [*(f"cuda:{number}" for number in range(torch.cuda.device_count())), "cpu"]


def check_sizes(folder: Path, expected: Mapping[str, Tensor]) -> None:
    """UsageError if the header of the weights is not that of `expected`, which may lie on the meta device.

    Reads names and shapes only: a config that asks for too much is refused before anything is allocated.
    """
    path = need(folder, WEIGHTS)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged or truncated ({error}); copy or train it again") from error
    _check_names(path, expected, shapes)
    for name, tensor in expected.items():
        if list(tensor.shape) != shapes[name]:
            raise UsageError(f"{path}: {name} has shape {shapes[name]}, {CONFIG} asks for {list(tensor.shape)}")


def _check_names(path: Path, expected: Collection[str], found: Collection[str]) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        what = [f"lacks {missing[0]} (and {len(missing) - 1} more)"] if missing else []
        what += [f"has unexpected {extra[0]} (and {len(extra) - 1} more)"] if extra else []
        raise UsageError(f"{path} {', '.join(what)}; it does not belong to the {CONFIG} beside it")


def load_weights(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read `model.safetensors`, which passed `check_sizes`: strict on hash and kinds, in the expected dtypes."""
    path = folder / WEIGHTS
    check_hash(folder)
    found = load_file(path)
    for name in expected:
        check_weight(f"{path}: {name}", found[name])
    return {name: found[name].to(expected[name].dtype) for name in expected}


def check_weight(what: str, tensor: Tensor) -> None:
    """UsageError unless a stored weight is a floating one, NotFiniteError unless it is finite."""
    if not tensor.is_floating_point():
        raise UsageError(f"{what} is {tensor.dtype}, not a floating dtype; store weights as they were trained")
    if not bool(tensor.isfinite().all()):
        raise NotFiniteError(f"{what} holds NaN or infinite weights; train it again or take an earlier checkpoint")


def save_weights(
    folder: Path | str,
    cfg: LoopMDMConfig,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write weights and config into `folder`, each file atomically; tied weights are written once a name.

    `record` is written with their hash; else a record that lies there gets it, and loses its evaluation if it was
    of other weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if record is None and (folder / RECORD).is_file():
        record = read_record(folder)
        if WEIGHTS_HASH not in record and (folder / WEIGHTS).is_file():
            record = {WEIGHTS_HASH: sha256(folder / WEIGHTS)} | record
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        whole = tensor.detach().to("cpu", dtype).contiguous()
        if dtype is not None and bool((whole.isinf() & tensor.detach().to("cpu").isfinite()).any()):
            raise NotFiniteError(f"{name} is beyond the range of {dtype}; save in torch.bfloat16 or torch.float32")
        tied = any(whole.data_ptr() == other.data_ptr() for other in tensors.values())
        tensors[name] = whole.clone() if tied else whole
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_atomic(folder / CONFIG, cfg.save)
    if record is not None:
        write_json(folder / RECORD, with_hash(folder, record))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors atomically; OSError when the disk fails."""
    try:
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    except SafetensorError as error:
        raise OSError(f"cannot write {path} ({error}); free some space or write elsewhere") from error
