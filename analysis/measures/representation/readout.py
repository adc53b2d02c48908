"""What each loop would answer: a lens' read-out after every loop, position by position."""

import pandas as pd
import torch
from torch import Tensor

from loopmdm.analysis.measures.representation.lenses import check_lens, read, readout_metrics
from loopmdm.analysis.watch.states import check_loops
from loopmdm.model.errors import UsageError, check_model
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch, as_batch
from loopmdm.model.stopping.rules import Lens


class LoopReadout(pd.DataFrame):
    """A DataFrame of read-outs by position and loop, whose `plot` shows them as a table of tokens."""

    def plot(self, sequence: int = 0, masked_only: bool = True, ax=None, **kws):
        """Positions x loops, shaded by p(true), flips of the best token outlined; Axes; `kws` go to imshow."""
        from loopmdm.analysis.plots.representation import plot_read_loops

        if not (self["sequence"] == sequence).any():
            raise UsageError(f"sequence {sequence} is not among the {self['sequence'].nunique()} that were read")
        return plot_read_loops(self, sequence=sequence, masked_only=masked_only, ax=ax, **kws)


@torch.no_grad()
def read_loops(m: HookedLoopMDM, b: MaskedBatch, n_loops: int | None = None, lens: Lens = "coda") -> LoopReadout:
    """What each loop would answer at every position, through the coda or, lens "direct", from the state itself.

    Columns: sequence position loop masked true top1 (token pieces, ids without a tokenizer) true_id
    top1_id p_top1 p_true entropy (nats) correct flipped (best token differs from the loop before) lens.
    UsageError where nobody knows what is hidden; `explore(cache)` shows what loops answer without it.

    >>> _ = lm.read_loops(m, b, n_loops=4).plot()
    """
    check_model(m, "read_loops")
    b, n_loops = as_batch("read_loops", b), check_loops(m, n_loops)
    check_lens(lens)
    real = b.real
    sequence, position = (index.cpu() for index in torch.nonzero(real, as_tuple=True))
    clean, frames, before = b.truth("read_loops")[real], [], None
    for loop, (state, context) in enumerate(m.states(b.tokens, n_loops, b.attention_mask)):
        log_probs = read(m, state, context, lens, real)
        metrics = readout_metrics(log_probs, None, clean)
        best, top = log_probs.max(-1)
        columns = {
            "sequence": sequence,
            "position": position,
            "loop": loop,
            "masked": b.masked[real],
            "true_id": clean,
            "top1_id": top,
            "p_top1": best.exp(),
            "p_true": metrics["p_true"],
            "entropy": metrics["entropy"],
            "correct": top == clean,
            "flipped": torch.zeros_like(top, dtype=torch.bool) if before is None else top != before,
        }
        frames.append(pd.DataFrame({k: v.cpu() if isinstance(v, Tensor) else v for k, v in columns.items()}))
        before = top
    frame = pd.concat(frames, ignore_index=True)
    for name in ("true", "top1"):
        frame.insert(4, name, _pieces(m, frame[f"{name}_id"]))
    return LoopReadout(frame.assign(lens=lens).sort_values(["sequence", "position", "loop"], ignore_index=True))


def _pieces(m: HookedLoopMDM, ids: pd.Series) -> pd.Series:
    """Token pieces of ids, or the ids as text without a tokenizer."""
    distinct = [int(token) for token in ids.unique()]
    names = [str(token) for token in distinct] if m.tokenizer is None else m.to_str_tokens(distinct)
    return ids.map(dict(zip(distinct, names, strict=True)))
