"""A record for a model that has none: guessed from common names, or made of the six paths that the user gives."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loopmdm.model.adapters.families import HEADS_OF_OTHERS, LLAMA, PARTS, PATHS, Family
from loopmdm.model.adapters.kinds import checked
from loopmdm.model.errors import UsageError

COMMON = {
    "embed": ("model.embed_tokens", "transformer.wte", "gpt_neox.embed_in", "embed_tokens", "embed", "wte"),
    "attn": ("self_attn", "attention.self", "attention", "attn", "self_attention"),
    "attn_out": ("o_proj", "out_proj", "c_proj", "dense", "proj", "Wo", "out", "wo"),
    "mlp": ("mlp", "ffn", "feed_forward", "block_sparse_moe", "output.dense", "fc2"),
    "norm": ("norm", "final_norm", "final_layer_norm", "final_layernorm", "ln_f", "ln_final", "layer_norm", "ln"),
    "head": ("lm_head", "cls", "output_layer", "embed_out", "unembed", "head", "predictions", "output_projection"),
}
"""Names to try for a part, likelier ones first."""
BESIDE = {"attention.self": "attention.output.dense"}
"""Where the output projection stands if not inside attention."""
OLDER = (*HEADS_OF_OTHERS, *LLAMA.ignores, "max_window_layers")
"""Config attributes of published checkpoints that transformers reads into others, or no longer."""


def rescaled(native: nn.Module, x: Tensor) -> Tensor:
    """Logits as configs of today rescale them after the head: a factor, a divisor, a soft bound."""
    config: Any = native.config
    for name, change in RESCALED.items():
        size = getattr(config, name, None)
        x = x if size is None else change(x, size)
    return x


RESCALED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logit_scale": lambda x, size: x * size,
    "logits_scaling": lambda x, size: x / size,
    "final_logit_softcapping": lambda x, size: torch.tanh(x / size) * size,
}


def from_paths(given: Mapping[str, Any]) -> Family:
    """A family of the paths in `given`; its other entries are fields of the record.

    `attn`, `attn_out` and `mlp` are paths inside a block; `head` is one path or several, in order.
    """
    missing = [path for path in PATHS if path not in given]
    if missing:
        raise UsageError(f"{', '.join(missing)} missing; a model without a record needs {', '.join(PATHS)}")
    parts, rest = parts_of(given)
    chosen: dict[str, Any] = {"additive": False, "pre_norm": False, "options": {"use_cache": False}} | rest
    return Family(parts=parts, **chosen)


def parts_of(given: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The paths of parts of a block among what a user gives, and all else."""
    inside = {name: given[name] for name in PATHS if name in PARTS and name in given}
    rest = {name: value for name, value in given.items() if name not in (*inside, "parts")}
    return checked("parts", given.get("parts", {})) | inside, rest


def guesses(native: nn.Module) -> Iterator[Family]:
    """Families that may describe `native`, likelier ones first; UsageError names what was not found."""
    blocks = _largest_list(native)
    block = native.get_submodule(f"{blocks}.0") if blocks else nn.Module()
    attn = _first(block, COMMON["attn"])
    inside = [] if attn is None else [f"{attn}.{name}" for name in COMMON["attn_out"]]
    found: dict[str, Any] = {
        "blocks": blocks,
        "embed": _embedding(native),
        "attn": attn,
        "mlp": _first(block, COMMON["mlp"]),
    }
    found["attn_out"] = _first(block, (*inside, BESIDE.get(attn or "", "")))
    found["head"] = _first(native, COMMON["head"])
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise UsageError(
            f"{type(native).__name__} has no record, and its {', '.join(missing)} could not be found; "
            f"give the paths {', '.join(f'{name}=' for name in PATHS)}"
        )
    above = blocks.rpartition(".")[0] if blocks else ""
    places = dict.fromkeys((above, above.rpartition(".")[0]))
    norms = [f"{place}.{name}".lstrip(".") for place in places for name in (*COMMON["norm"], "LayerNorm")]
    norms = [path for path in norms if _first(native, (path,))]
    ends = (found["head"], *(name for name in ("decoder",) if hasattr(native, name)))
    if any(getattr(getattr(native, "config", None), name, None) is not None for name in RESCALED):
        ends = (*ends, rescaled)
    guess = found | {"remarks": ("its parts were guessed",), "ignores": OLDER}
    masked = "Masked" in type(native).__name__  # where nothing can be tried the first guess stands
    for causal in (not masked, masked):
        for linear in (True, False):
            for head in [(norm, *ends) for norm in norms] + [ends]:
                yield from_paths(guess | {"head": head, "causal": causal, "linear_heads": linear})


def _largest_list(native: nn.Module) -> str | None:
    """The list of equal modules that holds most parameters."""
    lists = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in native.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(child) for child in module}) == 1
    }
    return max(lists, key=lambda path: lists[path], default=None)


def _embedding(native: nn.Module) -> str | None:
    """The table of the tokens, by what the model says, by common names, or the largest."""
    tables = {path: module for path, module in native.named_modules() if isinstance(module, nn.Embedding)}
    try:
        said = native.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError):
        said = None
    by_word = [path for path, table in tables.items() if table is said]
    return next(iter(by_word), None) or _first(native, COMMON["embed"]) or max(
        tables, key=lambda path: tables[path].num_embeddings, default=None
    )  # fmt: skip


def _first(module: nn.Module, paths: tuple[str, ...]) -> str | None:
    for path in filter(None, paths):
        try:
            module.get_submodule(path)
        except AttributeError:
            continue
        return path
    return None
