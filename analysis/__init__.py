"""Measures of looped masked-diffusion models: torch in, tidy DataFrames out, plots and figures on top.

Names are loaded on first use, so that drawing from tables does not load the models.
"""

from typing import TYPE_CHECKING, Any

from loopmdm.folders import hand_over, named

hand_over(__name__)

if TYPE_CHECKING:
    from loopmdm.analysis import exhibits as figures
    from loopmdm.analysis.activations import ActivationStore, record
    from loopmdm.analysis.exhibits import tables
    from loopmdm.analysis.exhibits.verdicts import claims_table
    from loopmdm.analysis.measures import Case, measure
    from loopmdm.analysis.measures.attention import attention_across_loops, mask_attention
    from loopmdm.analysis.measures.attention.cards import head_cards
    from loopmdm.analysis.measures.compare import compare
    from loopmdm.analysis.measures.interventions import (
        Reference,
        ablate,
        cut,
        damp,
        freeze,
        patch,
        skip,
        stale,
    )
    from loopmdm.analysis.measures.known.candidates import candidates
    from loopmdm.analysis.measures.known.example_board import example_board
    from loopmdm.analysis.measures.mechanism.attribution import logit_attribution
    from loopmdm.analysis.measures.mechanism.attribution_patching import attribution_patching
    from loopmdm.analysis.measures.mechanism.corruption import corrupted
    from loopmdm.analysis.measures.mechanism.dictionaries import Dictionary, train_dictionary
    from loopmdm.analysis.measures.mechanism.edge_effects import edge_effects
    from loopmdm.analysis.measures.mechanism.edge_paths import path_patching
    from loopmdm.analysis.measures.mechanism.patching import activation_patching
    from loopmdm.analysis.measures.mechanism.probes import probe
    from loopmdm.analysis.measures.mechanism.steering import steer
    from loopmdm.analysis.measures.quality.decomposition import nelbo_decomposition
    from loopmdm.analysis.measures.representation import read_loops, representation_change
    from loopmdm.analysis.measures.representation.gain import perturbation_gain
    from loopmdm.analysis.measures.stopping import stopping_frontier
    from loopmdm.analysis.measures.twins import untrained
    from loopmdm.analysis.numbers.reading import by_loop
    from loopmdm.analysis.report import explore

__all__ = [
    "ActivationStore",
    "Case",
    "Dictionary",
    "Reference",
    "ablate",
    "activation_patching",
    "attention_across_loops",
    "attribution_patching",
    "by_loop",
    "candidates",
    "claims_table",
    "compare",
    "corrupted",
    "cut",
    "damp",
    "edge_effects",
    "example_board",
    "explore",
    "figures",
    "freeze",
    "head_cards",
    "logit_attribution",
    "mask_attention",
    "measure",
    "nelbo_decomposition",
    "patch",
    "path_patching",
    "perturbation_gain",
    "probe",
    "read_loops",
    "record",
    "representation_change",
    "skip",
    "stale",
    "steer",
    "stopping_frontier",
    "tables",
    "train_dictionary",
    "untrained",
]

_HOMES = {
    "ActivationStore": "loopmdm.analysis.activations",
    "Case": "loopmdm.analysis.measures",
    "Dictionary": "loopmdm.analysis.measures.mechanism.dictionaries",
    "Reference": "loopmdm.analysis.measures.interventions",
    "ablate": "loopmdm.analysis.measures.interventions",
    "activation_patching": "loopmdm.analysis.measures.mechanism.patching",
    "attention_across_loops": "loopmdm.analysis.measures.attention.maps",
    "attribution_patching": "loopmdm.analysis.measures.mechanism.attribution_patching",
    "by_loop": "loopmdm.analysis.numbers.reading",
    "candidates": "loopmdm.analysis.measures.known.candidates",
    "claims_table": "loopmdm.analysis.exhibits.verdicts",
    "compare": "loopmdm.analysis.measures.compare",
    "corrupted": "loopmdm.analysis.measures.mechanism.corruption",
    "cut": "loopmdm.analysis.measures.interventions",
    "damp": "loopmdm.analysis.measures.interventions",
    "edge_effects": "loopmdm.analysis.measures.mechanism.edge_effects",
    "example_board": "loopmdm.analysis.measures.known.example_board",
    "explore": "loopmdm.analysis.report",
    "freeze": "loopmdm.analysis.measures.interventions",
    "head_cards": "loopmdm.analysis.measures.attention.cards",
    "logit_attribution": "loopmdm.analysis.measures.mechanism.attribution",
    "mask_attention": "loopmdm.analysis.measures.attention",
    "measure": "loopmdm.analysis.measures",
    "nelbo_decomposition": "loopmdm.analysis.measures.quality.decomposition",
    "patch": "loopmdm.analysis.measures.interventions",
    "path_patching": "loopmdm.analysis.measures.mechanism.edge_paths",
    "perturbation_gain": "loopmdm.analysis.measures.representation.gain",
    "probe": "loopmdm.analysis.measures.mechanism.probes",
    "read_loops": "loopmdm.analysis.measures.representation",
    "record": "loopmdm.analysis.activations",
    "representation_change": "loopmdm.analysis.measures.representation",
    "skip": "loopmdm.analysis.measures.interventions",
    "stale": "loopmdm.analysis.measures.interventions",
    "steer": "loopmdm.analysis.measures.mechanism.steering",
    "stopping_frontier": "loopmdm.analysis.measures.stopping",
    "train_dictionary": "loopmdm.analysis.measures.mechanism.dictionaries",
    "untrained": "loopmdm.analysis.measures.twins",
}


def __getattr__(name: str) -> Any:
    return named(__name__, _HOMES, name)  # `figures` and `tables`, too: modules that have moved


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
