"""A trajectory of states: H(-1) = prelude output, H(i) = state after loop i, one batch at a time.

What all measures of the representation share: the way along the loops, the two token groups and the
checks of their input. It holds the state of one loop, whatever the number of loops.
"""

from collections.abc import Iterator

from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.analysis.watch.groups import TOKEN_GROUPS, members
from loopmdm.model.context import Context
from loopmdm.model.errors import check_count
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.hooks.scopes import AttnPath
from loopmdm.model.layout import By, asked
from loopmdm.model.precision import wide
from loopmdm.model.sequences import MaskedBatch


def check_loops(m: HookedLoopMDM, n_loops: int | None) -> int:
    """The number of loops meant (default S_max)."""
    return check_count("n_loops", m.cfg.max_loops if n_loops is None else n_loops)


def token_groups(m: HookedLoopMDM, b: MaskedBatch, by: By = "holds") -> dict[str, Bool[Tensor, "batch pos"]]:
    """Real positions that hold (or predict) [MASK] and those that hold (or predict) a token."""
    found = members(*asked(m.cfg.hidden(b.tokens), b.real, by))
    return {group: found[group] for group in TOKEN_GROUPS}


def group_mean(values: Float[Tensor, "batch pos"], member: Bool[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
    """Mean over a sequence's members; NaN where it has none."""
    return values.masked_fill(~member, 0.0).sum(-1) / member.sum(-1)


def row_mean(values: Float[Tensor, " row"], member: Bool[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
    """As `group_mean`, for values of the members only, in reading order."""
    owner = member.nonzero()[:, 0]
    return values.new_zeros(len(member)).index_add(0, owner, values) / member.sum(-1)


def trajectory(
    m: HookedLoopMDM, b: MaskedBatch, n_loops: int, attn_path: AttnPath = "auto"
) -> Iterator[tuple[int, Float[Tensor, "batch pos d_model"], Context]]:
    """(-1, H(-1), context), (0, H(0), context), .. with the model's hooks, states in float32 or wider."""
    caught: list[Tensor] = []
    with m.hooks([("loop.0.hook_in", lambda x, hook: caught.append(wide(x).clone()))]):  # noqa: ARG005
        for loop, (state, context) in enumerate(m.states(b.tokens, n_loops, b.attention_mask, attn_path)):
            if loop == 0:
                yield -1, caught.pop(), context
            yield loop, wide(state), context
