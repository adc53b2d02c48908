"""What a run left behind: activations by name, by (name, "loop", i, layer), stacked over loops."""

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from loopmdm.model import sites
from loopmdm.model.errors import MissingAttribute, UnknownNameError, UsageError, unknown_name
from loopmdm.model.network.checkpoints import check_device

if TYPE_CHECKING:
    from transformer_lens import ActivationCache
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.utilities import Slice

UNROLLED = ("accumulated_resid", "apply_ln_to_stack", "apply_slice_to_batch_dim", "compute_head_results")
UNROLLED += ("decompose_resid", "get_full_resid_decomposition", "get_neuron_results", "logit_attrs", "logit_lens")
UNROLLED += ("model", "remove_batch_dim", "stack_activation", "stack_head_results", "stack_neuron_results")
"""What only a cache over virtual layers offers, TransformerLens' ActivationCache."""


@runtime_checkable
class Ran(Protocol):
    """The model that a cache is of."""

    cfg: Any
    tokenizer: Any

    def unroll(self, cache: "LoopCache") -> "ActivationCache":
        """The cache over virtual layers."""
        ...

    def to_str_tokens(self, tokens: Any) -> Any:
        """Pieces of text."""
        ...


class LoopCache(Mapping[str, Tensor]):
    """Cached activations of one run.

    `owner` is the model that ran, `tokens` [batch, pos] what it saw. `n_loops` is the number of loops
    the longest-running sequence made, `loops_used` [batch] each sequence's own. In an adaptive run an
    entry of loop i holds only the sequences still running; `stack` puts them back in place, NaN for
    the others. Tokens that a rule of scope "token" has stopped (`token_loops` [batch, pos]) show q, k, v and
    patterns, but nothing of theirs is added: `hook_attn_out` and `hook_mlp_out` are 0 there.
    """

    def __init__(
        self,
        activations: dict[str, Tensor],
        owner: "Ran",
        loops_used: Tensor,
        tokens: Tensor,
        has_batch_dim: bool = True,
        token_loops: Tensor | None = None,
    ):
        self._activations, self.owner, self.cfg = activations, owner, owner.cfg
        self.token_loops = token_loops
        self.loops_used, self.tokens = loops_used, tokens.clone()
        self.n_loops = int(loops_used.max())
        self.has_batch_dim = has_batch_dim

    def __getitem__(self, key: str | tuple | sites.Site) -> Tensor:
        """An activation by full name, ("pattern", layer) or ("pattern", "loop", i, layer); -1 = last."""
        name = sites.resolve(self.cfg, key, self.n_loops)
        if name in self._activations:
            return self._activations[name]
        try:
            sites.check_name(self.cfg, name.removesuffix("_grad"), self.n_loops)
        except UnknownNameError as error:
            raise error from None
        loop = sites.Site.parse(name).loop
        if loop is not None and loop >= self.n_loops:
            raise UnknownNameError(f"{name} is not in the cache: only {self.n_loops} loops ran")
        raise unknown_name("cached activation", name, self._activations, "(exists, but names_filter left it out)")

    def __contains__(self, key: object) -> bool:
        """Whether a name or key is cached."""
        try:
            return isinstance(key, str | tuple | sites.Site) and self[key] is not None
        except (KeyError, UsageError):
            return False

    def __iter__(self) -> Iterator[str]:
        """Names in running order."""
        return iter(self._activations)

    def __len__(self) -> int:
        """Number of cached activations."""
        return len(self._activations)

    def __getattr__(self, name: str) -> Any:
        """Say where what TransformerLens' cache has is to be found."""
        if name in UNROLLED:
            raise MissingAttribute(f"a cache over loops has no {name}; use cache.unrolled().{name}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def keys(self) -> KeysView[str]:
        """Cached names."""
        return self._activations.keys()

    def values(self) -> ValuesView[Tensor]:
        """Cached tensors."""
        return self._activations.values()

    def items(self) -> ItemsView[str, Tensor]:
        """Names and tensors."""
        return self._activations.items()

    def __repr__(self) -> str:
        """Counts and size."""
        return f"LoopCache({len(self)} activations, {self.n_loops} loops, {self.n_bytes / 2**20:.1f} MiB)"

    @property
    def n_bytes(self) -> int:
        """Bytes held."""
        return sum(value.numel() * value.element_size() for value in self.values())

    def stack(self, name: str, layer: int | None = None, *within: str) -> Tensor:
        """An activation of the looped `layer` over all loops: [loop, batch, ...]; NaN where stopped.

        Without a layer: the loop's own `stack("in")`, `stack("out")`.
        """
        if layer is not None:
            self.check_looped(layer)
        place = () if layer is None else (layer, *within)
        return torch.stack([self._full(self[(name, "loop", i, *place)], i) for i in range(self.n_loops)])

    def check_looped(self, layer: int) -> None:
        """UsageError for a layer that does not run once a loop."""
        looped = list(self.cfg.layers("loop"))
        if layer % self.cfg.n_layers not in looped:
            raise UsageError(
                f"layer {layer} is not looped (looped layers: {looped}); it has one entry, not a stack"
            )

    def _full(self, value: Tensor, loop: int) -> Tensor:
        running = self.loops_used > loop
        if not self.has_batch_dim or len(value) == len(running):
            return value
        full = value.new_full((len(running), *value.shape[1:]), float("nan"))
        full[running.to(full.device)] = value
        return full

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "LoopCache":
        """A copy on another device or in another floating dtype."""
        form = check_form(device, dtype)
        moved = {name: value.to(*form, copy=True) for name, value in self.items()}
        return LoopCache(moved, self.owner, self.loops_used, self.tokens, self.has_batch_dim, self.token_loops)

    def unrolled(self) -> "ActivationCache":
        """A TransformerLens ActivationCache over virtual layers blocks.{depth}, one per application."""
        used = self.loops_used if self.token_loops is None else self.token_loops
        if bool((used != self.n_loops).any()):
            raise UsageError("sequences or tokens stopped at different loops; unroll a run with a fixed n_loops")
        return self.owner.unroll(self)


def check_kept(dtype: torch.dtype | None) -> None:
    """UsageError for a dtype that activations cannot be kept in."""
    if dtype is not None and not (
        isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
    ):
        raise UsageError(f"activations are kept in a floating dtype of 16 bits or more, got dtype={dtype}")


def check_form(device: Any, dtype: torch.dtype | None = None) -> "Form":
    """Where and in which dtype activations are kept, checked; None: as they are."""
    check_kept(dtype)
    return None if device is None else check_device(device), dtype


Form = tuple[torch.device | None, torch.dtype | None]


@dataclass(frozen=True)
class Keeper:
    """A hook that puts a copy of what it sees into a cache, as slice, place and dtype want it."""

    store: dict[str, Tensor] = field(repr=False)  # TransformerLens names a backward hook by its repr
    suffix: str
    piece: "Slice"
    remove_batch_dim: bool
    form: Form

    reads_only = True

    def __call__(self, value: Tensor, hook: "HookPoint") -> None:
        """Keep it under the point's name."""
        assert hook.name is not None
        value = self.piece.apply(value.detach(), dim=sites.position_axis(hook.name)).to(*self.form, copy=True)
        self.store[hook.name + self.suffix] = value[0] if self.remove_batch_dim else value
