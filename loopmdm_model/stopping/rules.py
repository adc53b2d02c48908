"""Stopping rules by name: when to stop looping, small rules that look at one loop at a time.

To add a rule: a file in this folder with a subclass of `StoppingRule` that has a `name` and gives `values`, or of
`LensRule` that gives `read` and `change`, and `RULES = (TheRule,)`; from another package, an entry point of the
group "loopmdm.rules" that names the class. Logits that a rule does not ask for are not computed; the exit gate of
a model that has one is.
"""

from jaxtyping import Float
from torch import Tensor

from loopmdm.model.errors import UsageError, unknown_name
from loopmdm.model.registry import Registry
from loopmdm.model.stopping.gate import ExitGate
from loopmdm.model.stopping.lens import ArgmaxStable, EntropyDelta, KLDelta, LensRule
from loopmdm.model.stopping.rule import FixedLoops, Lens, LoopView, StoppingRule, as_rule, unknown
from loopmdm.model.stopping.schedule import NoiseSchedule
from loopmdm.model.stopping.state import SecondDifference, StateDelta, relative_change

__all__ = [
    "RULES",
    "ArgmaxStable",
    "EntropyDelta",
    "ExitGate",
    "FixedLoops",
    "KLDelta",
    "Lens",
    "LensRule",
    "LoopView",
    "NoiseSchedule",
    "SecondDifference",
    "StateDelta",
    "StoppingRule",
    "as_rule",
    "oracle_loops",
    "parse_rule",
    "relative_change",
    "unknown",
]

FILES = ("loopmdm.model.stopping", "RULES")
RULES: Registry[type[StoppingRule]] = Registry("stopping rule", type, "loopmdm.rules", files=FILES)


def parse_rule(text: str, max_loops: int) -> StoppingRule:
    """The rule written as NAME or NAME:THRESHOLD, such as state-delta:0.03."""
    name, _, number = text.partition(":")
    if name not in RULES:
        raise unknown_name("stopping rule", name, RULES)
    if not number:
        return RULES[name](max_loops=max_loops)
    try:
        threshold = float(number)
    except ValueError:
        raise UsageError(f"the threshold in {text!r} is no number; write {name}:0.03") from None
    return RULES[name](max_loops=max_loops, threshold=threshold)


def oracle_loops(losses: Float[Tensor, "loop batch"], flops: Float[Tensor, " loop"], price: float) -> Tensor:
    """Loops [batch] that minimise true loss + price * FLOPs; for analysis, as it looks at the answer.

    `losses` are true-token cross-entropies read after each loop, `flops` the cost of stopping there.
    """
    return (losses + price * flops[:, None]).argmin(0) + 1
