"""Rules on what each loop would answer, through a lens."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from loopmdm.model.errors import check_word
from loopmdm.model.information import entropy, kl
from loopmdm.model.precision import wide
from loopmdm.model.stopping.rule import Lens, StoppingRule


@dataclass(frozen=True)
class LensRule(StoppingRule):
    """Base of rules on what each loop would answer, by default at masked positions, from loop 1 on.

    `lens` "coda" reads through the coda, as the model would answer if it stopped here; "direct" unembeds
    the state itself. The cost of reading is part of the FLOPs.
    """

    positions: Literal["all", "masked"] = field(default="masked", kw_only=True)
    lens: Lens = field(default="coda", kw_only=True)

    def __post_init__(self):
        """Refuse an unknown lens."""
        super().__post_init__()
        check_word("lens", self.lens, get_args(Lens))

    @property
    def reads(self) -> Lens:
        """Its own lens."""
        return self.lens

    def read(self, logits: Float[Tensor, "row d_vocab"]) -> Tensor:
        """What to remember of a loop's logits, [row, ...]."""
        raise NotImplementedError

    def change(self, now: Tensor, before: Tensor) -> Float[Tensor, " row"]:
        """The rule's number from this loop's reading and the previous one's."""
        raise NotImplementedError


@dataclass(frozen=True)
class KLDelta(LensRule):
    """KL(this loop's answer || the previous one's) in nats (arXiv 2502.05171 stops below 5e-4)."""

    name: ClassVar[str] = "kl-delta"

    threshold: float = 5e-4

    def read(self, logits: Tensor) -> Tensor:
        """Log-probabilities [row, d_vocab]."""
        return wide(logits).log_softmax(-1)

    def change(self, now: Tensor, before: Tensor) -> Tensor:
        """In nats; [MASK] has probability 0 in both."""
        return kl(now, before).clamp(min=0.0)


@dataclass(frozen=True)
class EntropyDelta(LensRule):
    """Absolute change of the answer's entropy in nats (arXiv 2502.05171 stops below 1e-3)."""

    name: ClassVar[str] = "entropy-delta"

    threshold: float = 1e-3

    def read(self, logits: Tensor) -> Tensor:
        """Entropies [row]."""
        return entropy(wide(logits).log_softmax(-1))

    def change(self, now: Tensor, before: Tensor) -> Tensor:
        """In nats."""
        return (now - before).abs()


@dataclass(frozen=True)
class ArgmaxStable(LensRule):
    """Share of positions whose best token changed: by default none of them for 5 loops (arXiv 2502.05171)."""

    name: ClassVar[str] = "argmax-stable"

    threshold: float = 1e-6
    patience: int = field(default=5, kw_only=True)

    def read(self, logits: Tensor) -> Tensor:
        """Best tokens [row]."""
        return logits.argmax(-1)

    def change(self, now: Tensor, before: Tensor) -> Tensor:
        """1 where it changed, else 0."""
        return (now != before).float()


RULES = (KLDelta, EntropyDelta, ArgmaxStable)
