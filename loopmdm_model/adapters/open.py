"""Taking in a model: `hook_model` one that is loaded, `open_model` one by name."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loopmdm.model.adapters import loading
from loopmdm.model.adapters.checks import check
from loopmdm.model.adapters.core import ForeignCore
from loopmdm.model.adapters.families import PATHS, Family, family_named, looks_like, name_of_class
from loopmdm.model.adapters.infer import from_paths, guesses, parts_of
from loopmdm.model.adapters.kinds import checked
from loopmdm.model.adapters.layout import read_layout
from loopmdm.model.adapters.specimens import SPECIMENS, Specimen
from loopmdm.model.errors import UsageError, check_keys, unknown_name
from loopmdm.model.files import is_file, is_folder, read_json
from loopmdm.model.hooks.doors import floating
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.checkpoints import CONFIG, check_device, is_shipped, list_released

HUB = "hf:"


def open_model(
    name: Path | str,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> HookedLoopMDM:
    """A shipped name, a run folder, a folder of somebody else's model, "hf:owner/name" from the hub, a specimen.

    Specimens are pretrained models that `loopmdm data fetch` brings: sapiens-heavy, sapiens-light, antiberty.

    `dtype` (torch's, or its name) None: as stored; `device` "auto": a GPU if there is one, "meta": sizes and sites
    without weights. `trust_remote_code` lets code run that lies beside the weights; `revision` pins it. `changes`:
    as `hook_model`.

    >>> lm.open_model("sudoku-loop-s4").cfg.max_loops
    4
    """
    if not isinstance(name, str | Path) or not name or name == HUB:
        raise UsageError(f"a model is opened by name or folder, got {name!r:.60}; hook_model takes a loaded one")
    dtype = None if dtype is None else floating(dtype)
    place = check_device(device)
    if name in SPECIMENS:
        if revision or trust_remote_code:
            raise UsageError(f"{name} is pinned by its hash and brings no code; leave revision and trust out")
        return _specimen(SPECIMENS[str(name)], place, dtype, changes)
    hears = changes.get("hears", True)
    wanted = loading.Wanted(str(name).removeprefix(HUB), place, dtype, revision, trust_remote_code, hears)
    config = {} if is_ours(name) else loading.config_of(wanted)
    if looks_like(config) is None and "family" not in changes:
        if changes or revision or trust_remote_code:
            raise UsageError(f"{name} is a LoopMDM; it takes device and dtype only")
        if "/" not in str(name) and not is_folder(Path(name)) and not is_shipped(str(name)):
            known = [*list_released(), *SPECIMENS]
            raise unknown_name("model", str(name), known, "A run folder or a hub id owner/name works too.")
        return HookedLoopMDM.from_pretrained(name if is_ours(name) else wanted.name, place, dtype)
    native, tokenizer, record = loading.load(wanted, config, changes.get("family"))
    m = hook_model(native, tokenizer=tokenizer, **changes)
    m.model_name = wanted.name.rstrip("/").rpartition("/")[2]
    m.record |= record
    return m


def _specimen(
    specimen: Specimen, device: torch.device, dtype: torch.dtype | None, changes: Mapping[str, Any]
) -> HookedLoopMDM:
    loading.check_transformers()
    native, tokenizer, record = specimen.load()
    m = hook_model(native.to(device, dtype), tokenizer=tokenizer, **changes)
    m.model_name, m.gap_words = specimen.name, (*m.gap_words, *specimen.gaps)
    m.record |= record
    return m


def is_ours(name: Path | str) -> bool:
    """Whether a name is no specimen's and leads to nobody else's model, as far as can be told without the hub."""
    if name in SPECIMENS:
        return False
    if isinstance(name, str) and (name.startswith(HUB) or is_shipped(name)):
        return not name.startswith(HUB)
    path = Path(name) / CONFIG
    return not is_file(path) or looks_like(read_json(path)) is None


def hook_model(
    native: nn.Module,
    family: str | Family | None = None,
    loop: tuple[int, int] | None = None,
    max_loops: int | None = None,
    tokenizer: Any = None,
    **changes: Any,
) -> HookedLoopMDM:
    """Somebody else's model, loaded already, with our hooks; its code and weights stay as they are, in eval mode.

    `loop=(first, n)` loops layers first .. first + n - 1 (training-free if the model does not loop them itself).
    `changes` are fields of the family's record, such as mask_token_id=103, or bidirectional=True, which opens a
    causal model's attention; without a record the six `PATHS` are. What is checked stands in `checks.py`.
    """
    if not isinstance(native, nn.Module):
        raise UsageError(f"hook_model takes a torch module, got {type(native).__name__}; open_model takes names")
    check_keys(changes, [*PATHS, *(entry.name for entry in fields(Family))], "hook_model")
    loading.check_loaded(native, changes.get("hears", getattr(family, "hears", True)))
    native.eval()
    name, core, found = _first_that_fits(native, family, (loop, max_loops, tokenizer), changes)
    m = HookedLoopMDM(core, loading.plain_tokenizer(tokenizer))
    m.model_name, m.pad = type(native).__name__, loading.pad_of(tokenizer) or m.pad
    m.special = loading.special_of(m.tokenizer)
    m.record = {"family": name, "torch": torch.__version__, "checks": found}
    m.record |= loading.provenance(native)
    return m


def _first_that_fits(
    native: nn.Module, family: str | Family | None, how: tuple[Any, int | None, Any], changes: Mapping[str, Any]
) -> tuple[str, ForeignCore, dict[str, Any]]:
    """The family's name, the core and its checks, for the first record that passes them.

    `how` is (loop, max_loops, tokenizer) as given.
    """
    name, records = _records(native, family, changes)
    loading.check_config(native, records[0])
    failures = []
    for record in records:
        try:
            core = _core(native, record, *how)
            return name, core, check(core) if core.device.type != "meta" else {"none": "on the meta device"}
        except UsageError as error:
            if name != "guessed":
                raise
            failures.append(str(error))
    raise UsageError(
        f"{type(native).__name__} has no record, and none that was guessed fits ({failures[0]}); "
        f"give the paths {', '.join(f'{path}=' for path in PATHS)}"
    )


def _records(native: nn.Module, family: Any, changes: Mapping[str, Any]) -> tuple[str, list[Family]]:
    """The family's name and its record with `changes`; several guesses where there is none."""
    if isinstance(family, Family):
        return "given", [_changed(family, changes)]
    if family is not None and not isinstance(family, str):
        raise UsageError(f"family must be a name or a Family, got {family!r:.60}")
    name = family or name_of_class(*(cls.__name__ for cls in type(native).__mro__))
    if name is not None:
        return name, [_changed(family_named(name), changes)]
    if any(path in changes for path in PATHS):
        return "given", [from_paths(changes)]
    return "guessed", [_changed(record, changes) for record in guesses(native)]


def _changed(record: Family, changes: Mapping[str, Any]) -> Family:
    parts, rest = parts_of(changes)
    if "ignores" in rest:  # these beside what the record knows, as the message that asks for them says
        rest["ignores"] = (*record.ignores, *checked("ignores", rest["ignores"]))
    return replace(record, **rest, parts={**record.parts, **parts})


def _core(native: nn.Module, record: Family, loop: Any, max_loops: int | None, tokenizer: Any) -> ForeignCore:
    mask = loading.mask_of(native, record, tokenizer)
    layout = read_layout(native, record, mask, loop, max_loops)
    if mask is not None and not 0 <= mask < layout.d_vocab:
        raise UsageError(
            f"mask_token_id {mask} is outside the vocabulary 0..{layout.d_vocab - 1}; give mask_token_id="
        )
    return ForeignCore(native, record, layout)
