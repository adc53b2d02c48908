"""Antibody chains to measure antibody models on: sampled by `antiberty`, taken from nobody and no database.

What stands in antibodies.tsv are samples of a model, not natural chains: likelihoods on them say how models of
antibodies differ, not how well any of them knows nature, and antiberty's own is that of its own samples. A chain
is drawn residue by residue, the surest position first, at temperature 1, from nothing but [MASK]s; its number is
that of its sequence under seed 0. Which chain it became is the model's choice: the length only suggests it.
"""

from pathlib import Path

from loopmdm.model.errors import unknown_name

FILE = Path(__file__).parent / "antibodies.tsv"
LENGTHS = {"antibody-heavy": 120, "antibody-light": 107}
"""Residues of a chain, by the task that the chains serve."""


def chains(task: str) -> list[str]:
    """All chains of a task, in the order of their numbers."""
    if task not in LENGTHS:
        raise unknown_name("antibody task", task, LENGTHS)
    rows = [line.split("\t") for line in FILE.read_text(encoding="utf-8").splitlines()[1:]]
    return [chain for kind, _, chain in rows if kind == task]
