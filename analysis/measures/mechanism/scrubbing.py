"""Causal scrubbing of "loop i does a round of propagation": are states with the same candidates exchangeable?

Hypothesis (loop i, round r): all that the answer needs of H(i) at a hidden cell is what that cell may still hold
after r rounds of singles. If so, the state of another board's cell that may hold the same can stand in, in all
hidden cells at once, and nothing is lost (Chan et al. 2022, "Causal scrubbing"). What cells are exchanged within:

    candidates    cells that may hold the same symbols after round r: the hypothesis
    truth         cells whose hidden symbol is the same: a control, the answer alone
    number        cells that may hold as many symbols: a control, difficulty alone
    any           any hidden cells: a control, nothing of the board kept

each time only among cells of the same place on the board (`same_place`) or of any, of other boards, at the same
loop. Cells without a partner under the hypothesis stay as they are in all three (`partners` is the share that
have one); the model then runs on to n_loops and is asked all hidden cells.

    cost = loss - loss intact,    recovered = (loss of "any" - loss) / (loss of "any" - loss intact)
    kl = KL(intact || scrubbed) of the answer,    kept = 1 - kl / kl of "any"

recovered and kept only where "any" exceeds 0 by more than 5 standard errors. Classes of later rounds, and "truth",
know more of the solution than the model does: an exchange then repairs some of its errors, cost falls below 0 and
recovered exceeds 1. `kl`, which has no sign, tells rounds apart. A state may hold more than the hypothesis says
and still pass, if the answer does not need it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.mechanism.contrast import questions
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.states import check_loops, row_mean
from loopmdm.model.context import Context
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.information import kl
from loopmdm.model.precision import wide
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.propagation import candidates_by_round
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS, board_of_model

ARMS = ("candidates", "truth", "number", "any")
BEYOND = 5.0
"""Standard errors that "any" must cost for a share of it to mean something."""


@dataclass(frozen=True)
class Scrub:
    """How cells are exchanged: after which `rounds`, by which rules, in the `same_place` or any.

    `loops` None: all. `batch_size` boards run at a time; cells find partners among all boards.
    """

    loops: tuple[int, ...] | None = None
    rounds: tuple[int, ...] = (0, 1, 2, 3, 4)
    hidden_singles: bool = True
    same_place: bool = True
    seed: int = 0
    batch_size: int = 128

    def __post_init__(self):
        """Counts from 0; some round."""
        if not self.rounds:
            raise UsageError("rounds is empty; name at least one, such as 1")
        for number in self.rounds:
            check_count("round", number, least=0)
        for number in self.loops or ():
            check_count("loop", number, least=0)
        check_count("batch_size", self.batch_size)


@torch.no_grad()
def propagation_scrubbing(
    m: HookedLoopMDM, b: MaskedBatch, n_loops: int | None = None, scrub: Scrub | None = None
) -> pd.DataFrame:
    """What exchanging states within classes costs, by loop, round and arm.

    Columns: n_loops loop round same_place arm cost cost_se kl kl_se recovered recovered_se kept kept_se
    loss n partners changed.
    Nats per hidden cell, errors over boards. `changed`: share of the exchanged cells whose state came from a cell
    with other candidates (0 under the hypothesis). UsageError for models of no Sudoku board, and where fewer than
    two boards are given.
    """
    scrub = scrub or Scrub()
    board, n_loops = board_of_model(m.cfg), check_loops(m, n_loops)
    if board is None:
        raise UsageError(f"scrubbing needs a Sudoku model; {m.model_name or 'this model'} fills no board")
    m.facts.need("nested", by="scrubbing")
    b = questions("scrubbing", m, b)
    if len(b) < 2:
        raise UsageError("scrubbing needs two boards at least; give more")
    loops = tuple(range(n_loops)) if scrub.loops is None else scrub.loops
    if not all(loop < n_loops for loop in loops):
        raise UsageError(f"loops run from 0 to {n_loops - 1}, got {max(loops)}")
    known = candidates_by_round(board, b.tokens, max(scrub.rounds), scrub.hidden_singles)
    run = _Run(m, b, n_loops, scrub.batch_size)
    rows = []
    for loop, states in run.states(loops):
        intact = run.lost(states, loop)[0]
        for number in scrub.rounds:
            base = {"n_loops": n_loops, "loop": loop, "round": number, "same_place": scrub.same_place}
            for arm in _arms(run, (loop, states), known[number], scrub, intact):
                rows.append(base | arm)
    return pd.DataFrame(rows)


def _arms(
    run: "_Run",
    at: tuple[int, Tensor],
    candidates: Bool[Tensor, "batch cell symbol"],
    scrub: Scrub,
    intact: np.ndarray,
) -> Iterator[dict]:
    loop, states = at
    b = run.batch
    labels = _labels(candidates, b.truth("scrubbing").cpu(), scrub.same_place)
    partner = exchange(labels["candidates"], b.masked.cpu(), scrub.seed)
    there = partner >= 0
    found = {"candidates": partner}
    for arm in ARMS[1:]:
        other = exchange(labels[arm], b.masked.cpu(), scrub.seed)
        found[arm] = torch.where(there, other, -1)
    lost = {arm: run.lost(_put(states, other), loop) for arm, other in found.items()}
    share = float(there.sum() / b.masked.sum())
    code = labels["candidates"].flatten()
    for arm, other in found.items():
        moved = other.flatten()
        known = moved >= 0
        differs = float((code[moved[known]] != code[known]).float().mean()) if bool(known.any()) else float("nan")
        told = _estimates(lost[arm], lost["any"], intact, b.clusters)
        yield {"arm": arm} | told | {"partners": share, "changed": differs}


def _labels(
    candidates: Bool[Tensor, "batch cell symbol"], truth: Int[Tensor, "batch cell"], same_place: bool
) -> dict[str, Int[Tensor, "batch cell"]]:
    """Classes of cells by arm; the same place makes the place part of the class."""
    size, cells = candidates.shape[-1], candidates.shape[1]
    place = torch.arange(cells).expand(candidates.shape[:2]) * 2**size if same_place else 0
    found = {
        "candidates": (candidates * 2 ** torch.arange(size)).sum(-1),
        "truth": truth,
        "number": candidates.sum(-1),
        "any": torch.zeros_like(truth),
    }
    return {arm: label + place for arm, label in found.items()}


def exchange(
    labels: Int[Tensor, "batch cell"], hidden: Bool[Tensor, "batch cell"], seed: int = 0
) -> Int[Tensor, "batch cell"]:
    """For each hidden cell the flat index of a hidden cell of another board with its label; -1 for none.

    Within a class cells are put in random order and each takes the next one's state: every state is used once, so
    what is exchanged has the class's own distribution. A class of one has no partner, nor has a cell whose next is
    of its own board.
    """
    batch, cells = labels.shape
    flat = hidden.flatten().nonzero()[:, 0]
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
    flat = flat[order]
    flat = flat[labels.flatten()[flat].argsort(stable=True)]
    label = labels.flatten()[flat]
    _, sizes = label.unique_consecutive(return_counts=True)
    start = sizes.cumsum(0) - sizes
    within = torch.arange(len(flat)) - start.repeat_interleave(sizes)
    following = start.repeat_interleave(sizes) + (within + 1) % sizes.repeat_interleave(sizes)
    other = flat[following]
    found = torch.full((batch * cells,), -1)
    found[flat] = torch.where(other // cells != flat // cells, other, -1)
    return found.view(batch, cells)


def _put(states: Float[Tensor, "batch cell d_model"], partner: Int[Tensor, "batch cell"]) -> Tensor:
    """States with those of partners in place of their own."""
    partner = partner.to(states.device)
    taken = states.flatten(0, 1)[partner.clamp(min=0).flatten()].view_as(states)
    return torch.where((partner >= 0)[..., None], taken, states)


def _estimates(
    lost: tuple[np.ndarray, np.ndarray],
    floor: tuple[np.ndarray, np.ndarray],
    intact: np.ndarray,
    clusters: np.ndarray | None,
) -> dict[str, float | int]:
    """Cost, KL and the shares of "any" (`floor`) that are not lost, with errors over boards."""
    loss, apart = lost
    mean, _, n = stats.mean_and_error(loss, clusters)
    told: dict[str, float | int] = {"loss": float(mean), "n": int(n)}
    named = (("cost", "recovered", loss - intact, floor[0] - intact), ("kl", "kept", apart, floor[1]))
    for name, share, values, whole in named:
        value, error, _ = stats.mean_and_error(values, clusters)
        told |= {name: float(value), f"{name}_se": float(error)}
        gone, gone_se, _ = stats.ratio_of_means(values, whole, clusters, BEYOND)
        told |= {share: 1 - gone, f"{share}_se": gone_se}
    return told


class _Run:
    """A model on boards, part by part, from any loop's states on."""

    def __init__(self, m: HookedLoopMDM, batch: MaskedBatch, n_loops: int, batch_size: int):
        self.m, self.batch, self.n_loops, self.batch_size = m, batch, n_loops, batch_size
        self.contexts: list[Context] = []
        self.intact: list[Tensor] = []

    def states(self, loops: Sequence[int]) -> Iterator[tuple[int, Float[Tensor, "batch cell d_model"]]]:
        """(loop, H(loop) of all boards); one loop's states are held at a time."""
        parts: list[Tensor] = []
        for _, part in self.batch.batches(self.batch_size):
            state, context = next(self.m.states(part.tokens, 1, part.attention_mask))
            self.contexts.append(context)
            parts.append(state)
        for loop in range(max(loops) + 1):
            if loop:
                parts = [
                    self.m.loop(state, where, loop) for state, where in zip(parts, self.contexts, strict=True)
                ]
            if loop in loops:
                yield loop, torch.cat(parts)

    def lost(
        self, states: Float[Tensor, "batch cell d_model"], loop: int
    ) -> tuple[Float[np.ndarray, " batch"], Float[np.ndarray, " batch"]]:
        """Of each board's hidden cells, going on from H(loop): mean cross-entropy, and KL from the intact answer.

        The first call is the intact one.
        """
        found: list[tuple[Tensor, Tensor]] = []
        parts = list(self.batch.batches(self.batch_size))
        answers = [
            self._answer(states[start : start + len(part)], loop, part.masked, context)
            for (start, part), context in zip(parts, self.contexts, strict=True)
        ]
        self.intact = self.intact or answers
        for (_, part), now, before in zip(parts, answers, self.intact, strict=True):
            loss = -now.gather(-1, part.truth("scrubbing")[part.masked][:, None])[:, 0]
            apart = kl(before, now).clamp(min=0.0)
            found.append((row_mean(loss, part.masked), row_mean(apart, part.masked)))
        loss, apart = (torch.cat(parts).double().cpu().numpy() for parts in zip(*found, strict=True))
        return loss, apart

    def _answer(self, state: Tensor, loop: int, rows: Tensor, context: Context) -> Float[Tensor, "row d_vocab"]:
        """Log-probabilities of one part at its hidden cells `rows`."""
        for following in range(loop + 1, self.n_loops):
            state = self.m.loop(state, context, following)
        return wide(self.m.readout(state, context, rows=rows)).log_softmax(-1)


def of_case(
    case: Case,
    n_clues: int = 16,
    n_boards: int = 400,
    rounds: tuple[int, ...] = (0, 1, 2, 3),
    loops: tuple[int, ...] = (),
    hidden_singles: bool = True,
    same_place: bool = True,
) -> pd.DataFrame:
    """By loop and round on `n_boards` test boards with `n_clues` of 36 cells given; several may be completions.

    `loops` (): the first four.
    """
    board = BOARDS[case.test.task]
    grids = case.test.sequences.spread(check_count("n_boards", n_boards)).tokens
    b = puzzles(board, grids, round(n_clues / 36 * board.n_cells), seed=case.seed)
    chosen = tuple(loops) or tuple(range(min(4, case.n_loops)))
    scrub = Scrub(chosen, tuple(rounds), hidden_singles, same_place, case.seed)
    return propagation_scrubbing(case.m, b, case.n_loops, scrub)


MEASURES = (
    Measure(
        "propagation-scrubbing",
        "what is lost where hidden cells swap states with cells that may hold the same",
        of_case,
        "Sudoku",
    ),
)
