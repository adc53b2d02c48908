"""Measures of looped masked-diffusion models: torch in, tidy DataFrames out, plots and figures on top.

Names are loaded on first use, so that drawing from tables does not load the models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis import figures
    from analysis.attention import mask_attention
    from analysis.attention.maps import attention_across_loops
    from analysis.decomposition import nelbo_decomposition
    from analysis.representation import read_loops, representation_change

__all__ = [
    "attention_across_loops",
    "figures",
    "mask_attention",
    "nelbo_decomposition",
    "read_loops",
    "representation_change",
]

_HOMES = {
    "mask_attention": "analysis.attention",
    "attention_across_loops": "analysis.attention.maps",
    "nelbo_decomposition": "analysis.decomposition",
    "read_loops": "analysis.representation",
    "representation_change": "analysis.representation",
}


def __getattr__(name: str) -> Any:
    if name == "figures":
        return import_module("analysis.figures")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
