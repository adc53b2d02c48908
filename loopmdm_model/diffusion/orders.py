"""Orders by name: which positions a sampler fills first.

To add one, subclass `Order`, `Commit` (an even share, best first) or one of the bases beside it. What others call
them: LLaDA's low_confidence is `DrawnConfidence`, its random `EvenRandom`; Dream's origin is `Ancestral`,
maskgit_plus `DrawnConfidence`, topk_margin `Margin`, entropy `LowEntropy`, alg_temp `Noised`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from loopmdm.model.diffusion.blind import Ancestral, EvenRandom, FirstHitting, FixedOrder, OneShot
from loopmdm.model.diffusion.blocks import Blocks
from loopmdm.model.diffusion.order import Order, StepView, best, lowest
from loopmdm.model.diffusion.parallel import EntropyBound, Factor, InParallel, Threshold
from loopmdm.model.diffusion.ranking import (
    ByDraw,
    Commit,
    Confidence,
    DrawnConfidence,
    HardestFirst,
    LowEntropy,
    Margin,
    Noised,
)
from loopmdm.model.diffusion.remasking import PathPlanning, Remask
from loopmdm.model.errors import UsageError, check_count, unknown_name

__all__ = [
    "BLOCKS",
    "ORDERS",
    "Ancestral",
    "Blocks",
    "ByDraw",
    "Commit",
    "Confidence",
    "DrawnConfidence",
    "EntropyBound",
    "EvenRandom",
    "Factor",
    "FirstHitting",
    "FixedOrder",
    "HardestFirst",
    "InParallel",
    "LowEntropy",
    "Margin",
    "Noised",
    "OneShot",
    "Order",
    "PathPlanning",
    "Remask",
    "StepView",
    "Threshold",
    "as_order",
    "best",
    "lowest",
    "parse_order",
]

ORDERS: dict[str, Order] = {
    "random": Ancestral(),
    "even-random": EvenRandom(),
    "first-hitting": FirstHitting(),
    "confidence": Confidence(),
    "drawn-confidence": DrawnConfidence(),
    "margin": Margin(),
    "entropy": LowEntropy(),
    "hardest-first": HardestFirst(),
    "threshold": Threshold(),
    "factor": Factor(),
    "entropy-bound": EntropyBound(),
    "noised": Noised(),
    "maskgit": Noised(4.5, DrawnConfidence(log=True), annealed=True),
    "left-to-right": FixedOrder(),
    "row-major": FixedOrder(),
    "one-shot": OneShot(),
    "remask": Remask(),
    "remask-confidence": Remask(schedule="confidence"),
    "remask-loop": Remask(schedule="loop"),
    "path-planning": PathPlanning(),
}
BLOCKS = ("blocks", "random-blocks")


def parse_order(text: str) -> Order:
    """The order written as NAME, NAME:NUMBER where it has a number, or blocks:SIZE[:NAME[:NUMBER]]."""
    kind, _, rest = text.partition(":")
    if kind in BLOCKS:
        size, _, inner = rest.partition(":")
        if not (size.isascii() and size.isdigit()):
            raise UsageError(f"{kind} needs a size, such as {kind}:8, got {text!r}")
        size = check_count("the size of blocks", int(size[:99]))
        return Blocks(size, parse_order(inner) if inner else Confidence(), shuffled=kind == "random-blocks")
    dialled = ORDERS[kind].dial if kind in ORDERS else ""
    if kind not in ORDERS or (":" in text and not dialled):
        raise unknown_name("order", text, [*ORDERS, *(f"{kind}:SIZE" for kind in BLOCKS)])
    if ":" not in text:
        return ORDERS[kind]
    try:
        number = float(rest)
    except ValueError:
        raise UsageError(f"{dialled} in {text!r} is no number; write {kind}:0.5") from None
    return replace(ORDERS[kind], **{dialled: number})  # pyright: ignore[reportArgumentType]


def as_order(order: Any, length: int) -> Order:
    """The order meant by a name (see `parse_order`), a permutation, or an Order."""
    if isinstance(order, str):
        order = parse_order(order)
    if isinstance(order, Tensor):
        order = order.tolist()
    if isinstance(order, Sequence):
        if not all(isinstance(position, int) for position in order):
            raise UsageError(f"an order must hold the positions 0..{length - 1} as integers, got {order!r:.80}")
        order = FixedOrder(tuple(order) or (-1,))
    if not isinstance(order, Order):
        raise UsageError(f"order must be a name, a permutation or an Order, got {order!r}")
    order.check(length)
    return order
