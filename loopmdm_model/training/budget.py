"""The budget of a run: FLOPs, tokens or steps; with FLOPs looped and non-looped runs cost the same.

S's cap depends on the share of the budget already spent, so the number of steps follows from
walking through the budget once with E[S] (planned) or with the drawn S (realised).
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from loopmdm.model.flops import training_flops
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.randomness import step_generator
from loopmdm.model.training.spec import LoopSchedule, RunSpec


@dataclass(frozen=True)
class Plan:
    """Planned `steps`, mean loops `e_s` over the run, tokens seen, and training FLOPs."""

    steps: int
    e_s: float
    tokens: int
    flops: float


def step_cost(spec: RunSpec, n_loops: float) -> float:
    """Training FLOPs of one step at `n_loops`."""
    return training_flops(spec.config, spec.data.length, n_loops, spec.training.batch_size)


def share_spent(spec: RunSpec, steps: int, flops: float) -> float:
    """Share of the budget that `steps` steps of `flops` in all have used; 1 or more: done."""
    training = spec.training
    if training.flops:
        return flops / training.flops
    if training.tokens:
        return steps * training.batch_size * spec.data.length / training.tokens
    return steps / training.steps


def plan(spec: RunSpec) -> Plan:
    """Walk through the budget with the expected cost of each step."""
    base = step_cost(spec, 1)
    extra = step_cost(spec, 2) - base
    spent, steps, loops = 0.0, 0, 0.0
    while (share := share_spent(spec, steps, spent)) < 1:
        cap = spec.loops.cap(share, spec.config.max_loops)
        mean = mean_loops(spec.config, spec.loops, cap, spec.data.length)
        cost = base + (mean - 1) * extra
        # with the cap at its end all further steps are alike
        count = _steps_left(spec, steps, spent, cost) if share >= spec.loops.widen_until else 1
        steps, spent, loops = steps + count, spent + count * cost, loops + count * mean
    return Plan(steps, loops / steps, steps * spec.training.batch_size * spec.data.length, spent)


def _steps_left(spec: RunSpec, steps: int, spent: float, cost: float) -> int:
    training = spec.training
    if training.flops:
        return max(1, math.ceil((training.flops - spent) / cost))
    total = training.steps or math.ceil(training.tokens / (training.batch_size * spec.data.length))
    return total - steps


def loop_chances(cfg: LoopMDMConfig, loops: LoopSchedule, cap: int, length: int) -> np.ndarray:
    """Probabilities of S = 1..cap."""
    if loops.distribution == "fixed":
        return np.eye(cap)[cap - 1]
    weights = np.ones(cap)
    if loops.distribution != "uniform":
        cost = np.array([training_flops(cfg, length, s) for s in range(1, cap + 1)])
        weights = cost if loops.distribution == "flop-proportional" else 1 / cost
    return weights / weights.sum()


def mean_loops(cfg: LoopMDMConfig, loops: LoopSchedule, cap: int, length: int) -> float:
    """E[S] below `cap`."""
    return float(loop_chances(cfg, loops, cap, length) @ np.arange(1, cap + 1))


def draw_loops(spec: RunSpec, step: int, progress: float) -> int:
    """S of one step: a function of seed, step and the share of the budget spent."""
    cap = spec.loops.cap(progress, spec.config.max_loops)
    generator = step_generator(spec.seed, "loops", step)
    if spec.loops.distribution == "uniform":
        return 1 + int(generator.integers(cap))
    edges = loop_chances(spec.config, spec.loops, cap, spec.data.length).cumsum()
    return 1 + min(int(np.searchsorted(edges, generator.random(), side="right")), cap - 1)


def training_memory(spec: RunSpec, n_parameters: int) -> float:
    """Bytes of one process, about: weights, gradients, two moments and the average in float32; activations.

    A layer application keeps some 20 d_model (with the MLP's width) floats a token, the logits 3 d_vocab.
    """
    cfg, training = spec.config, spec.training
    tokens = training.batch_size * spec.data.length / training.accumulate
    applications = cfg.n_prelude_layers + cfg.max_loops * cfg.n_loop_layers + cfg.n_coda_layers
    size = 2 if training.precision == "bf16" else 4
    per_token = applications * (12 * cfg.d_model + 2 * cfg.d_mlp) * size + 3 * 4 * cfg.d_vocab
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
