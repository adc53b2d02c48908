"""Is loop i round i of belief propagation? On `tree`, and on `markov` as the negative control.

In a round of synchronous sum-product every node sends to each neighbour at once, from the messages of the round
before; messages start uniform:

    msg(j -> i) = normalised sum over x_j of p(x_i | x_j) evidence(x_j) prod over other neighbours of msg(. -> j)

On a tree the belief after r rounds is the posterior given only the clean nodes within distance r, and it is exact
from round `hops` on (`TreeModel.hops`). The measure is the matrix

    KL(belief after round r || read-out after loop i),   nats per hidden node,

whose last column is the excess over the exact posterior. A model that runs one round a loop has its minimum of
row i at r = i + offset (prelude and coda may add rounds of their own): a best round that stays, or moves at
another pace, says no. A node's belief no longer changes beyond its hops: to tell rounds apart look at deep ones
(`least_hops`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.options import RATIOS
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.model.errors import UsageError, check_count, unknown_name
from loopmdm.model.information import kl
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.sequences import MaskedBatch, as_batch
from loopmdm.model.tasks.trees import TREE_TASKS, TreeModel


def beliefs(
    task: TreeModel, tokens: Int[Tensor, "n pos"], masked: Bool[Tensor, "n pos"], n_rounds: int
) -> Iterator[Float[Tensor, "n pos k"]]:
    """p(state | what has been heard) of every node after 0, 1, .. n_rounds synchronous rounds; float64."""
    k, parents = task.n_states, np.array(task.parents)
    ids, hidden = tokens.cpu().numpy(), masked.cpu().numpy()
    evidence = np.where(hidden[..., None], 1.0, np.eye(k)[np.where(hidden, 0, ids)])
    up, down = np.ones_like(evidence), np.ones_like(evidence)  # to the parent, and from it; none at the root
    for step in range(check_count("n_rounds", n_rounds, least=0) + 1):
        heard = evidence * down
        for node in range(1, task.n_nodes):
            heard[:, parents[node]] *= up[:, node]
        yield torch.from_numpy(heard / heard.sum(-1, keepdims=True))
        if step == n_rounds:
            return
        from_parent = heard[:, parents[1:]] / up[:, 1:]  # messages are positive: all transitions are
        to_parent = heard[:, 1:] / down[:, 1:]
        up[:, 1:] = _normalised(to_parent @ task.transition.T)
        down[:, 1:] = _normalised(from_parent @ task.transition)


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum(-1, keepdims=True)


def belief_rounds(
    m: LoopedModel,
    b: MaskedBatch,
    task: TreeModel | str,
    n_loops: int | None = None,
    n_rounds: int | None = None,
    least_hops: int = 1,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """KL between the belief after every round and the read-out after every loop, over hidden nodes.

    Columns: n_loops loop round mask_ratio kl standard_error kl_reverse kl_reverse_se n_nodes n. `kl` is
    KL(belief || read-out), `kl_reverse` the other way round; nats per hidden node with at least `least_hops`,
    errors over sequences, or over `clusters`. `n_rounds` defaults to the most that any node needs.
    """
    b = as_batch("belief_rounds", b, clusters)
    sums, number, n_loops = _sums(m, b, _task(m, b, task), _Asked(n_loops, n_rounds, least_hops, batch_size))
    rows = []
    for loop in range(n_loops):
        for step in range(sums.shape[3]):
            kl, kl_se, n = _mean(sums[0, :, loop, step], number, b.clusters)
            other, other_se, _ = _mean(sums[1, :, loop, step], number, b.clusters)
            rows.append((n_loops, loop, step, b.mask_ratio, kl, kl_se, other, other_se, int(number.sum()), n))
    columns = ["n_loops", "loop", "round", "mask_ratio", "kl", "standard_error", "kl_reverse", "kl_reverse_se",
               "n_nodes", "n"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def best_rounds(
    m: LoopedModel,
    b: MaskedBatch,
    task: TreeModel | str,
    n_loops: int | None = None,
    n_rounds: int | None = None,
    least_hops: int = 1,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """The round whose belief is nearest to the read-out after each loop, and by how much.

    Columns: n_loops loop best_round kl second_round gap gap_se share n. `gap` = KL to the second best round less
    KL to the best, paired over sequences; `share` of the sequences that by themselves have this best round,
    rounds that tie sharing a sequence. Missing with n = 0 if no hidden node has `least_hops`.
    """
    b = as_batch("best_rounds", b, clusters)
    sums, number, n_loops = _sums(m, b, _task(m, b, task), _Asked(n_loops, n_rounds, least_hops, batch_size))
    rows = []
    for loop in range(n_loops):
        per_round = sums[0, :, loop]
        if not number.sum():
            rows.append((n_loops, loop, None, np.nan, None, np.nan, np.nan, np.nan, 0))
            continue
        order = np.argsort(per_round.sum(0), kind="stable")
        best, second = int(order[0]), int(order[1]) if len(order) > 1 else None
        kl, _, n = _mean(per_round[:, best], number, b.clusters)
        gap, gap_se = np.nan, np.nan
        if second is not None:
            gap, gap_se, _ = _mean(per_round[:, second] - per_round[:, best], number, b.clusters)
        own = per_round[number > 0]
        ties = np.isclose(own, own.min(-1, keepdims=True), rtol=1e-9, atol=1e-12)
        share = float((ties[:, best] / ties.sum(-1)).mean())
        rows.append((n_loops, loop, best, kl, second, gap, gap_se, share, n))
    columns = ["n_loops", "loop", "best_round", "kl", "second_round", "gap", "gap_se", "share", "n"]
    return pd.DataFrame(rows, columns=columns).astype({"best_round": "Int64", "second_round": "Int64"})


def _task(m: LoopedModel, b: MaskedBatch, task: TreeModel | str) -> TreeModel:
    if isinstance(task, str):
        if task not in TREE_TASKS:
            raise unknown_name("task with a known posterior", task, TREE_TASKS)
        task = TREE_TASKS[task]
    if b.tokens.shape[1] != task.n_nodes or bool((b.clean >= task.n_states).any()):
        raise UsageError(
            f"sequences of this task have {task.n_nodes} positions with ids 0..{task.n_states - 1}, "
            f"got {list(b.tokens.shape)} with ids up to {int(b.clean.max())}"
        )
    if m.cfg.d_vocab <= task.n_states:
        raise UsageError(f"this task has {task.n_states} states, the model a vocabulary of {m.cfg.d_vocab}")
    return task


@dataclass(frozen=True)
class _Asked:
    """How far to go: loops (None: S_max), rounds (None: the most any node needs); which nodes; batches."""

    n_loops: int | None
    n_rounds: int | None
    least_hops: int
    batch_size: int


@torch.no_grad()
def _sums(m: LoopedModel, b: MaskedBatch, task: TreeModel, asked: _Asked) -> tuple[np.ndarray, np.ndarray, int]:
    """Sums of both divergences [direction, batch, loop, round] over a sequence's nodes; their number [batch]."""
    n_loops = check_count("n_loops", m.cfg.max_loops if asked.n_loops is None else asked.n_loops)
    hops = task.hops(b.masked)
    most = max(1, int(hops.max())) if asked.n_rounds is None else check_count("n_rounds", asked.n_rounds)
    chosen = b.masked.cpu() & (hops >= check_count("least_hops", asked.least_hops, least=0))
    sums = np.zeros((2, len(b), n_loops, most + 1))
    for start, part in b.batches(asked.batch_size):
        rows = chosen[start : start + len(part)]
        if not bool(rows.any()):
            continue
        owner = start + rows.nonzero()[:, 0].numpy()
        exact = torch.stack([belief[rows] for belief in beliefs(task, part.tokens, part.masked, most)])
        for loop, (state, context) in enumerate(m.states(part.tokens, n_loops)):
            logits = m.readout(state, context, rows=rows.to(part.tokens.device)).double().cpu()
            read = logits.log_softmax(-1)[:, : task.n_states].exp()
            onward = kl(exact.log(), read.log(), exact)
            among = logits[:, : task.n_states].softmax(-1)
            reverse = kl(among.log(), exact.log(), among)
            for index, values in enumerate((onward, reverse)):
                np.add.at(sums[index, :, loop], owner, values.T.numpy())
    return sums, chosen.sum(-1).double().numpy(), n_loops


def _mean(sums: np.ndarray, number: np.ndarray, clusters: np.ndarray | None) -> tuple[float, float, int]:
    if not number.any():
        return float("nan"), float("nan"), 0
    values = np.divide(sums, number, out=np.full(len(number), np.nan), where=number > 0)
    mean, error, n = stats.weighted_mean_and_error(values, number, clusters)
    return float(mean), float(error), int(n)


def at_ratios(function: Callable[..., pd.DataFrame]) -> Callable[..., pd.DataFrame]:
    """Against belief propagation, at mask ratios."""

    def run(case: Case, mask_ratios: tuple[float, ...] = RATIOS) -> pd.DataFrame:
        parts = [
            function(case.m, case.masked(ratio), case.test.task, case.n_loops).assign(nominal_mask_ratio=ratio)
            for ratio in mask_ratios
        ]
        return pd.concat(parts, ignore_index=True)

    return run


MEASURES = (
    Measure(
        "belief-rounds",
        "read-out after every loop against rounds of belief propagation",
        at_ratios(belief_rounds),
        "tree",
    ),
    Measure("best-rounds", "nearest round of every loop", at_ratios(best_rounds), "tree"),
)
