"""Direct logit attribution: what every write to the residual stream adds to the logit difference true - wrong.

The stream is a sum of writes, H(S-1) = sum of w over the embedding, heads, attention biases and MLPs of prelude
and loops, to which the coda adds its own. The difference f of a sequence (`Contrast`, mean over its rows) is taken
apart in three ways, each of which sums to f:

    direct   w . C(weight x (W_U[true] - W_U[wrong])) / scale     the final norm frozen at its scale in this run;
             C takes the mean away where the norm is centred. Coda writes included, biases are a part
    linear   w . g with g = df / dH(S-1) at all positions         what the coda makes of w, linearised where the
             run stands: the norm moves with the stream. "rest" is f - g . H(S-1)
    exact    f(H(S-1)) - f(H(S-1) - w)                            w left out, the coda run again; "interaction" is
             f less the sum of these

Without a coda "direct" and "linear" differ by the final norm alone: a norm does not change with the length of its
input, so "linear" sums to almost nothing and its rest is f. Sources: Elhage et al. 2021; for differences Wang et
al. 2022 (arXiv 2211.00593).
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.mechanism.contrast import Contrast, best_wrong, questions
from loopmdm.analysis.measures.mechanism.writes import Part, Writes, need_writes
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.states import check_loops
from loopmdm.model.context import Context
from loopmdm.model.errors import UsageError, check_count, check_model, check_word
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import check_logits, wide
from loopmdm.model.sequences import MaskedBatch, as_batch
from loopmdm.model.sites import at

Read = Literal["direct", "linear", "exact"]
READS: tuple[Read, ...] = get_args(Read)
NAME = "logit-attribution"
CLOSES = 1e3
"""Rounding steps, of the sum of all parts' sizes, by which the parts of "direct" may miss the difference."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """`difference` [batch], and by read and part its shares [batch], nats; NaN where nothing is asked."""

    m: HookedLoopMDM
    difference: np.ndarray
    parts: dict[tuple[str, Part], np.ndarray]
    clusters: np.ndarray | None = None

    def __post_init__(self):
        """The parts of "direct" sum to the difference, or more than layers' sums touches the stream."""
        shares = [values for (read, _), values in self.parts.items() if read == "direct"]
        if not shares:
            return
        off = np.abs(np.sum(shares, axis=0) - self.difference)
        allowed = CLOSES * torch.finfo(self.m.model.dtype).eps * np.abs(shares).sum(axis=0)
        if (off > allowed).any():
            raise UsageError(
                f"{NAME}: what layers write does not sum to the logits, off by up to {np.nanmax(off):.2g} nats; "
                'the model does more to its stream than its facts say: ask for reads=("linear", "exact")'
            )

    def frame(self) -> pd.DataFrame:
        """A row a read and part: read part segment loop layer head value standard_error n; difference.

        `value` is the mean over sequences, nats; `difference` that of the whole: a read's values sum to it.
        """
        whole, _, _ = stats.mean_and_error(self.difference, self.clusters)
        rows = []
        for (read, part), values in self.parts.items():
            mean, error, n = stats.mean_and_error(values, self.clusters)
            rows.append(self._place(read, part) | {"value": float(mean), "standard_error": float(error),
                                                   "n": int(n), "difference": float(whole)})  # fmt: skip
        frame = pd.DataFrame(rows)
        return frame.astype(dict.fromkeys(("loop", "layer", "head"), "Int64"))

    def _place(self, read: str, part: Part) -> dict[str, Any]:
        segment = None if part.layer is None else self.m.cfg.segment(part.layer)
        return {"read": read, "part": part.kind, "segment": segment, "loop": part.loop, "layer": part.layer,
                "head": part.head}  # fmt: skip


def attribute(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    *,
    reads: Iterable[str] = READS,
    asked: Contrast | None = None,
    batch_size: int = 64,
) -> Attribution:
    """The parts of every sequence's difference at n_loops (default S_max).

    `asked`: rows and tokens of the batch as given; default: the true token against the best wrong one at all rows
    of `questions`. "direct" is left out with a warning where more than a norm and a linear map leads to logits.
    UsageError for models whose stream is no sum, or whose first state is drawn.
    """
    check_model(m, NAME, hooked=True)
    m.facts.need("additive", "fixed_start", by=NAME)
    b, n_loops = questions(NAME, m, b), check_loops(m, n_loops)
    need_writes(m, NAME)
    if asked is not None and asked.rows.shape != b.tokens.shape:
        raise UsageError(f"{NAME}: asked has rows {list(asked.rows.shape)}, the batch {list(b.tokens.shape)}")
    chosen = _readable(m, reads)
    found: dict[tuple[str, Part], list[Tensor]] = {}
    whole: list[Tensor] = []
    for start, part in b.batches(batch_size):
        run = _Run.of(m, part, n_loops, None if asked is None else asked.of(slice(start, start + len(part))))
        whole.append(run.by_sequence(run.difference))
        for read, write, values in run.shares(chosen):
            found.setdefault((read, write), []).append(values)
    parts = {key: torch.cat(values).double().cpu().numpy() for key, values in found.items()}
    return Attribution(m, torch.cat(whole).double().cpu().numpy(), parts, b.clusters)


def logit_attribution(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    *,
    reads: Iterable[str] = READS,
    n_exact: int = 32,
) -> pd.DataFrame:
    """`attribute` as a frame: mean and error over sequences or documents (`Attribution.frame`), with mask_ratio.

    "exact" runs the coda once a part, so it is asked of `n_exact` sequences, evenly spread.

    >>> df = lm.logit_attribution(m, b, n_loops=2, reads=("direct",))
    >>> sorted(df["part"].unique())
    ['bias', 'embed', 'head', 'mlp']
    """
    wanted, few = list(reads), check_count("n_exact", n_exact)
    frames, cheap = [], [read for read in wanted if read != "exact"]
    if cheap or not wanted:
        frames.append(attribute(m, b, n_loops, reads=cheap).frame())
    if "exact" in wanted:
        spread = torch.linspace(0, len(b) - 1, min(few, len(b))).long()
        frames.append(attribute(m, as_batch(NAME, b).rows(spread), n_loops, reads=["exact"]).frame())
    return pd.concat(frames, ignore_index=True).assign(mask_ratio=b.mask_ratio)


def _readable(m: HookedLoopMDM, reads: Iterable[str]) -> list[str]:
    """Those that are asked for and can be had."""
    wanted = list(reads)
    for read in wanted:
        check_word("reads", read, READS)
    if not wanted:
        raise UsageError(f"reads is empty; name some of {', '.join(READS)}")
    if "direct" in wanted:
        try:
            m.model.readout_weights()
        except UsageError as error:
            wanted = [read for read in wanted if read != "direct"]
            if not wanted:
                raise  # nothing else is asked for
            warnings.warn(f'{NAME}: "direct" is left out: {error}', stacklevel=3)
    return wanted


@dataclass
class _Run:
    """One batch read once: its writes, H(S-1), and the difference as a function of it."""

    m: HookedLoopMDM
    asked: Contrast
    context: Context
    state: Float[Tensor, "batch pos d_model"]
    difference: Float[Tensor, " row"]
    gradient: Float[Tensor, "batch pos d_model"]
    final: Float[Tensor, "batch pos d_model"]
    writes: Writes

    @classmethod
    def of(cls, m: HookedLoopMDM, b: MaskedBatch, n_loops: int, asked: Contrast | None) -> "_Run":
        writes = Writes(m)
        with torch.no_grad(), m.hooks([writes.rule()]):
            *_, (state, context) = m.states(b.tokens, n_loops, b.attention_mask)
        state = state.detach().requires_grad_()
        rows = b.masked if asked is None else asked.rows
        final = {"": state.detach()}
        coda = m.cfg.layers("coda")
        ends = [writes.rule(), (at(layer=coda, leaf="hook_resid_post"), _keeper(final))] if coda else []
        with torch.enable_grad(), m.hooks(ends):  # pyright: ignore[reportArgumentType]
            logits = m.readout(state, context, rows=rows)
            check_logits(logits)
            asked = best_wrong(m, b, logits.detach(), NAME) if asked is None else asked  # empty is falsy
            difference = asked.difference(logits)
            total = (difference * asked.weights(difference.dtype)).sum()
            (gradient,) = torch.autograd.grad(total, state)
        return cls(m, asked, context, state.detach(), difference.detach(), wide(gradient), wide(final[""]), writes)

    def by_sequence(self, values: Float[Tensor, " row"]) -> Float[Tensor, " batch"]:
        return self.asked.by_sequence(values)

    def shares(self, reads: Iterable[str]) -> Iterator[tuple[str, Part, Tensor]]:
        """(read, part, [batch]) of every part of every read, what closes the sum last."""
        whole, none = self.by_sequence(self.difference), ~self.asked.rows.any(-1)
        for read in reads:
            left = whole
            for part, values in self._parts(read):
                values = values.masked_fill(none, float("nan"))
                left = left - values
                yield read, part, values
            if read != "direct":
                yield read, Part("rest" if read == "linear" else "interaction"), left

    def _parts(self, read: str) -> Iterator[tuple[Part, Float[Tensor, " batch"]]]:
        if read == "exact":
            for part, write in self.writes.vectors():
                yield part, self._left_out(write)
            return
        direction, bias = self._direct() if read == "direct" else (self.gradient, None)
        yield from self.writes.shares(direction, coda=read == "direct")
        if bias is not None:
            yield Part("bias"), self.by_sequence(bias)

    # --- what a write counts for ---

    def _direct(self) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, " row"]]:
        """The direction that each row reads, over its frozen scale, and what biases add to it."""
        norm, unembed = self.m.model.readout_weights()
        ends = torch.stack([self.asked.right, self.asked.wrong])
        one, other = wide(unembed.weight)[ends]
        apart = one - other
        x = self.final[self.asked.rows]
        x = x - x.mean(-1, keepdim=True) if norm.centred else x
        scale = (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        reading = apart * wide(norm.weight)
        reading = (reading - reading.mean(-1, keepdim=True) if norm.centred else reading) / scale
        bias = torch.zeros_like(apart[:, 0])
        if norm.bias is not None:
            bias = apart @ wide(norm.bias)
        if unembed.bias is not None:
            first, second = wide(unembed.bias)[ends]
            bias = bias + first - second
        direction = torch.zeros_like(self.final)
        direction[self.asked.rows] = reading * self.asked.weights(reading.dtype)[:, None]
        return direction.detach(), bias.detach()

    @torch.no_grad()
    def _left_out(self, write: Tensor) -> Float[Tensor, " batch"]:
        state = self.state - write.to(self.state.dtype)
        logits = self.m.readout(state, self.context, rows=self.asked.rows)
        return self.by_sequence(self.difference - self.asked.difference(logits))


def _keeper(store: dict[str, Tensor]) -> Any:
    def keep(x: Tensor, hook: Any) -> None:  # noqa: ARG001
        store[""] = x.detach()

    return keep


def run(case: Case, b: MaskedBatch, reads: tuple[str, ...] = READS, n_exact: int = 32) -> pd.DataFrame:
    """Writes' shares of the logit difference on a masked batch."""
    return logit_attribution(case.m, b, case.n_loops, reads=reads, n_exact=n_exact)


MEASURES = (
    Measure(
        NAME,
        "what each head and MLP of each loop adds to the logit difference true - best wrong token",
        run,
        needs=("additive", "fixed_start"),
        groupless=run,
    ),
)
