"""Floating-point operations of whole forwards, counted from a layout's own costs.

2mnk for a product of m x n and n x k; attention scores and values included; embedding look-ups and
element-wise work free; training costs 3 forwards. Agrees with torch's FlopCounterMode on the
explicit attention path.
"""

from typing import Any

from loopmdm.model.layout import Layout


def readout_flops(cfg: Layout, length: int, n_rows: Any = None, coda: bool = True) -> Any:
    """Coda and unembedding of one sequence.

    If only `n_rows` positions are read (a number or a tensor; default all) the last coda layer updates
    those alone. Without `coda` it is the unembedding only.
    """
    cost = cfg.unembedding_flops(length if n_rows is None else n_rows)
    if coda and cfg.n_coda_layers:
        cost += (cfg.n_coda_layers - 1) * cfg.layer_flops(length) + cfg.layer_flops(length, n_rows)
    return cost


def forward_flops(cfg: Layout, length: int, n_loops: float, batch: int = 1, embedding: bool = False) -> float:
    """One forward of `batch` sequences at `n_loops` loops (an expectation E[S] may be fractional).

    With `embedding` the look-up is counted as the product of a one-hot matrix, as some do.
    """
    applications = cfg.n_prelude_layers + n_loops * cfg.n_loop_layers + cfg.n_coda_layers
    ends = (2 if embedding else 1) * cfg.unembedding_flops(length)
    return float(batch * (applications * cfg.layer_flops(length) + ends))


def training_flops(cfg: Layout, length: int, n_loops: float, batch: int = 1, embedding: bool = False) -> float:
    """One training step: forward, and a backward of twice its cost."""
    return 3 * forward_flops(cfg, length, n_loops, batch, embedding)


def flops_per_token(cfg: Layout, length: int, n_loops: float) -> float:
    """Forward FLOPs per token at sequence length `length`."""
    return forward_flops(cfg, length, n_loops) / length


def applied_parameters(cfg: Layout, n_parameters: int, layer_parameters: int, n_loops: int) -> int:
    """Parameters counted once per application: stored + (n_loops - 1) x those of the looped layers."""
    return n_parameters + (n_loops - 1) * cfg.n_loop_layers * layer_parameters
