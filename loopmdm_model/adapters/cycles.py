"""What families do between loops beside repeating layers: inject, norm, draw a first state, keep a second one.

A cycle gets the core and the context; what it keeps for later loops goes into `context.extra`, never on itself.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from loopmdm.model.errors import UsageError
from loopmdm.model.layout import Layout

if TYPE_CHECKING:
    from loopmdm.model.context import Context


@runtime_checkable
class Around(Protocol):
    """What a cycle needs of the model that it is part of."""

    seed: int
    native: Any

    @property
    def cfg(self) -> Layout:
        """Its layers."""
        ...


class Cycle:
    """Nothing: the looped layers repeat, and that is all. States are [batch, pos, d_model]."""

    fixed = False
    """Whether only the layers that the model loops itself can be looped."""

    def start(self, core: "Around", x: Tensor, context: "Context") -> Tensor:  # noqa: ARG002
        """H(-1), from what the prelude gives."""
        return x

    def parts(self, core: "Around") -> list[range]:
        """The looped layers as runs with something between them, in order; by default one run.

        `before` and `after` stand around each, told the number of the run since the first loop's first.
        """
        return [core.cfg.layers("loop")]

    def before(self, core: "Around", x: Tensor, context: "Context", run: int) -> Tensor:  # noqa: ARG002
        """What the looped layers get."""
        return x

    def after(
        self, core: "Around", x: Tensor, inside: Tensor, context: "Context", run: int  # noqa: ARG002
    ) -> Tensor:  # fmt: skip
        """The next state, from the one before and what the looped layers give."""
        return inside

    def leave(self, core: "Around", x: Tensor) -> Tensor:  # noqa: ARG002
        """What the coda gets."""
        return x

    def steps(self, n_loops: int) -> dict[str, Any]:  # noqa: ARG002
        """Keywords by which the native forward makes `n_loops` loops."""
        return {}

    def exit_gate(self, core: "Around", state: Tensor) -> Tensor | None:  # noqa: ARG002
        """The model's own chance to stop, [batch, pos]; None: it has no gate."""
        return None

    def drawn(self, seed: int, row: int) -> AbstractContextManager:  # noqa: ARG002
        """What is drawn inside is that of sequence `row` under `seed`."""
        return nullcontext()

    def unmoved(self) -> AbstractContextManager:
        """What is drawn inside leaves torch's generator as it was."""
        return nullcontext()


_GENERATOR = RLock()
"""Torch's global generator is one for all threads; native code draws from nothing else."""


def _left(context: Any, name: str) -> Tensor:
    """What the prelude left in the context."""
    if name not in context.extra:
        raise UsageError(
            "this model's loops need what its prelude left: take state and context from m.states(tokens)"
        )
    return context.extra[name]


class Injected(Cycle):
    """Raven's recurrence (arXiv 2502.05171): x = adapter([x, e]) before every loop, e from the prelude.

    The first state is the model's own random one, drawn for each sequence of a batch by itself, so that sequence i
    starts alike whatever stands beside it.
    """

    fixed = True

    def start(self, core: "Around", x: Tensor, context: Any) -> Tensor:
        """A random state; keeps e."""
        context.extra["injected"] = x
        states = []
        for row in range(len(x)):
            with self.drawn(core.seed, row):
                states.append(core.native.initialize_state(x[row : row + 1]))  # pyright: ignore[reportCallIssue]
        return torch.cat(states)

    def before(self, core: "Around", x: Tensor, context: Any, run: int) -> Tensor:  # noqa: ARG002
        """The state with e let in."""
        adapter = core.native.get_submodule("transformer.adapter")
        return adapter(torch.cat([x, _left(context, "injected").to(x.device)], dim=-1))

    def steps(self, n_loops: int) -> dict[str, Any]:
        """Loops without and with gradients."""
        return {"num_steps": (n_loops, 0)}

    @contextmanager
    def drawn(self, seed: int, row: int) -> Iterator[None]:
        """Seeds torch's generator, and puts it back."""
        with self.unmoved():
            torch.manual_seed(int(np.random.SeedSequence([seed, row]).generate_state(1)[0]))
            yield

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """Keeps torch's generator."""
        with _GENERATOR, torch.random.fork_rng():
            yield


class InjectedNormed(Injected):
    """As in Huginn, whose coda sees the normed state."""

    def leave(self, core: "Around", x: Tensor) -> Tensor:
        """The final norm, which comes once more after the coda."""
        return core.native.get_submodule("transformer.ln_f")(x)


class NormedGated(Cycle):
    """Ouro (arXiv 2510.25741): the final norm after every loop, and a gate p = sigmoid(w state + b)."""

    fixed = True

    def after(
        self, core: "Around", x: Tensor, inside: Tensor, context: "Context", run: int  # noqa: ARG002
    ) -> Tensor:  # fmt: skip
        """The normed state."""
        return core.native.get_submodule("model.norm")(inside)

    def exit_gate(self, core: "Around", state: Tensor) -> Tensor:
        """The chance to stop here, given that no earlier loop did."""
        return torch.sigmoid(core.native.get_submodule("model.early_exit_gate")(state))[..., 0]


class TwoStates(Cycle):
    """TRM (arXiv 2510.04871): L_cycles loops of z_L = f(z_L + z_H + e), then one of z_H = f(z_H + z_L).

    One loop is one application; the state is z_H.
    """

    fixed = True

    def start(self, core: "Around", x: Tensor, context: Any) -> Tensor:
        """Learned first states; keeps e, which is what the first layer sees beside them."""
        inner: Any = core.native.get_submodule("inner")
        high, low = inner.H_init.expand_as(x), inner.L_init.expand_as(x)
        context.extra |= {"injected": x - (low + high), "low": low}
        return high

    def before(self, core: "Around", x: Tensor, context: Any, run: int) -> Tensor:
        """Both states, and e unless the high one moves."""
        both = _left(context, "low") + x
        return both if self._moves_high(core, run) else both + _left(context, "injected")

    def after(self, core: "Around", x: Tensor, inside: Tensor, context: Any, run: int) -> Tensor:
        """The high state, moved or not."""
        if self._moves_high(core, run):
            return inside
        held = context.held  # what stopped keeps both its states
        context.extra["low"] = (
            inside if held is None else torch.where(held[..., None], context.extra["low"], inside)
        )
        return x

    def _moves_high(self, core: "Around", run: int) -> bool:
        config: Any = core.native.config
        return (run + 1) % (config.L_cycles + 1) == 0


class TwoStacks(TwoStates):
    """HRM-Text: L_cycles runs of z_L = norm(f_L(z_L + z_H)), then z_H = norm(f_H(z_H + z_L)), layers of their own.

    One loop is all of that; the state is z_H, which begins as the embedded tokens.
    """

    def start(self, core: "Around", x: Tensor, context: Any) -> Tensor:
        """The embedded tokens, which the first layer sees beside the first low state."""
        low = core.native.get_submodule("model").z_L_init.to(x).expand_as(x)
        context.extra["low"] = low
        return x - low

    def parts(self, core: "Around") -> list[range]:
        """The low stack L_cycles times, then the high one."""
        layers, runs = core.cfg.layers("loop"), core.native.config.L_cycles + 1
        size = len(layers) // runs
        return [layers[first : first + size] for first in range(0, len(layers), size)]

    def before(self, core: "Around", x: Tensor, context: Any, run: int) -> Tensor:  # noqa: ARG002
        """Both states."""
        return _left(context, "low") + x

    def after(self, core: "Around", x: Tensor, inside: Tensor, context: Any, run: int) -> Tensor:
        """The high state, moved or not, by its stack's own norm."""
        stack = "model.H_module" if self._moves_high(core, run) else "model.L_module"
        return super().after(core, x, core.native.get_submodule(stack).final_norm(inside), context, run)
