"""HookedLoopMDM: TransformerLens' habits on a LoopMDM.

The hook points are those of `points.py`, what one call hears is in `scopes.py`, the text entries are those of
`text.py`; here are the runs, with and without a cache. Attention is computed explicitly only where somebody
listens to it.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice

from loopmdm.model import sites
from loopmdm.model.blocks import RowLogits
from loopmdm.model.context import Context
from loopmdm.model.corpora.tokenizer import load_tokenizer
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.cache import Keeper, LoopCache, check_form, check_kept
from loopmdm.model.hooks.doors import LoopDoors, in_dtype
from loopmdm.model.hooks.points import LoopHooks
from loopmdm.model.hooks.scopes import AttnPath, Call, Scope, check_path, untraced, warn_unfired
from loopmdm.model.hooks.text import TextEntries
from loopmdm.model.hooks.unrolled import UnrolledLoopMDM, unroll
from loopmdm.model.layout import Facts
from loopmdm.model.network.checkpoints import EVALUATION, RECORD, TOKENIZER, read_record, resolve
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.protocol import Core, LoopOutput
from loopmdm.model.sites import Site
from loopmdm.model.stopping.halting import OnLoop
from loopmdm.model.stopping.rules import StoppingRule, as_rule

Names = str | Site | Iterable[str | Site] | Callable[[str], bool] | None
LARGE_CACHE = 4 * 2**30
Hooked = TypeVar("Hooked", bound="LoopRuns")


class LoopRuns(TextEntries, LoopHooks):
    """A LoopMDM, or any other `Core`, that TransformerLens users can look into.

    `model` is the core, `tokenizer` optional. Hook functions have TransformerLens' form
    `fn(activation, hook)`; names are those of `sites.py`.
    """

    def __init__(self, model: Core | LoopMDMConfig, tokenizer: Tokenizer | None = None):
        plain = LoopMDM(model).eval() if isinstance(model, LoopMDMConfig) else model
        super().__init__(plain.cfg)
        self.model, self.tokenizer = plain, tokenizer
        self.model_name, self.record = "", {}

    @classmethod
    def from_pretrained(
        cls: type[Hooked],
        name: Path | str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
    ) -> Hooked:
        """Load a shipped name, a run folder or a hub id, with its tokenizer if there is one; in eval mode."""
        folder = resolve(name)
        model = in_dtype(LoopMDM.from_pretrained(name, device), dtype)
        path = folder / TOKENIZER
        hooked = cls(model, load_tokenizer(path, model.cfg.d_vocab) if path.is_file() else None)
        hooked.model_name = folder.name
        if (folder / RECORD).is_file():
            hooked.record = read_record(folder)
        return hooked

    def __repr__(self) -> str:
        """Layers, loops, size and what the model reached."""
        cfg = self.cfg
        layers = f"{cfg.n_prelude_layers} + {cfg.n_loop_layers} x S + {cfg.n_coda_layers} layers"
        parts = [layers, f"S_max = {cfg.max_loops}", f"d_model = {cfg.d_model}", f"{cfg.n_heads} heads"]
        parts.append(f"{self.model.n_parameters / 1e6:.2f} M parameters")
        reached = self.record.get(EVALUATION, {})
        if "bits_per_byte" in reached:
            parts.append(f"{reached['bits_per_byte']:.3f} bits per byte")
        elif "test_nelbo" in reached:
            parts.append(f"test NELBO {reached['test_nelbo']:.3f} nats per token")
        return f"{type(self).__name__}({self.model_name or 'unnamed'}: {', '.join(parts)})"

    # --- running ---

    @property
    def facts(self) -> Facts:
        """What kind of model it is."""
        return self.model.facts

    @untraced
    def forward(
        self,
        tokens: Tensor | str | list[str],
        n_loops: int | None = None,
        stop: StoppingRule | None = None,
        attention_mask: Tensor | None = None,
        attn_path: AttnPath = "auto",
    ) -> Tensor:
        """Logits [batch, pos, d_vocab]; `attn_path` pins explicit ("eager") or fused ("sdpa") attention."""
        if stop is not None:
            return self.run(tokens, n_loops, stop, attention_mask, attn_path).logits
        tokens, attention_mask = self._inputs(tokens, attention_mask)
        n_loops = check_count("n_loops", self.cfg.max_loops if n_loops is None else n_loops)
        call = Call(self, check_path(attn_path))
        logits = self.model(tokens, n_loops, attention_mask, call.taps)
        call.ran(n_loops)
        return logits

    @untraced
    def run(
        self,
        tokens: Tensor | str | list[str],
        n_loops: int | None = None,
        stop: StoppingRule | None = None,
        attention_mask: Tensor | None = None,
        attn_path: AttnPath = "auto",
        *,
        rows: Tensor | None = None,
        on_loop: OnLoop | None = None,
        into: Callable[[RowLogits], Tensor] | None = None,
    ) -> LoopOutput:
        """Forward with hooks; a stopping rule makes it adaptive. `rows`, `on_loop`, `into`: see `Core.run`.

        What a rule reads through the coda fires no hooks; the final read-out does.
        """
        tokens, attention_mask = self._inputs(tokens, attention_mask)
        rule = as_rule(n_loops, stop, self.cfg.max_loops)
        call = Call(self, check_path(attn_path))
        return self._run(call, tokens, rule, attention_mask, rows=rows, on_loop=on_loop, into=into)

    def _run(
        self, call: Call, tokens: Tensor, rule: StoppingRule, mask: Tensor | None, **options: Any
    ) -> LoopOutput:
        output = self.model.run(tokens, None, rule, mask, call.taps, **options)
        call.ran(int(output.loops_used.max()))
        return output

    @untraced
    def states(
        self,
        tokens: Tensor,
        n_loops: int,
        attention_mask: Tensor | None = None,
        attn_path: AttnPath = "auto",
    ) -> Iterator[tuple[Tensor, Context]]:
        """H(0), H(1), .. with the hooks that hold where this is called, as `Core.states`."""
        tokens, attention_mask = self._inputs(tokens, attention_mask)
        check_count("n_loops", n_loops)
        found = self.model.states(tokens, n_loops, attention_mask, Call(self, check_path(attn_path)).taps)
        return ((state.clone(), context) for state, context in found)  # the trajectory goes on with its own

    @untraced
    def loop(self, x: Tensor, context: Context, loop: int, attn_path: AttnPath = "auto") -> Tensor:
        """One loop on a state with hooks, as `Core.loop`."""
        return self.model.loop(x, context, loop, Call(self, check_path(attn_path)).taps)

    @untraced
    def readout(self, state: Tensor, context: Context, *, rows: Tensor | None = None) -> Tensor:
        """Coda and unembedding with hooks, as `Core.readout`."""
        return self.model.readout(state, context, Call(self).taps, rows=rows)

    @untraced
    def read(self, state: Tensor, context: Context, *, rows: Tensor) -> RowLogits:
        """The same at `rows`, block by block, as `Core.read`."""
        return self.model.read(state, context, Call(self).taps, rows=rows)

    # --- caching ---

    def get_caching_hooks(
        self,
        names_filter: Names = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict | None = None,
        pos_slice: Any = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[dict, list, list]:
        """One predicate pair that caches what `names_filter` chooses, also in loops born later."""
        store: dict[str, Tensor] = {} if cache is None else cache
        chosen, piece, form = self._filter(names_filter), Slice.unwrap(pos_slice), check_form(device, dtype)
        kept = [Keeper(store, suffix, piece, remove_batch_dim, form) for suffix in ("", "_grad")]
        return store, [(chosen, kept[0])], [(chosen, kept[1])] if incl_bwd else []

    def _filter(self, names_filter: Names, path: AttnPath | None = None) -> Callable[[str], bool]:
        if names_filter is None:
            fused = (path or self.attn_path) == "sdpa"
            large = sites.ON_DEMAND + (sites.EXPLICIT_ONLY if fused else ())
            return lambda name: not name.endswith(large)
        if callable(names_filter):
            return names_filter
        wanted = {self._known(name) for name in _listed(names_filter)}
        return wanted.__contains__

    def estimate_cache(
        self, batch: int, pos: int, n_loops: int | None = None, names_filter: Names = None, dtype: Any = None
    ) -> int:
        """Bytes that caching a run of `batch` sequences of `pos` tokens will hold."""
        check_kept(dtype)
        chosen = self._filter(names_filter)
        size = (dtype or self.model.dtype).itemsize
        every = sites.all_names(self.cfg, n_loops or self.cfg.max_loops)
        shapes = [sites.shape(self.cfg, name, batch, pos) for name in every if chosen(name)]
        return size * sum(torch.Size(shape).numel() for shape in shapes)

    @untraced
    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: Tensor | str | list[str],
        n_loops: int | None = None,
        stop: StoppingRule | None = None,
        attention_mask: Tensor | None = None,
        names_filter: Names = None,
        attn_path: AttnPath = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        loss_fn: Callable[[Tensor], Tensor] | None = None,
        pos_slice: Any = None,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> tuple[Tensor, LoopCache]:
        """Logits and cache. `device`, `dtype`: where and how activations are kept.

        `incl_bwd` also caches gradients ("<name>_grad") of `loss_fn(logits)`, a scalar; the
        parameters' own .grad stay as they were. `attn.hook_result` is cached only if asked for.
        """
        tokens, attention_mask = self._inputs(tokens, attention_mask)
        if remove_batch_dim and len(tokens) != 1:
            raise UsageError(f"remove_batch_dim needs one sequence, got {len(tokens)}")
        if incl_bwd and not callable(loss_fn):
            raise UsageError("incl_bwd needs loss_fn=, a function from logits to a scalar")
        if incl_bwd and not torch.is_grad_enabled():
            raise UsageError("incl_bwd needs gradients; wrap the call in `with torch.enable_grad():`")
        rule = as_rule(n_loops, stop, self.cfg.max_loops)
        path = Call(self, check_path(attn_path)).path
        self._warn_size(tokens, rule.max_loops, self._filter(names_filter, path), dtype)
        store, forward, backward = self.get_caching_hooks(
            self._filter(names_filter, path), incl_bwd, device, remove_batch_dim, pos_slice=pos_slice, dtype=dtype
        )
        if not reset_hooks_end:
            self.add_hook(*forward[0])
        own = Scope(
            self, forward=self._checked(forward) if reset_hooks_end else [], backward=self._checked(backward)
        )
        output = self._run(Call(self, path, own), tokens, rule, attention_mask)
        if loss_fn is not None and incl_bwd:
            self._backward(loss_fn(output.logits))
        if clear_contexts:
            self.clear_contexts()
        warn_unfired([] if names_filter is None or callable(names_filter) else _listed(names_filter), own)
        kept = LoopCache(store, self, output.loops_used, tokens, not remove_batch_dim, output.token_loops)
        return output.logits, kept

    def unrolled(self, n_loops: int | None = None) -> UnrolledLoopMDM:
        """The model as a plain deep one, one virtual layer per application; see `UnrolledLoopMDM`."""
        n_loops = check_count("n_loops", self.cfg.max_loops if n_loops is None else n_loops)
        deep = UnrolledLoopMDM(self.model, n_loops)
        deep.reads_as(self)
        return deep

    def unroll(self, cache: LoopCache) -> ActivationCache:
        """What `cache.unrolled()` gives."""
        return unroll(self.unrolled(cache.n_loops), cache)

    def _backward(self, loss: Tensor) -> None:
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
            found = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            detached = " without gradient" if isinstance(loss, Tensor) and not loss.requires_grad else ""
            raise UsageError(f"loss_fn must give one number that depends on the logits, got {found}{detached}")
        kept = [parameter.grad for parameter in self.parameters()]
        self.zero_grad(set_to_none=True)
        try:
            loss.backward()
        finally:
            for parameter, gradient in zip(self.parameters(), kept, strict=True):
                parameter.grad = gradient

    def _warn_size(self, tokens: Tensor, n_loops: int, chosen: Callable[[str], bool], dtype: Any) -> None:
        size = self.estimate_cache(len(tokens), tokens.shape[-1], n_loops, chosen, dtype)
        if size > LARGE_CACHE:
            warnings.warn(
                f"the cache will hold about {size / 2**30:.1f} GiB; choose less with names_filter=, "
                "or keep it in dtype=torch.float16",
                stacklevel=3,
            )


def _listed(names: "str | Site | Iterable[str | Site]") -> list[str]:
    return [str(names)] if isinstance(names, str | Site) else [str(name) for name in names]


class HookedLoopMDM(LoopDoors, LoopRuns):
    """`LoopRuns` with TransformerLens' names and arguments, those of `doors.py`.

    Weights are shown as TransformerLens shows them, norms folded in (`folded.py`): they act on the normalised
    stream without weights, as `ln_final` here and `cache.unrolled()` give it. A cache over loops holds under
    `hook_normalized` what `model` itself computes, norms' weights included.
    """
