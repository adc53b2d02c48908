"""HookedLoopMDM: TransformerLens' habits on a LoopMDM, with a distinct hook point at every loop.

Each (loop, layer, site) has its own HookPoint, grown as S grows. (One HookPoint that fires S times
would keep the last value and the first gradient under one name.) A HookPoint is called only if
somebody listens, and attention is computed explicitly only where somebody listens to it.
"""

import difflib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from loopmdm_model import names
from loopmdm_model.cache import LoopCache
from loopmdm_model.checkpoints import RECORD, TOKENIZER, resolve
from loopmdm_model.config import LoopMDMConfig
from loopmdm_model.data.tokenizer import PAD, load_tokenizer
from loopmdm_model.errors import UnknownNameError, UsageError, check_count
from loopmdm_model.masking import MaskedBatch, mask_tokens
from loopmdm_model.model import Context, LoopMDM, LoopOutput
from loopmdm_model.stopping import StoppingRule, as_rule
from loopmdm_model.taps import EXPLICIT_TAP, NO_TAP, Tap
from loopmdm_model.unrolled import unroll

AttnPath = Literal["auto", "eager", "sdpa"]
Names = str | Iterable[str] | Callable[[str], bool] | None
LARGE_CACHE = 4 * 2**30


class HookTap(Tap):
    """Hands the activations of one layer application to its hook points."""

    __slots__ = ("listeners", "owner", "points")

    def __init__(self, owner: "HookedLoopMDM"):
        self.owner, self.points = owner, {}
        self.listeners: list[dict] = []

    def add(self, leaf: str, point: HookPoint) -> None:
        """Take in the hook point of a leaf."""
        self.points[leaf] = point
        self.listeners += [point._forward_hooks, point._backward_hooks]

    @property
    def explicit(self) -> bool:
        """Whether the caller pinned the explicit attention path."""
        return self.owner.attn_path == "eager"

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Run the point's hooks if it has any; refuse a changed shape."""
        point = self.points[name]
        if not (point._forward_hooks or point._backward_hooks):
            return x
        self.owner.fired.add(point.name)
        out = point(x)
        if out.shape != x.shape:
            raise UsageError(
                f"a hook at {point.name} returned shape {list(out.shape)}, expected {list(x.shape)}; "
                "return a tensor of the same shape, or None"
            )
        return out

    def wants(self, *leaf_names: str) -> bool:
        """Whether a hook listens to one of these leaves."""
        for leaf in leaf_names:
            point = self.points[leaf]
            if point._forward_hooks or point._backward_hooks:
                if self.owner.attn_path == "sdpa" and leaf in names.EXPLICIT_ONLY:
                    raise UsageError(f'{point.name} does not exist on attn_path="sdpa"; use "auto" or "eager"')
                return True
        return False


class HookedLoopMDM(HookedRootModule):
    """A LoopMDM that TransformerLens users can look into.

    `model` is the plain LoopMDM, `tokenizer` optional. Hook functions have TransformerLens' form
    `fn(activation, hook)`; names are those of `names.py`.
    """

    def __init__(self, model: LoopMDM | LoopMDMConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.model = LoopMDM(model).eval() if isinstance(model, LoopMDMConfig) else model
        self.cfg, self.tokenizer = self.model.cfg, tokenizer
        self.model_name, self.record = "", {}
        self.mod_dict: dict[str, Any] = {}
        self.hook_dict: dict[str, HookPoint] = {}
        self.attn_path: AttnPath = "auto"
        self.fired: set[str] = set()
        self._loops_run: int | None = None
        self._rules: list[tuple[Callable[[str], bool], dict[str, Any]]] = []
        self._taps: dict[str, HookTap] = {}
        self._add_points(names.outer_names(self.cfg))
        self.n_grown = 0
        self.grow(self.cfg.max_loops)

    @classmethod
    def from_pretrained(cls, name: Path | str, device: str | torch.device = "cpu") -> "HookedLoopMDM":
        """Load a shipped name, a run folder or a hub id, with its tokenizer if there is one."""
        folder = resolve(name)
        model = LoopMDM.from_pretrained(name, device)
        path = folder / TOKENIZER
        hooked = cls(model, load_tokenizer(path, model.cfg.d_vocab) if path.is_file() else None)
        hooked.model_name = folder.name
        if (folder / RECORD).is_file():
            hooked.record = json.loads((folder / RECORD).read_text())
        return hooked

    def __repr__(self) -> str:
        """Layers, loops, size and what the model reached."""
        cfg = self.cfg
        layers = f"{cfg.n_prelude_layers} + {cfg.n_loop_layers} x S + {cfg.n_coda_layers} layers"
        parts = [layers, f"S_max = {cfg.max_loops}", f"d_model = {cfg.d_model}", f"{cfg.n_heads} heads"]
        parts.append(f"{self.model.n_parameters / 1e6:.2f} M parameters")
        reached = self.record.get("evaluation", {})
        if "bits_per_byte" in reached:
            parts.append(f"{reached['bits_per_byte']:.3f} bits per byte")
        elif "test_nelbo" in reached:
            parts.append(f"test NELBO {reached['test_nelbo']:.3f} nats per token")
        return f"{type(self).__name__}({self.model_name or 'unnamed'}: {', '.join(parts)})"

    # --- running ---

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
        self.grow(n_loops)
        if attn_path == self.attn_path:
            logits = self.model(tokens, n_loops, attention_mask, self.taps)
        else:
            with self._path(attn_path):
                logits = self.model(tokens, n_loops, attention_mask, self.taps)
        self._loops_run = n_loops
        return logits

    def run(
        self,
        tokens: Tensor | str | list[str],
        n_loops: int | None = None,
        stop: StoppingRule | None = None,
        attention_mask: Tensor | None = None,
        attn_path: AttnPath = "auto",
    ) -> LoopOutput:
        """Forward with hooks; a stopping rule makes it adaptive."""
        tokens, attention_mask = self._inputs(tokens, attention_mask)
        self.grow(as_rule(n_loops, stop, self.cfg.max_loops).max_loops)
        with self._path(attn_path):
            output = self.model.run(tokens, n_loops, stop, attention_mask, self.taps)
        self._loops_run = int(output.loops_used.max())
        return output

    def states(
        self,
        tokens: Tensor,
        n_loops: int,
        attention_mask: Tensor | None = None,
        attn_path: AttnPath = "auto",
    ) -> Iterator[tuple[Tensor, Context]]:
        """H(0), H(1), .. with hooks, as `LoopMDM.states`."""
        self.grow(check_count("n_loops", n_loops))
        with self._path(attn_path):
            yield from self.model.states(tokens, n_loops, attention_mask, self.taps)

    def readout(self, state: Tensor, context: Context) -> Tensor:
        """Coda and unembedding with hooks, as `LoopMDM.readout`."""
        return self.model.readout(state, context, self.taps)

    def taps(self, prefix: str) -> Tap:
        """The tap of a layer application (a tap source for LoopMDM); a silent one where nobody listens."""
        tap = self._taps[prefix]
        if any(tap.listeners):
            return tap
        return EXPLICIT_TAP if self.attn_path == "eager" else NO_TAP

    @contextmanager
    def _path(self, attn_path: AttnPath) -> Iterator[None]:
        if attn_path not in ("auto", "eager", "sdpa"):
            raise UsageError(f'attn_path must be "auto", "eager" or "sdpa", got {attn_path!r}')
        before, self.attn_path = self.attn_path, attn_path
        try:
            yield
        finally:
            self.attn_path = before

    def _inputs(self, tokens: Tensor | str | list[str], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if isinstance(tokens, Tensor):
            return tokens, mask
        tokens = self.to_tokens(tokens)
        return tokens, self._padding_mask(tokens) if mask is None else mask

    # --- hook points ---

    def grow(self, n_loops: int) -> None:
        """Make the hook points of loops 0..n_loops - 1; standing rules apply to new ones too."""
        for loop in range(self.n_grown, n_loops):
            self._add_points(names.loop_names(self.cfg, loop))
        self.n_grown = max(self.n_grown, n_loops)

    def _add_points(self, new: list[str]) -> None:
        for name in new:
            point = HookPoint()
            point.name = name
            self.hook_dict[name] = self.mod_dict[name] = point
            prefix, leaf = self._split(name)
            self._taps.setdefault(prefix, HookTap(self)).add(leaf, point)
            for matches, arguments in self._rules:
                if matches(name):
                    point.add_hook(**arguments)

    @staticmethod
    def _split(name: str) -> tuple[str, str]:
        head, mark, tail = name.partition("blocks.")
        if mark:
            layer, _, leaf = tail.partition(".")
            return f"{head}blocks.{layer}.", leaf
        loop = names.parse_loop(name)
        return ("", name) if loop is None else (f"loop.{loop}.", name.removeprefix(f"loop.{loop}."))

    def _known(self, name: str) -> str:
        """Check an explicit name and make its point if it belongs to a loop not grown yet."""
        names.check_name(self.cfg, name, self.n_grown)
        loop = names.parse_loop(name)
        if loop is not None:
            self.grow(loop + 1)
        return name

    def _matcher(self, chosen: Callable[[str], bool]) -> Callable[[str], bool]:
        """The predicate itself, after making sure that it matches something."""
        if not any(chosen(name) for name in names.all_names(self.cfg, max(64, self.n_grown))):
            hint = _hint(chosen, names.all_names(self.cfg, 1))
            raise UnknownNameError(f"the filter matches no hook name; names look like {hint}")
        return chosen

    def add_hook(self, name: str | Callable[[str], bool], hook: Callable, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens; a predicate also applies to loops that do not exist yet."""
        if isinstance(name, str):
            super().add_hook(self._known(name), hook, *args, **kwargs)
            return
        fields = ("dir", "is_permanent", "level", "prepend")
        self._add_rule(self._matcher(name), dict(zip(fields, args, strict=False)) | kwargs | {"hook": hook})

    def _enable_hook(self, name: str | Callable[[str], bool], hook: Callable, dir: Literal["fwd", "bwd"]) -> None:
        arguments = {"hook": hook, "dir": dir, "level": self.context_level}
        if isinstance(name, str):
            self.hook_dict[self._known(name)].add_hook(**arguments)
        else:
            self._add_rule(self._matcher(name), arguments)

    def _add_rule(self, matches: Callable[[str], bool], arguments: dict[str, Any]) -> None:
        self._rules.append((matches, arguments))
        for name, point in self.hook_dict.items():
            if matches(name):
                point.add_hook(**arguments)

    def remove_all_hook_fns(
        self,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks and the standing rules behind them."""
        super().remove_all_hook_fns(direction, including_permanent, level)

        def stays(arguments: dict[str, Any]) -> bool:
            other = direction != "both" and arguments.get("dir", "fwd") != direction
            permanent = arguments.get("is_permanent", False) and not including_permanent
            return other or permanent or (level is not None and arguments.get("level") != level)

        self._rules = [rule for rule in self._rules if stays(rule[1])]

    @contextmanager
    def hooks(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        fwd_hooks: list[tuple[Any, Callable]] | None = None,
        bwd_hooks: list[tuple[Any, Callable]] | None = None,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator["HookedLoopMDM"]:
        """Temporary hooks; warns at the end of those named explicitly that never fired."""
        fwd_hooks, bwd_hooks = list(fwd_hooks or []), list(bwd_hooks or [])
        for name, _ in fwd_hooks + bwd_hooks:  # refuse wrong names before adding anything
            self._known(name) if isinstance(name, str) else self._matcher(name)
        explicit = [name for name, _ in fwd_hooks if isinstance(name, str)]
        before, self.fired, self._loops_run = self.fired, set(), None
        try:
            with super().hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
                yield self
            self._warn_unfired(explicit)
        finally:
            self.fired = before | self.fired

    def _warn_unfired(self, explicit: list[str]) -> None:
        missing = [name for name in dict.fromkeys(explicit) if name not in self.fired]
        if missing and self._loops_run is not None:
            warnings.warn(
                f"never fired: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''} "
                f"({self._loops_run} loops ran); raise n_loops or the rule's max_loops",
                stacklevel=4,
            )

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
        piece = Slice.unwrap(pos_slice)
        chosen = self._filter(names_filter)

        def save(value: Tensor, hook: HookPoint, suffix: str) -> None:
            assert hook.name is not None
            value = piece.apply(value.detach(), dim=names.position_axis(hook.name)).to(device, dtype)
            store[hook.name + suffix] = value[0] if remove_batch_dim else value

        self.is_caching = True
        backward = [(chosen, partial(save, suffix="_grad"))] if incl_bwd else []
        return store, [(chosen, partial(save, suffix=""))], backward

    def _filter(self, names_filter: Names) -> Callable[[str], bool]:
        if names_filter is None:
            large = names.ON_DEMAND + (names.EXPLICIT_ONLY if self.attn_path == "sdpa" else ())
            return lambda name: not name.endswith(large)
        if callable(names_filter):
            return names_filter
        listed = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        wanted = {self._known(name) for name in listed}
        return lambda name: name in wanted

    def estimate_cache(
        self, batch: int, pos: int, n_loops: int | None = None, names_filter: Names = None, dtype: Any = None
    ) -> int:
        """Bytes that caching a run of `batch` sequences of `pos` tokens will hold."""
        chosen = self._filter(names_filter)
        size = (dtype or next(self.parameters()).dtype).itemsize
        every = names.all_names(self.cfg, n_loops or self.cfg.max_loops)
        shapes = [names.shape(self.cfg, name, batch, pos) for name in every if chosen(name)]
        return size * sum(torch.Size(shape).numel() for shape in shapes)

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
        if incl_bwd and loss_fn is None:
            raise UsageError("incl_bwd needs loss_fn=, a function from logits to a scalar")
        most = as_rule(n_loops, stop, self.cfg.max_loops).max_loops
        self.grow(most)
        with self._path(attn_path):
            self._warn_size(tokens, most, names_filter, dtype)
            found = self.get_caching_hooks(
                names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice, dtype=dtype
            )
        store, forward, backward = found
        with self.hooks(forward, backward, reset_hooks_end, clear_contexts):
            output = self.run(tokens, n_loops, stop, attention_mask, attn_path)
            if loss_fn is not None and incl_bwd:
                self._backward(loss_fn(output.logits))
        self._warn_absent(names_filter, store)
        return output.logits, LoopCache(store, self, output.loops_used, tokens, not remove_batch_dim)

    def unroll(self, cache: LoopCache) -> ActivationCache:
        """What `cache.unrolled()` gives."""
        return unroll(self.model, cache)

    def _backward(self, loss: Tensor) -> None:
        kept = [parameter.grad for parameter in self.parameters()]
        self.zero_grad(set_to_none=True)
        try:
            loss.backward()
        finally:
            for parameter, gradient in zip(self.parameters(), kept, strict=True):
                parameter.grad = gradient

    def _warn_size(self, tokens: Tensor, n_loops: int, names_filter: Names, dtype: Any) -> None:
        size = self.estimate_cache(*tokens.shape, n_loops, names_filter, dtype)
        if size > LARGE_CACHE:
            warnings.warn(
                f"the cache will hold about {size / 2**30:.1f} GiB; choose less with names_filter=, "
                "or keep it in dtype=torch.float16",
                stacklevel=3,
            )

    def _warn_absent(self, names_filter: Names, store: dict[str, Tensor]) -> None:
        if names_filter is None or callable(names_filter):
            return
        listed = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        self._warn_unfired([name for name in listed if name not in store])

    # --- text ---

    def _text(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError("this model has no tokenizer; give token ids, or set .tokenizer")
        return self.tokenizer

    def to_tokens(self, text: str | list[str]) -> Tensor:
        """Token ids [batch, pos] of a text or several; shorter ones are padded with [PAD]."""
        texts = [text] if isinstance(text, str) else list(text)
        rows = [encoding.ids for encoding in self._text().encode_batch(texts)]
        longest = max(len(row) for row in rows)
        pad = self._text().token_to_id(PAD)
        if pad is None and any(len(row) != longest for row in rows):
            raise UsageError("this tokenizer has no [PAD]; give texts of one length")
        if longest == 0:
            raise UsageError("the text is empty; give at least one token")
        tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        return tokens.to(self.model.rotary_cos.device)

    def _padding_mask(self, tokens: Tensor) -> Tensor | None:
        pad = self._text().token_to_id(PAD) if self.tokenizer else None
        return None if pad is None or not bool((tokens == pad).any()) else tokens != pad

    def to_str_tokens(self, tokens: Tensor | str | list[int]) -> list[str]:
        """The pieces of one sequence (a text, or ids [pos] or [1, pos])."""
        ids = self.to_tokens(tokens) if isinstance(tokens, str) else torch.as_tensor(tokens)
        if ids.ndim == 2 and len(ids) != 1:
            raise UsageError(f"to_str_tokens takes one sequence, got {len(ids)}; pick a row")
        return [self._text().decode([int(token)], skip_special_tokens=False) for token in ids.flatten()]

    def to_string(self, tokens: Tensor) -> str | list[str]:
        """Text of ids [pos], or a list of texts of ids [batch, pos]."""
        if tokens.ndim == 1:
            return self._text().decode(tokens.tolist(), skip_special_tokens=False)
        return self._text().decode_batch(tokens.tolist(), skip_special_tokens=False)

    def mask(
        self,
        text: str | list[str] | Tensor,
        ratio: float | None = None,
        *,
        t: float | None = None,
        seed: int = 0,
        maskable: Tensor | None = None,
    ) -> MaskedBatch:
        """Text in, MaskedBatch out: hide an exact share `ratio`, or each token with probability `t`."""
        tokens, attention_mask = self._inputs(text, None)
        return mask_tokens(
            tokens,
            self.cfg.mask_token_id,
            mask_ratio=ratio,
            t=t,
            maskable=maskable,
            attention_mask=attention_mask,
            seed=seed,
        )


def _hint(chosen: Callable[[str], bool], every: list[str]) -> str:
    words = [c for c in getattr(getattr(chosen, "__code__", None), "co_consts", ()) if isinstance(c, str)]
    near = [match for word in words for match in difflib.get_close_matches(word, every, n=2, cutoff=0.4)]
    return ", ".join(near or [every[1], every[-1]])
