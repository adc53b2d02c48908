"""What each loop would answer: the coda's read-out after every loop, position by position."""

import pandas as pd
import torch
from torch import Tensor

from analysis.representation.change import readout_metrics
from loopmdm_model.errors import UsageError, check_count
from loopmdm_model.hooked import HookedLoopMDM
from loopmdm_model.masking import MaskedBatch


class LoopReadout(pd.DataFrame):
    """A DataFrame of read-outs by position and loop, whose `plot` shows them as a table of tokens."""

    def plot(self, sequence: int = 0, masked_only: bool = True, ax=None):
        """Positions x loops, coloured by p(true), flips of the best token outlined; returns Axes."""
        from analysis.plots.representation import plot_read_loops

        return plot_read_loops(self, sequence=sequence, masked_only=masked_only, ax=ax)


@torch.no_grad()
def read_loops(m: HookedLoopMDM, b: MaskedBatch, n_loops: int | None = None) -> LoopReadout:
    """What the coda would answer after each loop, at every position.

    Columns: sequence position loop masked true top1 (token pieces, ids without a tokenizer) true_id
    top1_id p_top1 p_true entropy (nats) correct flipped (best token differs from the loop before).
    """
    n_loops = check_count("n_loops", m.cfg.max_loops if n_loops is None else n_loops)
    if not isinstance(b, MaskedBatch):
        raise UsageError("read_loops takes a MaskedBatch; make one with m.mask(text, ratio=.5)")
    real = torch.ones_like(b.masked) if b.attention_mask is None else b.attention_mask != 0
    sequence, position = (index.cpu() for index in torch.nonzero(real, as_tuple=True))
    frames, before = [], None
    for loop, (state, context) in enumerate(m.states(b.tokens, n_loops, b.attention_mask)):
        log_probs = m.readout(state, context).float().log_softmax(-1)
        metrics = readout_metrics(log_probs, None, b.clean)
        best, top = log_probs.max(-1)
        columns = {
            "sequence": sequence,
            "position": position,
            "loop": loop,
            "masked": b.masked[real],
            "true_id": b.clean[real],
            "top1_id": top[real],
            "p_top1": best[real].exp(),
            "p_true": metrics["p_true"][real],
            "entropy": metrics["entropy"][real],
            "correct": top[real] == b.clean[real],
            "flipped": torch.zeros_like(top[real], dtype=torch.bool) if before is None else (top != before)[real],
        }
        frames.append(pd.DataFrame({k: v.cpu() if isinstance(v, Tensor) else v for k, v in columns.items()}))
        before = top
    frame = pd.concat(frames, ignore_index=True)
    for name in ("true", "top1"):
        frame.insert(4, name, _pieces(m, frame[f"{name}_id"]))
    return LoopReadout(frame.sort_values(["sequence", "position", "loop"], ignore_index=True))


def _pieces(m: HookedLoopMDM, ids: pd.Series) -> pd.Series:
    """Token pieces of ids, or the ids as text without a tokenizer."""
    distinct = [int(token) for token in ids.unique()]
    names = [str(token) for token in distinct] if m.tokenizer is None else m.to_str_tokens(distinct)
    return ids.map(dict(zip(distinct, names, strict=True)))
