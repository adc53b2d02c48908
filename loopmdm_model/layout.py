"""Where a model's layers stand and what they cost (`Layout`), and what kind of model it is (`Facts`)."""

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from loopmdm.model.errors import UsageError, check_word

SEGMENTS = ("prelude", "loop", "coda")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a family is, as far as a measure has to know.

    `mask_token_id` is the id of [MASK], wherever it stands, None if the model has none; `causal`: a position
    sees earlier ones only; `shifted`: logits for a position are read one position before it; `additive`: every
    layer adds to the residual stream and nothing else touches it; `linear_heads`: what heads give reaches the
    stream through W_O alone, no gate or norm before it; `random_start`: the first state is drawn;
    `nested`: loop i's states do not depend on how many loops follow; `gated`: it has an
    exit gate of its own; `trained_to`: the largest mask ratio of training. `remarks` are sentences that captions
    repeat.
    """

    mask_token_id: int | None = None
    causal: bool = False
    shifted: bool = False
    additive: bool = True
    linear_heads: bool = True
    random_start: bool = False
    nested: bool = True
    gated: bool = False
    trained_to: float = 1.0
    remarks: tuple[str, ...] = field(default=())

    @property
    def grouped(self) -> bool:
        """Whether masked and clean positions are groups of it: it has a [MASK], and sees both sides."""
        return self.mask_token_id is not None and not self.causal

    def warn_beyond(self, mask_ratio: float, by: str) -> None:
        """Warn where `by` looks at more masks than the model was trained with."""
        if mask_ratio > self.trained_to:
            warnings.warn(
                f"{by}: this model was trained with {self.trained_to:.0%} of tokens masked; what is said of more, "
                f"here up to {mask_ratio:.0%}, is extrapolation",
                stacklevel=3,
            )

    def need(self, *wanted: str, by: str) -> None:
        """UsageError in one line that names the missing fact, for the first of `wanted` that does not hold.

        `by` is who asks: a measure's or a function's name.
        """
        for name in wanted:
            holds, says = NEEDS[name]
            if not holds(self):
                raise UsageError(f"{by} needs {says} ({_as_written(self, name)})")


By = Literal["holds", "predicts"]
"""What puts a position into a group: the token that it holds, or the one that its state predicts."""


def check_by(facts: Facts, by: str, who: str) -> None:
    """UsageError for a `by` that is none, or says nothing of a model."""
    check_word("by", by, get_args(By))
    if by == "predicts" and not facts.shifted:
        raise UsageError(f'{who}: this model predicts a token where it stands; leave by="holds"')


def asked(masked: Tensor, real: Tensor, by: str) -> tuple[Tensor, Tensor]:
    """Which positions count as masked and which are real, [batch, pos], by what they hold or predict.

    By what a shifted model predicts a position goes by the next one, and the last one predicts nothing.
    """
    if by == "holds":
        return masked, real
    nothing = torch.zeros_like(real[:, :1])
    return torch.cat([masked[:, 1:], nothing], 1), real & torch.cat([real[:, 1:], nothing], 1)


NEEDS: dict[str, tuple[Any, str]] = {
    "masks": (lambda facts: facts.mask_token_id is not None, "a model with a [MASK] token; this one has none"),
    "bidirectional": (lambda facts: not facts.causal, "a bidirectional model; this one is causal"),
    "unshifted": (
        lambda facts: not facts.shifted,
        "logits at their own position; this model's are shifted by one",
    ),
    "additive": (
        lambda facts: facts.additive,
        "an additive residual stream; in this model more than the layers' sums touches it",
    ),
    "linear_heads": (
        lambda facts: facts.linear_heads,
        "heads that reach the stream through W_O alone; in this model a gate or a norm comes between",
    ),
    "nested": (lambda facts: facts.nested, "loops that do not depend on how many follow; this model's do"),
    "fixed_start": (lambda facts: not facts.random_start, "a fixed first state; this model draws its own"),
}
"""What a measure may need: whether the facts hold it, and how to say that they do not."""

_SHOWN = {
    "masks": "mask_token_id",
    "bidirectional": "causal",
    "unshifted": "shifted",
    "fixed_start": "random_start",
}


def _as_written(facts: Facts, need: str) -> str:
    name = _SHOWN.get(need, need)
    return f"facts.{name} = {getattr(facts, name)}"


class Layout:
    """Sizes of a model and the order of its layers: prelude, then the looped ones, then the coda.

    A config that has these fields gains the rest by inheriting from it.
    """

    d_vocab: int
    n_ctx: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    n_prelude_layers: int
    n_loop_layers: int
    n_coda_layers: int
    max_loops: int
    mask_token_id: Any  # an id, or None

    leaves: tuple[str, ...]
    """Leaf names of a layer application, in running order."""
    outer_leaves: tuple[str, ...]
    """Names outside layers and loops: the embedding first, then what follows the coda."""

    @property
    def facts(self) -> Facts:
        """What kind of model it is."""
        return Facts(mask_token_id=self.mask_token_id)

    @property
    def n_layers(self) -> int:
        """Physical layers stored."""
        return self.n_prelude_layers + self.n_loop_layers + self.n_coda_layers

    def layers(self, segment: str) -> range:
        """Physical layer indices of "prelude", "loop" or "coda"."""
        after_loop = self.n_prelude_layers + self.n_loop_layers
        if segment == "prelude":
            return range(self.n_prelude_layers)
        if segment == "loop":
            return range(self.n_prelude_layers, after_loop)
        assert segment == "coda", segment
        return range(after_loop, after_loop + self.n_coda_layers)

    def segment(self, layer: int) -> str:
        """The segment that physical `layer` belongs to."""
        if layer < self.n_prelude_layers:  # comparisons, not ranges: torch.compile may make layer symbolic
            return "prelude"
        return "loop" if layer < self.n_prelude_layers + self.n_loop_layers else "coda"

    def depth(self, layer: int, loop: int, n_loops: int) -> int:
        """0-based place of an application in running order; `loop` counts for looped layers only."""
        segment = self.segment(layer)
        if segment == "loop":
            return layer + loop * self.n_loop_layers
        return layer + (n_loops - 1) * self.n_loop_layers if segment == "coda" else layer

    def segmented(self, first: int, n_layers: int, max_loops: int) -> dict[str, int]:
        """Fields of a layout that loops layers first .. first + n_layers - 1; UsageError if they do not fit."""
        after = self.n_layers - first - n_layers
        if n_layers < 1 or first < 0 or after < 0:
            raise UsageError(f"{first} + {n_layers} layers do not fit into the {self.n_layers} there are")
        sizes = (first, n_layers, after, max_loops)
        names = ("n_prelude_layers", "n_loop_layers", "n_coda_layers", "max_loops")
        return dict(zip(names, sizes, strict=True))

    def hidden(self, tokens: Any) -> Any:
        """Which of `tokens` hold [MASK], a boolean tensor; none in a model that has no [MASK]."""
        return tokens != tokens if self.mask_token_id is None else tokens == self.mask_token_id

    def layer_flops(self, length: int, moving: Any = None) -> Any:
        """FLOPs of one layer applied to one sequence of `length` tokens: 2mnk a product, attention included.

        `moving` (a number or a tensor; default all) is how many tokens are updated; held ones only give keys and
        values.
        """
        moving = length if moving is None else moving
        width = self.n_heads * self.d_head
        projections = 2 * self.d_model * 2 * width * (moving + length)
        attention = 2 * 2 * length * width
        mlp = 2 * self.d_model * self.d_mlp * (3 if self.gated_mlp else 2)
        return projections + moving * (attention + mlp)

    gated_mlp: bool = False
    n_kv_heads: int = 0
    """Heads of keys and values where several query heads share one; 0: as many as there are heads."""

    def unembedding_flops(self, n_rows: Any) -> Any:
        """FLOPs of the logits of `n_rows` positions (a number or a tensor)."""
        return n_rows * 2 * self.d_model * self.d_vocab
