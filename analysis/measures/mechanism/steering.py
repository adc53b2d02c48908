"""Adding to a state what would say "this cell is v": does the cell follow, and do its peers feel the constraint?

    H(i) becomes H(i) + strength x direction   at chosen positions (`steer`, of any model and any direction)

What a probe reads off a state need not be used; what the model does with a push tells. On Sudoku boards one hidden
cell is pushed towards a wrong symbol v, at one loop, and read after the last one:

    cell     change of p(v) in the cell itself; follows: share of boards where v becomes its best symbol
    peers    mean change of p(v) over the hidden cells in its row, column or box where the clues leave v possible
    others   the same over hidden cells outside them: what a push does to all, constraint or not
    felt     others less peers: above 0, peers drop v because of the cell
    beyond   felt less what the random push of the same board, loop and strength gives: a cell that is merely
             disturbed makes its peers less sure, too

`kind`: open, v is possible as far as the clues say; excluded, a clue in sight of the cell holds v. Directions of
length 1, by symbol and loop, from other boards: means (states of cells whose symbol is v, less those of the other
cells), probe (weights of the ridge probe for v), unembedding (what the logit of v reads, less the mean symbol, the
norm frozen), random (drawn per board: what a push of the size does alone). Strength is in spreads, the root mean
square distance of hidden cells' states from their mean after that loop; `norm_share` says what share of a state's
norm one spread is. Loop -1 is the prelude's output. Errors over boards. Definitions are ours.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.interventions.places import Loops, in_loops
from loopmdm.analysis.measures.known.boards import board_of
from loopmdm.analysis.measures.mechanism.labels import sudoku_labels
from loopmdm.analysis.measures.mechanism.probes import fit_probe, states_at
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.states import check_loops
from loopmdm.model.errors import UsageError, check_count, check_model, check_word
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import wide
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.propagation import candidates_by_round, peers
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS

DIRECTIONS = ("means", "probe", "unembedding", "random")
KINDS = ("open", "excluded")
STRENGTHS = (1.0, 2.0, 4.0)
BEFORE = -1
"""The place before loop 0."""


@contextmanager
def steer(
    m: HookedLoopMDM,
    direction: Float[Tensor, "*batch d_model"],
    loops: Loops = None,
    rows: Bool[Tensor, "batch pos"] | None = None,
    strength: float = 1.0,
) -> Iterator[HookedLoopMDM]:
    """Add strength x `direction` [d_model], or [batch, d_model], to H(i) after the chosen loops (None: each).

    At the positions `rows`, or at all. Loop -1 is H(-1), what loop 0 starts from. Strength 0 changes no bit.
    UsageError where shapes do not fit the run.
    """
    check_model(m, "steer", hooked=True)
    if not isinstance(direction, Tensor) or not 1 <= direction.ndim <= 2 or direction.shape[-1] != m.cfg.d_model:
        shape = list(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
        raise UsageError(f"a direction is [d_model] or [batch, d_model] with {m.cfg.d_model} entries, got {shape}")
    if not bool(direction.isfinite().all()):
        raise UsageError("the direction is not finite; a state it is added to would be NaN")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not np.isfinite(strength):
        raise UsageError(f"strength must be a finite number, got {strength!r}")
    push = wide(direction) * strength

    def add(state: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        if (push.ndim == 2 and len(push) != len(state)) or (rows is not None and rows.shape != state.shape[:2]):
            raise UsageError(
                f"the run has states of shape {list(state.shape)}; give a direction and rows of as many sequences "
                "and positions, and n_loops, not a stopping rule"
            )
        there = push if push.ndim == 1 else push[:, None]
        moved = (wide(state) + there.to(state.device)).to(state.dtype)
        return moved if rows is None else torch.where(rows[..., None].to(state.device), moved, state)

    with m.hooks([(where, add) for where in _places(loops)] if strength else []):
        yield m


def _places(loops: Loops) -> list[Any]:
    """What to hook: H(i) after the loops, H(-1) as loop 0 gets it."""
    listed = [loops] if isinstance(loops, int) else loops
    if not isinstance(listed, Iterable):
        return [in_loops(listed, "hook_out")]
    after = [loop for loop in listed if loop != BEFORE]
    found: list[Any] = ["loop.0.hook_in"] if len(after) < len(list(listed)) else []
    return found + ([in_loops(after, "hook_out")] if after else [])


# --- directions ---


@dataclass(frozen=True, eq=False)
class Directions:
    """Unit `vectors` [symbol, d_model] by (name, loop); `spread` and `norm` of hidden cells' states by loop."""

    vectors: dict[tuple[str, int], Float[Tensor, "symbol d_model"]]
    spread: dict[int, float]
    norm: dict[int, float]


def symbol_directions(
    m: HookedLoopMDM, b: MaskedBatch, n_loops: int | None = None, names: Sequence[str] = DIRECTIONS, seed: int = 0
) -> Directions:
    """Directions of the module (but "random") for each symbol and loop -1..n_loops - 1, from boards of their own.

    UsageError where a model says nothing of its unembedding and that is asked for, or a symbol is never hidden.
    """
    n_loops = check_loops(m, n_loops)
    for name in names:
        check_word("direction", name, DIRECTIONS)
    some = sudoku_labels(b, 0)
    y = some.answers["symbol", None]
    if not y.any(0).all() or not (~y).any(0).all():
        raise UsageError("each symbol must be hidden somewhere, and not everywhere; give more boards")
    found: dict[tuple[str, int], Tensor] = {}
    spread, norm = {}, {}
    for place, x in enumerate(states_at(m, some, n_loops)):
        loop, x = place - 1, x.astype(np.float64)
        spread[loop] = float(np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean()))
        norm[loop] = float(np.linalg.norm(x, axis=1).mean())
        if "means" in names:
            found["means", loop] = _unit(np.stack([x[yes].mean(0) - x[~yes].mean(0) for yes in y.T]))
        if "probe" in names:
            found["probe", loop] = _unit(fit_probe(x, y, some.sequence, seed).weight.T)
        if "unembedding" in names:
            found["unembedding", loop] = _unit(_read_by_logits(m, y.shape[1]))
    return Directions(found, spread, norm)


def _read_by_logits(m: HookedLoopMDM, size: int) -> np.ndarray:
    norm, linear = m.model.readout_weights()
    read = wide(linear.weight[:size] * norm.weight)
    return (read - read.mean(0)).double().cpu().numpy()


def _unit(vectors: np.ndarray) -> Float[Tensor, "symbol d_model"]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return torch.from_numpy(vectors / np.where(length > 0, length, 1)).float()


# --- pushes ---


@dataclass(frozen=True, eq=False)
class Pushes:
    """One cell [batch] a board, and the wrong symbol [batch] that it is pushed to; who is its peer.

    `peers` and `others` [batch, cell]: hidden cells where the clues leave the symbol possible.
    """

    batch: MaskedBatch
    cell: Int[Tensor, " batch"]
    symbol: Int[Tensor, " batch"]
    peers: Bool[Tensor, "batch cell"]
    others: Bool[Tensor, "batch cell"]

    @property
    def rows(self) -> Bool[Tensor, "batch cell"]:
        """The pushed cells."""
        return torch.nn.functional.one_hot(self.cell, self.batch.tokens.shape[1]).bool()

    def groups(self) -> dict[str, Bool[Tensor, "batch cell"]]:
        """Who is read."""
        return {"cell": self.rows, "peers": self.peers, "others": self.others}


def pushes(b: MaskedBatch, kind: str = "open", seed: int = 0) -> Pushes:
    """A cell and a wrong symbol of each board, drawn among the pairs of a `kind` with a peer and another to read.

    Boards without such a pair are left out; UsageError where none has one.
    """
    check_word("kind", kind, KINDS)
    board, hidden = board_of(b), b.masked.cpu()
    may = candidates_by_round(board, b.tokens, 0)[0] & hidden[..., None]
    wrong = torch.nn.functional.one_hot(b.clean.cpu(), board.size) == 0
    peer = peers(board)
    near = torch.einsum("cd,bdv->bcv", peer.float(), may.float()) > 0
    far = (
        torch.einsum("cd,bdv->bcv", (~peer & ~torch.eye(board.n_cells, dtype=torch.bool)).float(), may.float()) > 0
    )
    fits = wrong & near & far & hidden[..., None] & (may if kind == "open" else ~may)
    kept = fits.flatten(1).any(-1)
    if not bool(kept.any()):
        raise UsageError(f"no board has a cell to push to a symbol that is {kind}; hide more cells")
    b, fits, may = b.rows(kept.to(b.tokens.device)), fits[kept], may[kept]
    lots = row_uniforms(seed, "order", len(b), fits[0].numel())
    chosen = torch.where(fits.flatten(1), lots, -1.0).argmax(-1)
    cell, symbol = chosen // board.size, chosen % board.size
    open_there = may.gather(-1, symbol[:, None, None].expand(-1, board.n_cells, 1))[..., 0]
    itself = torch.nn.functional.one_hot(cell, board.n_cells).bool()
    return Pushes(b, cell, symbol, open_there & peer[cell], open_there & ~peer[cell] & ~itself)


@torch.no_grad()
def answers(m: HookedLoopMDM, b: MaskedBatch, n_loops: int, size: int) -> Float[Tensor, "batch cell symbol"]:
    """Probabilities of symbols in every hidden cell after the last loop, 0 elsewhere; under the open contexts."""
    logits = m.run(b.tokens, n_loops, attention_mask=b.attention_mask, rows=b.masked).logits[:, :size]
    found = torch.zeros(*b.tokens.shape, size)
    found[b.masked.cpu()] = wide(logits).softmax(-1).cpu()
    return found


def steering(
    m: HookedLoopMDM,
    b: MaskedBatch,
    directions: Directions,
    kind: str = "open",
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> pd.DataFrame:
    """Pushes of one kind in all directions, loops and strengths, and "random" beside them.

    Columns: n_loops kind direction loop strength norm_share metric intact value standard_error low high n.
    Metrics: cell, follows, peers, others, felt, beyond (see the module), `value` the change that the push makes,
    `intact` what is there without; paired by board, 95% by Student's t.
    """
    for strength in strengths:
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise UsageError(f"strengths are numbers in spreads, got {strength!r}")
    n_loops = 1 + max(directions.spread)
    p, board = pushes(b, kind, seed), board_of(b)
    before = _read(answers(m, p.batch, n_loops, board.size), p)
    lots = row_uniforms(seed, "noise", len(p.batch), m.cfg.d_model)
    random = _unit(torch.special.ndtri(lots.clamp(1e-12, 1 - 1e-12)).numpy())
    names = ["random", *dict.fromkeys(name for name, _ in directions.vectors)]
    rows = []
    for loop, spread in directions.spread.items():
        at_random: dict[float, np.ndarray] = {}
        for name in names:
            towards = random if name == "random" else directions.vectors[name, loop][p.symbol]
            for strength in strengths:
                with steer(m, towards.to(m.model.device), loop, p.rows, strength * spread):
                    after = _read(answers(m, p.batch, n_loops, board.size), p)
                at = {"n_loops": n_loops, "kind": kind, "direction": name, "loop": loop}
                at |= {"strength": float(strength), "norm_share": spread / directions.norm[loop]}
                change = _change(before, after)
                at_random.setdefault(strength, change["felt"])  # random comes first
                change["beyond"] = change["felt"] - at_random[strength]
                rows += [at | row for row in _rows(change, before, p.batch.clusters)]
    return pd.DataFrame(rows)


def _read(p: Float[Tensor, "batch cell symbol"], pushed: Pushes) -> dict[str, np.ndarray]:
    """Per board: mean p(v) over each group, and whether v is the pushed cell's best symbol."""
    there = p.gather(-1, pushed.symbol[:, None, None].expand(-1, p.shape[1], 1))[..., 0].double()
    found = {name: ((there * who).sum(-1) / who.sum(-1)).numpy() for name, who in pushed.groups().items()}
    best = p[torch.arange(len(p)), pushed.cell].argmax(-1)
    return found | {"follows": (best == pushed.symbol).double().numpy()}


def _change(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Per board: what the push changes, and how much more in peers than in others."""
    change = {name: after[name] - before[name] for name in before}
    return change | {"felt": change["others"] - change["peers"]}


def _rows(
    change: dict[str, np.ndarray], before: dict[str, np.ndarray], clusters: np.ndarray | None
) -> Iterator[dict]:
    for metric, values in change.items():
        value, error, n = (float(part) for part in stats.mean_and_error(values, clusters))
        half = error * stats.t95(stats.count_units(int(n), clusters))
        intact = float(np.nanmean(before[metric])) if metric in before else np.nan
        yield {"metric": metric, "intact": intact, "value": value, "standard_error": error, "low": value - half,
               "high": value + half, "n": int(n)}  # fmt: skip


def on_boards(
    case: Case,
    n_clues: int = 14,
    n_boards: int = 64,
    strengths: tuple[float, ...] = STRENGTHS,
    directions: tuple[str, ...] = DIRECTIONS,
) -> pd.DataFrame:
    """On its test grids, `n_clues` of 36 cells given, one solution or more; directions from validation's grids."""
    check_count("n_boards", n_boards)
    board = BOARDS[case.test.task]
    given = round(n_clues / 36 * board.n_cells)
    fit = puzzles(board, case.validation.sequences.spread(case.n).tokens, given, seed=case.seed)
    b = puzzles(board, case.sequences.spread(n_boards).tokens, given, unique=True, seed=case.seed)
    found = symbol_directions(case.m, fit, case.n_loops, directions, case.seed)
    parts = [steering(case.m, b, found, kind, strengths, case.seed) for kind in KINDS]
    return pd.concat(parts, ignore_index=True)


MEASURES = (
    Measure("steering", "pushing a cell to a symbol: does it follow, do its peers feel it", on_boards, "Sudoku"),
)
