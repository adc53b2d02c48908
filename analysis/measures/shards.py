"""One measure in several jobs: each takes a shard of the sequences, and what they keep is merged to one table.

    part = measure("mask-attention", "sotu-loop", shard=(1, 4))      a frame of what this shard's batches gave
    merge([part, ..])                                                the table that one job would have given

A shard is one piece of the sequences; masks and draws go by the number that a sequence has in the whole, so that
they are those of an undivided run. A part holds what the measure computed batch by batch (`work.py`), before
anything was averaged. To merge runs the measure once more on all sequences and takes what each batch gave from the
parts: means, errors over documents that span shards, quantiles and tests are computed once, from all of it. Where
shards begin at whole batches, as they do if there are enough sequences, the table is the same to the last bit;
otherwise up to the rounding of a forward in another batch.

Only measures whose forwards all lie in such batches come in shards (`Measure.shards`).
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from loopmdm.analysis.measures.access import Access
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.registry import MEASURES, Measure
from loopmdm.analysis.numbers import kept
from loopmdm.model.batching import at_a_time, wanted
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import Share
from loopmdm.model.training.record import versions
from loopmdm.model.work import digest, keeping

VERSIONS = ("torch", "numpy", "transformer-lens")
ATTRIBUTE = "part"
OWN = ("shard", "model", "text")
"""What parts may differ in: paths are other ones on other machines, hashes of weights and sequences decide."""
OPENED = ("dtype", "revision", "trust_remote_code")
"""What was opened otherwise is another model; a device is not, but for rounding."""


@dataclass
class Collecting:
    """A ledger that has work done, and keeps what it gives."""

    found: dict[str, Any] = field(default_factory=dict)

    def result(self, key: str, work: Callable[[], Any]) -> Any:
        """Now."""
        self.found[key] = value = work()
        return value


@dataclass(frozen=True)
class Merging:
    """A ledger that has what others did; nothing is computed."""

    name: str
    found: dict[str, Any]

    def result(self, key: str, work: Callable[[], Any]) -> Any:  # noqa: ARG002
        """From a part; UsageError where none has it."""
        if key not in self.found:
            raise UsageError(
                f"the parts lack something that {self.name} asks of all sequences, so they do not add up to its "
                f"table; measure it in one piece (these come in shards: {', '.join(in_shards())})"
            )
        return self.found[key]


def in_shards() -> list[str]:
    """Names of the measures that come in shards."""
    return [item.name for item in MEASURES.values() if item.shards]


def check_shards(item: Measure, options: Any) -> None:
    """UsageError for a measure, or a way of asking it, that does not come in shards."""
    if not item.shards:
        raise UsageError(f"{item.name} does not come in shards; these do: {', '.join(in_shards())}")
    if getattr(options, "along_sampling", 0):
        raise UsageError(f"{item.name} along sampling does not come in shards; leave along_sampling out")


def share_of(shard: Any) -> Share:
    """The shard (i, n) that is meant."""
    if not isinstance(shard, tuple | list) or len(shard) != 2:
        raise UsageError(f"shard takes a pair such as (1, 4), the first of four, got {shard!r:.60}")
    share = Share(*shard)
    if share.number < 1:
        raise UsageError(f"there is no shard {share.number}/{share.of}; shards count from 1/{share.of} on")
    return share


def measured_part(item: Measure, model: Any, access: Access, options: Any, share: Share) -> pd.DataFrame:
    """What one shard keeps: key tree data, and in `attrs` what it is part of."""
    check_shards(item, options)
    case = Case.of(model, options=options, access=access, shard=share)
    whole, ledger = told_of(case, item, model), Collecting()
    with keeping(ledger):
        item.of(case)
    frame = kept.table(ledger.found)
    frame.attrs[ATTRIBUTE] = whole | {"shard": share.number}
    return frame


def told_of(case: Case, item: Measure, model: Any) -> dict[str, Any]:
    """What must be the same of all parts, in plain JSON, in the words of a message."""
    from loopmdm.analysis.activations.identity import identity

    assert case.shard is not None
    access, sequences = case.access, case.test.sequences
    opened = {name: getattr(access, name) for name in OPENED}
    return {
        "measure": item.label,
        "model": model.model_name if isinstance(model, HookedLoopMDM) else str(model),
        "weights": identity(case.m).hash,
        "options": case.options.asked(),
        "opened": opened | {"changes": dict(access.changes)},
        "text": None if access.text is None else str(access.text),
        "sequences": hashlib.sha256(digest(sequences).encode()).hexdigest()[:16],
        "shards": case.shard.of,
        "batch_size": wanted(),
        "versions": versions(VERSIONS),
    }


@torch.no_grad()
def merge(
    parts: Iterable[pd.DataFrame], model: HookedLoopMDM | None = None, names: Sequence[str] = ()
) -> pd.DataFrame:
    """The table of a measure from all its parts, in any order; `model` is the one they are of (else opened anew).

    UsageError if they are not all the parts of one whole. `names` are what messages call them. What was asked,
    `measure`, `model` and `options`, is in the table's `attrs["asked"]`.
    """
    parts = list(parts)
    names = list(names) or [f"part {place}" for place in range(1, len(parts) + 1)]
    whole = _check(parts, names)
    item = MEASURES[whole["measure"].rpartition(" ")[0]]
    if item.label != whole["measure"]:
        raise UsageError(f"the parts are of {whole['measure']}, this version has {item.label}; measure them again")
    text, given = whole["text"], whole["model"] if model is None else model
    access = Access(**whole["opened"], text=None if text is None else Path(text))
    options = item.options.of(item.name, whole["options"])
    case = Case.of(given, options=options, access=access, shard=Share(0, whole["shards"]))
    _check_case(told_of(case, item, given), whole)
    found: dict[str, Any] = {}
    for part in parts:
        found |= dict(kept.results(part))
    with at_a_time(whole["batch_size"]), keeping(Merging(item.name, found)):
        frame = item.of(case)
    frame = item.labelled(frame, case, whole["model"])
    frame.attrs["asked"] = {"measure": item.name} | {name: whole[name] for name in ("model", "options")}
    return frame


def _check_case(now: dict[str, Any], whole: dict[str, Any]) -> None:
    for what in ("weights", "sequences"):
        if now[what] != whole[what]:
            raise UsageError(
                f"the parts were made with other {what} ({_short(whole[what])}) than there are now "
                f"({_short(now[what])}); restore those, or make the parts again"
            )


def _check(parts: list[pd.DataFrame], names: Sequence[str]) -> dict[str, Any]:
    """What the parts are of; UsageError unless they are all the parts of it, each once."""
    if not parts:
        raise UsageError("there is nothing to merge; give the parts that `measure` made with shard=")
    told: list[Any] = [part.attrs.get(ATTRIBUTE) for part in parts]
    for name, one in zip(names, told, strict=True):
        if not isinstance(one, dict) or "shard" not in one:
            raise UsageError(f"{name} is no part of a measure; `loopmdm measure .. --shard 1/4 --out` makes one")
        for what, value in told[0].items():
            if what not in OWN and one.get(what) != value:
                raise UsageError(
                    f"{names[0]} and {name} differ in {what}: {_short(value)} and {_short(one.get(what))}; "
                    "merge parts of one model, measure and setting"
                )
    numbers, of = [one["shard"] for one in told], told[0]["shards"]
    for number in range(1, of + 1):
        if numbers.count(number) > 1:
            twice = [name for name, other in zip(names, numbers, strict=True) if other == number]
            raise UsageError(f"shard {number}/{of} is there twice: {' and '.join(twice)}; leave one out")
    missing = [f"{number}/{of}" for number in range(1, of + 1) if number not in numbers]
    if missing:
        raise UsageError(f"shard {', '.join(missing)} is missing; measure it with --shard {missing[0]}")
    return told[0]


def _short(value: Any) -> str:
    return f"{value!r:.120}"
