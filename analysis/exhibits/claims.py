"""The figure of the claims."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure as MatplotlibFigure

from loopmdm.analysis.exhibits import (
    attention,
    causal,
    generation,
    inference,
    known,
    mechanism,
    messages,
    representation,
    stopping,
    training,
)
from loopmdm.analysis.exhibits import verdicts as claims
from loopmdm.analysis.exhibits.registry import Exhibit, Tables
from loopmdm.analysis.plots.claims import plot_claims
from loopmdm.analysis.plots.style import PAGE


def verdicts(loaded: Tables) -> MatplotlibFigure:  # noqa: ARG001 - the answers load the tables themselves
    """Every claim with its verdict by task."""
    df = claims.claims_table()
    drawn, ax = plt.subplots(figsize=(1.25 * PAGE, 0.19 * len(df) + 0.6), layout="constrained")
    plot_claims(df, ax=ax)
    return drawn


THEMES = (training, inference, generation, stopping, attention, representation, causal, known, mechanism, messages)
READ = dict.fromkeys(
    table
    for theme in THEMES
    for exhibit in theme.EXHIBITS
    for reading in exhibit.answers
    for table in reading.reads
)
"""The tables that the answers are read off."""

EXHIBITS = (
    Exhibit(
        "claims",
        "Some of the paper's claims hold here, some fail, many stay open",
        tuple(READ),
        verdicts,
        """The paper's claims put to measurements that could have said no, on our small models: verdict, estimate
        and 95%. Supported: the whole 95% interval lies beyond the margin in the claimed direction; not
        supported: on the other side; equivalent: within a stated slack of it; undecided: none of these; not
        testable here: a positive control failed, so the number says nothing. Axes: the line is the margin, right
        of it lies what is claimed; each row has its own scale, on which its interval just fits; hollow: no
        interval. Seeds: of training, of both arms where two are compared; the interval is over seeds, over test
        items or documents where there is one seed, and then the verdict is about that model alone. Estimands,
        margins, gates and falsifiers stand in figures/claims.toml, which says what was known when they were
        written; those that a declared set names are answered, on its task and once it is whole, by runs that
        were not. What is false here may be true at the paper's scale.""",
    ),
)
