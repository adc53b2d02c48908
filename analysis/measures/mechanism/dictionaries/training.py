"""Training a dictionary: mean squared error, k active features or a price on them, and the dead ones helped.

    loss = mean_s |z_s - f D_s|^2 / d_model + price x sum_j f_j sum_s |D_sj| (relu) + aux x what dead features
    leave

The price is Lindsey et al.'s (2024): activity times the summed norms of a feature's directions. A feature that did
not fire for `dead_after` rows is dead; the `4 k` dead ones nearest to firing are fitted to what is left over, as
in Gao et al. (2024), "Scaling and evaluating sparse autoencoders", whose start is used, too: encoders are the
transposed decoders, random directions.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.analysis.activations import Identity
from loopmdm.analysis.measures.mechanism.dictionaries.coder import Dictionary, Origin, Shape, keep_largest
from loopmdm.analysis.numbers.parallel import one_thread
from loopmdm.model.errors import NotFiniteError, UsageError, check_count, check_number, check_seed

SAMPLE = 16_384
"""Rows that means and scales are taken from."""
EXTRA = 4
"""Dead features that are helped, in units of k."""
CALIBRATION = 16
"""Batches that the threshold is taken from."""


@runtime_checkable
class Samples(Protocol):
    """What is trained on: an `ActivationStore`, or what `gather` holds in memory."""

    sites: list[str]
    model: Identity
    n_loops: int
    positions: str

    def __len__(self) -> int:
        """Rows."""
        ...

    def batches(self, size: int, seed: int = 0, epochs: int | None = 1) -> Iterator[Tensor]:
        """[row, site, d_model] in random order."""
        ...


@dataclass(frozen=True)
class Training:
    """How it is trained: `steps` of `batch_size` rows by Adam, 5% of them warming up, the last fifth to 0.

    `price` counts for relu only, `aux` and `dead_after` (rows) for the others.
    """

    steps: int = 300
    batch_size: int = 512
    learning_rate: float = 2e-3
    price: float = 0.01
    aux: float = 1 / 32
    dead_after: int = 20_000
    seed: int = 0

    def __post_init__(self):
        """Counts and numbers."""
        for name in ("steps", "batch_size", "dead_after"):
            check_count(name, getattr(self, name))
        check_number("learning_rate", self.learning_rate, 0, above=True)
        for name in ("price", "aux"):
            check_number(name, getattr(self, name), 0)
        check_seed(self.seed)

    def rate(self, step: int) -> float:
        """The learning rate's factor."""
        warm, left = (step + 1) / max(1, self.steps // 20), (self.steps - step) / max(1, self.steps // 5)
        return min(1.0, warm, left)


@torch.enable_grad()
@one_thread()
def train_dictionary(samples: Samples, shape: Shape | None = None, training: Training | None = None) -> Dictionary:
    """Train one; the same samples, settings and seed give the same dictionary.

    UsageError for sites that hold no vectors, or fewer rows than a batch; NotFiniteError where it diverges.
    """
    shape, training = shape or Shape(), training or Training()
    if not isinstance(samples, Samples):
        raise UsageError(f"train_dictionary takes an ActivationStore or what gather gives, got {samples!r:.60}")
    if len(samples) < training.batch_size:
        raise UsageError(
            f"{len(samples)} rows are fewer than a batch of {training.batch_size}; gather more sequences or ratios"
        )
    first = next(samples.batches(min(SAMPLE, len(samples)), training.seed))
    if first.ndim != 3:
        raise UsageError(
            f"a dictionary is of sites that hold one vector a row, these hold {list(first.shape[2:])}"
        )
    made = _started(first, samples, shape, training)
    state = _Fit(made, training)
    rows = samples.batches(training.batch_size, training.seed, None)
    for step, x in zip(range(training.steps), rows, strict=False):
        state.step(x, step)
    _set_threshold(made, samples, training)
    made.fold()
    made.zero_grad(set_to_none=True)
    return made.eval().requires_grad_(False)


def _started(first: Tensor, samples: Samples, shape: Shape, training: Training) -> Dictionary:
    told = {"training": asdict(training), "n_rows": len(samples)}
    origin = Origin(samples.model, tuple(samples.sites), samples.positions, samples.n_loops, told)
    made = Dictionary(shape, origin, first.shape[-1])
    made.means.copy_(first.mean(0))
    pooled = first if made.shared else first.flatten(0, 1)[:, None]
    made.mean.copy_(pooled.mean(0))
    made.scale.copy_((pooled - made.mean).square().mean((0, 2)).sqrt().clamp(min=1e-8))
    generator = torch.Generator().manual_seed(training.seed)
    drawn = torch.randn(made.decoder.shape, generator=generator)
    with torch.no_grad():
        made.decoder.copy_(drawn / drawn.norm(dim=-1, keepdim=True) / len(drawn))
        made.encoder.copy_(made.decoder.transpose(1, 2))
    return made


class _Fit:
    """The state of training beside the weights: Adam's, and how long each feature has been idle, in rows."""

    def __init__(self, made: Dictionary, training: Training):
        self.made, self.training = made, training
        self.optimizer = torch.optim.Adam(made.parameters(), lr=training.learning_rate, betas=(0.9, 0.999))
        self.idle = torch.zeros(made.shape.n_features)

    def step(self, x: Float[Tensor, "row site d_model"], step: int) -> None:
        """One step of Adam."""
        z = self.made.normalised(x)
        before = self.made.before(z).relu()
        codes = self._active(before)
        left = z - self.made.added(codes)
        loss = left.square().mean()
        if self.made.shape.activation == "relu":
            loss = loss + self.training.price * (codes * self.made.weights).sum(-1).mean()
        else:
            loss = loss + self.training.aux * self._helped(before, left.detach())
        if not bool(loss.isfinite()):
            raise NotFiniteError(f"training diverged at step {step}; take a smaller learning_rate")
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate * self.training.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        fired = (codes.detach() > 0).flatten(0, 1).any(0)
        self.idle = torch.where(fired, 0.0, self.idle + len(x))

    def _active(self, before: Tensor) -> Tensor:
        shape = self.made.shape
        if shape.activation == "relu":
            return before
        weighed = (before * self.made.weights).detach()
        if shape.activation == "topk":
            return keep_largest(before, weighed, shape.k)
        return before * (weighed >= least_kept(weighed, shape.k)) * (weighed > 0)

    def _helped(self, before: Tensor, left: Tensor) -> Tensor:
        """Share of what is left over that the dead features leave, too."""
        dead = self.idle > self.training.dead_after
        if not bool(dead.any()):
            return left.new_zeros(())
        alone = before * dead
        most = min(EXTRA * self.made.shape.k, int(dead.sum()))
        again = self.made.added(keep_largest(alone, (alone * self.made.weights).detach(), most))
        return (left - again).square().mean() / left.square().mean().clamp(min=1e-12)


def least_kept(weighed: Float[Tensor, "row code feature"], k: int) -> Tensor:
    """The smallest of the k x rows x codes largest values."""
    flat = weighed.flatten()
    return flat.topk(k * (flat.numel() // weighed.shape[-1]), sorted=False).values.min()


@torch.no_grad()
def _set_threshold(made: Dictionary, samples: Samples, training: Training) -> None:
    """Of batchtopk: the mean of what batches keep least, so that k are active on average without a batch."""
    if made.shape.activation != "batchtopk":
        return
    rows = samples.batches(training.batch_size, training.seed + 1, None)
    found = [
        least_kept(made.before(made.normalised(x)).relu() * made.weights, made.shape.k)
        for _, x in zip(range(CALIBRATION), rows, strict=False)
    ]
    made.threshold.copy_(torch.stack(found).mean())
