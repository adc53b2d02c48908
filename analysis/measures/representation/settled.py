"""The loop at which an answer appears, and from which it stays.

With answer(i) the best token of the read-out after loop i at a hidden position, and S loops:

    appears         first i with answer(i) = answer(S-1)
    settled         first i from which all later answers are answer(S-1)
    first_right     first i with the true token (it may be lost again: this one harvests luck)
    right_settled   first i from which all later answers are the true token

The last two are NaN where that never happens. An answer that wanders to the end "settles" at S-1, and all
four can only lie within the S loops run: read the curves, not only the means. Definitions are ours.
"""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.measures.representation.lenses import answer, check_lens
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.states import check_loops, token_groups
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch, as_batch, before_next
from loopmdm.model.stopping.rules import Lens

KEYS = ["n_loops", "mask_ratio", "lens"]
EVENTS = ("appears", "settled", "first_right", "right_settled")


def first_loops(answers: Int[Tensor, "loop row"], truth: Int[Tensor, " row"]) -> dict[str, np.ndarray]:
    """The four loops [row] of the module's docstring, float64, NaN where they never come."""
    final, right = answers == answers[-1], answers == truth
    events = {"appears": final, "settled": _stays(final), "first_right": right, "right_settled": _stays(right)}
    found = {}
    for name, happens in events.items():
        loop = happens.int().argmax(0).double()  # the first, or 0 where there is none
        found[name] = loop.masked_fill(~happens.any(0), float("nan")).cpu().numpy()
    return found


def _stays(happens: Tensor) -> Tensor:
    """Where something [loop, row] holds from a loop to the last."""
    return happens.int().flip(0).cumprod(0).flip(0).bool()


@torch.no_grad()
def settled_loops(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    lens: Lens = "coda",
    batch_size: int = 32,
) -> pd.DataFrame:
    """One row a hidden position: n_loops mask_ratio lens sequence position final_id correct, and

    appears settled first_right right_settled (0-based loops). `correct`: the final answer is the true token.
    UsageError if nothing is masked, or nobody knows what is. Of a causal model: every token that has a next one,
    which is the true one.
    """
    b, n_loops = as_batch("settled_loops", b), check_loops(m, n_loops)
    b = before_next(b) if m.facts.causal else b
    check_lens(lens)
    frames = []

    def work(part: MaskedBatch) -> Int[Tensor, "loop row"]:
        states, masked = m.states(part.tokens, n_loops, part.attention_mask), _asked(m, part)
        answers = (answer(m, state, context, lens, masked) for state, context in states)
        return torch.stack([torch.cat([one[span].argmax(-1) for span in one.spans]) for one in answers])

    for span, part, answers in b.each(batch_size, work):
        masked = _asked(m, part)
        sequence, position = masked.nonzero().cpu().numpy().T
        truth = (part.clean if m.facts.causal else part.truth("settled_loops"))[masked]
        columns = {"sequence": span.start + sequence, "position": position, "final_id": answers[-1].cpu().numpy()}
        columns |= {"correct": (answers[-1] == truth).cpu().numpy()} | first_loops(answers, truth)
        frames.append(pd.DataFrame(columns))
    frame = pd.concat(frames, ignore_index=True)
    if frame.empty:
        raise UsageError("settled_loops: no position is masked, so there is no answer to settle; mask some")
    for place, (name, value) in enumerate(zip(KEYS, (n_loops, b.mask_ratio, lens), strict=True)):
        frame.insert(place, name, value)
    return frame


def _asked(m: HookedLoopMDM, b: MaskedBatch) -> Bool[Tensor, "batch pos"]:
    """Where an answer is looked for."""
    return b.masked if m.facts.causal else token_groups(m, b)["masked"]


def _summary(part: pd.DataFrame, values: pd.Series, clusters: np.ndarray | None) -> tuple[float, float, int]:
    """Mean over each sequence's positions that have a value, then over sequences; error, n."""
    by_sequence = values.groupby(part["sequence"]).mean()
    means, sequence = by_sequence.to_numpy(dtype=float), by_sequence.index.to_numpy()
    if clusters is not None and sequence.max() >= len(clusters):
        raise UsageError(
            f"clusters must name one per sequence: {sequence.max() + 1} expected, got {len(clusters)}"
        )
    mean, error, n = stats.mean_and_error(means, None if clusters is None else np.asarray(clusters)[sequence])
    return float(mean), float(error), int(n)


def settled_means(frame: pd.DataFrame, clusters: np.ndarray | None = None) -> pd.DataFrame:
    """Mean loops of `settled_loops`: n_loops mask_ratio lens metric value standard_error n.

    Each is over the positions where it happens, averaged within sequences first; `correct` (a share) says how
    many can have a `right_settled`. `clusters` [sequence] as elsewhere. Frames of several mask ratios may be
    joined.
    """
    rows = []
    for key, part in frame.groupby(KEYS, sort=True):
        for metric in (*EVENTS, "correct"):
            rows.append((*key, metric, *_summary(part, part[metric].astype(float), clusters)))
    return pd.DataFrame(rows, columns=[*KEYS, "metric", "value", "standard_error", "n"])


def settled_curve(frame: pd.DataFrame, clusters: np.ndarray | None = None) -> pd.DataFrame:
    """Share of hidden positions where it has happened by each loop: the metrics of `settled_means` over `loop`.

    Columns: n_loops mask_ratio lens loop metric value standard_error n. What never happens counts as not yet.
    """
    rows = []
    for key, part in frame.groupby(KEYS, sort=True):
        for loop in range(int(part["n_loops"].iloc[0])):
            for metric in EVENTS:
                rows.append((*key, loop, metric, *_summary(part, (part[metric] <= loop).astype(float), clusters)))
    return pd.DataFrame(rows, columns=[*KEYS, "loop", "metric", "value", "standard_error", "n"])


def shares(case: Case, b: MaskedBatch) -> pd.DataFrame:
    """Share of hidden positions settled by each loop."""
    return settled_curve(settled_loops(case.m, b, case.n_loops), b.clusters)


MEASURES = (
    Measure(
        "settled",
        "loops by which the answer has appeared, stays, is right",
        shares,
        groupless=shares,
        shards=True,
    ),
)
