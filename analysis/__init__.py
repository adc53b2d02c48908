"""Measures of looped masked-diffusion models: torch in, tidy DataFrames out, plots and figures on top.

Names are loaded on first use, so that drawing from tables does not load the models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis import figures
    from analysis.attention import attention_across_loops, mask_attention
    from analysis.decomposition import nelbo_decomposition
    from analysis.interventions import cut, stale
    from analysis.measures import measure
    from analysis.report import explore
    from analysis.representation import read_loops, representation_change
    from analysis.stopping import stopping_frontier

__all__ = [
    "attention_across_loops",
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
]

_HOMES = {
    "mask_attention": "analysis.attention",
    "attention_across_loops": "analysis.attention.maps",
    "cut": "analysis.interventions",
    "explore": "analysis.report",
    "measure": "analysis.measures",
    "nelbo_decomposition": "analysis.decomposition",
    "read_loops": "analysis.representation",
    "representation_change": "analysis.representation",
    "stale": "analysis.interventions",
    "stopping_frontier": "analysis.stopping",
}


def __getattr__(name: str) -> Any:
    if name == "figures":
        return import_module("analysis.figures")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
