"""The shape of attention, whoever the keys are: how spread, how far, how concentrated.

For queries in a group Q of one sequence, then averaged over sequences, with T real keys:

    entropy        mean over queries of -sum_k A ln A (nats); uniform rows: ln T
    distance       mean over queries of sum_k A |q - k| (positions); uniform rows: mean |q - k|
    concentration  max over keys of the mean attention received from Q: the share of all that Q gives which goes
                   to its most attended key; 1 / T if all keys receive alike, 1 if one receives everything

Definitions are ours.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.analysis.measures.registry import Measure, plain
from loopmdm.analysis.numbers.moments import Moments
from loopmdm.analysis.watch.groups import TOKEN_GROUPS, Place, Seen
from loopmdm.analysis.watch.sums import Asks
from loopmdm.analysis.watch.walk import PlaceSums, summed
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.layout import By, check_by
from loopmdm.model.sequences import MaskedBatch, as_batch

METRICS = ("entropy", "distance", "concentration")
NULLS = ("entropy_uniform", "distance_uniform")


class ShapeSums(PlaceSums):
    """Entropy, distance and concentration as running moments."""

    def asks(self, place: Place) -> Asks:  # noqa: ARG002
        """Entropy and distance of every row."""
        return Asks(shape=True)

    def vectors(self, seen: Seen) -> Tensor:
        """[sequence, head, query group, metric and null]."""
        entropy, distance = seen.sums.row_entropy, seen.sums.distance
        real = seen.states.real
        uniform = _uniform_distance(real).to(entropy.dtype)[:, None].expand_as(entropy)
        log_length = real.sum(-1).to(entropy.dtype).log()[:, None, None].expand_as(entropy)
        concentration = seen.sums.received.amax(-1).masked_fill(seen.states.empty[:, None], float("nan"))
        mean = seen.states.mean
        return torch.stack(
            [mean(entropy), mean(distance), concentration, mean(log_length), mean(uniform)], dim=-1
        )  # fmt: skip

    def groups(self) -> dict[str, Sequence[str]]:
        """Query groups."""
        return {"query_group": TOKEN_GROUPS}

    def columns(self, moments: Moments) -> dict[str, np.ndarray]:
        """Columns [head, query group]."""
        means, errors = moments.mean, np.sqrt(np.diagonal(moments.covariance, axis1=-2, axis2=-1))
        columns = {}
        for at, metric in enumerate(METRICS):
            columns |= {metric: means[..., at], f"{metric}_se": errors[..., at]}
        columns |= {null: means[..., len(METRICS) + at] for at, null in enumerate(NULLS)}
        return columns | {"n": moments.n}


def _uniform_distance(real: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """Mean |q - k| over the real keys, for every query: sums from the left, so that no square is made."""
    keys = real.double()
    position = torch.arange(real.shape[1], device=real.device).double()
    number, place = keys.cumsum(-1), (keys * position).cumsum(-1)
    left, right = position * number - place, (place[:, -1:] - place) - position * (number[:, -1:] - number)
    return (left + right) / number[:, -1:]


def attention_shape(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    by_head: bool = True,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
    by: By = "holds",
) -> pd.DataFrame:
    """Entropy (nats), distance (positions) and concentration (share) by application, head and query group.

    Columns: n_loops segment loop layer depth head query_group mask_ratio entropy entropy_se distance distance_se
    concentration concentration_se entropy_uniform distance_uniform n; the last two are what uniform rows give.
    `by="predicts"`: as in `mask_attention`.
    """
    check_by(m.facts, by, "attention_shape")
    sums = ShapeSums(m, n_loops, by_head)
    sums.by = by
    return summed(sums, as_batch("attention_shape", b, clusters), batch_size)


MEASURES = (
    Measure(
        "attention-shape",
        "row entropy, distance, concentration",
        plain(attention_shape),
        groupless=plain(attention_shape),
        both_ways=True,
        shards=True,
    ),
)
