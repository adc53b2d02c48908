"""Windows that walk over documents longer than the context, scoring every token once."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopmdm.model.corpora.ids import IdLists, id_lists
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.sequences import Sequences


@dataclass(frozen=True)
class Windows:
    """`tokens`, `scored` and `real` are [window, pos]; `owners` [window] numbers the documents."""

    tokens: Int[Tensor, "window pos"]
    scored: Bool[Tensor, "window pos"]
    real: Bool[Tensor, "window pos"]
    owners: Int[np.ndarray, " window"]

    @property
    def sequences(self) -> Sequences:
        """The windows as sequences, a cluster a document."""
        return Sequences.of(self.tokens, self.scored, self.real, self.owners)


def sliding_windows(documents: IdLists, length: int, stride: int) -> Windows:
    """Windows of `length` tokens whose ends advance by `stride`; each scores what no earlier one did.

    The first window of a document scores all its tokens; the last ends where the document ends. Only a
    document shorter than `length` is padded.
    """
    check_count("length", length)
    if check_count("stride", stride) > length:
        raise UsageError(f"stride {stride} exceeds the window of {length} tokens; some would never be scored")
    rows = []
    for owner, ids in enumerate(id_lists("documents", documents)):
        ends = [*range(min(length, len(ids)), len(ids), stride), len(ids)] if len(ids) else []
        done = 0
        for end in ends:
            start = max(0, end - length)
            rows.append((owner, ids[start:end], done - start))
            done = end
    if not rows:
        raise UsageError("the documents hold no tokens")
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    real, scored = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    for row, (_, ids, first) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        real[row, : len(ids)] = True
        scored[row, first : len(ids)] = True
    return Windows(tokens, scored, real, np.array([owner for owner, _, _ in rows]))
