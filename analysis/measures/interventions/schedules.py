"""Other orders of layers: any sequence of them. (Other cuts of a stack are `core.looping`.)

Looped layers share their weights and know nothing of the loop's number, so leaving a whole loop out *is* one loop
less, repeating it one more, and swapping two changes nothing: only parts of a loop can be skipped or swapped.
"""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from loopmdm.analysis.measures.interventions.places import several
from loopmdm.model.protocol import Core


def run_layers(
    model: Core, tokens: Int[Tensor, "batch pos"], layers: Sequence[int]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits after the physical layers `layers`, in that order, each as often as it is named."""
    order = several("layer", layers, model.cfg.n_layers)
    context = model.context(tokens)
    x = model.enter(tokens, context)
    for layer in order or ():
        x = model.layer(layer, x, context)
    return model.unembedding(x)
