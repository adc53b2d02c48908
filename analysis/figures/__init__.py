"""The registry of figures: name -> tables, builder, caption. Batch, notebooks and tests all use it.

from analysis import figures
figures.FIGURES["mask-to-mask-by-loop"].draw(out="figures/out")
"""

from analysis.figures import adaptive, attention, causal, claims, inference, known, representation, training
from analysis.figures.entry import Figure
from loopmdm_model.errors import unknown_name

FAMILIES = {
    "claims": claims,
    "training": training,
    "inference": inference,
    "adaptive": adaptive,
    "attention": attention,
    "representation": representation,
    "causal": causal,
    "known answers": known,
}
FIGURES = {item.name: item for family in FAMILIES.values() for item in family.FIGURES}


def figure(name: str) -> Figure:
    """A figure of the registry."""
    if name not in FIGURES:
        raise unknown_name("figure", name, FIGURES)
    return FIGURES[name]
