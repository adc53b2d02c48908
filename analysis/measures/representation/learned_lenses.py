"""Lenses that are learned: an affine map a loop from its state to the final one, then final norm and unembedding.

    log p_i = log softmax unembedding(A_i H(i) + b_i)

    tuned      A_i, b_i minimise KL(final read-out || p_i) at hidden positions of validation sequences, from the
               identity (Belrose et al. 2023, arXiv 2303.08112)
    jacobian   A_i = E[d h(end) / d H(i)] at the same position, h(end) the state before the final norm, b_i so that
               means map to means: what is left of the computation, linearised, nothing being fitted to its answers

A_i = 1, b_i = 0 is the direct lens. A learned lens belongs to the weights, the number of loops and the mask ratio
that it was made with; of other weights it is refused.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loopmdm.analysis.activations.identity import Identity
from loopmdm.analysis.measures.representation.lenses import LEARNED
from loopmdm.model.errors import UsageError, check_count, check_word
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.checkpoints import write_tensors
from loopmdm.model.precision import check_logits, wide

RECORD = "lens"
"""Where a file's header has the record."""


@dataclass(frozen=True, eq=False)
class LearnedLens:
    """A map a loop: `weight` [loop, d_model, d_model] and `bias` [loop, d_model], float32.

    `kind` is "tuned" or "jacobian". `record` says of what it is (`model`, the fields of its `Identity`) and how it
    came about: `n_loops`, `mask_ratio`, `n_rows`, and of tuned ones `steps`, `seed`, `loss` (held-out KL, nats, by
    loop).
    """

    kind: str
    weight: Float[Tensor, "loop d_model d_model"]
    bias: Float[Tensor, "loop d_model"]
    record: dict[str, Any]

    def __post_init__(self):
        """A known kind, and one shape."""
        check_word("kind of lens", self.kind, LEARNED)
        assert self.weight.shape == (*self.bias.shape, self.bias.shape[-1])

    @property
    def n_loops(self) -> int:
        """How many loops it reads."""
        return len(self.bias)

    def translate(self, state: Float[Tensor, "*row d_model"], loop: int) -> Float[Tensor, "*row d_model"]:
        """A_i H(i) + b_i."""
        if check_count("loop", loop, least=0) >= self.n_loops:
            raise UsageError(f"this lens reads loops 0..{self.n_loops - 1}, not {loop}; fit one with more n_loops")
        return torch.addmm(
            self.bias[loop].to(state.device), wide(state).flatten(0, -2), self.weight[loop].to(state.device).T
        ).view(state.shape)

    def read(
        self,
        m: HookedLoopMDM,
        state: Float[Tensor, "batch pos d_model"],
        loop: int,
        rows: Bool[Tensor, "batch pos"],
    ) -> Float[Tensor, "row d_vocab"]:
        """Log-probabilities at `rows`, in reading order, as `lenses.read`; `check` asks for the model."""
        if not bool(rows.any()):
            return torch.zeros(0, m.cfg.d_vocab, device=state.device)
        logits = m.model.unembedding(self.translate(state, loop).to(m.model.dtype), rows=rows)
        check_logits(logits)
        return wide(logits).log_softmax(-1)

    def check(self, m: HookedLoopMDM) -> "LearnedLens":
        """Itself; UsageError unless it was made of these weights."""
        try:
            made_of = Identity(**self.record["model"])
        except (KeyError, TypeError):
            raise UsageError(f"this {self.kind} lens does not say which model it is of; fit it anew") from None
        made_of.check(m, f"this {self.kind} lens")
        return self

    def save(self, path: Path | str) -> None:
        """Write it as safetensors with its record, whole or not at all."""
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        write_tensors(Path(path), tensors, {RECORD: json.dumps({"kind": self.kind} | self.record)})

    @classmethod
    def load(cls, path: Path | str, m: HookedLoopMDM) -> "LearnedLens":
        """Read it for `m`; UsageError for a damaged file, and for the lens of other weights."""
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads((file.metadata() or {})[RECORD])
                weight, bias = (file.get_tensor(name) for name in ("weight", "bias"))
            if weight.shape != (*bias.shape, m.cfg.d_model) or bias.ndim != 2:
                raise UsageError(f"{path} is a lens of d_model {bias.shape[-1]}, the model's is {m.cfg.d_model}")
            return cls(record.pop("kind"), weight, bias, record).check(m)
        except FileNotFoundError:
            raise UsageError(f"{path} is no file; fit a lens and save it there") from None
        except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise UsageError(f"{path} is no learned lens ({error}); fit one and save it again") from None
