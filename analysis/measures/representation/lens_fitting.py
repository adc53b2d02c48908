"""How learned lenses come about: translators tuned by a short descent, and the mean Jacobian of what follows.

Tuned: for each loop alone Adam descends on KL(final || translated) over minibatches of cached states, from the
identity, in coordinates of spread 1. What is kept is the best on sequences held out from that, the start included,
so a tuned lens is no worse there than the direct one. Logits exist for one minibatch and one loop at a time.

Jacobian: with random signs s_q at the hidden positions q of a sequence,

    E[s_p d(sum_q s_q h_q[k]) / d H_p] = d h_p[k] / d H_p,    other positions' parts have mean 0,

so one backward pass a dimension k gives row k at all loops and rows at once. Nothing is fitted to answers: what it
reads off is what the rest of the computation takes up, to first order and on average.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.analysis.activations.identity import identity
from loopmdm.analysis.measures.mechanism.contrast import questions
from loopmdm.analysis.measures.representation.learned_lenses import LearnedLens
from loopmdm.analysis.watch.states import check_loops
from loopmdm.model.errors import UsageError, check_count, check_model, check_seed
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.information import kl
from loopmdm.model.precision import check_state, wide
from loopmdm.model.protocol import Core
from loopmdm.model.randomness import row_uniforms, step_generator
from loopmdm.model.sequences import MaskedBatch

LARGEST = 1024
"""d_model up to which Jacobians are taken exactly."""
FLOOR = 1e-3
"""Dimensions that vary by less than this share of the one that varies most count as if they varied so much."""
HELD_OUT = 4
"""Every so many-th sequence or document chooses among steps."""
CHECKS = 8
"""How often that happens."""
PASSED = 16
"""Sequences that a backward pass goes through at once."""


@dataclass(frozen=True)
class Descent:
    """How translators are tuned: `steps` of Adam at `rate`, falling linearly to 0, on `n_rows` rows each."""

    steps: int = 120
    n_rows: int = 128
    rate: float = 2e-3
    seed: int = 0

    def __post_init__(self):
        """Counts; 0 steps leave the direct lens."""
        check_count("steps", self.steps, least=0)
        check_count("n_rows", self.n_rows)
        check_seed(self.seed)
        if not self.rate > 0:
            raise UsageError(f"rate must be above 0, got {self.rate!r}")


@dataclass(frozen=True, eq=False)
class Asked:
    """States of hidden positions: `states` by loop, `end` after the coda; `owner` is each one's document.

    Of a shifted model they are those that predict the hidden positions.
    """

    states: Float[Tensor, "loop row d_model"]
    end: Float[Tensor, "row d_model"]
    owner: Int[np.ndarray, " row"]

    @classmethod
    @torch.no_grad()
    def of(cls, m: HookedLoopMDM, b: MaskedBatch, n_loops: int, batch_size: int = 32) -> "Asked":
        """Of the hidden positions of a batch (of a causal model: of all that have a next token)."""
        states, ends, owners = [], [], []
        for start, part in b.batches(batch_size):
            rows = read_at(m.model, part.masked)
            run = list(m.states(part.tokens, n_loops, part.attention_mask))
            states.append(torch.stack([wide(state[rows]) for state, _ in run]))
            ends.append(wide(m.model.coda(*run[-1])[rows]))
            owners.append(b.owners[start : start + len(part)][rows.nonzero()[:, 0].cpu().numpy()])
        return cls(torch.cat(states, 1), torch.cat(ends), np.concatenate(owners))

    def __len__(self) -> int:
        """Rows."""
        return len(self.end)


def read_at(core: Core, rows: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Where the states stand that logits at `rows` are read from; UsageError where that is before the first."""
    if not core.facts.shifted:
        return rows
    if bool(rows[:, 0].any()):
        raise UsageError("a shifted model reads no state before the first position; leave it unmasked (maskable=)")
    return torch.cat([rows[:, 1:], torch.zeros_like(rows[:, :1])], 1)


def unembed(core: Core, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    """Log-probabilities of packed states, float32 or wider."""
    x = x.to(core.dtype)
    if core.facts.shifted:  # it reads the state before each row
        later = torch.tensor([False, True], device=x.device).expand(len(x), 2)
        return wide(core.unembedding(torch.stack([x, x], 1), rows=later)).log_softmax(-1)
    return wide(core.unembedding(x)).log_softmax(-1)


# --- tuned ---


def fit_tuned(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    descent: Descent | None = None,
    shuffled: bool = False,
) -> LearnedLens:
    """A tuned lens from hidden positions of `b`, validation sequences; `shuffled` gives each row another's answer.

    A lens of shuffled answers is the null: what a map of this size says without knowing the state's own answer.
    UsageError where `b` has fewer than two sequences or documents.
    """
    check_model(m, "fit_tuned", hooked=True)
    b, n_loops, descent = questions("fit_tuned", m, b), check_loops(m, n_loops), descent or Descent()
    asked = Asked.of(m, b, n_loops)
    label = np.unique(asked.owner, return_inverse=True)[1]
    if label.max() < 1:
        raise UsageError("a tuned lens needs two sequences or documents, one to choose on; give more of them")
    end = asked.end
    if shuffled:
        end = end[torch.from_numpy(step_generator(descent.seed, "order", 3).permutation(len(end)))]
    held = torch.from_numpy(label % HELD_OUT == min(HELD_OUT - 1, label.max()))
    found = [_tuned(m.model, states, end, held, descent) for states in asked.states]
    record = {"steps": descent.steps, "seed": descent.seed, "loss": [loss for *_, loss in found]}
    weight, bias = (torch.stack([part[place] for part in found]) for place in (0, 1))
    return LearnedLens("tuned", weight, bias, _told(m, b, n_loops, len(asked)) | record)


def _told(m: HookedLoopMDM, b: MaskedBatch, n_loops: int, n_rows: int) -> dict:
    told = {"model": asdict(identity(m)), "n_loops": n_loops}
    return told | {"mask_ratio": b.mask_ratio, "n_rows": n_rows}


def _tuned(
    core: Core, states: Float[Tensor, "row d_model"], end: Tensor, held: Bool[Tensor, " row"], descent: Descent
) -> tuple[Tensor, Tensor, float]:
    """A, b and held-out KL of one loop: the best of what the descent passed."""
    fold = _Folded(states, end)
    chosen, learns = held.nonzero()[:, 0], (~held).nonzero()[:, 0]
    order = step_generator(descent.seed, "order", 4)
    optimizer = torch.optim.Adam(fold.parameters, lr=descent.rate)
    every = max(1, descent.steps // CHECKS)
    best = (*fold.affine(), _held_out(core, fold, states[chosen], end[chosen], descent.n_rows))
    for step in range(descent.steps):
        some = learns[torch.from_numpy(order.integers(len(learns), size=min(descent.n_rows, len(learns))))]
        for group in optimizer.param_groups:
            group["lr"] = descent.rate * (1 - step / descent.steps)
        with torch.no_grad():
            final = unembed(core, end[some])
        with torch.enable_grad():
            loss = kl(final, unembed(core, fold(states[some]))).mean()
            gradients = torch.autograd.grad(loss, fold.parameters)
        for parameter, gradient in zip(fold.parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if (step + 1) % every == 0:
            now = _held_out(core, fold, states[chosen], end[chosen], descent.n_rows)
            best = (*fold.affine(), now) if now < best[-1] else best
    return best


@torch.no_grad()
def _held_out(core: Core, fold: "_Folded", states: Tensor, end: Tensor, n_rows: int) -> float:
    total = sum(
        float(kl(unembed(core, last), unembed(core, fold(some))).mean()) * len(some)
        for some, last in zip(states.split(n_rows), end.split(n_rows), strict=True)
    )
    return total / len(states)


class _Folded:
    """x + scale (W z + c), z the state with mean 0 and spread 1 in each dimension: what Adam moves is W and c.

    Without that a dimension that is large and never changes would drown what it is asked. `scale` is how far the
    coda and later loops still move a state: where nothing follows, nothing is moved.
    """

    def __init__(self, states: Float[Tensor, "row d_model"], end: Float[Tensor, "row d_model"]):
        self.mean, spread = states.mean(0), states.std(0, unbiased=False)
        self.spread = spread.clamp(min=float(spread.max()) * FLOOR).clamp(min=torch.finfo(spread.dtype).tiny)
        self.scale = (end - states).pow(2).mean().sqrt()
        d = states.shape[-1]
        self.parameters = [states.new_zeros(d, d).requires_grad_(), states.new_zeros(d).requires_grad_()]

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.parameters
        return x + self.scale * ((x - self.mean) / self.spread @ weight.T + bias)

    def affine(self) -> tuple[Tensor, Tensor]:
        """A and b."""
        weight, bias = (parameter.detach() for parameter in self.parameters)
        change = self.scale * weight / self.spread
        eye = torch.eye(len(bias), dtype=bias.dtype, device=bias.device)
        return eye + change, self.scale * bias - change @ self.mean


# --- Jacobian ---


def fit_jacobian(
    m: HookedLoopMDM, b: MaskedBatch, n_loops: int | None = None, n_sequences: int | None = None, seed: int = 0
) -> LearnedLens:
    """The Jacobian lens from hidden positions of `b`: one backward pass a dimension and 16 sequences.

    Jacobians are those of `n_sequences` evenly spread ones (None: all), the means that map to each other those of
    all. UsageError beyond d_model 1024, where that is too many passes.
    """
    check_model(m, "fit_jacobian", hooked=True)
    b, n_loops, d = questions("fit_jacobian", m, b), check_loops(m, n_loops), m.cfg.d_model
    if d > LARGEST:
        raise UsageError(
            f"the Jacobian lens takes one backward pass a dimension: d_model {d} exceeds {LARGEST}; "
            "leave it out, as in lenses=('coda', 'direct', 'tuned')"
        )
    n_few = len(b) if n_sequences is None else min(check_count("n_sequences", n_sequences), len(b))
    few = b.rows(torch.linspace(0, len(b) - 1, n_few).long())
    total, n = torch.zeros(n_loops, d, d, dtype=torch.float64), 0
    for first, part in few.batches(PASSED):
        rows = read_at(m.model, part.masked)
        states, end = _graph(m, part, n_loops)
        n += int(rows.sum())
        for k, gradients in _rows_of_jacobian(states, end, rows, (seed, first)):
            total[:, k] += gradients
    asked = Asked.of(m, b, n_loops)
    jacobian, mean = total / n, asked.states.double().mean(1).cpu()
    bias = asked.end.double().mean(0).cpu() - torch.einsum("lij,lj->li", jacobian, mean)
    record = _told(m, b, n_loops, len(asked)) | {"seed": seed, "n_jacobians": n}
    return LearnedLens("jacobian", jacobian.float(), bias.float(), record)


@torch.enable_grad()
def _graph(m: HookedLoopMDM, part: MaskedBatch, n_loops: int) -> tuple[list[Tensor], Tensor]:
    """H(0), .., H(n_loops - 1) as nodes of one graph that ends in the state after the coda."""
    with torch.no_grad():
        state, context = next(iter(m.states(part.tokens, 1, part.attention_mask, "eager")))
    states = [state.detach().requires_grad_()]
    for loop in range(1, n_loops):
        states.append(m.loop(states[-1], context, loop, attn_path="eager"))
    check_state(states[-1].detach(), context.real, f"H({n_loops - 1})")
    return states, m.model.coda(states[-1], context)


def _rows_of_jacobian(
    states: list[Tensor], end: Tensor, rows: Tensor, place: tuple[int, int]
) -> Iterator[tuple[int, Float[Tensor, "loop d_model"]]]:
    """(k, sum over rows of s_p d(sum_q s_q end_q[k]) / d H_p), with fresh signs for each k."""
    seed, first = place
    for k in range(end.shape[-1]):
        drawn = row_uniforms(seed, "noise", *rows.shape, first_index=first, step=k).to(end.device)
        signs = (torch.where(drawn < 0.5, -1.0, 1.0) * rows).to(end)
        cotangent = torch.zeros_like(end)
        cotangent[..., k] = signs
        found = torch.autograd.grad(end, states, cotangent, retain_graph=k + 1 < end.shape[-1])
        yield k, torch.stack([torch.einsum("bp,bpd->d", signs, wide(g)).double().cpu() for g in found])
