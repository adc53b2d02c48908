"""What people with TransformerLens' habits type: its names, its arguments, and what to do where it differs.

`Doors` is what the looped and the unrolled model share, `LoopDoors` what only the looped one has.
"""

from collections.abc import Callable, Iterable
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from loopmdm.model.diffusion.likelihood import row_cross_entropy
from loopmdm.model.errors import MissingAttribute, UsageError, check_count, check_word, unknown_name
from loopmdm.model.files import write_atomic, write_json
from loopmdm.model.hooks.cache import LoopCache
from loopmdm.model.hooks.deep import outputs
from loopmdm.model.hooks.depth import depth_of, stream_at
from loopmdm.model.hooks.folded import OWN_WEIGHTS, FoldedWeights
from loopmdm.model.hooks.points import LoopHooks
from loopmdm.model.hooks.scopes import AttnPath, Call, check_path, untraced
from loopmdm.model.hooks.text import TextEntries, as_ids
from loopmdm.model.masking import MaskedBatch
from loopmdm.model.network.checkpoints import RECORD, TOKENIZER, with_hash
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.sites import Site, applications
from loopmdm.model.stopping.rules import StoppingRule

Given = Tensor | MaskedBatch | str | list | tuple | np.ndarray
"""What goes in as tokens: ids, text, several texts, or a batch that knows what it hides."""
Run = tuple[Any, int | None, StoppingRule | None, Tensor | None]
"""What `LoopRuns` takes first: tokens, n_loops, stop, attention_mask."""

_GENERATE = "a masked diffusion model fills in, it does not go on from the left: use loopmdm.sample(m, ...)"
_FOLDED = "shown weights have the norms folded in already, and m.model keeps its own"
_FORK = "q, k and v read one stream here; hook attn.hook_q, attn.hook_k or attn.hook_v instead"
INSTEAD = {
    **dict.fromkeys(("generate", "generate_stream", "hf_generate", "diffusion_generate"), _GENERATE),
    **dict.fromkeys(("W_pos", "pos_embed", "W_E_pos"), "positions are rotary: hook attn.hook_rot_q"),
    **dict.fromkeys(("enable_compatibility_mode", "process_weights", "fold_layer_norm", "fold_ln"), _FOLDED),
    **dict.fromkeys(("set_use_split_qkv_input", "set_use_attn_in", "set_use_split_qkv_normalized_input"), _FORK),
    "set_use_attn_result": 'not needed: name attn.hook_result, as in names_filter=lambda n: n.endswith("result")',
    "set_use_hook_mlp_in": "hook ln2.hook_normalized or hook_resid_mid instead",
    **dict.fromkeys(("QK", "OV"), "m.unrolled(1) has it, each layer once"),
    "set_tokenizer": "set .tokenizer",
    "tl_parameters": "use m.model.named_parameters()",
}
"""Attributes of TransformerLens' models that there are not, and what to do instead."""

ARGUMENTS = {
    **dict.fromkeys(("S", "loops", "num_loops", "loop", "n_loop", "max_loops"), "the number of loops is n_loops="),
    **dict.fromkeys(("prepend_bos", "padding_side"), "leave it out: there is no BOS, and [PAD] goes right"),
    **dict.fromkeys(("start_at_layer",), "patch hook_resid_pre instead"),
    **dict.fromkeys(("past_kv_cache", "past_key_values"), "attention is bidirectional: nothing can be kept"),
}
"""Arguments that people try, and what to do instead."""


class Output(NamedTuple):
    """What `return_type="both"` gives."""

    logits: Tensor
    loss: Tensor


def refuse(given: Iterable[str], known: Callable) -> None:
    """Raise for the first argument that `known` does not take."""
    for name in given:
        if name in ARGUMENTS:
            raise UsageError(f"unknown argument {name!r}; {ARGUMENTS[name]}")
        takes = [each for each, kind in signature(known).parameters.items() if kind.kind is not kind.VAR_KEYWORD]
        if name not in takes:
            raise unknown_name("argument", name, takes)


def in_dtype(model: LoopMDM, dtype: torch.dtype | str | None) -> LoopMDM:
    """The model with its parameters in `dtype`, a torch dtype or its name; rotary tables stay float32."""
    if dtype is None:
        return model
    found = floating(dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(found)
    return model


def floating(dtype: torch.dtype | str) -> torch.dtype:
    """A floating torch dtype, itself or by its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UsageError(f'dtype must be a floating torch dtype or its name, as "bfloat16"; got {dtype!r}')
    return found


class Doors(FoldedWeights, TextEntries, LoopHooks):
    """What the looped and the unrolled model share."""

    def __getattr__(self, name: str) -> Any:
        """Say what to do instead of what TransformerLens has and this does not."""
        if name in INSTEAD:
            raise MissingAttribute(f"no {name} here; {INSTEAD[name]}")
        shown = isinstance(getattr(FoldedWeights, name, None), property)
        if shown and not isinstance(self.model, LoopMDM):
            raise MissingAttribute(f"no {name} here; {OWN_WEIGHTS}")
        return super().__getattr__(name)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        return self.model.dtype

    # --- tokens ---

    def _inputs(self, tokens: Given, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Ids [batch, pos] and padding mask of whatever may be given as tokens."""
        return super()._inputs(*self._plain(tokens, mask))

    def _plain(self, tokens: Given, mask: Tensor | None) -> tuple[Any, Tensor | None]:
        """Ids [batch, pos] or text, and the mask that came with them."""
        if isinstance(tokens, MaskedBatch):
            tokens, mask = tokens.tokens, tokens.attention_mask if mask is None else mask
        boards = self._boards(tokens)
        tokens = tokens if boards is None else boards
        if isinstance(tokens, np.ndarray | list | tuple) and len(tokens) and not isinstance(tokens[0], str):
            tokens = as_ids(tokens, self.device)
        if isinstance(tokens, Tensor) and tokens.ndim == 1:
            tokens, mask = tokens[None], mask if mask is None else mask.reshape(1, -1)
        return tokens, mask

    def to_tokens(self, text: str | list[str], prepend_bos: bool = False) -> Tensor:
        """Token ids [batch, pos] of a text or several; shorter ones are padded with [PAD]. There is no BOS."""
        if prepend_bos:
            raise UsageError("there is no BOS token here; leave prepend_bos out")
        return super().to_tokens(text)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token."""
        ids = self.to_tokens(text)[0]
        if len(ids) != 1:
            raise UsageError(f"{text!r} is {len(ids)} tokens, {self.to_str_tokens(ids)}; give one of them")
        return int(ids)

    _single = to_single_token

    def to_single_str_token(self, token: int) -> str:
        """The piece that an id stands for."""
        return self.to_str_tokens([check_count("token", token, least=0)])[0]

    def get_token_position(self, single_token: str | int | Tensor, input: Given, mode: str = "first") -> int:
        """Where a token is in one sequence; `mode` "first" or "last" of several."""
        check_word("mode", mode, ("first", "last"))
        named = isinstance(single_token, str)
        wanted = (
            self.to_single_token(single_token) if named else check_count("single_token", single_token, least=0)
        )
        tokens, _ = self._inputs(input, None)
        if len(tokens) != 1:
            raise UsageError(f"get_token_position takes one sequence, got {len(tokens)}; pick a row")
        found = (tokens[0] == wanted).nonzero().flatten().tolist()
        if not found:
            raise UsageError(f"token {single_token!r} (id {wanted}) is not in the sequence")
        return found[0 if mode == "first" else -1]

    # --- answers ---

    def loss_fn(self, logits: Tensor, batch: MaskedBatch, per_token: bool = False) -> Tensor:
        """Mean cross-entropy in nats at the masked positions; per token [row], those in reading order."""
        if not isinstance(batch, MaskedBatch):
            raise UsageError(f"loss_fn needs the MaskedBatch that was run, got {type(batch).__name__}; see m.mask")
        if not bool(batch.masked.any()):
            raise UsageError("nothing is masked, so there is no loss; mask at least one position")
        losses = row_cross_entropy(logits[batch.masked], batch)
        return losses if per_token else losses.mean()

    @staticmethod
    def _check_answer(return_type: str | None, given: Given) -> None:
        if not isinstance(return_type, str | None) or return_type not in ("logits", "loss", "both", None):
            raise UsageError(f'return_type must be "logits", "loss", "both" or None, got {return_type!r:.80}')
        if return_type in ("loss", "both") and not isinstance(given, MaskedBatch):
            raise UsageError(
                f'return_type="{return_type}" needs a MaskedBatch, got {type(given).__name__}; tokens alone do '
                "not say what was masked: give m.mask(text, ratio=0.5)"
            )

    def _answer(self, logits: Tensor, given: Given, return_type: str | None) -> Tensor | Output | None:
        if return_type in (None, "logits"):
            return logits if return_type else None
        assert isinstance(given, MaskedBatch)
        loss = self.loss_fn(logits, given)
        return loss if return_type == "loss" else Output(logits, loss)


class LoopDoors(Doors):
    """What only the looped model has; mixed into HookedLoopMDM."""

    tokenizer: Any
    record: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.training = self.model.training

    @property
    def d_vocab_out(self) -> int:
        """Width of the logits."""
        return self.model.cfg.d_vocab

    def _loops(self, n_loops: int | None) -> int:
        return check_count("n_loops", self.model.cfg.max_loops if n_loops is None else n_loops)

    @untraced
    def forward(
        self,
        tokens: Given,
        n_loops: int | None = None,
        stop: StoppingRule | None = None,
        attention_mask: Tensor | None = None,
        attn_path: AttnPath = "auto",
        *,
        return_type: str | None = "logits",
        stop_at_layer: int | None = None,
        mask_logit: bool = True,
        **others: Any,
    ) -> Any:
        """Run, as `LoopRuns.forward`, with what TransformerLens adds.

        Logits [batch, pos, d_vocab], [MASK]'s being -inf: exact, but p * log(p), a mean over the vocabulary or
        a difference of two runs is NaN or infinite there. `mask_logit=False` leaves that last column away:
        [batch, pos, d_vocab - 1], the same ids and numbers, nothing infinite. `return_type`: "logits"; "loss", the
        mean cross-entropy at the masked positions of a MaskedBatch; "both"; None. `stop_at_layer`: the stream
        [batch, pos, d_model] after so many layer applications, -1 for all but the last.
        """
        self._check_answer(return_type, tokens)
        refuse(others, self.forward)
        ids, attention_mask = self._plain(tokens, attention_mask)
        if stop_at_layer is not None:
            return self._stream(stop_at_layer, (ids, n_loops, stop, attention_mask), attn_path)
        logits = super().forward(ids, n_loops, stop, attention_mask, attn_path)
        return self._answer(self._shown_logits(logits, mask_logit), tokens, return_type)

    def _shown_logits(self, logits: Tensor, mask_logit: bool) -> Tensor:
        if mask_logit or self.cfg.mask_token_id is None:
            return logits
        if outputs(self.cfg) == self.cfg.d_vocab:
            raise UsageError(
                f"mask_logit=False leaves away [MASK] as the last id, but it is id {self.cfg.mask_token_id} of "
                f"{self.cfg.d_vocab} here; leave it out, and skip that column"
            )
        return logits[..., :-1]

    def _stream(self, stop_at_layer: int, run: Run, attn_path: AttnPath) -> Tensor:
        given, n_loops, stop, attention_mask = run
        if stop is not None:
            raise UsageError("stop_at_layer needs a fixed number of loops; leave stop= out")
        tokens, attention_mask = self._inputs(given, attention_mask)
        loops = self._loops(n_loops)
        depth = depth_of(stop_at_layer, len(applications(self.cfg, loops)))
        taps = Call(self, check_path(attn_path)).taps
        return stream_at(depth, self.model, (tokens, loops, attention_mask), taps)

    @untraced
    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: Given,
        n_loops: int | None = None,
        stop: StoppingRule | None = None,
        attention_mask: Tensor | None = None,
        *,
        return_type: str | None = "logits",
        stop_at_layer: int | None = None,
        mask_logit: bool = True,
        **kept: Any,
    ) -> tuple[Any, LoopCache]:
        """What `forward` gives, and what it left; `kept`: what `LoopRuns.run_with_cache` takes."""
        self._check_answer(return_type, tokens)
        refuse(kept, super().run_with_cache)
        ids, attention_mask = self._inputs(tokens, attention_mask)
        run = (ids, n_loops, stop, attention_mask)
        if stop_at_layer is not None:
            return self._cached_stream(stop_at_layer, run, **kept)
        if return_type in ("loss", "both") and kept.get("incl_bwd"):
            kept.setdefault("loss_fn", lambda logits: self.loss_fn(logits, tokens))  # pyright: ignore[reportArgumentType]
        logits, cache = super().run_with_cache(*run, **kept)
        answer = self._answer(self._shown_logits(logits, mask_logit), tokens, return_type)
        return answer, cast(LoopCache, cache)

    def _cached_stream(
        self, stop_at_layer: int, run: Run, attn_path: AttnPath = "auto", **kept: Any
    ) -> tuple[Tensor, LoopCache]:
        """`_stream` of `run` and what it left, chosen by keywords of `get_caching_hooks`."""
        refuse(kept, self.get_caching_hooks)
        with self.attention_path(attn_path):
            store, forward, _ = self.get_caching_hooks(**kept)
        with self.hooks(forward):
            x = self._stream(stop_at_layer, run, attn_path)
        done = applications(self.cfg, self._loops(run[1]))
        done = done[: depth_of(stop_at_layer, len(done))]
        looped = {Site.parse(f"{prefix}hook_resid_pre").loop for prefix, _ in done} - {None}
        loops = torch.tensor([len(looped)] * len(x))
        return x, LoopCache(store, self, loops, run[0], not kept.get("remove_batch_dim", False))  # pyright: ignore[reportArgumentType]

    def save_pretrained(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write weights, config, tokenizer and record into `folder`, so that `from_pretrained` gives all back."""
        self.model.save_pretrained(folder, dtype)
        if self.tokenizer is not None:
            write_atomic(Path(folder) / TOKENIZER, lambda path: self.tokenizer.save(str(path)))
        if self.record:
            write_json(Path(folder) / RECORD, with_hash(Path(folder), self.record))
