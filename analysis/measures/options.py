"""What a measure is asked beside the model: frozen, so that it can be printed, hashed, kept and shown.

A measure's own options are the keyword parameters of its function (`options_of`); how far and on what a model is
read stands before them, by what the measure looks at: `OnTests`, `OnMasks` or `ByLoops`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from inspect import Parameter, signature
from typing import Any, TypeVar

import pandas as pd

from loopmdm.model.errors import UsageError, check_count, check_number, check_seed

RATIOS = (0.25, 0.5, 0.75)
Own = TypeVar("Own", bound="Options")


@dataclass(frozen=True)
class Options:
    """Base: prints what differs from the defaults."""

    @classmethod
    def of(cls: type[Own], by: str, given: Mapping[str, Any]) -> Own:
        """From keywords, lists as tuples; UsageError, said by the measure `by`, on one that it does not have."""
        usual = {item.name: item.default for item in fields(cls)}
        for name, value in given.items():
            if name not in usual:
                raise UsageError(f"{by} takes no {name}; it takes {', '.join(usual)}")
            _check(f"{by}: {name}", value, usual[name])
        return cls(**{name: _frozen(value) for name, value in given.items()})

    def asked(self) -> dict[str, Any]:
        """All of them in plain JSON."""
        return json.loads(json.dumps(asdict(self)))

    def __str__(self) -> str:
        usual = {item.name: item.default for item in fields(self)}
        return ", ".join(f"{name}={value!r}" for name, value in asdict(self).items() if value != usual[name])


@dataclass(frozen=True)
class OnTests(Options):
    """`n` test sequences, read to `n_loops` (None: S_max of training); `seed` of masks and samples."""

    n_loops: int | None = None
    n: int = 256
    seed: int = 0

    def __post_init__(self):
        """Counts only."""
        if self.n_loops is not None:
            check_count("n_loops", self.n_loops)
        check_count("n", self.n)
        check_seed(self.seed)


@dataclass(frozen=True)
class OnMasks(OnTests):
    """At each of `mask_ratios`, or before five of `along_sampling` denoising steps of the model's own samples."""

    mask_ratios: tuple[float, ...] = RATIOS
    along_sampling: int = 0

    def __post_init__(self):
        """Counts and shares only."""
        super().__post_init__()
        if not self.mask_ratios:
            raise UsageError("mask_ratios is empty; name at least one, such as 0.5")
        for share in self.mask_ratios:
            check_number("mask_ratios", share, least=0, most=1)
        check_count("along_sampling", self.along_sampling, least=0)


@dataclass(frozen=True)
class ByLoops(Options):
    """At each of the loop counts `n_loops`, sorted (none given: 1 and S_max of training)."""

    n_loops: tuple[int, ...] = ()

    def __post_init__(self):
        """Counts only, each once."""
        given = self.n_loops if isinstance(self.n_loops, tuple) else (self.n_loops,)
        object.__setattr__(self, "n_loops", tuple(sorted({check_count("n_loops", count) for count in given})))


def options_of(name: str, base: type[Options], run: Callable[..., pd.DataFrame], skip: int) -> type[Options]:
    """`base` with the parameters of `run` after the first `skip`, each of which must have a default."""
    own = [item for item in list(signature(run).parameters.values())[skip:] if item.kind != Parameter.VAR_KEYWORD]
    lacking = [item.name for item in own if item.default is Parameter.empty]
    if lacking:
        raise UsageError(f"the measure {name} gives no default for {lacking[0]}; its options need one")
    words = "".join(word.capitalize() for word in name.split("-"))
    entries = [(item.name, item.annotation, field(default=_frozen(item.default))) for item in own]
    return make_dataclass(f"{words}Options", entries, bases=(base,), frozen=True)


KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a word", tuple: "several values"}


def _check(name: str, value: Any, usual: Any) -> None:
    """UsageError where a value is of another kind than the default."""
    kind = type(usual)
    if kind not in KINDS or name.endswith(": n_loops"):
        return
    fits = {float: (int, float), tuple: (tuple, list)}.get(kind, kind)
    if not isinstance(value, fits) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{name} takes {KINDS[kind]} such as {usual!r}, got {value!r}")


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
