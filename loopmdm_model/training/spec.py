"""What a run is: a TOML file read into frozen, validated records; unknown keys are refused."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from loopmdm.model.corpora.documents import check_trainable
from loopmdm.model.corpora.tokenizer import GPT2_IDS
from loopmdm.model.errors import UsageError, check_count, check_keys, check_word, shown, unknown_name
from loopmdm.model.files import is_file, read_toml
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.places import figures_folder
from loopmdm.model.tasks.batches import TASK_SIZES, Dataset, check_name, dataset
from loopmdm.model.training.budget import plan

LAST_SEED = 2**32 - 1
"""The largest that NumPy takes, whose generator accelerate seeds, too."""
DISTRIBUTIONS = ("uniform", "fixed", "flop-proportional", "flop-balanced")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """`corpus` is a text corpus or a task; `length` tokens a sequence, `d_vocab` ids in all.

    `tokenizer` "bpe" is trained on the corpus, "gpt2" is GPT-2's; `tokens` is how many training tokens to
    take of a hub corpus (default: as many as the run needs). Tasks fix length, vocabulary and tokenizer.
    """

    corpus: str
    length: int = 64
    d_vocab: int = 1024
    tokenizer: str = "bpe"
    tokens: int = 0

    def __post_init__(self):
        """Sizes that the task or the tokenizer fixes."""
        check_trainable(check_name(self.corpus))
        if self.corpus in TASK_SIZES:
            length, d_vocab = TASK_SIZES[self.corpus]
            object.__setattr__(self, "length", length)
            object.__setattr__(self, "d_vocab", d_vocab)
        check_word("data.tokenizer", self.tokenizer, ("bpe", "gpt2"))
        if self.tokenizer == "gpt2":
            object.__setattr__(self, "d_vocab", GPT2_IDS)
        check_count("data.length", self.length, least=2)
        check_count("data.tokens", self.tokens, least=0)


@dataclass(frozen=True, kw_only=True)
class LoopSchedule:
    """How S is drawn, below a cap that is 1 until `widen_from` of the budget and max_loops from `widen_until` on.

    `distribution`: "uniform" on 1..cap (the paper's), "fixed" (always the cap), "flop-proportional" (the chance
    of S grows with the cost of a step) or "flop-balanced" (it falls with it: equal FLOPs for every S).
    `earlier` (an arm, not the paper's): where S > 1 the loss is the mean of that after S loops and that after s',
    drawn uniformly from 1..S-1; both read-outs count as FLOPs.
    """

    widen_from: float = 0.0
    widen_until: float = 0.0
    distribution: str = "uniform"
    earlier: bool = False

    def __post_init__(self):
        """A known distribution; shares of the budget in order."""
        if self.distribution not in DISTRIBUTIONS:
            raise unknown_name("loops.distribution", self.distribution, DISTRIBUTIONS)
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
    """AdamW with warm-up and then a constant rate; EMA weights are kept.

    The whole budget is exactly one of `flops`, `tokens` and `steps`. A step sees `batch_size` sequences in
    `accumulate` parts on each process. `precision` "bf16" or "no"; "" leaves it to accelerate's configuration.
    `matmul_precision` is torch's: with "medium" everything stays float32 but products read bf16 inputs, where the
    processor has instructions for it (evaluation is always at "highest").
    `logits` "masked" unembeds masked positions alone, "all" all of them: the same loss, up to rounding, with about
    half of the unembedding's work and memory. FLOPs are counted as for "all", which is the paper's definition.
    """

    batch_size: int
    flops: float = 0.0
    tokens: int = 0
    steps: int = 0
    accumulate: int = 1
    precision: str = ""
    matmul_precision: str = "highest"
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0
    ema: float = 0.999
    curve_points: int = 25
    curve_sequences: int = 128
    compile: bool = False
    logits: str = "all"
    threads: int = 1

    def __post_init__(self):
        """Positive sizes and rates."""
        check_count("training.batch_size", self.batch_size)
        check_count("training.threads", self.threads)
        check_count("training.accumulate", self.accumulate)
        check_count("training.tokens", self.tokens, least=0)
        check_count("training.steps", self.steps, least=0)
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"training.batch_size {self.batch_size} does not divide into {self.accumulate} parts (accumulate)"
            )
        check_word("training.precision", self.precision, ("", "no", "bf16"))
        check_word("training.logits", self.logits, ("all", "masked"))
        check_word("training.matmul_precision", self.matmul_precision, ("highest", "high", "medium"))
        if not 0 <= self.flops < float("inf"):
            raise UsageError(f"training.flops must be positive and finite, got {self.flops!r}")
        if sum(bool(budget) for budget in (self.flops, self.tokens, self.steps)) != 1:
            raise UsageError("training needs exactly one budget: flops, tokens or steps (or match = SPEC)")
        check_count("training.curve_points", self.curve_points)
        check_count("training.curve_sequences", self.curve_sequences)
        check_count("training.warmup_steps", self.warmup_steps, least=0)
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"training.{name} must be positive and finite, got {getattr(self, name)!r}")
        for name in ("ema", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"training.{name} must lie in [0, 1), got {getattr(self, name)!r}")
        if not 0 <= self.weight_decay < float("inf"):
            raise UsageError(f"training.weight_decay must be at least 0, got {self.weight_decay!r}")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One training run.

    `seed` draws data, masks and loops, and the initial weights too unless `init_seed` does.
    """

    name: str
    seed: int
    data: DataSpec
    model: dict[str, Any]
    training: TrainingSpec
    loops: LoopSchedule = field(default_factory=LoopSchedule)
    init_seed: int | None = None

    @property
    def config(self) -> LoopMDMConfig:
        """The model's config: [model] with the data's vocabulary and length."""
        return LoopMDMConfig.from_dict(self.model | {"d_vocab": self.data.d_vocab, "n_ctx": self.data.length})

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as the TOML file reads.

        `init_seed`, `loops.earlier` and `training.logits` only if given: what was recorded reads the same.
        """
        values = dataclasses.asdict(self)
        if not self.loops.earlier:
            del values["loops"]["earlier"]
        if self.training.logits == "all":
            del values["training"]["logits"]
        return {key: value for key, value in values.items() if (key, value) != ("init_seed", None)}

    def seeded(self, seed: int) -> "RunSpec":
        """The same run with another seed, called NAME-seedN; itself if that is its seed."""
        if seed == self.seed:
            return self
        return RunSpec.from_dict(self.to_dict() | {"seed": seed, "name": f"{self.name}-seed{seed}"})

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "spec") -> "RunSpec":
        """Build and validate; UsageError names unknown and missing keys."""
        parts = {"data": DataSpec, "training": TrainingSpec, "loops": LoopSchedule}
        built = _build(cls, values, origin, skip=parts)
        for name, kind in parts.items():
            built[name] = kind(**_build(kind, values.get(name, {}), f"{origin} [{name}]"))
        spec = cls(**built)
        if not isinstance(spec.model, dict):
            raise UsageError(f"{origin} [model] must be a table, got {spec.model!r:.80}")
        check_count("seed", spec.seed, least=0, most=LAST_SEED)
        if spec.init_seed is not None:
            check_count("init_seed", spec.init_seed, least=0, most=LAST_SEED)
        if not re.fullmatch(r"[\w.-]+", spec.name) or spec.name.startswith("."):
            raise UsageError(f"{origin}: name must be letters, digits, '-', '_' or '.', got {spec.name!r:.80}")
        reserved = {"d_vocab", "n_ctx", "mask_token_id"} & spec.model.keys()
        if reserved:
            raise UsageError(f"{origin} [model]: {', '.join(sorted(reserved))} follow from [data]; remove them")
        if spec.config.max_loops == 1 and spec.loops.earlier:  # a config that makes no sense is refused here
            raise UsageError(f"{origin} [loops]: earlier needs more than one loop; raise max_loops or remove it")
        return spec

    @classmethod
    def load(
        cls, path: Path | str, changes: Mapping[str, Any] | None = None, above: tuple[Path, ...] = ()
    ) -> "RunSpec":
        """Read a TOML spec, a file or the name of a shipped one.

        `changes` maps dotted keys such as "training.learning_rate" to other values; `above` are the specs whose
        budget this one is to match.
        """
        path = spec_file(path)
        values = read_toml(path)
        for key, value in (changes or {}).items():
            *tables, last = key.split(".")
            place = values
            for name in tables:
                place = place.setdefault(name, {})
                if not isinstance(place, dict):
                    raise UsageError(f"{key}: {name} is no table of {path.name}")
            place[last] = value
        training = values.get("training")
        if isinstance(training, dict) and "match" in training:
            training["flops"] = matched_flops(path, training.pop("match"), training, above)
        return cls.from_dict(values, path.name)


def dataset_of(spec: RunSpec, tokenizer: Tokenizer | None = None) -> Dataset:
    """The data of a run; a tokenizer is made unless given."""
    data = spec.data
    limit = data.tokens or plan(spec).tokens + data.length
    return dataset(data.corpus, data.length, data.d_vocab, spec.seed, tokenizer, data.tokenizer, limit)


def shipped_specs() -> dict[str, Path]:
    """Files of the specs that come along, by name."""
    return {path.stem: path for path in sorted((figures_folder() / "specs").glob("*.toml"))}


def spec_file(given: Path | str) -> Path:
    """A file, or else the shipped spec of that name; UnknownNameError offers near ones."""
    path = Path(given)
    if is_file(path):
        return path
    shipped = shipped_specs()
    if str(given) in shipped:
        return shipped[str(given)]
    remedy = f"There is no file {str(path)!r:.200} either; shipped specs lie in {figures_folder() / 'specs'}."
    raise unknown_name("spec", path.stem, shipped, remedy)


def matched_flops(path: Path, other: Any, training: dict[str, Any], above: tuple[Path, ...] = ()) -> float:
    """Training FLOPs of the whole run that another spec (a file beside this one) describes."""
    if {"flops", "tokens", "steps"} & training.keys():
        raise UsageError(f"{path.name}: match takes the place of flops, tokens and steps; remove them")
    if not isinstance(other, str) or Path(other).name == path.name:
        raise UsageError(f"{path.name}: match must name another spec beside it, got {other!r:.80}")
    chain = (*above, path.resolve())
    if is_file(path.parent / other) and (path.parent / other).resolve() in chain:
        names = " -> ".join([*(spec.name for spec in chain), Path(other).name])
        raise UsageError(f"{path.name}: match goes in a circle ({names}); give one of them flops, tokens or steps")
    return plan(RunSpec.load(path.parent / other, above=chain)).flops


def _build(kind: type, values: Any, origin: str, skip: Any = ()) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UsageError(f"{origin} must be a table, got {values!r:.80}")
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
        raise UsageError(f"{name} must be {kind.__name__}, got {value!r:.80}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"{name} is {shown(value)}, beyond 64 bits; give a smaller number")
