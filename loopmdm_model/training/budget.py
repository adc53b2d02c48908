"""The budget of a run: FLOPs, tokens or steps; with FLOPs looped and non-looped runs cost the same.

S's cap depends on the share of the budget already spent, so the number of steps follows from
walking through the budget once with E[S] (planned) or with the drawn S (realised).
"""

import math
import os
import time
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from loopmdm.model.errors import UsageError
from loopmdm.model.flops import readout_flops, training_flops
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.randomness import step_generator

MOST_STEPS = 10**7


@runtime_checkable
class Schedule(Protocol):
    """How S is drawn, by the share of the budget that is spent (`spec.LoopSchedule`)."""

    @property
    def distribution(self) -> str:
        """Its name."""
        ...

    @property
    def widen_until(self) -> float:
        """From which share on the cap is S_max."""
        ...

    @property
    def earlier(self) -> bool:
        """Whether the loss is taken at an earlier loop, too."""
        ...

    def cap(self, progress: float, max_loops: int) -> int:
        """The largest S that is drawn."""
        ...


@runtime_checkable
class Planned(Protocol):
    """What a plan needs of a run's spec (`spec.RunSpec`)."""

    @property
    def config(self) -> LoopMDMConfig:
        """The model's."""
        ...

    @property
    def data(self) -> Any:
        """Its `length` in tokens."""
        ...

    @property
    def training(self) -> Any:
        """Budget, batch size, precision, threads."""
        ...

    @property
    def loops(self) -> Schedule:
        """How S is drawn."""
        ...

    @property
    def seed(self) -> int:
        """Of the draws of S."""
        ...

    @property
    def name(self) -> str:
        """What the run is called."""
        ...


@dataclass(frozen=True)
class Plan:
    """Planned `steps`, mean loops `e_s` over the run, tokens seen, and training FLOPs."""

    steps: int
    e_s: float
    tokens: int
    flops: float


def step_cost(spec: Planned, n_loops: float) -> float:
    """Training FLOPs of one step at `n_loops`."""
    length, batch = spec.data.length, spec.training.batch_size
    cost = training_flops(spec.config, length, n_loops, batch)
    return cost + batch * earlier_cost(spec.config, spec.loops, length) if n_loops > 1 else cost


def earlier_cost(cfg: LoopMDMConfig, loops: Schedule, length: int) -> float:
    """Training FLOPs, a sequence, of the read-out that `loops.earlier` adds where S > 1; else 0."""
    return 3.0 * readout_flops(cfg, length) if loops.earlier else 0.0


def share_spent(spec: Planned, steps: int, flops: float) -> float:
    """Share of the budget that `steps` steps of `flops` in all have used; 1 or more: done."""
    training = spec.training
    if training.flops:
        return flops / training.flops
    if training.tokens:
        return steps * training.batch_size * spec.data.length / training.tokens
    return steps / training.steps


def plan(spec: Planned) -> Plan:
    """Walk through the budget with the expected cost of each step; UsageError if it never ends."""
    cfg, spent, steps, loops, length = spec.config, 0.0, 0, 0.0, spec.data.length
    base = step_cost(spec, 1)
    _check_steps(spec)
    again = spec.training.batch_size * earlier_cost(cfg, spec.loops, length)
    extra = step_cost(spec, 2) - base - again
    known: dict[int, tuple[float, float]] = {}  # E[S] and the chance of S > 1 below each cap
    while (share := share_spent(spec, steps, spent)) < 1:
        cap = spec.loops.cap(share, cfg.max_loops)
        if cap not in known:
            chances = loop_chances(cfg, spec.loops, cap, length)
            known[cap] = mean_loops(cfg, spec.loops, cap, length), 1 - float(chances[0])
        mean, deeper = known[cap]
        cost = base + (mean - 1) * extra + deeper * again
        # with the cap at its end all further steps are alike
        count = _steps_left(spec, steps, spent, cost) if share >= spec.loops.widen_until else 1
        steps, spent, loops = steps + count, spent + count * cost, loops + count * mean
    return Plan(steps, loops / steps, steps * spec.training.batch_size * spec.data.length, spent)


def _check_steps(spec: Planned) -> None:
    least = 1 / share_spent(spec, 1, step_cost(spec, spec.config.max_loops))
    if least > MOST_STEPS:
        raise UsageError(
            f"the budget of {spec.name} is more than {MOST_STEPS:.0e} steps; "
            "lower training.flops, tokens or steps, or raise batch_size"
        )


def check_threads(threads: int) -> None:
    """UsageError where the machine has fewer cores; the specs of a cluster can be read anywhere."""
    cores = os.cpu_count() or 1
    if threads > cores:
        raise UsageError(
            f"training.threads is {threads}, this machine has {cores} cores; --set training.threads={cores}"
        )


def _steps_left(spec: Planned, steps: int, spent: float, cost: float) -> int:
    training = spec.training
    if training.flops:
        return max(1, math.ceil((training.flops - spent) / cost))
    total = training.steps or math.ceil(training.tokens / (training.batch_size * spec.data.length))
    return total - steps


def loop_chances(cfg: LoopMDMConfig, loops: Schedule, cap: int, length: int) -> np.ndarray:
    """Probabilities of S = 1..cap."""
    if loops.distribution == "fixed":
        return np.eye(cap)[cap - 1]
    weights = np.ones(cap)
    if loops.distribution != "uniform":
        cost = np.array([training_flops(cfg, length, s) for s in range(1, cap + 1)])
        cost[1:] += earlier_cost(cfg, loops, length)
        weights = cost if loops.distribution == "flop-proportional" else 1 / cost
    return weights / weights.sum()


def mean_loops(cfg: LoopMDMConfig, loops: Schedule, cap: int, length: int) -> float:
    """E[S] below `cap`."""
    return float(loop_chances(cfg, loops, cap, length) @ np.arange(1, cap + 1))


def draw_loops(spec: Planned, step: int, progress: float) -> int:
    """S of one step: a function of seed, step and the share of the budget spent."""
    cap = spec.loops.cap(progress, spec.config.max_loops)
    generator = step_generator(spec.seed, "loops", step)
    if spec.loops.distribution == "uniform":
        return 1 + int(generator.integers(cap))
    edges = loop_chances(spec.config, spec.loops, cap, spec.data.length).cumsum()
    return 1 + min(int(np.searchsorted(edges, generator.random(), side="right")), cap - 1)


def draw_earlier(spec: Planned, step: int, n_loops: int) -> int | None:
    """The earlier loop count of a step that takes its loss there, too, uniform on 1..n_loops - 1; else None."""
    if not spec.loops.earlier or n_loops == 1:
        return None
    return 1 + int(step_generator(spec.seed, "earlier", step).integers(n_loops - 1))


def training_memory(spec: Planned, n_parameters: int) -> float:
    """Bytes of one process, about: weights, gradients, two moments and the average in float32; activations.

    A layer application keeps some 20 d_model (with the MLP's width) floats a token, the logits 3 d_vocab of every
    token, or, where `logits` says so, of the masked half.
    """
    cfg, training = spec.config, spec.training
    tokens = training.batch_size * spec.data.length / training.accumulate
    readouts = 2 if spec.loops.earlier else 1
    applications = cfg.n_prelude_layers + cfg.max_loops * cfg.n_loop_layers + readouts * cfg.n_coda_layers
    size = 2 if training.precision == "bf16" else 4
    unembedded = 0.5 if training.logits == "masked" else 1.0
    per_token = applications * (12 * cfg.d_model + 2 * cfg.d_mlp) * size
    per_token += unembedded * readouts * 3 * 4 * cfg.d_vocab
    return 20.0 * n_parameters + tokens * per_token


def product_rate(threads: int) -> float:
    """FLOP/s of float32 matrix products on this machine: the best of a few, in half a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b, best = torch.randn(1024, 1024), torch.randn(1024, 1024), float("inf")
        start = time.perf_counter()
        while time.perf_counter() - start < 0.5:
            began = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return 2 * 1024**3 / best
