"""How the representation changes from loop to loop, and what each loop would answer."""

from analysis.representation.change import representation_change
from analysis.representation.readout import LoopReadout, read_loops

__all__ = ["LoopReadout", "read_loops", "representation_change"]
