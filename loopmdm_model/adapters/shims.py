"""Code that lies beside weights was written for transformers 4.4x; what of it is gone from 5 stands here.

Each shim is put in place only where its name is missing, while such a model is imported and built, and taken away
again. `mend` puts right what loading leaves wrong in the model itself.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def old_code(needed: bool = True) -> Iterator[None]:
    """The names that old code imports or sets, inside."""
    with ExitStack() as stack:
        for place in _PLACES if needed else ():
            place(stack)
        yield


def mend(native: nn.Module) -> None:
    """No caches; rotary frequencies computed again: loading by way of the meta device leaves buffers unset."""
    config: Any = getattr(native, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    for module in native.modules():
        make = getattr(module, "rope_init_fn", None)
        if make is not None and isinstance(getattr(module, "inv_freq", None), Tensor):
            found, scaling = make(module.config, module.inv_freq.device)  # pyright: ignore
            module.inv_freq, module.attention_scaling = found, scaling
            if hasattr(module, "original_inv_freq"):
                module.original_inv_freq = found.clone()


def default_rope(config: Any, device: Any = None, **unused: Any) -> tuple[Tensor, float]:  # noqa: ARG001
    """theta^(-2i/d_head) and a scaling of 1, as ROPE_INIT_FUNCTIONS["default"] gave them."""
    told = getattr(config, "rope_parameters", None) or {}
    theta = getattr(config, "rope_theta", None) or told.get("rope_theta", 10000.0)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(width * (getattr(config, "partial_rotary_factor", None) or told.get("partial_rotary_factor", 1.0)))
    return theta ** -(torch.arange(0, width, 2, device=device).float() / width), 1.0


def _rope(stack: ExitStack) -> None:
    functions = import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    if "default" not in functions:
        functions["default"] = default_rope
        stack.callback(functions.pop, "default")


def _fx(stack: ExitStack) -> None:
    for name in ("transformers.utils.import_utils", "transformers.utils"):
        module = import_module(name)
        if not hasattr(module, "is_torch_fx_available"):
            _set(stack, module, "is_torch_fx_available", lambda: False)


def _tied(stack: ExitStack) -> None:
    """Tied weights as a list: all of them are the embedding."""
    base = import_module("transformers").PreTrainedModel
    now: Callable = base.get_expanded_tied_weights_keys

    def then(self: Any, *args: Any, **kwargs: Any) -> dict:
        listed = self._tied_weights_keys
        if isinstance(listed, list | tuple):
            table = next(path for path, module in self.named_modules() if module is self.get_input_embeddings())
            self._tied_weights_keys = {name: f"{table}.weight" for name in listed}
        return now(self, *args, **kwargs)

    _set(stack, base, "get_expanded_tied_weights_keys", then)


def _masks(stack: ExitStack) -> None:
    """Keywords of mask functions that were renamed or dropped; a model imports the function while it is built."""
    module = import_module("transformers.masking_utils")
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        now: Callable = getattr(module, name)

        def then(*args: Any, _now: Callable = now, **kwargs: Any) -> Any:
            if "input_embeds" in kwargs:
                kwargs["inputs_embeds"] = kwargs.pop("input_embeds")
            kwargs.pop("cache_position", None)
            return _now(*args, **kwargs)

        _set(stack, module, name, then)


def _return_dict(stack: ExitStack) -> None:
    """`config.use_return_dict = ..` as it could be written once."""
    base = import_module("transformers").PretrainedConfig
    now = base.__dict__.get("use_return_dict")
    if isinstance(now, property) and now.fset is None:
        _set(stack, base, "use_return_dict", now.setter(lambda self, value: setattr(self, "return_dict", value)))


def _grouped(stack: ExitStack) -> None:
    """LLaDA asks its config for this."""
    base = import_module("transformers").PretrainedConfig
    if not hasattr(base, "effective_n_kv_heads"):
        _set(
            stack,
            base,
            "effective_n_kv_heads",
            property(lambda self: getattr(self, "n_kv_heads", None) or self.n_heads),
        )


_PLACES = (_rope, _fx, _tied, _masks, _return_dict, _grouped)
_ABSENT = object()


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    before = owner.__dict__.get(name, _ABSENT)
    setattr(owner, name, value)
    if before is _ABSENT:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, before)
