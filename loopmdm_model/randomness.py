"""Counter-based randomness: numbers are a function of (seed, stream, step, sequence, position).

A row of uniforms belongs to one sequence, whatever batch it sits in: sequence i of a batch equals
the same sequence alone with `first_index=i`, and padding a batch changes nothing. One Philox
generator serves thousands of sequences; its 256-bit counter is (position, sequence, step, stream).
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.model.errors import check_count, check_seed

STREAMS = {"positions": 1, "counts": 2, "order": 3, "data": 4, "loops": 5, "relabel": 6}
STREAMS |= {"reveal": 7, "tokens": 8, "times": 9, "remask": 10, "blocks": 11, "grids": 12, "dig": 13, "edges": 14}
STREAMS |= {"donors": 15, "noise": 16, "earlier": 17}


def row_uniforms(
    seed: int, stream: str, n_rows: int, width: int, first_index: int = 0, step: int = 0
) -> Float[Tensor, "row width"]:
    """Uniforms in [0, 1), float64; row r belongs to sequence first_index + r."""
    check_seed(seed)
    check_count("first_index", first_index, least=0)
    check_count("step", step, least=0, most=2**63 - 1)
    bits = np.random.Philox(key=seed)
    generator, state = np.random.Generator(bits), bits.state
    out = np.empty((n_rows, width))
    for row in range(n_rows):
        state["state"]["counter"][:] = (0, first_index + row, step, STREAMS[stream])
        bits.state = state
        generator.random(out=out[row])
    return torch.from_numpy(out)


def step_generator(seed: int, stream: str, step: int = 0) -> np.random.Generator:
    """A generator for what belongs to a whole step or draw, not to one sequence."""
    check_seed(seed)
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 2**63, step, STREAMS[stream]]))
