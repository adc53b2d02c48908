"""Depth, counted in layer applications: which application it is, and a run that ends there."""

from torch import Tensor

from loopmdm.model.context import Context
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.protocol import Core
from loopmdm.model.sites import applications
from loopmdm.model.taps import Tap, TapSource
from loopmdm.model.tiles import Attend


class Relay(Tap):
    """Passes everything on to another tap."""

    __slots__ = ("tap",)

    def __init__(self, tap: Tap):
        self.tap = tap

    @property
    def explicit(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the other tap."""
        return self.tap.explicit

    @property
    def attend(self) -> Attend | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the other tap."""
        return self.tap.attend

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Offer `x` to the other tap."""
        return self.tap(name, x)

    def enter(self, context: Context) -> None:
        """Tell the other tap."""
        self.tap.enter(context)

    def wants(self, *names: str) -> bool:
        """Ask the other tap."""
        return self.tap.wants(*names)


class Reached(Exception):
    """The depth to stop at; carries the stream there."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.x = x


class LastTap(Relay):
    """Ends the run once `leaf` has passed, hooks included."""

    __slots__ = ("leaf",)

    def __init__(self, tap: Tap, leaf: str):
        super().__init__(tap)
        self.leaf = leaf

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Offer `x`, then end if it was the last."""
        x = self.tap(name, x)
        if name == self.leaf:
            raise Reached(x)
        return x


def depth_of(stop_at_layer: int, count: int) -> int:
    """How many of `count` applications run; -1 means all but the last, as in TransformerLens."""
    depth = check_count("stop_at_layer", stop_at_layer, least=-count)
    if depth > count:
        raise UsageError(f"stop_at_layer must be at most {count}, one per layer application; got {depth}")
    return depth + count if depth < 0 else depth


def stream_at(depth: int, model: Core, run: tuple[Tensor, int, Tensor | None], taps: TapSource) -> Tensor:
    """The stream [batch, pos, d_model] after `depth` applications; `run` is (tokens, n_loops, attention_mask)."""
    done = applications(model.cfg, run[1])[:depth]
    prefix, leaf = (done[-1][0], "hook_resid_post") if done else ("", "hook_embed")
    try:
        model(*run, lambda at: LastTap(taps(at), leaf) if at == prefix else taps(at))
    except Reached as reached:
        return reached.x
    raise AssertionError(f"{prefix}{leaf} was never passed")
