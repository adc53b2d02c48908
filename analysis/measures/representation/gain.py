"""How far and how fast a change travels: one position's state is pushed, and followed over the loops.

    H'(s) = H(s) + a d at one position p,       c_j(i) = ||H'_j(i) - H_j(i)|| / ||a d||
    a -> 0:  c_j(i) = ||(J_i .. J_{s+1} d)_j|| / ||d||,  J_i the derivative of loop i (Jacobian-vector products)

The direction d is random, or the step from the token that p shows to another one's embedding. `size` is a: 0 is
the derivative; of a random direction in units of the states' spread over positions, of a token's in whole steps (1
puts the other token there). By distance of j from p: on a board 0, 1 (a shared row, column or box) and 2, told
apart by relation; in text |i - j| in bins. What a head can look at it can hear in one loop, so nothing but
training keeps a change near: the null is an untrained twin. Cells that read their units alone pass it one unit a
loop.

    gain     mean of c_j(i) over the receivers at a distance
    share    of the sum of squares of c, what lies at that distance; over distances it sums to 1
    growth   log of the change's norm after loop i over that before, nats a loop, of "total" and "own" (position p)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.measures.relations import Places
from loopmdm.analysis.measures.representation.fixed_points import LoopMap
from loopmdm.analysis.measures.twins import untrained
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.groups import TOKEN_GROUPS, members
from loopmdm.analysis.watch.states import check_loops
from loopmdm.model.context import Context
from loopmdm.model.errors import UsageError, check_count, check_model, check_number, check_seed, check_word
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import wide
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.sequences import MaskedBatch, as_batch

DIRECTIONS = ("random", "token")
RECEIVERS = ("any", *TOKEN_GROUPS)
COLUMNS = ["n_loops", "start", "loop", "direction", "size", "source", "receiver", "metric", "distance", "relation"]


@dataclass(frozen=True)
class Push:
    """What is changed: H(`start`), -1 being the prelude's output, in `directions` by `sizes`, `n_draws` times.

    Each draw has its own position and direction in every sequence, a function of `seed`.
    """

    start: int = -1
    directions: tuple[str, ...] = DIRECTIONS
    sizes: tuple[float, ...] = (0.0, 1.0)
    n_draws: int = 2
    seed: int = 0

    def __post_init__(self):
        """Known directions, sizes from 0 on."""
        check_count("start", self.start, least=-1)
        check_count("n_draws", self.n_draws)
        check_seed(self.seed)
        if not self.directions or not self.sizes:
            raise UsageError("directions and sizes must name one at least, such as directions=('random',)")
        for direction in self.directions:
            check_word("direction", direction, DIRECTIONS)
        for size in self.sizes:
            check_number("size", size, least=0)


# --- pushing ---


@dataclass(frozen=True)
class Source:
    """Where a batch is pushed: `position` [batch] (0 where there is none) and `there` [batch]."""

    position: Int[Tensor, " batch"]
    there: Bool[Tensor, " batch"]

    @classmethod
    def drawn(cls, among: Bool[Tensor, "batch pos"], push: Push, draw: int, first: int) -> "Source":
        """One of the positions `among`, at random."""
        order = row_uniforms(push.seed, "positions", *among.shape, first_index=first, step=draw).to(among.device)
        return cls(order.masked_fill(~among, -1).argmax(-1), among.any(-1))

    def put(self, vectors: Float[Tensor, "batch d_model"], n: int) -> Float[Tensor, "batch pos d_model"]:
        """`vectors` at the positions, 0 elsewhere and where there is none."""
        found = vectors.new_zeros(len(vectors), n, vectors.shape[-1])
        rows = torch.arange(len(vectors), device=vectors.device)
        found[rows, self.position] = vectors * self.there[:, None]
        return found


def token_steps(
    m: HookedLoopMDM, part: MaskedBatch, source: Source, pick: Float[Tensor, "batch one"]
) -> Float[Tensor, "batch d_model"]:
    """From what the sequences show at the sources to another token's embedding, one of those of the batch."""
    rows, core = torch.arange(len(part), device=part.tokens.device), m.model
    known = part.clean[~m.cfg.hidden(part.clean) & part.real].unique()
    shown = part.tokens[rows, source.position]
    others = known[None] != shown[:, None]
    if not bool(others.any(-1).all()):
        raise UsageError("another token's direction needs two different tokens in a batch; give more text")
    number = (pick[:, 0].to(others.device) * others.sum(-1)).long()
    chosen = ((others.cumsum(-1) - 1 == number[:, None]) & others).int().argmax(-1)
    tokens = part.tokens.clone()
    tokens[rows, source.position] = known[chosen]
    ends = [core.enter(each, core.context(each, part.attention_mask)) for each in (part.tokens, tokens)]
    return wide(ends[1] - ends[0])[rows, source.position]


def pushes(
    m: HookedLoopMDM, part: MaskedBatch, state: Tensor, source: Source, push: Push, at: tuple[int, int]
) -> Iterator[tuple[str, Float[Tensor, "batch pos d_model"]]]:
    """(direction, step of size 1) of a draw; `at` is its number and the first sequence's."""
    draw, first = at
    for direction in push.directions:
        if direction == "token":
            pick = row_uniforms(push.seed, "tokens", len(part), 1, first_index=first, step=draw)
            steps = token_steps(m, part, source, pick)
        else:
            rows = [np.random.default_rng([push.seed, draw, first + row]) for row in range(len(part))]
            noise = np.stack([generator.standard_normal(state.shape[-1]) for generator in rows])
            steps = torch.from_numpy(noise).to(state)
            steps = steps / steps.norm(dim=-1, keepdim=True) * _spread(state, part.real)[:, None]
        yield direction, source.put(steps.to(state), state.shape[1])


def _spread(state: Float[Tensor, "batch pos d_model"], real: Tensor) -> Float[Tensor, " batch"]:
    """Root mean square distance of the real positions' states from their mean: what states differ by."""
    weight = (real / real.sum(-1, keepdim=True)).to(state)
    mean = (state * weight[..., None]).sum(1, keepdim=True)
    return ((state - mean).pow(2).sum(-1) * weight).sum(-1).sqrt()


def follow_push(
    m: HookedLoopMDM, trace: "Trace", step: Float[Tensor, "batch pos d_model"], size: float
) -> Float[Tensor, "batch loop pos"]:
    """c_j(i) of each loop after the start, the start itself first; 0 at padding, NaN where the step is 0."""
    length = step.flatten(1).norm(dim=-1)[:, None]  # 0 / 0 is NaN: a push of nothing says nothing
    x, v = trace.states[0], step if size == 0 else trace.states[0] + size * step
    found = [step.norm(dim=-1) / length]
    for number, intact in enumerate(trace.states[1:]):
        loop_map = LoopMap(m, trace.context, trace.start + 1 + number)
        if size == 0:
            x, v = loop_map.push(x, v)
            change = v
        else:
            v = loop_map(v)
            change = (v - intact) / size
        found.append(wide(change).norm(dim=-1) / length)
    return torch.stack(found, 1).masked_fill(~trace.context.real[:, None], 0.0)


@dataclass(frozen=True)
class Trace:
    """H(start), .. H(n_loops - 1) of a batch, on the explicit attention path, and its context."""

    states: list[Tensor]
    context: Context
    start: int

    @classmethod
    def of(cls, m: HookedLoopMDM, part: MaskedBatch, n_loops: int, start: int) -> "Trace":
        """Run the loops."""
        caught: list[Tensor] = []
        with m.hooks([("loop.0.hook_in", lambda x, hook: caught.append(x.clone()))]):  # noqa: ARG005
            found = list(m.states(part.tokens, n_loops, part.attention_mask, "eager"))
        return cls([*caught[:1], *(state for state, _ in found)][start + 1 :], found[-1][1], start)


# --- telling ---

Key = tuple[str, float, str]
"""Direction, size, source group."""


def _followed(
    m: HookedLoopMDM, part: MaskedBatch, n_loops: int, push: Push, first: int
) -> dict[Key, Float[np.ndarray, "batch metric"]]:
    """Per sequence all numbers of `_labels`, means over draws, by what was pushed."""
    trace = Trace.of(m, part, n_loops, push.start)
    places = Places.of(m, part.tokens.shape[1])
    holds = members(m.cfg.hidden(part.tokens), part.real)
    found: dict[Key, list[Tensor]] = {}
    for draw in range(push.n_draws):
        for group in TOKEN_GROUPS:
            source = Source.drawn(holds[group], push, draw, first)
            if not bool(source.there.any()):
                continue
            for direction, step in pushes(m, part, trace.states[0], source, push, (draw, first)):
                for size in push.sizes:
                    change = follow_push(m, trace, step, size)
                    numbers = _numbers(change.double(), source, places, holds)
                    found.setdefault((direction, size, group), []).append(numbers)
    return {key: torch.stack(values).mean(0).cpu().numpy() for key, values in found.items()}


def _numbers(
    change: Float[Tensor, "batch loop pos"], source: Source, places: Places, holds: dict[str, Tensor]
) -> Float[Tensor, "batch metric"]:
    """Gain [receiver, class, loop], share [receiver, class, loop], growth [total | own, loop], flat; NaN: none."""
    kinds = places.member.to(change.device)[:, source.position].transpose(0, 1)
    at = torch.stack([kinds & holds[group][:, None] for group in RECEIVERS], 1).to(change)  # [b, group, kind, pos]
    count = at.sum(-1)[..., None]
    gain = torch.einsum("bgkp,blp->bgkl", at, change) / count
    squares = change.pow(2)
    total = squares.sum(-1)
    share = torch.einsum("bgkp,blp->bgkl", at, squares) / total[:, None, None]
    own = squares.gather(-1, source.position[:, None, None].expand(-1, change.shape[1], 1))[..., 0]
    logs = torch.stack([total, own], 1).log() / 2
    growth = torch.cat([torch.full_like(logs[..., :1], float("nan")), logs.diff(dim=-1)], -1)
    flat = torch.cat([part.flatten(1) for part in (gain, share, growth)], -1)
    return flat.masked_fill(~source.there[:, None], float("nan"))


def _labels(places: Places, start: int, n_loops: int) -> pd.DataFrame:
    """What the numbers of `_numbers` are, in their order."""
    loops, kinds = range(start, n_loops), list(zip(places.distance, places.relation, strict=True))
    rows = [
        (loop, receiver, metric, *kind)
        for metric in ("gain", "share")
        for receiver in RECEIVERS
        for kind in kinds
        for loop in loops
    ]
    rows += [(loop, "any", "growth", what, "any") for what in ("total", "own") for loop in loops]
    return pd.DataFrame(rows, columns=["loop", "receiver", "metric", "distance", "relation"])


@torch.no_grad()
def perturbation_gain(
    m: HookedLoopMDM, b: MaskedBatch, n_loops: int | None = None, push: Push | None = None, batch_size: int = 32
) -> pd.DataFrame:
    """Gain, share and growth of a change by loop and distance.

    Columns: n_loops start loop direction size source receiver metric distance relation mask_ratio value
    standard_error n. `source` (where it is pushed) and `receiver` are token groups; loop `start` is the push
    itself. Errors are over sequences or documents. A group without members is NaN with n = 0, as is growth
    from or to nothing. UsageError where no loop follows `start`.
    """
    check_model(m, "perturbation-gain", hooked=True)
    b, n_loops, push = as_batch("perturbation-gain", b), check_loops(m, n_loops), push or Push()
    if push.start >= n_loops - 1:
        raise UsageError(f"perturbation-gain follows H({push.start}) over later loops; there are only {n_loops}")
    parts = [(_followed(m, part, n_loops, push, first), len(part)) for first, part in b.batches(batch_size)]
    labels, frames = _labels(Places.of(m, b.tokens.shape[1]), push.start, n_loops), []
    for direction in push.directions:
        for size in push.sizes:
            for source in TOKEN_GROUPS:
                none = np.full((1, len(labels)), np.nan)
                values = [found.get((direction, size, source), none.repeat(n, 0)) for found, n in parts]
                mean, error, n = stats.mean_and_error(np.concatenate(values), b.clusters)
                frames.append(labels.assign(direction=direction, size=float(size), source=source, value=mean,
                                            standard_error=error, n=n))  # fmt: skip
    frame = pd.concat(frames, ignore_index=True).assign(n_loops=n_loops, start=push.start)
    return frame[COLUMNS].assign(mask_ratio=b.mask_ratio, **frame[["value", "standard_error", "n"]])


def of_case(
    case: Case,
    b: MaskedBatch,
    n_sequences: int = 32,
    start: int = -1,
    sizes: tuple[float, ...] = (0.0, 1.0),
    twins: int = 1,
) -> pd.DataFrame:
    """Of `n_sequences`, beside `twins` untrained ones of the same shape (`weights`)."""
    check_count("n_sequences", n_sequences)
    check_count("twins", twins, least=0)
    few = b.rows(torch.linspace(0, len(b) - 1, min(n_sequences, len(b))).long())
    push = Push(start, sizes=sizes, n_draws=1, seed=case.seed)
    arms = {"trained": case.m} | {f"untrained {seed}": untrained(case.m, seed) for seed in range(twins)}
    frames = [perturbation_gain(m, few, case.n_loops, push).assign(weights=name) for name, m in arms.items()]
    return pd.concat(frames, ignore_index=True).assign(n_units=few.n_units)


MEASURES = (
    Measure(
        "perturbation-gain",
        "how far and fast a change of one position travels over loops",
        of_case,
        needs=(),
        groupless=of_case,
    ),
)
