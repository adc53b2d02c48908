"""Other orders of layers: any sequence of them, and other cuts of a stack into prelude, loop and coda.

Looped layers share their weights and know nothing of the loop's number, so leaving a whole loop out *is* one loop
less, repeating it one more, and swapping two changes nothing: only parts of a loop can be skipped or swapped.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis.interventions.places import several
from loopmdm_model.config import LoopMDMConfig
from loopmdm_model.errors import UsageError
from loopmdm_model.model import LoopMDM


def run_layers(
    model: LoopMDM, tokens: Int[Tensor, "batch pos"], layers: Sequence[int]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits after the physical layers `layers`, in that order, each as often as it is named."""
    order = several("layer", layers, model.cfg.n_layers)
    context = model.context(tokens)
    x = model.embed(tokens)
    for layer in order or ():
        x = model.blocks[layer](x, context.rotary, context.allowed[model.cfg.segment(layer)])
    return model.unembedding(x)


def resegment(model: LoopMDM, n_prelude_layers: int, n_loop_layers: int) -> LoopMDM:
    """The same weights with other layers looped: training-free looping of any stack at `n_loops` > 1.

    At n_loops = 1 it is the model it was made from (at its own n_loops = 1). Weights are shared, not copied.
    """
    n_coda_layers = model.cfg.n_layers - n_prelude_layers - n_loop_layers
    if n_loop_layers < 1 or n_prelude_layers < 0 or n_coda_layers < 0:
        raise UsageError(
            f"{n_prelude_layers} + {n_loop_layers} layers do not fit into the {model.cfg.n_layers} there are"
        )
    changed = {"n_prelude_layers": n_prelude_layers, "n_loop_layers": n_loop_layers}
    fields = model.cfg.to_dict() | changed | {"n_coda_layers": n_coda_layers, "max_loops": 1}
    with torch.device("meta"):
        other = LoopMDM(LoopMDMConfig.from_dict(fields))
    other.load_state_dict(model.state_dict(), assign=True)
    other.rotary_cos, other.rotary_sin = model.rotary_cos, model.rotary_sin
    return other.train(model.training)
