"""Attention sums from tiles against a fused forward: CPU time of one process, and its memory.

One thread; the forward is the model's own with nobody listening. CPU time, not the clock on the wall: the machines
that this runs on are shared.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from loopmdm.analysis.measures.attention import mask_attention, received_attention
from loopmdm.analysis.measures.attention.masses import AttentionSums
from loopmdm.analysis.measures.attention.shape import ShapeSums
from loopmdm.analysis.watch.walk import walk
from loopmdm.model.adapters import hook_model
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.sequences import MaskedBatch
from tests.bench.common import Row, at_most, median_peak, peak_kib, ratio, shape

FACTORS = (3.0, 5.0, 10.0)


@dataclass(frozen=True)
class Setting:
    """A model and a batch: `n` sequences of `length` tokens, `n_loops` loops of one of `layers` layers."""

    d: int
    layers: int
    length: int
    n_loops: int
    heads: int
    n: int

    def made(self, n: int | None = None) -> tuple[HookedLoopMDM, MaskedBatch]:
        """The model, and `n` sequences half masked."""
        cfg = shape(self.d, self.layers, self.length, self.n_loops, self.heads)
        return HookedLoopMDM(cfg), self.batch(cfg.mask_token_id, n)

    def batch(self, mask_token_id: int, n: int | None = None) -> MaskedBatch:
        """Sequences half masked."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, mask_token_id, (n or self.n, self.length), generator=generator)
        return mask_tokens(tokens, mask_token_id, mask_ratio=0.5)

    def __str__(self) -> str:
        return f"T={self.length} d={self.d} S={self.n_loops}"


LONG, SHORT = Setting(768, 3, 1024, 1, 12, 1), Setting(768, 3, 64, 12, 12, 16)


def all_groups(m: HookedLoopMDM, b: MaskedBatch, n_loops: int) -> Callable[[], None]:
    """Masses with content, shape, and masses with sinks at three factors, in one walk."""
    sinks = [received_attention(m, b, n_loops).sinks(factor).groups for factor in FACTORS]

    def measured() -> None:
        apart = [AttentionSums(m, n_loops, False, True, keys) for keys in sinks]
        sums = [AttentionSums(m, n_loops), ShapeSums(m, n_loops), *apart]
        walk(m, b, n_loops, sums)
        for one in sums:
            one.frame()

    return measured


def against_fused() -> Iterator[Row]:
    """Masses, content and all group measures, against the forward alone; ours and somebody else's model."""
    with torch.inference_mode():
        m, b = LONG.made()
        yield _row(m, b, LONG, "masses", lambda: mask_attention(m, b, content=False), 1.3)
        yield _row(m, b, LONG, "masses and content", lambda: mask_attention(m, b), 1.8)
        yield _row(m, b, LONG, "all group measures", all_groups(m, b, LONG.n_loops), 2.0)
        short, few = SHORT.made()
        yield _row(short, few, SHORT, "masses", lambda: mask_attention(short, few, content=False), 1.15)
        theirs = _bert()
        given = LONG.batch(theirs.cfg.mask_token_id)
        yield _row(theirs, given, LONG, "BERT's masses", lambda: mask_attention(theirs, given, content=False), 1.3)


def _row(
    m: HookedLoopMDM, b: MaskedBatch, setting: Setting, what: str, run: Callable[[], object], goal: float
) -> Row:
    value = ratio(run, lambda: m(b.tokens), 9, now=time.process_time)
    return at_most(f"{what} at {setting}, / fused forward (CPU time)", value, goal)


def _bert() -> Any:
    import transformers

    sizes = {"vocab_size": 1024, "hidden_size": LONG.d, "num_hidden_layers": 3, "num_attention_heads": LONG.heads}
    sizes |= {"intermediate_size": 4 * LONG.d, "max_position_embeddings": LONG.length}
    settings = transformers.BertConfig(**sizes, attn_implementation="sdpa")
    return hook_model(transformers.BertForMaskedLM(settings).eval(), mask_token_id=1023)


def memory() -> Iterator[Row]:
    """Peak memory of a process that measures, against one that only runs the model."""
    peaks = {what: median_peak("sums", what) for what in ("forward", "masses", "eager")}
    more = peaks["masses"] / peaks["forward"]
    yield at_most(f"peak memory of masses at {LONG}, 4 sequences, / fused forward", more, 1.05)
    shown = (peaks["masses"] - peaks["forward"]) / (peaks["eager"] - peaks["forward"])
    yield at_most("what it adds, / what the explicit path adds", shown, 0.2)


@torch.no_grad()
def once(what: str) -> None:
    """Run one of the subjects of the memory rows, print the process's peak memory."""
    m, b = LONG.made(4)
    if what == "masses":
        mask_attention(m, b, content=False)
    else:
        m(b.tokens, attn_path="eager" if what == "eager" else "auto")
    print(peak_kib())
