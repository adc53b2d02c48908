"""The budget: training FLOPs, so that looped and non-looped runs cost the same.

S's cap depends on the share of the budget already spent, so the number of steps follows from
walking through the budget once with E[S] (planned) or with the drawn S (realised).
"""

from dataclasses import dataclass

from loopmdm_model.flops import training_flops
from loopmdm_model.randomness import step_generator
from loopmdm_model.training.spec import RunSpec


@dataclass(frozen=True)
class Plan:
    """Planned `steps`, mean loops `e_s` over the run, tokens seen, and FLOPs actually spent."""

    steps: int
    e_s: float
    tokens: int
    flops: float


def step_cost(spec: RunSpec, n_loops: float) -> float:
    """Training FLOPs of one step at `n_loops`."""
    return training_flops(spec.config, spec.data.length, n_loops, spec.training.batch_size)


def plan(spec: RunSpec) -> Plan:
    """Walk through the budget with the expected cost of each step."""
    spent, steps, loops, budget = 0.0, 0, 0.0, spec.training.flops
    base = step_cost(spec, 1)
    extra = step_cost(spec, 2) - base
    while spent < budget:
        mean = (1 + spec.loops.cap(spent / budget, spec.config.max_loops)) / 2
        spent += base + (mean - 1) * extra
        loops += mean
        steps += 1
    return Plan(steps, loops / steps, steps * spec.training.batch_size * spec.data.length, spent)


def draw_loops(spec: RunSpec, step: int, progress: float) -> int:
    """S of one step: a function of seed, step and the share of the budget spent."""
    cap = spec.loops.cap(progress, spec.config.max_loops)
    return 1 + int(step_generator(spec.seed, "loops", step).integers(cap))
