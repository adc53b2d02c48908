"""How tokens are drawn from logits, and where a text ends."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopmdm.model.errors import UsageError, check_count, check_number
from loopmdm.model.precision import check_logits, wide

MOST_GUIDANCE = 1000
"""Beyond it differences of logits outgrow the logits by so much that rounding decides."""


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn from logits, and where a text ends; see `sample`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    suppress: tuple[int, ...] = ()
    guidance: float = 0.0
    end: tuple[int, ...] = ()

    def __post_init__(self):
        """Refuse what cannot be drawn with."""
        check_number("temperature", self.temperature, 0)
        if not (self.temperature == 0 or 1e-4 <= self.temperature < float("inf")):
            raise UsageError(
                f"temperature must be 0 (best token) or at least 1e-4 and finite, got {self.temperature!r}"
            )
        check_number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise UsageError("top_p must lie in (0, 1], got 0; top_k=1 or temperature=0 takes the best token")
        check_number("guidance", self.guidance, 0, MOST_GUIDANCE)
        if self.top_k is not None:
            check_count("top_k", self.top_k)

    def never(self, d_vocab: int, mask_token_id: int, special: frozenset[int] = frozenset()) -> list[int]:
        """Ids that are not drawn: [MASK], those suppressed, and `special` ones that end no text.

        UsageError for ids that the model does not have, or if none is left to draw.
        """
        for name in ("suppress", "end"):
            for token in getattr(self, name):
                if token >= d_vocab:
                    raise UsageError(f"{name} has id {token}, which is outside 0..{d_vocab - 1}")
        found = {mask_token_id, *self.suppress, *(special - {*self.end})}
        if len(found) == d_vocab:
            raise UsageError("suppress leaves no id to draw; suppress fewer")
        return sorted(found)

    def __call__(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """One token a row, and its probability; see `draw_tokens`."""
        return draw_tokens(logits, uniforms, self.temperature, self.top_p, self.top_k)

    def guided(self, logits: Tensor, without: Tensor) -> Tensor:
        """Logits + guidance * (logits - without), in float32 at least; what is -inf stays."""
        logits, without = wide(logits), wide(without)
        return torch.where(logits.isinf(), logits, logits + self.guidance * (logits - without))

    def ended(self, tokens: Tensor, free: Tensor, mask_id: int) -> Tensor:
        """`tokens` [batch, pos] with what is masked behind a text's end filled with the id that ended it."""
        masked = free & (tokens == mask_id)
        ends = free & torch.isin(tokens, torch.tensor(self.end, device=tokens.device))
        over = (ends & (masked.cumsum(-1) == 0)).cumsum(-1) > 0
        first = tokens.gather(1, ends.long().argmax(-1, keepdim=True))
        return torch.where(masked & over, first, tokens)


def close(logits: Float[Tensor, "row d_vocab"], never: Int[Tensor, " id"], seen: bool = False) -> None:
    """Put the logits of the ids `never` at -inf, in place.

    UsageError if that leaves a row nothing to draw, NotFiniteError for NaN and overflow; `seen`: they passed
    `check_logits`, which is not asked again where they all are at -inf already.
    """
    if seen and bool((logits[:, never] == float("-inf")).all()):
        return
    logits.index_fill_(-1, never, float("-inf"))
    left = logits.amax(-1)
    if bool((left == float("-inf")).any()):
        raise UsageError("nothing but [MASK] and suppressed ids is left to draw at some positions; suppress fewer")
    check_logits(left[:, None])


def listed(ids: Any, name: str) -> tuple[int, ...]:
    """One id or several, as the argument of that name is given."""
    listed = ids if isinstance(ids, Iterable) else [ids]
    return tuple(check_count(f"an id of {name}", token, least=0) for token in listed)


def draw_tokens(
    logits: Float[Tensor, "row d_vocab"],
    uniforms: Float[Tensor, " row"],
    temperature: float,
    top_p: float,
    top_k: int | None = None,
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """One token a row by the inverse of its cumulative distribution in float64, and its probability.

    Of the `top_k` most probable tokens (None: of all), `top_p` keeps the first that reach that share.
    """
    logits = logits.double()
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1 or (top_k is not None and top_k < logits.shape[-1]):
        probabilities = _most_probable(probabilities, top_p, top_k)
    total = probabilities.cumsum(-1)
    goal = uniforms[:, None] * total[:, -1:]
    tokens = torch.searchsorted(total, goal, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], (probabilities.gather(-1, tokens) / total[:, -1:])[:, 0]


def _most_probable(probabilities: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """`probabilities` [row, d_vocab] with those beyond top k and top p at 0, not summing to 1."""
    ordered, index = probabilities.sort(dim=-1, descending=True)
    if top_k is not None:
        ordered[:, top_k:] = 0.0
    if top_p < 1:
        goal = top_p if top_k is None else top_p * ordered.sum(-1, keepdim=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= goal, 0.0)
    return torch.zeros_like(ordered).scatter(-1, index, ordered)
