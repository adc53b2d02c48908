"""A looped model seen as a plain deep one: virtual layers blocks.{depth}, one per layer application.

n_prelude + S * n_loop + n_coda of them share the looped weights, under the names and in the form that
TransformerLens' patching, ActivationCache and tools of the analysis know.
"""

import re
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.FactoredMatrix import FactoredMatrix
from transformer_lens.utilities import Slice

from loopmdm.model import sites
from loopmdm.model.errors import UnknownNameError, UsageError
from loopmdm.model.hooks.cache import Keeper, LoopCache, check_form
from loopmdm.model.hooks.deep import deep_config, outputs
from loopmdm.model.hooks.depth import Relay, depth_of, stream_at
from loopmdm.model.hooks.doors import Doors, Given, refuse
from loopmdm.model.hooks.folded import BlockWeights, CoreBlock, plain, weighted
from loopmdm.model.hooks.scopes import AttnPath, Call, HookTap, check_path, untraced
from loopmdm.model.network.layers import Norm
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.protocol import Core
from loopmdm.model.sites import Site, applications
from loopmdm.model.taps import NO_TAP, Tap, TapSource


class FoldedTap(Relay):
    """Shows hooks the norms' outputs without weights, and logits without [MASK]'s."""

    __slots__ = ("norms", "outputs")

    def __init__(self, tap: Tap, norms: dict[str, Norm], outputs: int):
        super().__init__(tap)
        self.norms, self.outputs = norms, outputs

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Offer `x` in the form shown; the model goes on with x itself, bit for bit, unless a hook changed it."""
        if name == "hook_logits":
            return self.tap(name, x[..., : self.outputs])
        norm = self.norms.get(name)
        if norm is None or not self.tap.wants(name):
            return self.tap(name, x)
        shown = plain(norm, x)
        version = shown._version
        out = self.tap(name, shown)
        same = out is shown or torch.equal(out, shown)  # backward hooks hand back an alias
        changed = not same or shown._version != version
        if not (changed or shown.requires_grad):
            return x
        out = weighted(norm, out)
        return out if changed else x.detach() + (out - out.detach())  # x's numbers, gradients by way of `shown`


def norms_of(model: Core, layer: int | None) -> dict[str, Norm]:
    """Norms by the leaf that holds their output: those of a physical layer, or the final one; only a LoopMDM's."""
    if not isinstance(model, LoopMDM):
        return {}
    if layer is None:
        return {"ln_final.hook_normalized": model.ln_final}
    block: Any = model.blocks[layer]
    return {"ln1.hook_normalized": block.ln1, "ln2.hook_normalized": block.ln2}


class UnrolledCache(ActivationCache):
    """TransformerLens' cache of an unrolled model: what takes the stream apart is refused where it is no sum."""

    def __getitem__(self, key: Any) -> Tensor:
        """As in TransformerLens; the scale of a final norm that offers none itself is that of the last stream."""
        if key == "ln_final.hook_scale" and key not in self.cache_dict:
            return self.model.ln_final.scale(self["resid_post", -1])
        return super().__getitem__(key)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "UnrolledCache":
        """As in TransformerLens."""
        found = super().apply_slice_to_batch_dim(batch_slice)
        return UnrolledCache(found.cache_dict, found.model, has_batch_dim=found.has_batch_dim)

    def accumulated_resid(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens, with labels that say loop and layer."""
        return self._labelled(super().accumulated_resid(*args, **kwargs))

    def decompose_resid(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens."""
        return self._summed("decompose_resid", args, kwargs)

    def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens."""
        return self._summed("get_full_resid_decomposition", args, kwargs, "linear_heads")

    def stack_head_results(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens."""
        return self._summed("stack_head_results", args, kwargs, "linear_heads")

    def stack_neuron_results(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens."""
        return self._summed("stack_neuron_results", args, kwargs, "linear_heads")

    def logit_attrs(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens."""
        return self._summed("logit_attrs", args, kwargs)

    def _summed(self, name: str, args: tuple, kwargs: dict[str, Any], *needs: str) -> Any:
        self.model.cfg.facts.need("additive", *needs, by=name)  # pyright: ignore[reportAttributeAccessIssue]
        return self._labelled(getattr(super(), name)(*args, **kwargs))

    def _labelled(self, found: Any) -> Any:
        """With its labels, if there are any, by loop and layer in place of the depth."""
        if not (isinstance(found, tuple) and isinstance(found[-1], list)):
            return found
        return *found[:-1], [LABEL.sub(self._place, label) for label in found[-1]]

    def _place(self, depth: re.Match[str]) -> str:
        loop, layer = self.model.places[int(depth[1])]  # pyright: ignore[reportAttributeAccessIssue]
        return f"layer {layer}, " if loop is None else f"loop {loop}, layer {layer}, "


LABEL = re.compile(r"^L?(\d+)_?(?=[a-zA-Z])")
"""The depth that one of TransformerLens' labels begins with."""


class UnrolledLoopMDM(Doors):
    """A looped model `m` at `n_loops` loops as a plain deep one: virtual layers, one per application.

    Hook names are `hook_embed`, `blocks.{depth}.<leaf>`, `ln_final.*`, `hook_logits`. The weights are `m`'s own,
    and values are those of `m`, bit for bit, with two differences that make TransformerLens' arithmetic right:

    - Norms are folded, as by TransformerLens' `fold_ln`: `W_Q W_K W_V W_in W_gate W_U b_U` hold the norms'
      weights, and `ln1.hook_normalized`, `ln2.hook_normalized`, `ln_final.hook_normalized` the stream before them
      (a hook that changes it changes what follows accordingly). So `cache["ln_final.hook_normalized"] @ W_U + b_U`
      are the logits, and attributions close with `W_U` as with `tokens_to_residual_directions`.
    - [MASK] is never an output: logits are [batch, pos, d_vocab_out], d_vocab - 1 ids, equal to
      `m(tokens)[..., :-1]`. Nothing is infinite: entropies, means over the vocabulary and differences are right.

    Of somebody else's model names, values and patching are the same; its norms are shown as they are, and of its
    weights W_O, b_O, W_U and b_U only. Attributions close where the stream is a sum and a final norm and a linear
    map lead to the logits, and are refused by the missing fact elsewhere. A [MASK] before the last id stays, -inf.

    `places[depth]` is (loop, physical layer), loop None outside the loop. Of transformer_lens.patching all of
    `get_act_patch_*` runs but direct paths, which need q, k and v to read separate streams; so does
    `attribution_patch`, by node and not by edge. `detect_head` compares with causal patterns: "abs" refuses these,
    "mul" counts keys up to the query's own position only.
    """

    _virtual: dict[str, tuple[str, int | None]]

    def __init__(self, model: Core, n_loops: int, tokenizer: Tokenizer | None = None):
        done = applications(model.cfg, n_loops)
        super().__init__(deep_config(model, len(done)))
        self.model, self.tokenizer, self.n_loops = model, tokenizer, n_loops
        self.places = [(Site.parse(f"{prefix}hook_resid_pre").loop, layer) for prefix, layer in done]
        self._virtual = {prefix: (f"blocks.{depth}.", layer) for depth, (prefix, layer) in enumerate(done)}
        self._virtual[""] = ("", None)
        self.training = model.training

    def __repr__(self) -> str:
        """Layers and where they come from."""
        return f"{type(self).__name__}({self.cfg.n_layers} applications, {self.n_loops} loops)"

    @property
    def d_vocab_out(self) -> int:
        """Width of the logits."""
        return outputs(self.model.cfg)

    @property
    def blocks(self) -> list[BlockWeights] | list[CoreBlock]:
        """Weights by virtual layer."""
        physical = super().blocks
        return [physical[layer] for _, layer in self.places]  # pyright: ignore[reportReturnType]

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T, [layer, head, d_model, d_model], before rotation by position."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O, [layer, head, d_model, d_model]."""
        return FactoredMatrix(self.W_V, self.W_O)

    # --- hooks ---

    def grow(self, n_loops: int) -> None:
        """The number of applications is fixed."""

    def source(self, call: Call) -> TapSource:
        """The taps of a call, from names of the looped model."""

        def taps(prefix: str) -> Tap:
            if prefix not in self._virtual:
                return NO_TAP  # loop.{i}.hook_in and hook_out: here they are the layers' resid_pre and resid_post
            virtual, layer = self._virtual[prefix]
            tap = call.taps(virtual)
            heard = isinstance(tap, HookTap)
            return FoldedTap(tap, norms_of(self.model, layer), self.d_vocab_out) if heard else tap

        return taps

    def _known(self, name: str | Site) -> str:
        name = str(name)
        if not name.startswith("loop."):
            return sites.check_name(self.cfg, name, 1)
        prefix = next((each for each in self._virtual if each and name.startswith(each)), "")
        here = f"{self._virtual[prefix][0]}{name.removeprefix(prefix)}" if prefix else "blocks.{depth}.<leaf>"
        raise UnknownNameError(f"{name} is a name of the looped model; unrolled, it is {here}")

    def _matcher(self, chosen: Any) -> Any:
        if not any(chosen(name) for name in self.hook_dict):
            raise UnknownNameError("the filter matches no hook name; names look like blocks.0.hook_resid_pre")
        return chosen

    # --- running ---

    @untraced
    def forward(
        self,
        tokens: Given,
        return_type: str | None = "logits",
        stop_at_layer: int | None = None,
        attention_mask: Tensor | None = None,
        attn_path: AttnPath = "auto",
        **others: Any,
    ) -> Any:
        """Logits [batch, pos, d_vocab_out], or the loss at a MaskedBatch's masked positions, or the stream.

        `stop_at_layer` counts applications, -1 for all but the last; `attn_path` pins explicit ("eager") or fused
        ("sdpa") attention.
        """
        self._check_answer(return_type, tokens)
        refuse(others, self.forward)
        ids, attention_mask = self._inputs(tokens, attention_mask)
        run = (ids, self.n_loops, attention_mask)
        taps = self.source(Call(self, check_path(attn_path)))
        if stop_at_layer is not None:
            return stream_at(depth_of(stop_at_layer, self.cfg.n_layers), self.model, run, taps)
        logits = self.model(*run, taps)[..., : self.d_vocab_out]
        return self._answer(logits, tokens, return_type)

    @untraced
    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, tokens: Given, *args: Any, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Any, ActivationCache]:
        """As in TransformerLens: what `forward` gives, and an ActivationCache.

        `attn.hook_result` is cached only if asked for. `incl_bwd` needs return_type="loss" and a MaskedBatch.
        """
        if remove_batch_dim and len(self._inputs(tokens, None)[0]) != 1:
            raise UsageError("remove_batch_dim needs one sequence; pick a row")
        if kwargs.get("incl_bwd") and kwargs.get("return_type") != "loss":
            raise UsageError('incl_bwd needs a number to start from: return_type="loss" and a MaskedBatch')
        if kwargs.get("incl_bwd") and not torch.is_grad_enabled():
            raise UsageError("incl_bwd needs gradients; wrap the call in `with torch.enable_grad():`")
        out, found = super().run_with_cache(tokens, *args, remove_batch_dim=remove_batch_dim, **kwargs)
        return out, UnrolledCache(found, self, has_batch_dim=not remove_batch_dim)

    def get_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict, list, list]:
        """As in TransformerLens; what is kept is a copy, and slices take the position axis of every leaf."""
        store: dict[str, Tensor] = {} if cache is None else cache
        piece, chosen = Slice.unwrap(pos_slice), self._chosen(names_filter)
        kept = [Keeper(store, suffix, piece, remove_batch_dim, check_form(device)) for suffix in ("", "_grad")]
        forward, backward = ([(name, keeper) for name in chosen] for keeper in kept)
        return store, forward, backward if incl_bwd else []

    def _chosen(self, names_filter: Any) -> list[str]:
        if names_filter is None:
            large = sites.ON_DEMAND + (sites.EXPLICIT_ONLY if self.attn_path == "sdpa" else ())
            return [name for name in self.hook_dict if not name.endswith(large)]
        if callable(names_filter):
            return list(filter(self._matcher(names_filter), self.hook_dict))
        listed = [names_filter] if isinstance(names_filter, str | Site) else list(names_filter)
        return [self._known(name) for name in listed]


def unroll(unrolled: UnrolledLoopMDM, cache: LoopCache) -> ActivationCache:
    """A cache of the looped model as one of the unrolled model: names blocks.{depth}.<leaf>, norms folded."""
    model = unrolled.model
    virtual: dict[str, Tensor] = {}
    places = {"": ("", None)} | {
        prefix: (f"blocks.{depth}.", layer)
        for depth, (prefix, layer) in enumerate(applications(model.cfg, cache.n_loops))
    }
    for name, value in cache.items():
        prefix, leaf = sites.split(name)
        if prefix in places:  # not the loops' own in and out
            place, layer = places[prefix]
            virtual[place + leaf] = _shown(norms_of(model, layer), leaf, value, outputs(model.cfg))
    return UnrolledCache(virtual, unrolled, has_batch_dim=cache.has_batch_dim)


def _shown(norms: dict[str, Norm], name: str, value: Tensor, n_outputs: int) -> Tensor:
    leaf = name.removesuffix("_grad")
    if leaf == "hook_logits":
        return value[..., :n_outputs]
    if leaf not in norms:
        return value
    return plain(norms[leaf], value) if leaf == name else value * norms[leaf].weight.to(value)
