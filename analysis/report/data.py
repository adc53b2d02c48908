"""What the explorer shows of one run: every attention map once, and what each loop would answer.

Loop i's maps are the same for all n_loops > i, so a looped layer has one map a loop. A coda layer has one for
every n_loops: the coda, applied to the state after loop i, *is* the model at n_loops = i + 1. Its map at the
number of loops that was run is the cached one, the others are made from the cached states.

Weights are stored as 16-bit codes, w = low + (high - low) * code / 65535, with low, high = 0, 1 unless a hook
changed a pattern: within (high - low) / 131070 of the cache, and rows of T keys sum to 1 within T times that.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loopmdm.analysis.measures.representation.lenses import readout_metrics
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.cache import LoopCache
from loopmdm.model.precision import wide
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.sites import Site
from loopmdm.model.tasks.sudoku import BOARDS
from loopmdm.model.tasks.test_sets import task_of

LEVELS = 65535
LARGEST_PAGE = 48 * 2**20
"""Bytes of codes that one page may hold; a browser opens more only slowly."""

Place = tuple[int, int | None, int | None]
"""Layer, loop (looped layers only), n_loops (coda layers only)."""


@dataclass(frozen=True)
class Run:
    """One model on one sequence of T real (not padding) positions.

    `maps` [map, head, query, key] in the order of `places`; `n_loops` loops were run. `truth` are the clean
    tokens, None where unknown; `board` symbols, box rows and box columns of a Sudoku. `answers`: by loop and
    masked position top1 (text), p_top1, entropy (nats), and p_true and correct if the truth is known; None if the
    states were not cached.
    """

    model: str
    about: str
    segments: tuple[str, ...]
    s_max: int
    n_loops: int
    tokens: tuple[str, ...]
    truth: tuple[str, ...] | None
    masked: NDArray
    board: tuple[int, int, int] | None
    places: tuple[Place, ...]
    maps: NDArray
    answers: dict[str, list] | None

    def __post_init__(self):
        """One map a place, square in the tokens, finite."""
        t = len(self.tokens)
        assert self.maps.shape == (len(self.places), self.maps.shape[1], t, t) and len(self.masked) == t
        if not np.isfinite(self.maps).all():
            raise UsageError(f"patterns of {self.model} hold NaN or infinity; look at the hooks of that run")

    @property
    def best_head(self) -> int:
        """The head whose looped map changes most from the first loop to S_max; a choice to look, not to test."""
        looped = [i for i, (_, loop, _) in enumerate(self.places) if loop is not None and loop < self.s_max]
        if not looped:
            return 0
        return int(np.abs(self.maps[looped[-1]] - self.maps[looped[0]]).mean(axis=(-2, -1)).argmax())

    def payload(self) -> dict[str, Any]:
        """What the page holds of this run (JSON)."""
        low, high = min(0.0, float(self.maps.min())), max(1.0, float(self.maps.max()))
        codes = np.rint((self.maps.astype(np.float64) - low) / (high - low) * LEVELS).astype("<u2")
        return {
            "model": self.model,
            "about": self.about,
            "segments": self.segments,
            "s_max": self.s_max,
            "n_loops": self.n_loops,
            "n_heads": self.maps.shape[1],
            "best_head": self.best_head,
            "places": self.places,
            "low": low,
            "high": high,
            "weights": base64.b64encode(codes.tobytes()).decode(),
            "answers": self.answers,
        }


def run_of(cache: LoopCache, clean: MaskedBatch | Tensor | None = None, sequence: int = 0, name: str = "") -> Run:
    """One sequence of a cached run; `clean` the masked batch, or clean token ids, for p(true) if they are known.

    UsageError if the cache holds no whole patterns, or if `clean` is of other tokens.
    """
    _check_input(cache, sequence)
    m, tokens = cache.owner, cache.tokens[sequence]
    given = clean.attention_mask if isinstance(clean, MaskedBatch) else None
    padding = m.padding_mask(tokens[None]) if given is None else given[sequence : sequence + 1]
    real = torch.ones_like(tokens, dtype=torch.bool) if padding is None else padding[0] != 0
    truth = None if clean is None else _truth(clean, cache)[sequence]
    if truth is not None and bool(m.cfg.hidden(truth[real]).any()):
        truth = None  # nobody knows it: the answers are shown without
    n_loops = int(cache.loops_used[sequence])
    cached = dict(_cached(cache, sequence, n_loops))
    _check_maps(cached, len(real), n_loops if "loop.0.hook_out" in cache else 1)
    codas, answers = _read(cache, sequence, n_loops, padding, truth)
    found = _merge(codas, cached, n_loops, 1e-4 if m.model.dtype == torch.float32 else 2e-2)
    places = tuple(sorted(found, key=lambda place: (place[0], place[1] or 0, place[2] or 0)))
    keep = real.cpu().numpy()
    return Run(
        model=name or m.model_name or "model",
        about=repr(m).split(": ", 1)[-1].rstrip(")"),
        segments=tuple(segment for segment in ("prelude", "loop", "coda") for _ in m.cfg.layers(segment)),
        s_max=m.cfg.max_loops,
        n_loops=n_loops,
        tokens=_pieces(cache, tokens[real]),
        truth=None if truth is None else _pieces(cache, truth[real]),
        masked=m.cfg.hidden(tokens[real]).cpu().numpy(),
        board=_board(cache, int(real.sum())),
        places=places,
        maps=np.stack([found[place][:, keep][:, :, keep] for place in places]),
        answers=answers,
    )


def _check_input(cache: object, sequence: int) -> None:
    if not isinstance(cache, LoopCache):
        raise UsageError(f"explore takes the cache of run_with_cache, got {type(cache).__name__}")
    if not 0 <= check_count("sequence", sequence, least=0) < len(cache.tokens):
        raise UsageError(f"sequence must be 0..{len(cache.tokens) - 1}, got {sequence}")


def _truth(clean: MaskedBatch | Tensor, cache: LoopCache) -> Tensor:
    if not isinstance(clean, MaskedBatch | Tensor):
        raise UsageError(f"clean takes the MaskedBatch that was run, or its clean ids, got {clean!r:.60}")
    ids = clean.clean if isinstance(clean, MaskedBatch) else clean
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.shape != cache.tokens.shape:
        raise UsageError(f"clean has shape {list(ids.shape)}, the cached tokens {list(cache.tokens.shape)}")
    ids = ids.to(cache.tokens.device)
    if bool(((ids != cache.tokens) & ~cache.cfg.hidden(cache.tokens)).any()):
        raise UsageError(
            "clean differs from the cached tokens where nothing is masked; give the batch that was run"
        )
    return ids


def _pieces(cache: LoopCache, ids: Tensor) -> tuple[str, ...]:
    known = cache.owner.tokenizer is not None
    return tuple(cache.owner.to_str_tokens(ids) if known else [str(int(token)) for token in ids])


def _board(cache: LoopCache, length: int) -> tuple[int, int, int] | None:
    try:
        board = BOARDS.get(task_of(cache.owner.record))
    except UsageError:  # a model without a record
        return None
    if board is None or board.n_cells != length:
        return None
    return board.size, board.box_rows, board.box_columns


def _one(cache: LoopCache, value: Tensor, sequence: int, loop: int | None) -> Tensor:
    """The row of `value` that is the sequence's; entries of loops hold the sequences still running."""
    if not cache.has_batch_dim:
        return value
    if loop is None or len(value) == len(cache.tokens):
        return value[sequence]
    return value[int((cache.loops_used[:sequence] > loop).sum())]


def _cached(cache: LoopCache, sequence: int, n_loops: int) -> Iterator[tuple[Place, NDArray]]:
    """Patterns as they were cached: place, [head, query, key]."""
    for layer in range(cache.cfg.n_layers):
        looped = layer in cache.cfg.layers("loop")
        for loop in range(n_loops) if looped else (None,):
            key = ("pattern", layer) if loop is None else ("pattern", "loop", loop, layer)
            if key in cache:
                after = n_loops if layer in cache.cfg.layers("coda") else None
                pattern = _one(cache, cache[key], sequence, loop)
                yield (layer, loop, after), pattern.float().cpu().numpy()


def _merge(codas: dict, cached: dict, n_loops: int, tolerance: float) -> dict[Place, NDArray]:
    """Cached maps, with the coda's at fewer loops where the coda gives what was cached (no hook changed it)."""
    for place, pattern in codas.items():
        if place[2] == n_loops and np.abs(pattern - cached[place]).max() > tolerance:
            return cached
    return codas | cached


@torch.no_grad()
def _read(
    cache: LoopCache, sequence: int, n_loops: int, padding: Tensor | None, truth: Tensor | None
) -> tuple[dict[Place, NDArray], dict[str, list] | None]:
    """Coda patterns and read-outs at the masked positions after every loop; nothing if states are not cached."""
    m, coda = cache.owner, cache.cfg.layers("coda")
    if any(f"loop.{loop}.hook_out" not in cache for loop in range(n_loops)):
        return {}, None
    tokens = cache.tokens[sequence : sequence + 1]
    context = m.model.context(tokens, padding)
    rows = context.masked & context.real
    maps, answers = {}, {}
    for loop in range(n_loops):
        state = _one(cache, cache[f"loop.{loop}.hook_out"], sequence, loop)[None]
        if state.shape[1] != tokens.shape[1]:
            return {}, None
        patterns = {f"blocks.{layer}.attn.hook_pattern" for layer in coda if ("pattern", layer) in cache}
        store, forward, _ = m.get_caching_hooks(patterns.__contains__)
        with m.hooks(forward if patterns else []):
            logits = m.readout(state.to(m.model.device, m.model.dtype), context)[rows]
        maps |= {(Site.parse(name).layer, None, loop + 1): v[0].float().cpu().numpy() for name, v in store.items()}
        for name, values in _answers(cache, logits, None if truth is None else truth[rows[0]]).items():
            answers.setdefault(name, []).append(values)
    return maps, answers


def _answers(cache: LoopCache, logits: Tensor, truth: Tensor | None) -> dict[str, list]:
    """One loop's read-out [row, d_vocab]: best token, its probability, entropy; p(true) and whether it is best."""
    log_probs = wide(logits).log_softmax(-1)
    best, top = log_probs.max(-1)
    metrics = readout_metrics(log_probs, None, torch.full_like(top, -1) if truth is None else truth)
    found = {"top1": list(_pieces(cache, top)), "p_top1": best.exp(), "entropy": metrics["entropy"]}
    if truth is not None:
        found |= {"p_true": metrics["p_true"], "correct": (top == truth).int()}
    return {
        name: value if isinstance(value, list) else np.round(value.cpu().numpy().astype(float), 5).tolist()
        for name, value in found.items()
    }


def _check_maps(found: dict[Place, NDArray], length: int, codas: int) -> None:
    """Whole patterns, and not more than a page may hold, coda layers counted `codas` times."""
    if not found:
        raise UsageError(
            "the cache holds no attention patterns; let names_filter= keep names that end in hook_pattern"
        )
    size = sum(2 * pattern.size * (1 if place[2] is None else codas) for place, pattern in found.items())
    if any(pattern.shape[1:] != (length, length) for pattern in found.values()):
        raise UsageError("the cached patterns are not whole; run_with_cache without pos_slice=")
    if size > LARGEST_PAGE:
        raise UsageError(
            f"{len(found)} maps of {length} positions are {size / 2**20:.0f} MB, more than the "
            f"{LARGEST_PAGE / 2**20:.0f} MB a page may hold; run fewer loops, or cache fewer layers with "
            "names_filter="
        )
