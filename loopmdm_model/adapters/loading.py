"""Loading from a folder or the hub, and what a loaded model must be; every refusal is one line with its remedy.

transformers is imported here only, and only when a name asks for it.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from loopmdm.model.adapters import shims
from loopmdm.model.adapters.families import Family, family_named, name_of_class
from loopmdm.model.adapters.layout import NAMES as SIZE_NAMES
from loopmdm.model.corpora.tokenizer import reading_text
from loopmdm.model.errors import UsageError
from loopmdm.model.files import read_json

OLDEST, TOO_NEW = (5, 0), (6, 0)
"""Versions of transformers that blocks are called as here in; tried with 5.23."""

PAPERWORK = {
    "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "architectures",
    "auto_map", "dtype", "torch_dtype", "model_type", "transformers_version", "id2label", "label2id",
    "gradient_checkpointing", "attn_implementation", "use_cache", "tokenizer_class", "task_specific_params",
    "finetuning_task", "output_past", "prefix", "use_mrope=False",
    *(f"{kind}_token{end}" for kind in ("bos", "cls", "eos", "mask", "pad", "sep", "unk") for end in ("", "_id")),
    *(word for words in SIZE_NAMES.values() for word in words),
}  # fmt: skip
"""Config attributes that say nothing about the forward, as `Family.ignores`; sizes are checked otherwise."""


@dataclass(frozen=True)
class Wanted:
    """What is to be loaded, and how."""

    name: str
    device: torch.device
    dtype: torch.dtype | None
    revision: str | None
    trust: bool
    hears: bool = True


def check_transformers() -> None:
    """UsageError unless transformers is there, in a version that this was written for."""
    try:
        found = version("transformers")
    except ImportError:
        raise UsageError(
            "other people's models by name need transformers: pip install 'transformers>=5,<6'"
        ) from None
    number = tuple(int(part) for part in found.split(".")[:2])
    if not OLDEST <= number < TOO_NEW:
        age = "old" if number < OLDEST else "new"
        raise UsageError(f"transformers {found} is too {age} for the adapters; pip install 'transformers>=5,<6'")


# --- by name ---


def load(
    wanted: Wanted, config: Mapping[str, Any], family: str | Family | None
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The model that config.json describes, its tokenizer if it has one, and where they come from."""
    name, record = _family_of(config, family)
    _check_stored(wanted, config)
    native = _model(wanted, config, record, _own_code(wanted, name, config))
    source = {"source": wanted.name, "revision": wanted.revision or config.get("_commit_hash")}
    return native, _tokenizer(wanted), source | {"dtype": str(next(native.parameters()).dtype)}


def config_of(wanted: Wanted) -> dict[str, Any]:
    """What config.json holds, there or in the hub."""
    check_transformers()
    from transformers import PretrainedConfig

    try:
        return PretrainedConfig.get_config_dict(wanted.name, revision=wanted.revision)[0]
    except Exception as error:  # the hub client raises many kinds; all mean "not to be had"
        raise OSError(
            f"{wanted.name} has no config.json here and none was to be had from the hub ({_line(error)}); "
            "check the name and the network, or give a folder"
        ) from error


def _family_of(config: Mapping[str, Any], family: str | Family | None) -> tuple[str, Family | None]:
    """The record, given, by name or by the classes in config.json; None: it will be guessed once loaded."""
    if isinstance(family, Family):
        return "given", family
    name = family or name_of_class(*(config.get("architectures") or ()))
    return (name, family_named(name)) if name else (config.get("model_type", "unknown"), None)


def _check_stored(wanted: Wanted, config: Mapping[str, Any]) -> None:
    if config.get("quantization_config"):
        kind = config["quantization_config"].get("quant_method", "unknown")
        raise UsageError(f"{wanted.name} is quantised ({kind}); open the unquantised model it was made from")
    index = Path(wanted.name) / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index)["weight_map"].values()))
        missing = [shard for shard in shards if not index.with_name(shard).is_file()]
        if missing:
            raise UsageError(
                f"{wanted.name} lacks {missing[0]} ({len(missing)} of {len(shards)} shards); download it again"
            )


def _own_code(wanted: Wanted, name: str, config: Mapping[str, Any]) -> bool:
    """Whether the model's code lies beside its weights; UsageError unless that is allowed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not config.get("auto_map") or config.get("model_type") in CONFIG_MAPPING:
        return False
    if not wanted.trust:
        raise UsageError(
            f"{wanted.name} ({name}) brings its own code; read it, then pass trust_remote_code=True, revision="
        )
    return True


def _auto_of(wanted: Wanted, config: Mapping[str, Any]) -> str:
    """The class of transformers that builds a model without a record, by where config.json's own class stands."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    masked, causal, kind = "AutoModelForMaskedLM", "AutoModelForCausalLM", config.get("model_type")
    brought = [name for name in (masked, causal, "AutoModel") if name in (config.get("auto_map") or {})]
    if brought:
        return brought[0]
    names = {masked: auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, causal: auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    known = {name: classes[kind] for name, classes in names.items() if kind in classes}
    if not known and kind in CONFIG_MAPPING:
        raise UsageError(f"{wanted.name} ({kind}) is no language model of one stack; open a masked or causal one")
    own = config.get("architectures") or ()
    return next((name for name, cls in known.items() if cls in own), next(iter(known), masked))


def _model(wanted: Wanted, config: Mapping[str, Any], record: Family | None, own_code: bool) -> nn.Module:
    auto = getattr(import_module("transformers"), _auto_of(wanted, config) if record is None else record.auto)
    options: dict[str, Any] = {"attn_implementation": "sdpa"} if wanted.hears else {}
    options |= {"trust_remote_code": True} if own_code else {}
    if not sys.stderr.isatty():
        import_module("transformers.utils.logging").disable_progress_bar()
    with shims.old_code(own_code):
        try:
            if wanted.device.type == "meta":
                return _empty(wanted, auto, options)
            native, info = auto.from_pretrained(
                wanted.name,
                revision=wanted.revision,
                dtype=wanted.dtype or "auto",
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # damaged files, other versions' code: every library raises its own
            why = f"does not load with transformers {version('transformers')}: {_line(error)}"
            if "through torch.nn.functional.scaled_dot_product_attention" in str(error):
                why = "attends by code of its own; give hears=False for all but its patterns"
            raise UsageError(f"{wanted.name} {why}") from error
        if own_code:
            shims.mend(native)
    lost = sorted(info["missing_keys"])
    if lost:
        own, built = config.get("architectures") or (), type(native).__name__
        remedy = "download it again"
        if own and built not in own:
            remedy = f"it was saved as {own[0]}; open a checkpoint of {built}, which has the head"
        raise UsageError(f"{wanted.name} lacks {lost[0]} (and {len(lost) - 1} more weights); {remedy}")
    return native.to(wanted.device)


def _empty(wanted: Wanted, auto: Any, options: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig

    trust = {name: value for name, value in options.items() if name == "trust_remote_code"}
    config = AutoConfig.from_pretrained(wanted.name, revision=wanted.revision, **trust)
    with torch.device("meta"):
        return auto.from_config(config, dtype=wanted.dtype or torch.float32, **options)


def _tokenizer(wanted: Wanted) -> Any:
    """The tokenizer beside the model; None if there is none to be had.

    Where there are no files transformers makes one of special tokens alone, whose [MASK] is not the model's.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            wanted.name, revision=wanted.revision, trust_remote_code=wanted.trust
        )
    except Exception:  # many kinds again; a model without text is still a model
        return None
    return found if len(found) > len(found.all_special_ids) else None  # without files it is made up, of specials


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# --- what is loaded ---


def check_loaded(native: nn.Module, hears: bool = True) -> None:
    """UsageError for weights that cannot be read, and, where it is to be heard, for attention that cannot."""
    quantised = getattr(native, "is_quantized", False) or getattr(native, "quantization_method", None)
    if quantised:
        raise UsageError(f"{type(native).__name__} is quantised; load it without a quantization_config")
    check_uncompiled(native)
    config = getattr(native, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"{type(native).__name__} is an encoder and a decoder; give a model of one stack")
    chosen = getattr(config, "_attn_implementation", None)
    if hears and chosen not in (None, "sdpa"):
        remedy = "load it with attn_implementation='sdpa'"
        if not getattr(native, "_supports_sdpa", True):
            remedy = "transformers has no other for it: give hears=False for all but its patterns"
        raise UsageError(
            f"{type(native).__name__} was loaded with attn_implementation={chosen!r}, which nobody can listen to; "
            f"{remedy}"
        )


def check_uncompiled(native: nn.Module) -> None:
    """UsageError for a model of which anything was compiled: detours over its modules would not be noticed."""
    for name, module in native.named_modules():
        if is_compiled(module):
            raise UsageError(
                f"{name or type(native).__name__} is compiled and hears nobody; give the model as it was before "
                "torch.compile (the hooked model can be compiled)"
            )


def is_compiled(module: nn.Module) -> bool:
    """Whether it is compiled in place, or stands for one that torch.compile was given."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def provenance(native: nn.Module) -> dict[str, Any]:
    """Where a model of transformers came from, as far as its config knows."""
    config: Any = getattr(native, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    found = {"source": config._name_or_path, "revision": getattr(config, "_commit_hash", None)}
    return {"transformers": version("transformers")} | {name: value for name, value in found.items() if value}


def check_config(native: nn.Module, family: Family) -> None:
    """UsageError for a config attribute that neither its class nor the record knows."""
    config: Any = getattr(native, "config", None)
    if not hasattr(config, "to_dict"):
        return
    try:
        known = type(config)().to_dict().keys()
    except Exception:  # a config that cannot stand without arguments has no defaults to compare with
        return
    values = config.to_dict()
    ignored = PAPERWORK | set(family.ignores)
    unknown = sorted(
        name
        for name, value in values.items()
        if name not in known and value is not None and "dropout" not in name  # in eval mode nothing is dropped
        if not {name, f"{name}={value}"} & ignored
    )
    if unknown:
        raise UsageError(
            f"the config has {unknown[0]} = {values[unknown[0]]!r}, which neither {type(config).__name__} nor the "
            f"record knows; if it changes nothing in the forward, give ignores=({unknown[0]!r},)"
        )


def mask_of(native: nn.Module, family: Family, tokenizer: Any) -> int | None:
    """The id of [MASK]: as given, from config, tokenizer, or the record by vocabulary; None: there is none."""
    config = getattr(native, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    told = [
        family.mask_token_id,
        getattr(config, "mask_token_id", None),
        getattr(tokenizer, "mask_token_id", None),
    ]
    if isinstance(tokenizer, Tokenizer):
        told += [tokenizer.token_to_id(word) for word in ("[MASK]", "<mask>")]
    told.append(family.masks.get(vocabulary or -1))
    mask = next((said for said in told if said is not None), None)
    if mask is None and family.masks:
        raise UsageError(
            f"{type(native).__name__} has a [MASK], but neither config nor tokenizer names its id, and a "
            f"vocabulary of {vocabulary} is none of {sorted(family.masks)}; give mask_token_id="
        )
    return mask


def plain_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """A copy of the tokenizer of the `tokenizers` library that is inside one of transformers'.

    The copy reads text as text, special tokens spelled out in it included, and neither cuts nor fills up.
    """
    if tokenizer is None:
        return None
    inside = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(inside, Tokenizer):
        raise UsageError(
            f"{type(tokenizer).__name__} holds no fast tokenizer; load it with use_fast=True, or give none"
        )
    try:
        found = Tokenizer.from_str(inside.to_str())
    except Exception as error:  # the library raises bare Exception
        raise UsageError(
            f"{type(tokenizer).__name__} cannot be copied ({_line(error)}); give none, and ids for texts"
        ) from error
    return reading_text(found)


def pad_of(tokenizer: Any) -> str | None:
    """The token that fills short texts up, by what the tokenizer says or has."""
    if not isinstance(tokenizer, Tokenizer):
        return getattr(tokenizer, "pad_token", None)
    return next((word for word in ("[PAD]", "<pad>") if tokenizer.token_to_id(word) is not None), None)


def special_of(tokenizer: Tokenizer | None) -> frozenset[int]:
    """Special ids but [MASK]'s, if the tokenizer puts some around every text (as encoders' do); else none."""
    if tokenizer is None or not tokenizer.num_special_tokens_to_add(False):
        return frozenset()
    added = tokenizer.get_added_tokens_decoder().items()
    return frozenset(number for number, token in added if token.special and "mask" not in token.content.lower())
