"""Weights as TransformerLens shows them: its names, its axis orders, the norms folded in.

    norm(x) = n(x) * w + b        W' = w W,   b' = b W + bias        so that  n(x) W' + b' = norm(x) W + bias

n(x) is the normalised stream without weights: what `ln1`, `ln2` and `ln_final` shown here compute, and what
ActivationCache's `apply_ln=True` gives. All is computed from the model's own parameters when asked for, so
nothing is stored twice: writing into a shown weight changes nothing. The parameters are those of `.model`.
A constant by which a layer multiplies what it adds (`scaled_residual`) is in W_O, b_O, W_out and b_out. Norms
after attention and MLP (`sandwich_norm`) are in no weight: `facts.linear_heads` is False, sums over heads are
refused.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from loopmdm.model.errors import MissingAttribute, UsageError
from loopmdm.model.network.layers import Block, Norm
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.protocol import Core, NormWeights


class PlainNorm(nn.Module):
    """A norm without its weights: n(x), of x [..., d_model]."""

    def __init__(self, norm: Norm | NormWeights):
        super().__init__()
        self.eps, self.centred = norm.eps, norm.centred
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Centre ("LN" only) and scale to unit mean square."""
        x = self._centre(x)
        return x / self._root(x)

    def scale(self, x: Tensor) -> Tensor:
        """What x, centred, is divided by, [..., 1]."""
        return self._root(self._centre(x))

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def _root(self, x: Tensor) -> Tensor:
        return (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


def plain(norm: Norm, y: Tensor) -> Tensor:
    """n(x) from norm(x); 0 where the norm's weight is 0, where no folded weight reads it."""
    weight = norm.weight.to(y)
    y = y if norm.bias is None else y - norm.bias.to(y)
    return torch.where(weight == 0, 0.0, y / torch.where(weight == 0, 1.0, weight))


def weighted(norm: Norm | NormWeights, n: Tensor) -> Tensor:
    """norm(x) from n(x)."""
    n = n * norm.weight
    return n if norm.bias is None else n + norm.bias


def fold(norm: Norm | NormWeights, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight [d_model, out] and bias [out] of `linear` after `norm`, acting on n(x)."""
    weight = linear.weight.T * norm.weight[:, None]
    bias = _bias(linear)
    return weight, bias if norm.bias is None else bias + linear.weight @ norm.bias


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


class AttentionWeights:
    """W_Q W_K W_V [head, d_model, d_head], b_Q b_K b_V [head, d_head]; W_O [head, d_head, d_model], b_O."""

    def __init__(self, block: Block):
        self.block, self.heads = block, (block.attn.n_heads, block.attn.d_head)
        out = block.attn.out
        self.W_O, self.b_O = out.whole_weight.T.unflatten(0, self.heads), out.whole_bias

    @cached_property
    def _qkv(self) -> tuple[Tensor, Tensor]:
        weight, bias = fold(self.block.ln1, self.block.attn.qkv)
        return weight.unflatten(1, (3, *self.heads)).permute(1, 2, 0, 3), bias.unflatten(0, (3, *self.heads))

    W_Q, W_K, W_V = (property(lambda self, i=i: self._qkv[0][i]) for i in range(3))
    b_Q, b_K, b_V = (property(lambda self, i=i: self._qkv[1][i]) for i in range(3))


class MLPWeights:
    """W_in [d_model, d_mlp], b_in, W_out [d_mlp, d_model], b_out; W_gate, b_gate as W_in, None without a gate.

    Gated: (act(n W_gate + b_gate) * (n W_in + b_in)) W_out + b_out.
    """

    def __init__(self, block: Block):
        self.block = block
        self.W_out, self.b_out = block.mlp.out.whole_weight.T, block.mlp.out.whole_bias

    @cached_property
    def _in(self) -> tuple[Tensor, Tensor]:
        return fold(self.block.ln2, self.block.mlp.up)

    @cached_property
    def _gate(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        gate = self.block.mlp.gate
        return (None, None) if gate is None else fold(self.block.ln2, gate)

    W_in, b_in = (property(lambda self, i=i: self._in[i]) for i in range(2))
    W_gate, b_gate = (property(lambda self, i=i: self._gate[i]) for i in range(2))


class BlockWeights:
    """One layer's `attn`, `mlp`, and its norms `ln1`, `ln2` without weights."""

    def __init__(self, block: Block):
        self.block = block
        self.ln1, self.ln2 = PlainNorm(block.ln1), PlainNorm(block.ln2)

    @property
    def attn(self) -> AttentionWeights:
        """The attention's weights."""
        return AttentionWeights(self.block)

    @property
    def mlp(self) -> MLPWeights:
        """The MLP's weights."""
        return MLPWeights(self.block)


class OutputWeights:
    """Of a layer of somebody else's model: W_O [head, d_head, d_model] and b_O [d_model]."""

    def __init__(self, core: Core, layer: int):
        self.W_O = core.output_weight(layer).T.unflatten(0, (core.cfg.n_heads, core.cfg.d_head))
        self.b_O = core.output_bias(layer)

    def __getattr__(self, name: str) -> Any:
        """Say where the other weights are."""
        raise MissingAttribute(f"no {name} here; {OWN_WEIGHTS}")


class CoreBlock:
    """What is shown of a layer of somebody else's model: `attn` with its output weights."""

    def __init__(self, core: Core, layer: int):
        self.attn = OutputWeights(core, layer)

    def __getattr__(self, name: str) -> Any:
        """Say where the other parts are."""
        raise MissingAttribute(f"no {name} here; {OWN_WEIGHTS}")


OWN_WEIGHTS = (
    "of somebody else's model W_O, b_O, W_U and b_U are shown, all else lies under its own names in m.model.native"
)


class Readout(nn.Module):
    """The unembedding after the final norm: W_U [d_model, d_vocab], b_U [d_vocab], [MASK]'s bias -inf.

    With `outputs` only the first so many ids are shown.
    """

    def __init__(self, model: Core, outputs: int):
        super().__init__()
        weight, bias = fold(*model.readout_weights())
        if model.cfg.mask_token_id is not None:
            never = torch.arange(len(bias), device=bias.device) == model.cfg.mask_token_id
            bias = bias.masked_fill(never, float("-inf"))
        self.W_U, self.b_U = weight[:, :outputs], bias[:outputs]
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the plainly normalised stream x [..., d_model]."""
        return x @ self.W_U + self.b_U


def _stacked(part: str, name: str) -> Any:
    """A property: `blocks[layer].part.name` of all layers, stacked; None where layers have none."""

    def stack(self: "FoldedWeights") -> Tensor | None:
        found = [getattr(getattr(block, part), name) for block in self.blocks]
        return None if found[0] is None else torch.stack(found)

    return property(stack, doc=f"`blocks[layer].{part}.{name}` of all layers, stacked.")


class FoldedWeights:
    """Weights of all layers under TransformerLens' names; the leading axis is the layer.

    `blocks` tells which layers: the physical ones, or in an unrolled model one per application.
    """

    model: Any  # a Core
    d_vocab_out: int

    @property
    def blocks(self) -> "list[BlockWeights] | list[CoreBlock]":
        """The layers' weights, `blocks[1].attn.W_O` and so on."""
        if isinstance(self.model, LoopMDM):
            return [BlockWeights(block) for block in self.model.blocks]  # pyright: ignore[reportArgumentType]
        return [CoreBlock(self.model, layer) for layer in range(self.model.cfg.n_layers)]

    W_Q = _stacked("attn", "W_Q")
    W_K = _stacked("attn", "W_K")
    W_V = _stacked("attn", "W_V")
    W_O = _stacked("attn", "W_O")
    b_Q = _stacked("attn", "b_Q")
    b_K = _stacked("attn", "b_K")
    b_V = _stacked("attn", "b_V")
    b_O = _stacked("attn", "b_O")
    W_in = _stacked("mlp", "W_in")
    b_in = _stacked("mlp", "b_in")
    W_gate = _stacked("mlp", "W_gate")
    b_gate = _stacked("mlp", "b_gate")
    W_out = _stacked("mlp", "W_out")
    b_out = _stacked("mlp", "b_out")

    @property
    def ln_final(self) -> PlainNorm:
        """The final norm without its weights, which `unembed` holds."""
        return PlainNorm(self.model.readout_weights()[0])

    @property
    def unembed(self) -> Readout:
        """The unembedding with the final norm's weights folded in; `unembed(ln_final(x))` are the logits."""
        return Readout(self.model, self.d_vocab_out)

    @property
    def embed(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.embed

    @property
    def W_E(self) -> Tensor:
        """Token embedding [d_vocab, d_model]."""
        return self.model.embed.weight

    @property
    def W_U(self) -> Tensor:
        """Unembedding [d_model, d_vocab_out], final norm folded in."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Tensor:
        """Unembedding bias [d_vocab_out], final norm folded in."""
        return self.unembed.b_U

    def tokens_to_residual_directions(self, tokens: Tensor | int | str | list[int]) -> Tensor:
        """W_U's columns [..., d_model] of token ids, or of the token that a text is."""
        directions = self.W_U.T
        ids = torch.as_tensor(
            self._single(tokens) if isinstance(tokens, str) else tokens, device=directions.device
        )
        never = self.model.cfg.mask_token_id
        if never is not None and bool((ids == never).any()):
            raise UsageError(f"[MASK] (id {never}) is never an output, so it has no direction; give other ids")
        return directions[ids]

    def _single(self, text: str) -> int:
        raise NotImplementedError

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Tensor:
        """Sum of the output biases up to `layer`, [d_model]; UsageError where they do not add up in the stream."""
        self.model.facts.need("additive", "linear_heads", by="accumulated_bias")
        total = torch.zeros(self.model.cfg.d_model, device=self.model.device, dtype=self.model.dtype)
        for block in self.blocks[:layer]:
            total = total + block.attn.b_O + (block.mlp.b_out if include_mlp_biases else 0)
        return total + self.blocks[layer].attn.b_O if mlp_input else total
