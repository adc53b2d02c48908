"""Floating-point operations, counted from the shapes.

2mnk for a product of m x n and n x k; attention scores and values included; embedding look-ups and
element-wise work free; training costs 3 forwards. Agrees with torch's FlopCounterMode on the
explicit attention path.
"""

from typing import Any

from loopmdm_model.config import LoopMDMConfig


def layer_flops(cfg: LoopMDMConfig, length: int, moving: Any = None) -> Any:
    """One layer applied to one sequence of `length` tokens.

    `moving` (a number or a tensor; default all) is how many tokens are updated; held ones only give
    keys and values.
    """
    moving = length if moving is None else moving
    width = cfg.n_heads * cfg.d_head
    projections = 2 * cfg.d_model * 2 * width * (moving + length)
    attention = 2 * 2 * length * width
    mlp = 2 * cfg.d_model * cfg.d_mlp * (3 if cfg.gated_mlp else 2)
    return projections + moving * (attention + mlp)


def unembedding_flops(cfg: LoopMDMConfig, n_rows: Any) -> Any:
    """Logits of `n_rows` positions (a number or a tensor)."""
    return n_rows * 2 * cfg.d_model * cfg.d_vocab


def readout_flops(cfg: LoopMDMConfig, length: int, n_rows: Any = None, coda: bool = True) -> Any:
    """Coda and unembedding of one sequence.

    If only `n_rows` positions are read (a number or a tensor; default all) the last coda layer updates
    those alone. Without `coda` it is the unembedding only.
    """
    cost = unembedding_flops(cfg, length if n_rows is None else n_rows)
    if coda and cfg.n_coda_layers:
        cost += (cfg.n_coda_layers - 1) * layer_flops(cfg, length) + layer_flops(cfg, length, n_rows)
    return cost


def forward_flops(
    cfg: LoopMDMConfig, length: int, n_loops: float, batch: int = 1, embedding: bool = False
) -> float:
    """One forward of `batch` sequences at `n_loops` loops (an expectation E[S] may be fractional).

    With `embedding` the look-up is counted as the product of a one-hot matrix, as some do.
    """
    applications = cfg.n_prelude_layers + n_loops * cfg.n_loop_layers + cfg.n_coda_layers
    ends = (2 if embedding else 1) * unembedding_flops(cfg, length)
    return float(batch * (applications * layer_flops(cfg, length) + ends))


def training_flops(
    cfg: LoopMDMConfig, length: int, n_loops: float, batch: int = 1, embedding: bool = False
) -> float:
    """One training step: forward, and a backward of twice its cost."""
    return 3 * forward_flops(cfg, length, n_loops, batch, embedding)


def flops_per_token(cfg: LoopMDMConfig, length: int, n_loops: float) -> float:
    """Forward FLOPs per token at sequence length `length`."""
    return forward_flops(cfg, length, n_loops) / length


def applied_parameters(cfg: LoopMDMConfig, n_parameters: int, layer_parameters: int, n_loops: int) -> int:
    """Parameters counted once per application: stored + (n_loops - 1) x those of the looped layers."""
    return n_parameters + (n_loops - 1) * cfg.n_loop_layers * layer_parameters
