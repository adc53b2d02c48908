"""A model of the paper's size, random weights, on two sequences: peak memory and time of what is asked of it.

162.3 M parameters, T = 1024, V = 50,258, S = 12. Each row is a process of its own. It takes minutes, so it is run
only where it is named: `loopmdm bench paper-size`. Weights are 0.6 GiB of it.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from loopmdm.analysis.measures.attention import mask_attention
from loopmdm.analysis.measures.interventions import cut
from loopmdm.analysis.measures.representation import representation_change
from loopmdm.analysis.measures.stopping import stopping_frontier
from loopmdm.analysis.report import explore
from loopmdm.model.diffusion.likelihood import nelbo
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.sequences import MaskedBatch
from tests.bench.common import Row, alone, peak_kib

CONFIG: dict[str, Any] = {"d_vocab": 50_258, "n_ctx": 1024, "d_model": 768, "n_heads": 12, "n_prelude_layers": 1}
CONFIG |= {"n_loop_layers": 2, "n_coda_layers": 9, "max_loops": 12}
SEQUENCES, MOST = 2, 3.0


def _cut(m: HookedLoopMDM, b: MaskedBatch) -> None:
    with cut(m, "masked->masked", loops=slice(2, None)):
        nelbo(m, b.clean, 12, n_samples=1)


def _explored(m: HookedLoopMDM, b: MaskedBatch) -> None:
    """As much of a sequence as a page may hold."""
    for one in (0, 1):
        part = MaskedBatch(b.tokens[one : one + 1, :96], b.clean[one : one + 1, :96], b.masked[one : one + 1, :96])
        _, cache = m.run_with_cache(
            part.tokens, 12, names_filter=lambda n: n.endswith(("hook_pattern", "hook_out"))
        )
        assert len(explore(cache, clean=part).html) > 1000


WORK: dict[str, Callable[[HookedLoopMDM, MaskedBatch], object]] = {
    "a forward": lambda m, b: m(b.tokens, n_loops=12),
    "nelbo": lambda m, b: nelbo(m, b.clean, 12, n_samples=1),
    "mask_attention": lambda m, b: mask_attention(m, b, 12),
    "representation_change": lambda m, b: representation_change(m, b, 12),
    "stopping_frontier": lambda m, b: stopping_frontier(m, b.clean, n_samples=1, n_thresholds=5),
    "cut": _cut,
    "sampling, 4 steps": lambda m, b: sample(m, SEQUENCES, 1024, 4, n_loops=12),
    "explorer, 96 positions": _explored,
}


def size() -> Iterator[Row]:
    """Peak memory of each, and its time."""
    for what in WORK:
        found = json.loads(alone("paper", what, OMP_NUM_THREADS="1"))
        peak = found["peak"] / 2**20
        told = f"{peak:.2f} GiB; {found['cpu']:.0f} s of CPU"
        met = "yes" if peak <= MOST else "NO"
        yield f"paper's size, {SEQUENCES} sequences: {what}", told, f"<= {MOST} GiB", met


@torch.no_grad()
def once(what: str) -> None:
    """One of the rows, in this process: prints its peak in KiB, and CPU seconds."""
    torch.manual_seed(0)
    m = HookedLoopMDM(LoopMDMConfig(**CONFIG))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, m.cfg.mask_token_id, (SEQUENCES, m.cfg.n_ctx), generator=generator)
    b, before = mask_tokens(tokens, m.cfg.mask_token_id, mask_ratio=0.5), time.process_time()
    WORK[what](m, b)
    print(json.dumps({"peak": peak_kib(), "cpu": time.process_time() - before}))
