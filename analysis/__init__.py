"""Measures of looped masked-diffusion models: torch in, tidy DataFrames out, plots and figures on top.

Names are loaded on first use, so that drawing from tables does not load the models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loopmdm.folders import hand_over, moved

hand_over(__name__)

if TYPE_CHECKING:
    from loopmdm.analysis import exhibits as figures
    from loopmdm.analysis.exhibits import tables
    from loopmdm.analysis.exhibits.verdicts import claims_table
    from loopmdm.analysis.measures import Case, measure
    from loopmdm.analysis.measures.attention import attention_across_loops, mask_attention
    from loopmdm.analysis.measures.interventions import cut, stale
    from loopmdm.analysis.measures.quality.decomposition import nelbo_decomposition
    from loopmdm.analysis.measures.representation import read_loops, representation_change
    from loopmdm.analysis.measures.stopping import stopping_frontier
    from loopmdm.analysis.report import explore

__all__ = [
    "Case",
    "attention_across_loops",
    "claims_table",
    "cut",
    "explore",
    "figures",
    "mask_attention",
    "measure",
    "nelbo_decomposition",
    "read_loops",
    "representation_change",
    "stale",
    "stopping_frontier",
    "tables",
]

_HOMES = {
    "Case": "loopmdm.analysis.measures",
    "claims_table": "loopmdm.analysis.exhibits.verdicts",
    "mask_attention": "loopmdm.analysis.measures.attention",
    "attention_across_loops": "loopmdm.analysis.measures.attention.maps",
    "cut": "loopmdm.analysis.measures.interventions",
    "explore": "loopmdm.analysis.report",
    "measure": "loopmdm.analysis.measures",
    "nelbo_decomposition": "loopmdm.analysis.measures.quality.decomposition",
    "read_loops": "loopmdm.analysis.measures.representation",
    "representation_change": "loopmdm.analysis.measures.representation",
    "stale": "loopmdm.analysis.measures.interventions",
    "stopping_frontier": "loopmdm.analysis.measures.stopping",
}

_MODULES = {"figures": "loopmdm.analysis.exhibits", "tables": "loopmdm.analysis.exhibits.tables"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    return moved(__name__, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
