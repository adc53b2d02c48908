"""Attention between masked and clean positions: masses and what qualifies them, and maps side by side.

`mask_attention` masses, chance, lift, log-odds, content · `attention_shape` entropy, distance, concentration ·
`attention_change` maps between loops · `sink_attention` sinks as a group · `attention_toggle` one key masked
or clean · `head_growth`, `effect_tests` heads that turn to masked keys, tested · `specification_curve` the claim
under every definition · `attention_survey` several in one forward · `attention_across_loops` maps to look at.
"""

from loopmdm.analysis.measures.attention.change import ChangeSums, attention_change
from loopmdm.analysis.measures.attention.heads import effect_tests, head_growth
from loopmdm.analysis.measures.attention.maps import attention_across_loops
from loopmdm.analysis.measures.attention.masses import LOG_ODDS_CAP, AttentionSums, mask_attention, no_groups
from loopmdm.analysis.measures.attention.shape import ShapeSums, attention_shape
from loopmdm.analysis.measures.attention.sinks import received_attention, sink_attention
from loopmdm.analysis.measures.attention.specification import specification_curve
from loopmdm.analysis.measures.attention.survey import attention_survey
from loopmdm.analysis.measures.attention.toggle import ToggleSums, attention_toggle

__all__ = [
    "LOG_ODDS_CAP",
    "AttentionSums",
    "ChangeSums",
    "ShapeSums",
    "ToggleSums",
    "attention_across_loops",
    "attention_change",
    "attention_shape",
    "attention_survey",
    "attention_toggle",
    "effect_tests",
    "head_growth",
    "mask_attention",
    "no_groups",
    "received_attention",
    "sink_attention",
    "specification_curve",
]
