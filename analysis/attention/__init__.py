"""Attention between masked and clean positions: masses and what qualifies them, and maps side by side."""

from analysis.attention.maps import attention_across_loops
from analysis.attention.masses import mask_attention

__all__ = ["attention_across_loops", "mask_attention"]
