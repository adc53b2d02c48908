"""A looped run seen as a plain deep model: virtual layers blocks.{depth}, one per application.

TransformerLens' ActivationCache asks its model for a few weights and shapes; `UnrolledModel`
answers for n_prelude + S * n_loop + n_coda virtual layers that share the looped weights.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loopmdm_model.cache import LoopCache
from loopmdm_model.errors import UsageError
from loopmdm_model.layers import Block
from loopmdm_model.model import LoopMDM
from loopmdm_model.protocol import Core
from loopmdm_model.sites import applications

if TYPE_CHECKING:
    from transformer_lens import ActivationCache


def virtual_block(block: Block) -> SimpleNamespace:
    """A block's weights under TransformerLens' names and axis orders."""
    heads = (block.attn.n_heads, block.attn.d_head)
    zero = block.ln1.weight.new_zeros(block.ln1.weight.shape)
    attention = SimpleNamespace(
        W_O=block.attn.out.weight.T.unflatten(0, heads),
        b_O=zero if block.attn.out.bias is None else block.attn.out.bias,
    )
    out = block.mlp.out
    mlp = SimpleNamespace(W_out=out.weight.T, b_out=zero if out.bias is None else out.bias)
    return SimpleNamespace(attn=attention, mlp=mlp, ln1=block.ln1, ln2=block.ln2)


@dataclass
class UnrolledModel:
    """What ActivationCache needs of a model, for `n_loops` loops unrolled."""

    model: LoopMDM
    n_loops: int

    def __post_init__(self):
        """Lay out the virtual layers."""
        cfg = self.model.cfg
        layers = [layer for _, layer in applications(cfg, self.n_loops)]
        self.blocks = [virtual_block(self.model.get_submodule(f"blocks.{layer}")) for layer in layers]  # pyright: ignore[reportArgumentType]
        shapes = {name: getattr(cfg, name) for name in ("d_model", "n_heads", "d_head", "d_mlp", "d_vocab")}
        self.cfg = SimpleNamespace(
            **shapes,
            n_layers=len(layers),
            attn_only=False,
            normalization_type=cfg.normalization_type,
            positional_embedding_type="rotary",
            final_rms=False,
            device=self.W_U.device,
        )
        self.ln_final = self.model.ln_final

    @property
    def W_U(self) -> Tensor:
        """Unembedding [d_model, d_vocab]."""
        return self.model.unembed.weight.T

    @property
    def b_U(self) -> Tensor:
        """Unembedding bias [d_vocab]."""
        bias = self.model.unembed.bias
        return self.W_U.new_zeros(self.W_U.shape[1]) if bias is None else bias

    def tokens_to_residual_directions(self, tokens: Tensor) -> Tensor:
        """Directions [..., d_model] of token ids in the normalised stream: W_U with the final norm's weight.

        ActivationCache only centres and scales its components, so the weight belongs here; the norm's
        bias and b_U are constants beside the attributions.
        """
        return self.W_U.T[torch.as_tensor(tokens)] * self.model.ln_final.weight

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Tensor:
        """Sum of the output biases up to virtual `layer`."""
        total = torch.zeros_like(self.model.ln_final.weight)
        for block in self.blocks[:layer]:
            total = total + block.attn.b_O + (block.mlp.b_out if include_mlp_biases else 0)
        return total + self.blocks[layer].attn.b_O if mlp_input else total


def unroll(model: Core, cache: LoopCache) -> "ActivationCache":
    """The cache under virtual names blocks.{depth}.<leaf>; outer names stay."""
    from transformer_lens import ActivationCache

    if not isinstance(model, LoopMDM):
        raise UsageError(
            f"unrolled() needs the weights of a LoopMDM, got {type(model).__name__}; use the loop names"
        )
    virtual = {name: value for name, value in cache.items() if not name.startswith(("blocks.", "loop."))}
    for depth, (prefix, _) in enumerate(applications(model.cfg, cache.n_loops)):
        for name, value in cache.items():
            if name.startswith(prefix):
                virtual[f"blocks.{depth}.{name.removeprefix(prefix)}"] = value
    unrolled_model = UnrolledModel(model, cache.n_loops)
    return ActivationCache(virtual, unrolled_model, has_batch_dim=cache.has_batch_dim)  # pyright: ignore[reportArgumentType]
