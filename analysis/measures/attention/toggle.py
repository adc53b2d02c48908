"""Does a head look at a key *because* it is masked? One key toggled, all else equal.

For a sequence, one position j and the masked queries q != j, which stay masked:

    toggle(q, j) = A(q -> j) with j masked - A(q -> j) with j clean

Same sequence, same position, same distance: free of what confounds masses. Some maskable positions j are drawn per
sequence (whatever their state in the batch: the other state is made), and all masked queries count:

    toggle = mean over j of mean over q of toggle(q, j), then over sequences

It needs one more forward for every j drawn. For scores that only know whether a key is masked (bias beta) it is
e^beta / (e^beta (m + 1) + c) - 1 / (e^beta m + c + 1) with m and c the other masked and clean keys. Definitions
are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.analysis.measures.registry import Measure, plain
from loopmdm.analysis.numbers.moments import Moments
from loopmdm.analysis.watch.groups import NOTHING_MORE, Place, Seen, States
from loopmdm.analysis.watch.sums import Asks
from loopmdm.analysis.watch.walk import EVERYWHERE, PlaceSums, summed, walk
from loopmdm.model.errors import check_count, check_seed
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import wide
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.sequences import MaskedBatch, as_batch
from loopmdm.model.sites import Filter


class Columns:
    """A reducer that keeps A(q -> j), averaged over masked queries q != j, for drawn positions j [batch, draw]."""

    needs_values = False
    needs_pattern = True

    def __init__(self, drawn: Int[Tensor, "batch draw"], masked: Bool[Tensor, "batch pos"]):
        self.drawn = drawn
        position = torch.arange(masked.shape[1], device=masked.device)
        self.queries = masked[:, :, None] & (position[:, None] != drawn[:, None])
        self.found: dict[str, Float[Tensor, "batch head draw"]] = {}

    def begin(self, states: States) -> None:
        """Weights of the queries, the same in all applications; NaN without other masked queries."""
        weights = self.queries.to(states.dtype)
        self.weights = weights / weights.sum(1, keepdim=True)

    def asks(self, place: Place) -> Asks:  # noqa: ARG002
        """Nothing beside the pattern."""
        return NOTHING_MORE

    def see(self, seen: Seen) -> None:
        """Keep the columns of one application."""
        index = self.drawn[:, None, None].expand(*seen.pattern.shape[:3], -1)
        attention = wide(seen.pattern.gather(-1, index))
        self.found[seen.prefix] = torch.einsum("bhqd,bqd->bhd", attention, self.weights.to(attention.dtype))


@dataclass(frozen=True)
class Keys:
    """Which keys are toggled: `n` a sequence at most, drawn by `seed` and the sequence's number."""

    n: int
    seed: int
    first_index: int = 0

    def draw(self, b: MaskedBatch) -> Int[Tensor, "batch draw"]:
        """Positions; beyond what a sequence may have masked they mean nothing."""
        uniforms = row_uniforms(self.seed, "edges", *b.tokens.shape, first_index=self.first_index)
        most = max(1, min(self.n, int(b.sequences.lengths.max())))
        return uniforms.to(b.tokens.device).masked_fill(~b.allowed, 2.0).argsort(dim=-1)[:, :most]


def toggled(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int,
    keys: Keys,
    where: Filter = EVERYWHERE,
) -> dict[str, Float[Tensor, "batch head draw 2"]]:
    """A(q -> j) with j masked and with j clean, by application; NaN for draws a sequence does not have."""
    drawn = keys.draw(b)
    masked, was_masked, known = b.masked & b.real, b.masked.gather(1, drawn), b.allowed.gather(1, drawn)
    base = Columns(drawn, masked)
    walk(m, b, n_loops, [base], where)
    other: dict[str, list[Tensor]] = {prefix: [] for prefix in base.found}
    for draw in range(drawn.shape[1]):
        one = Columns(drawn[:, draw : draw + 1], masked)
        walk(m, _flip(m, b, drawn[:, draw], known[:, draw]), n_loops, [one], where)
        for prefix, found in one.found.items():
            other[prefix].append(found)
    pairs = {}
    for prefix, found in base.found.items():
        changed, first = torch.cat(other[prefix], dim=-1), was_masked[:, None]
        both = torch.stack([torch.where(first, found, changed), torch.where(first, changed, found)], dim=-1)
        pairs[prefix] = both.masked_fill(~known[:, None, :, None], torch.nan)
    return pairs


def _flip(
    m: HookedLoopMDM, b: MaskedBatch, position: Int[Tensor, " batch"], known: Bool[Tensor, " batch"]
) -> MaskedBatch:
    """The batch with one position of each sequence, where it is `known`, in its other state."""
    at = torch.arange(len(b), device=position.device), position
    masked = b.masked.clone()
    masked[at] = masked[at] ^ known
    tokens = b.truth("attention_toggle").masked_fill(masked, m.cfg.mask_token_id)
    return MaskedBatch(tokens, b.clean, masked, None, b.attention_mask)


class ToggleSums(PlaceSums):
    """Toggle and its two levels as running moments."""

    def __init__(
        self, m: HookedLoopMDM, n_loops: int | None = None, n_keys: int = 4, by_head: bool = True, seed: int = 0
    ):  # fmt: skip
        super().__init__(m, n_loops, by_head)
        self.n_keys, self.seed, self.seen = check_count("n_keys", n_keys), check_seed(seed), 0

    def add(
        self, b: MaskedBatch, clusters: np.ndarray | None = None, first_index: int | None = None
    ) -> "ToggleSums":  # fmt: skip
        """Toggle keys of a batch; `first_index` numbers its first sequence (default: its place, or on)."""
        given = b.first if first_index is None and b.place is not None else first_index
        first = self.seen if given is None else given
        b = as_batch(type(self).__name__, b, clusters)
        self.begin(States.of(self.m, b))
        for prefix, pairs in toggled(self.m, b, self.n_loops, Keys(self.n_keys, self.seed, first)).items():
            levels = pairs.nanmean(dim=2)
            change = levels[..., 0] - levels[..., 1]
            self.take(prefix, torch.cat([change[..., None], levels], dim=-1), b.clusters)
        self.seen = first + len(b)
        return self

    def groups(self) -> dict[str, Sequence[str]]:
        """One row a head: queries are masked."""
        return {"query_group": ("masked",)}

    def columns(self, moments: Moments) -> dict[str, np.ndarray]:
        """Columns [head, 1]."""
        mean, error = moments.mean[:, None], np.sqrt(np.diagonal(moments.covariance, axis1=-2, axis2=-1))[:, None]
        columns = {"toggle": mean[..., 0], "toggle_se": error[..., 0]}
        columns |= {"attention_masked": mean[..., 1], "attention_clean": mean[..., 2]}
        return columns | {"n": moments.n[:, None]}


@torch.no_grad()
def attention_toggle(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    n_keys: int = 4,
    by_head: bool = True,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """Attention of masked queries to a key when it is masked less when it is clean, by application and head.

    Columns: n_loops segment loop layer depth head query_group mask_ratio toggle toggle_se attention_masked
    attention_clean n: the two levels whose difference toggle is. `n_keys` positions are drawn a sequence (fewer
    where fewer are maskable); it takes 1 + n_keys forwards. Sequences without a masked query do not count.
    """
    sums = ToggleSums(m, n_loops, n_keys, by_head, seed)
    return summed(sums, as_batch("attention_toggle", b, clusters), batch_size)


MEASURES = (
    Measure(
        "attention-toggle",
        "attention to the same key masked less clean",
        plain(attention_toggle),
        shards=True,
    ),
)
