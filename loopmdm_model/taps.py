"""How the model offers its activations to whoever listens.

Every layer application is handed a *tap* and calls `x = tap("hook_resid_pre", x)`; the default tap
returns x untouched. `tap.wants(name)` tells whether anyone listens, so that costly intermediates
(the attention pattern) are computed only then; `tap.attend`, where there is one, computes attention in the fused
function's place, for whoever wants sums over patterns and can do without the patterns. A *tap source* maps the
prefix of an application, such as "loop.2.blocks.1.", to its tap. Training never meets a hook library.
"""

from collections.abc import Callable

from torch import Tensor

from loopmdm.model.context import Context
from loopmdm.model.tiles import Attend


class Tap:
    """Nobody listens: activations pass unchanged."""

    __slots__ = ()
    explicit = False
    """Compute attention explicitly even if nobody asks for the pattern."""
    attend: Attend | None = None
    """Who computes attention where scores and pattern are not wanted; None: the fused function."""

    def __call__(self, name: str, x: Tensor) -> Tensor:  # noqa: ARG002
        """Offer activation `x` under its leaf name; returns what the model goes on with."""
        return x

    def enter(self, context: Context) -> None:
        """Told before each application which sequences it runs on; those that stopped are gone from it."""

    def wants(self, *names: str) -> bool:  # noqa: ARG002
        """Whether anyone listens to one of these leaf names."""
        return False


class ExplicitTap(Tap):
    """Nobody listens, but attention runs on the explicit path (for comparisons on one path)."""

    __slots__ = ()
    explicit = True


TapSource = Callable[[str], Tap]

NO_TAP = Tap()
EXPLICIT_TAP = ExplicitTap()


def no_taps(prefix: str) -> Tap:  # noqa: ARG001
    """The default source: nobody listens anywhere."""
    return NO_TAP


def explicit_taps(prefix: str) -> Tap:  # noqa: ARG001
    """A source for the explicit ("eager") attention path without listeners."""
    return EXPLICIT_TAP
