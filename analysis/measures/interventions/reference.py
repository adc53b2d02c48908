"""What stands in for what is taken away: another run's activations under the same mask, or the mean of several.

Taking a head, a layer or a state away by zeros leaves the model somewhere it has never been; what it does there
says little of what the part does. So an intervention that takes something away is told `by` what:

    "zero"                 nothing is left of it, as before
    Reference.resample     another sequence's activations at the same place (Chan et al. 2022, resample ablation)
    Reference.mean         the mean of several such (Wang et al. 2022, mean ablation)

    by = Reference.mean(m, b, n_loops=6)
    with ablate(m, heads=[2], by=by): ...
    with skip(m, layers=1, by=by), cut(m, "masked->masked", by=by): ...

A reference belongs to the batch that it was made for: sequence i stands in for sequence i of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from loopmdm.analysis.measures.interventions.values import Values, donors
from loopmdm.model.errors import UsageError, check_count, check_model
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import wide
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.sites import Site, at

LEAVES = ("v", "z", "hook_attn_out", "hook_mlp_out")
"""What interventions replace inside layers; beside them states, "hook_out" of every loop."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Activations by hook name; `n_draws` runs were averaged."""

    held: dict[str, Tensor]
    n_draws: int = 1

    @classmethod
    @torch.no_grad()
    def record(
        cls,
        m: HookedLoopMDM,
        tokens: Int[Tensor, "batch pos"],
        n_loops: int,
        attention_mask: Tensor | None = None,
        leaves: Sequence[str] = LEAVES,
    ) -> "Reference":
        """One run's own: leaves of every layer, and the state after every loop."""
        check_model(m, "Reference", hooked=True)
        held: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any) -> None:
            held[hook.name] = x.clone()

        keep.hears_last = True  # pyright: ignore[reportFunctionMemberAccess]
        with m.hooks([(at(leaf=(*leaves, "hook_out")), keep)]):
            m(tokens, n_loops=check_count("n_loops", n_loops), attention_mask=attention_mask)
        return cls(held)

    @classmethod
    def resample(cls, m: HookedLoopMDM, b: MaskedBatch, n_loops: int, seed: int = 0, draw: int = 0) -> "Reference":
        """Of one other sequence each, of another document where several share one, under the masks of `b`."""
        return cls.record(m, other_tokens(m, b, seed, draw), n_loops, b.attention_mask)

    @classmethod
    def mean(cls, m: HookedLoopMDM, b: MaskedBatch, n_loops: int, seed: int = 0, n_draws: int = 10) -> "Reference":
        """The mean over `n_draws` of them."""
        check_count("n_draws", n_draws)
        return cls.averaged(cls.resample(m, b, n_loops, seed, draw) for draw in range(n_draws))

    @classmethod
    def averaged(cls, several: Iterable["Reference"]) -> "Reference":
        """The mean of several, place by place; of an iterator no more than one and the sum are held."""
        total: dict[str, Tensor] = {}
        number, kinds = 0, {}
        for one in several:
            if total and total.keys() != one.held.keys():
                raise UsageError("a mean of references needs the same places in each; record the same loops")
            kinds = kinds or {name: x.dtype for name, x in one.held.items()}
            total = {name: total[name] + wide(x) if total else wide(x) for name, x in one.held.items()}
            number += one.n_draws
        if not number:
            raise UsageError("a mean of references needs one at least; give Reference.resample of some")
        return cls({name: (x / number).to(kinds[name]) for name, x in total.items()}, number)

    def at(self, hook: Any, like: Tensor) -> Tensor:
        """What stands in at a hook's site; UsageError where nothing was recorded, or of another batch."""
        if hook.name not in self.held:
            raise UsageError(f"the reference holds nothing at {hook.name}; record more loops, or that leaf")
        found = self.held[hook.name]
        if found.shape != like.shape:
            raise UsageError(
                f"the reference is of another batch: at {hook.name} {list(found.shape)}, here {list(like.shape)}"
            )
        return found

    @property
    def values(self) -> Values:
        """What keys hand on, as `replace_values` takes it."""
        sites = {name: Site.parse(name) for name in self.held if name.endswith("attn.hook_v")}
        places: dict[Any, Tensor] = {(site.loop, site.layer): self.held[name] for name, site in sites.items()}
        return places


By = Literal["zero"] | Reference
"""What stands in for what is taken away."""


def check_reference(by: object, plain: str = "zero") -> "Reference | None":
    """The reference, None for what the word `plain` means; UsageError for anything else."""
    if isinstance(by, Reference):
        return by
    if by != plain:
        raise UsageError(
            f'by must be "{plain}" or a Reference (Reference.mean, Reference.resample), got {by!r:.60}'
        )
    return None


def other_tokens(m: HookedLoopMDM, b: MaskedBatch, seed: int = 0, draw: int = 0) -> Int[Tensor, "batch pos"]:
    """Each sequence's tokens replaced by another one's (`donors`), hidden where it is hidden."""
    clean = b.sequences.tokens[torch.from_numpy(donors(b.sequences, seed, draw))]
    hidden = m.cfg.hidden(b.tokens)
    return torch.where(hidden, b.tokens, clean)
