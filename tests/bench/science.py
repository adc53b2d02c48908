"""The analysis suite: attention measures in one forward, frontiers by replay, similarity batch by batch."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from loopmdm.analysis.exhibits.tables.science import FIRST
from loopmdm.analysis.measures import MEASURES, measure
from loopmdm.analysis.measures.attention import attention_survey, received_attention
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.mechanism.attribution import attribute
from loopmdm.analysis.measures.mechanism.attribution_patching import attribution_patching
from loopmdm.analysis.measures.mechanism.contrast import contrast
from loopmdm.analysis.measures.mechanism.corruption import corrupted
from loopmdm.analysis.measures.representation import loop_similarity
from loopmdm.analysis.measures.stopping import stopping_frontier
from loopmdm.model.diffusion.likelihood import nelbo_by_loop
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.zoo.runs import Zoo
from tests.bench.common import Row, at_most, median_peak, peak_kib, ratio, shape

N_LOOPS, LENGTH = 12, 256


def _large(batch: int = 8) -> tuple[HookedLoopMDM, MaskedBatch]:
    cfg = shape(256, 6, LENGTH, loops=N_LOOPS)
    tokens = torch.randint(0, cfg.d_vocab - 1, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    return HookedLoopMDM(cfg), mask_tokens(tokens, cfg.mask_token_id, mask_ratio=0.5)


def survey() -> Iterator[Row]:
    """All attention measures that need no further forward, but rank correlation, against an eager forward."""
    m, b = _large()
    received = received_attention(m, b, N_LOOPS)
    value = ratio(lambda: attention_survey(m, b, N_LOOPS, received, batch_size=8), lambda: _eager(m, b), 9)
    yield at_most(f"attention measures at S={N_LOOPS}, T={LENGTH}, / eager forward", value, 2.0)
    forward, patterns, measured = (median_peak("science", what) for what in ("forward", "patterns", "survey"))
    extra = (measured - forward) / (patterns - forward)
    yield at_most("their memory beyond the eager forward's, / storing the patterns", extra, 0.2)
    longer = (median_peak("science", "survey-more") - measured) / (patterns - forward)
    yield at_most("growth of that memory from 16 to 64 sequences, / storing the patterns of 16", longer, 0.05)


def attributed() -> Iterator[Row]:
    """Direct logit attribution against caching a run, attribution patching of everything against a forward."""
    m, b = _large(4)
    asked = contrast(m, b, N_LOOPS)
    value = ratio(
        lambda: attribute(m, b, N_LOOPS, reads=("direct", "linear"), asked=asked), lambda: _cached(m, b), 7
    )
    yield at_most(f"direct and linear logit attribution at S={N_LOOPS}, / run_with_cache", value, 1.5)
    other = corrupted(m, b)
    value = ratio(
        lambda: attribution_patching(m, b, other, n_loops=N_LOOPS, asked=asked),
        lambda: _forward(m, b),
        7,
    )
    yield at_most("attribution patching of all heads and MLPs, / forward", value, 4.0)


def _cached(m: HookedLoopMDM, b: MaskedBatch) -> None:
    with torch.no_grad():
        m.run_with_cache(b.tokens, n_loops=N_LOOPS)


def _forward(m: HookedLoopMDM, b: MaskedBatch) -> None:
    with torch.no_grad():
        m(b.tokens, n_loops=N_LOOPS)


def _eager(m: HookedLoopMDM, b: MaskedBatch) -> None:
    with torch.no_grad():
        m(b.tokens, n_loops=N_LOOPS, attn_path="eager")


@torch.no_grad()
def once(what: str) -> None:
    """Run one of the subjects of the memory rows, print the process's peak memory."""
    m, b = _large(64 if what.endswith("more") else 16)
    if what == "forward":
        _eager(m, b)
    elif what == "patterns":
        m.run_with_cache(b.tokens, n_loops=N_LOOPS, names_filter=lambda name: name.endswith("hook_pattern"))
    elif what.startswith("similarity"):
        loop_similarity(m, b, N_LOOPS, batch_size=8)
    else:
        attention_survey(m, b, N_LOOPS, batch_size=16)
    print(peak_kib())


def replay() -> Iterator[Row]:
    """The frontier of all rules and 20 thresholds each against one evaluation of all loops."""
    for name in FIRST.names(Zoo.shipped()):
        case = Case.of(name, None, 1000)
        options = {"maskable": case.maskable, "n_samples": 2}
        value = ratio(
            lambda case=case, options=options: stopping_frontier(case.m, case.tokens, **options),
            lambda case=case, options=options: nelbo_by_loop(case.m, case.tokens, case.n_loops, **options),
            5,
        )
        yield at_most(f"stopping frontier of {name} by replay, / trajectory and codas", value, 1.5)


def similarity() -> Iterator[Row]:
    """CKA over all pairs of 12 loops: memory does not grow with the number of sequences."""
    more, few = (median_peak("science", what) for what in ("similarity-more", "similarity"))
    yield at_most("peak memory of CKA over 12 loops, 64 / 16 sequences in batches of 8", more / few, 1.05)


def suite() -> Iterator[Row]:
    """All measures of one model, in seconds."""
    for run in FIRST.of(Zoo.shipped()):
        start = time.perf_counter()
        for item in MEASURES.values():
            if item.answers(run.spec.data.corpus) and item.on != "loops" and item.name != "training-free":
                measure(item.name, run.name, n=128, **({"mask_ratios": (0.5,)} if item.on == "masks" else {}))
        yield at_most(f"all measures of {run.name}, 128 sequences", time.perf_counter() - start, 300, " s")


def drawing() -> Iterator[Row]:
    """All figures from the committed tables, in seconds."""
    from loopmdm.analysis.exhibits import FIGURES, draw_all

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        list(draw_all(FIGURES, Path(folder)))
        yield at_most("all figures from tables", time.perf_counter() - start, 45, " s")
