"""Attention maps of one head side by side across loop counts, and their difference.

Loop i's pattern is the same for every S > i, so the map at loop i *is* the map that a model run
with n_loops = i + 1 ends on.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from loopmdm.model.errors import UsageError, check_count, check_word
from loopmdm.model.hooks.cache import LoopCache


@dataclass(frozen=True)
class AttentionMaps:
    """Maps of one sequence and head; rows are queries, columns keys, in the shown order.

    `maps` [shown loop, query, key]; `positions`, `labels` and `masked` [query] in the shown order. Rows sum to 1
    unless a hook changed the pattern.
    """

    maps: NDArray
    loops: tuple[int, ...]
    layer: int
    head: int
    positions: NDArray
    labels: list[str]
    masked: NDArray

    @property
    def difference(self) -> NDArray:
        """Last shown loop minus the first: [query, key], rows sum to 0."""
        return self.maps[-1] - self.maps[0]

    def frame(self) -> pd.DataFrame:
        """Tidy: loop query key (positions) query_masked key_masked query_token key_token attention."""
        n = len(self.positions)
        loop, query, key = (index.ravel() for index in np.indices(self.maps.shape))
        labels = np.array(self.labels, dtype=object)
        columns = {"loop": np.array(self.loops)[loop], "layer": self.layer, "head": self.head}
        columns |= {"query": self.positions[query], "key": self.positions[key]}
        columns |= {"query_masked": self.masked[query], "key_masked": self.masked[key]}
        columns |= {"query_token": labels[query], "key_token": labels[key]}
        assert len(loop) == len(self.loops) * n * n
        return pd.DataFrame(columns | {"attention": self.maps.ravel()})

    def plot(self, *, ax=None, axes=None, **kws):
        """Maps side by side with their difference, a Figure; of a single loop its map alone, Axes.

        `ax` takes the map of a single loop, `axes` one axes a loop and one for the change; `kws` go to imshow.
        What is drawn is pyplot's current figure. UsageError if axes are too few or too many.
        """
        from loopmdm.analysis.plots.attention import plot_maps

        n = len(self.loops)
        if axes is not None and n == 1:
            raise UsageError("of one loop there is no change to draw; give ax=")
        if ax is not None and (axes is not None or n > 1):
            raise UsageError(f"ax takes one map, there are {n} loops; choose one, as in loops=[3], or give axes=")
        if axes is not None and len(list(axes)) != n + 1:
            raise UsageError(f"axes needs {n + 1} axes, one a loop and one for the change, got {len(list(axes))}")
        return plot_maps(self, ax=ax, axes=None if axes is None else list(axes), **kws)

    def _repr_png_(self) -> bytes:
        from loopmdm.analysis.plots.style import png_bytes

        drawn = self.plot()
        return png_bytes(drawn if hasattr(drawn, "savefig") else drawn.figure)


def attention_across_loops(
    cache: LoopCache,
    layer: int,
    head: int | Literal["auto"] = "auto",
    loops: Iterable[int] | None = None,
    order: Literal["position", "masked-first"] = "position",
    sequence: int = 0,
) -> AttentionMaps:
    """One head's maps at several loops of a cached run, ready to `.plot()`.

    `head="auto"` takes the head whose map changes most between the first and last loop shown (a
    choice made on the data it shows: use it to look, not to test). `loops` defaults to first,
    middle and last; `order` keeps positions, or puts masked positions first.

    >>> _, cache = m.run_with_cache(b, n_loops=4)
    >>> _ = lm.attention_across_loops(cache, layer=1, loops=(0, 3)).plot()
    """
    if not isinstance(cache, LoopCache):
        raise UsageError(f"a cache of run_with_cache is needed, got {cache!r:.60}")
    check_word("order", order, ("position", "masked-first"))
    given = tuple(loops) if isinstance(loops, Iterable) else loops
    if given is not None and not (isinstance(given, tuple) and all(hasattr(loop, "__index__") for loop in given)):
        raise UsageError(f"loops must be integers, as in loops=(0, 3), got {loops!r:.60}")
    check_count("sequence", sequence, least=0)
    cache.check_looped(check_count("layer", layer, least=-cache.cfg.n_layers))
    last = cache.n_loops - 1
    chosen = tuple(dict.fromkeys((0, last // 2, last))) if given is None else given
    if not chosen:
        raise UsageError("loops is empty; name at least one, as in loops=(0, 3)")
    patterns = [_pattern(cache, layer, loop, sequence) for loop in chosen]
    stacked = torch.stack(patterns).double().cpu().numpy()
    n_heads = stacked.shape[1]
    if isinstance(head, str) and head == "auto":
        head = int(np.abs(stacked[-1] - stacked[0]).mean(axis=(-2, -1)).argmax())
    if isinstance(head, str) or check_count("head", head, least=0) >= n_heads:
        raise UsageError(f'head must be "auto" or 0..{n_heads - 1}, got {head!r}')
    head = int(head)
    tokens = cache.tokens[sequence].cpu()
    masked = cache.cfg.hidden(tokens).numpy()
    known = cache.owner.tokenizer is not None
    labels = cache.owner.to_str_tokens(tokens) if known else [str(int(token)) for token in tokens]
    places = np.argsort(~masked, kind="stable") if order == "masked-first" else np.arange(len(tokens))
    maps = stacked[:, head][:, places][:, :, places]
    shown = tuple(range_index(cache, chosen))
    return AttentionMaps(maps, shown, layer, head, places, [labels[place] for place in places], masked[places])


def range_index(cache: LoopCache, loops: Sequence[int]) -> list[int]:
    """Loops counted from 0 (-1 is the last one run)."""
    return [loop % cache.n_loops for loop in loops]


def _pattern(cache: LoopCache, layer: int, loop: int, sequence: int) -> torch.Tensor:
    running = int((cache.loops_used[:sequence] > loop % cache.n_loops).sum()) if cache.has_batch_dim else 0
    pattern = cache["pattern", "loop", loop, layer]
    if not 0 <= sequence < len(cache.tokens):
        raise UsageError(f"sequence must be 0..{len(cache.tokens) - 1}, got {sequence}")
    if cache.loops_used[sequence] <= loop % cache.n_loops:
        raise UsageError(f"sequence {sequence} stopped after {int(cache.loops_used[sequence])} loops")
    return pattern[running] if cache.has_batch_dim else pattern
