"""One self-contained file: claims, figures and an attention explorer; in a notebook the explorer alone.

from loopmdm.analysis import explore
logits, cache = m.run_with_cache(b.tokens, n_loops=12)
explore(cache, clean=b)
"""

from loopmdm.analysis.report.explorer import Explorer, explore

__all__ = ["Explorer", "explore"]
