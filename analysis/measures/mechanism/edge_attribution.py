"""What every edge of every loop carries, to first order, from one backward pass.

With g_q the gradient of the answer's difference (true less wrong logit) at z_q, what the heads give at q:

    carried(q, k) = - A_qk (v'_k - v_k).g_q  -  A_qk c q.(k'_k - k_k) (v_k - z_q).g_q

the value part and, through the softmax, the score part; summed over heads and looped layers of a loop. It is the
derivative of patching one edge of one layer in the step from clean to corrupted messages (Nanda 2023, "Attribution
patching"; Syed et al. 2023, "Attribution patching outperforms automated circuit discovery"). So sums over edges
add up, which patched effects need not: with several looped layers a later layer's patched edge hides what an
earlier one did to its key. What saturates (an attention that flips) it misses, too: `edge_effects` gives both.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.analysis.measures.interventions.places import applications
from loopmdm.analysis.measures.mechanism.edges import EdgeStudy
from loopmdm.model.precision import wide

LEAVES = {"q": "rot_q", "pattern": "pattern", "z": "z"}


def edge_attribution(study: EdgeStudy) -> Iterator[tuple[int, Float[Tensor, "batch head query key"]]]:
    """(loop, what its edges carried, nats of `difference` a sequence), loop by loop; above 0 for the truth.

    Looped layers are summed, heads are not. The graph of one run is held meanwhile, as in any backward pass.
    """
    heard = _backward(study)
    for loop in range(study.n_loops):
        layers = [_carried(study, place, heard[place]) for place in heard if place[0] == loop]
        yield loop, torch.stack(layers).sum(0)


def _backward(study: EdgeStudy) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Queries, patterns, z and the gradient at z of every application."""
    m, heard = study.m, {}

    def keep(name: str) -> Any:
        def hear(x: Tensor, hook: Any) -> None:
            heard.setdefault((hook.loop(), hook.layer()), {})[name] = x

        hear.hears_last = True  # pyright: ignore[reportFunctionMemberAccess]
        return hear

    def start(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return x.detach().requires_grad_()  # weights may be frozen

    hooks: list = [(applications(m.cfg, None, None, leaf), keep(name)) for name, leaf in LEAVES.items()]
    with torch.enable_grad(), m.attention_path("eager"), m.hooks([*hooks, ("loop.0.hook_in", start)]):
        state, context = study.clean.states[0], study.clean.context
        for loop in range(study.n_loops):
            state = m.loop(state, context, loop)
        logits = m.readout(state, context, rows=study.asked.rows)
        total = study.asked.by_sequence(study.asked.difference(logits)).nansum()
        places = list(heard)
        gradients = torch.autograd.grad(total, [heard[place]["z"] for place in places])
    for place, gradient in zip(places, gradients, strict=True):
        heard[place] = {name: x.detach() for name, x in heard[place].items()} | {"gradient": gradient}
    return heard


@torch.no_grad()
def _carried(study: EdgeStudy, place: tuple[int, int], heard: dict[str, Tensor]) -> Tensor:
    """[batch, head, query, key] of one application."""
    clean, other = study.clean.messages, study.corrupt.messages
    query, pattern, z, gradient = (wide(heard[name]) for name in ("q", "pattern", "z", "gradient"))
    value, key = wide(clean.values[place]), wide(clean.keys[place])
    told = torch.einsum("bkhd,bqhd->bhqk", wide(other.values[place]) - value, gradient)
    score = clean.scale[place[1]] * torch.einsum("bqhd,bkhd->bhqk", query, wide(other.keys[place]) - key)
    pull = torch.einsum("bkhd,bqhd->bhqk", value, gradient) - (z * gradient).sum(-1).transpose(1, 2)[..., None]
    return -pattern * (told + score * pull)
