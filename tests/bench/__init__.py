"""Speed goals, measured as ratios in one run against what they are compared with; medians.

Machines are noisy: the two sides alternate, every ratio is the median of paired repeats, and what is
printed is the ratio and its goal, never a time.
"""

from loopmdm.model.errors import unknown_name
from tests.bench import browser, corpora, foreign, forward, likelihood, paper, science, sums, training
from tests.bench.common import Row

BENCHMARKS = {
    "forward": forward.forward,
    "caching": forward.caching,
    "masses": forward.masses,
    "sums": sums.against_fused,
    "sums-memory": sums.memory,
    "import": forward.importing,
    "foreign": foreign.listening,
    "foreign-map": foreign.sites_of_eight_billion,
    "faster-training": training.faster,
    "throughput": training.throughput,
    "tokenising": corpora.tokenising,
    "loading": training.loading,
    "resuming": training.resuming,
    "sampling": likelihood.sampling,
    "spread": likelihood.spread,
    "adaptive": likelihood.adaptive,
    "all-loops": likelihood.all_loops,
    "attention-measures": science.survey,
    "attribution": science.attributed,
    "frontier": science.replay,
    "similarity": science.similarity,
    "all-measures": science.suite,
    "figures": science.drawing,
    "explorer": browser.explorer,
}
SLOW = {"paper-size": paper.size}
"""Run only where they are named: minutes, and gigabytes."""


def run(names: list[str] | None = None) -> list[Row]:
    """All rows of the named benchmarks: (benchmark, measured, goal, met)."""
    known = BENCHMARKS | SLOW
    for name in names or []:
        if name not in known:
            raise unknown_name("benchmark", name, known)
    return [row for name in names or BENCHMARKS for row in known[name]()]
