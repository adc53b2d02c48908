"""What a run is: a TOML file read into frozen, validated records; unknown keys are refused."""

import dataclasses
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopmdm_model.config import LoopMDMConfig
from loopmdm_model.data.batches import TASKS
from loopmdm_model.data.sudoku import N_CELLS, SIZE
from loopmdm_model.errors import UsageError, check_count, check_keys, unknown_name


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """`corpus` is a text corpus or the task sudoku6; `length` tokens a sequence, `d_vocab` ids in all."""

    corpus: str
    length: int = 64
    d_vocab: int = 1024

    def __post_init__(self):
        """Sudoku fixes its own length and vocabulary."""
        if self.corpus not in TASKS:
            raise unknown_name("corpus or task", self.corpus, TASKS)
        if self.corpus == "sudoku6":
            object.__setattr__(self, "length", N_CELLS)
            object.__setattr__(self, "d_vocab", SIZE + 1)
        check_count("data.length", self.length, least=2)


@dataclass(frozen=True, kw_only=True)
class LoopSchedule:
    """S ~ Uniform{1..cap}; cap is 1 until `widen_from` of the budget and max_loops from `widen_until` on."""

    widen_from: float = 0.0
    widen_until: float = 0.0

    def __post_init__(self):
        """Shares of the budget in order."""
        if not 0 <= self.widen_from <= self.widen_until <= 1:
            raise UsageError("loops needs 0 <= widen_from <= widen_until <= 1")

    def cap(self, progress: float, max_loops: int) -> int:
        """Largest S drawn when `progress` of the budget is spent."""
        if progress >= self.widen_until:
            return max_loops
        if progress < self.widen_from:
            return 1
        share = (progress - self.widen_from) / (self.widen_until - self.widen_from)
        return min(max_loops, 1 + int(share * max_loops))


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """AdamW with warm-up and then a constant rate; `flops` is the whole budget; EMA weights are kept."""

    flops: float
    batch_size: int
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0
    ema: float = 0.999
    curve_points: int = 25
    curve_sequences: int = 128
    compile: bool = False
    threads: int = 1

    def __post_init__(self):
        """Positive sizes and rates."""
        check_count("training.batch_size", self.batch_size)
        check_count("training.threads", self.threads)
        check_count("training.curve_points", self.curve_points)
        check_count("training.curve_sequences", self.curve_sequences)
        check_count("training.warmup_steps", self.warmup_steps, least=0)
        for name in ("flops", "learning_rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"training.{name} must be positive and finite, got {getattr(self, name)!r}")
        for name in ("ema", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"training.{name} must lie in [0, 1), got {getattr(self, name)!r}")
        if not 0 <= self.weight_decay < float("inf"):
            raise UsageError(f"training.weight_decay must be at least 0, got {self.weight_decay!r}")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One training run."""

    name: str
    seed: int
    data: DataSpec
    model: dict[str, Any]
    training: TrainingSpec
    loops: LoopSchedule = field(default_factory=LoopSchedule)

    @property
    def config(self) -> LoopMDMConfig:
        """The model's config: [model] with the data's vocabulary and length."""
        return LoopMDMConfig.from_dict(self.model | {"d_vocab": self.data.d_vocab, "n_ctx": self.data.length})

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as the TOML file reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "spec") -> "RunSpec":
        """Build and validate; UsageError names unknown and missing keys."""
        parts = {"data": DataSpec, "training": TrainingSpec, "loops": LoopSchedule}
        built = _build(cls, values, origin, skip=parts)
        for name, kind in parts.items():
            built[name] = kind(**_build(kind, values.get(name, {}), f"{origin} [{name}]"))
        spec = cls(**built)
        check_count("seed", spec.seed, least=0)
        if not re.fullmatch(r"[\w.-]+", spec.name) or spec.name.startswith("."):
            raise UsageError(f"{origin}: name must be letters, digits, '-', '_' or '.', got {spec.name!r}")
        reserved = {"d_vocab", "n_ctx", "mask_token_id"} & spec.model.keys()
        if reserved:
            raise UsageError(f"{origin} [model]: {', '.join(sorted(reserved))} follow from [data]; remove them")
        assert spec.config
        return spec

    @classmethod
    def load(cls, path: Path | str) -> "RunSpec":
        """Read a TOML spec."""
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"no spec at {path}; see figures/specs for examples")
        try:
            values = tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not TOML: {error}") from error
        return cls.from_dict(values, path.name)


def _build(kind: type, values: Any, origin: str, skip: Any = ()) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UsageError(f"{origin} must be a table, got {values!r}")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    check_keys(values, fields, origin)
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UsageError(f"{origin}: missing key {name!r}")
        if name in values and item.type in (int, float, str, bool) and name not in skip:
            _check_type(f"{origin}: {name}", values[name], item.type)
    return dict(values)


def _check_type(name: str, value: Any, kind: Any) -> None:
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{name} must be {kind.__name__}, got {value!r}")
