"""Where an intervention acts: loops, layers and heads, checked, as a predicate on hook names."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loopmdm_model import names
from loopmdm_model.config import LoopMDMConfig
from loopmdm_model.errors import UsageError, check_count

Loops = int | slice | Iterable[int] | None
Chosen = int | Sequence[int] | None


@dataclass(frozen=True)
class Places:
    """`loops` None: every loop; `layers`: physical layers, of which those outside the loop run once."""

    loops: Callable[[int], bool]
    layers: frozenset[int]

    @classmethod
    def of(cls, cfg: LoopMDMConfig, loops: Loops, layers: Chosen) -> "Places":
        """Check what was asked for; `layers` None means the looped ones."""
        chosen = several("layer", layers, cfg.n_layers)
        return cls(_loops(loops), frozenset(cfg.layers("loop") if chosen is None else chosen))

    def matches(self, leaf: str) -> Callable[[str], bool]:
        """Whether a hook name is `leaf` of a layer application meant here."""

        def match(name: str) -> bool:
            if not name.endswith(f".{leaf}") or "blocks." not in name:
                return False
            loop, layer = names.parse_loop(name), int(name.partition("blocks.")[2].split(".")[0])
            return layer in self.layers and (loop is None or self.loops(loop))

        return match

    def matches_loop(self, leaf: str) -> Callable[[str], bool]:
        """Whether a hook name is `hook_in` or `hook_out` of a loop meant here."""

        def match(name: str) -> bool:
            loop = names.parse_loop(name)
            return loop is not None and name == f"loop.{loop}.{leaf}" and self.loops(loop)

        return match


def several(what: str, chosen: Chosen, size: int) -> list[int] | None:
    """A number or several, each in 0..size - 1; None stays None."""
    if chosen is None:
        return None
    listed = [chosen] if isinstance(chosen, int) else list(chosen)
    if not listed:
        raise UsageError(f"no {what} is named; name at least one of 0..{size - 1}, or None for all")
    for number in listed:
        if check_count(what, number, least=0) >= size:
            raise UsageError(f"{what} must be 0..{size - 1}, got {number}")
    return [int(number) for number in listed]


def _loops(loops: Loops) -> Callable[[int], bool]:
    if loops is None:
        return lambda loop: True  # noqa: ARG005
    if isinstance(loops, slice):
        first, last, step = loops.start or 0, loops.stop, loops.step or 1
        if first < 0 or (last is not None and last < 0) or step < 1:
            raise UsageError(f"loops are counted from 0, from the front; got {loops}")
        return lambda loop: loop >= first and (last is None or loop < last) and (loop - first) % step == 0
    wanted = {loops} if isinstance(loops, int) else set(loops)
    if not wanted:
        raise UsageError("loops is empty; name at least one, or None for all")
    for loop in wanted:
        check_count("loops", loop, least=0)
    return lambda loop: loop in wanted
