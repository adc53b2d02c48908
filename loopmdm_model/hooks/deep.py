"""The config of a model seen unrolled: its sizes, a layer an application, and what else TransformerLens asks."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from loopmdm.model.errors import UsageError
from loopmdm.model.layout import Facts, Layout
from loopmdm.model.network.config import FORBIDDEN, LoopMDMConfig
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.protocol import Core


def outputs(cfg: Layout) -> int:
    """How many ids logits are shown of: a [MASK] that is the last one is left away."""
    return cfg.d_vocab - (cfg.mask_token_id == cfg.d_vocab - 1)


class Asked:
    """What TransformerLens asks of every config."""

    attn_only = False
    final_rms = False
    use_attn_result = False
    use_attn_in = False
    use_split_qkv_input = False
    use_hook_mlp_in = False
    default_prepend_bos = False


@dataclass(frozen=True, kw_only=True)
class UnrolledConfig(Asked, LoopMDMConfig):
    """The shape of a plain deep model; `n_layers` is the number of applications, which all count as prelude."""

    device: torch.device
    dtype: torch.dtype
    n_key_value_heads: None = None
    positional_embedding_type: str = "rotary"
    attention_dir: str = "bidirectional"

    @property
    def d_vocab_out(self) -> int:
        """Width of the logits: [MASK], the last id, is never an output."""
        return outputs(self)


@dataclass(frozen=True)
class UnrolledLayout(Asked, Layout):
    """The layout of somebody else's model with `n_prelude_layers` applications and nothing looped."""

    core: Core = field(repr=False)
    n_prelude_layers: int
    n_loop_layers = 0
    n_coda_layers = 0
    max_loops = 1

    def __getattr__(self, name: str) -> Any:
        """Sizes are the model's own."""
        if name == "core":  # while it is copied
            raise AttributeError(name)
        return getattr(self.core.cfg, name)

    @property
    def facts(self) -> Facts:
        """What kind of model it is."""
        return self.core.facts

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.core.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        return self.core.dtype

    @property
    def d_vocab_out(self) -> int:
        """Width of the logits."""
        return outputs(self.core.cfg)

    @property
    def attention_dir(self) -> str:
        """Who sees whom."""
        return "causal" if self.facts.causal else "bidirectional"

    @property
    def normalization_type(self) -> str:
        """The final norm's, "LN" or "RMS"; UsageError where that is not all that precedes the unembedding."""
        return "LN" if self.core.readout_weights()[0].centred else "RMS"

    @property
    def n_kv_heads(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Heads of keys."""
        return self.core.cfg.n_kv_heads

    @property
    def n_key_value_heads(self) -> None:
        """None, as where every head has keys of its own; UsageError where heads share them."""
        if self.n_kv_heads not in (0, self.core.cfg.n_heads):
            raise UsageError(
                f"{self.core.cfg.n_heads} heads share {self.n_kv_heads} heads of keys here, so keys and values "
                "have no patch by TransformerLens' heads; hook attn.hook_k, attn.hook_v or attn.hook_z"
            )

    def layer_flops(self, length: int, moving: Any = None) -> Any:
        """FLOPs of one application."""
        return self.core.cfg.layer_flops(length, moving)

    def unembedding_flops(self, n_rows: Any) -> Any:
        """FLOPs of the logits of `n_rows` positions."""
        return self.core.cfg.unembedding_flops(n_rows)


def deep_config(model: Core, n_layers: int) -> "UnrolledConfig | UnrolledLayout":
    """The config of `n_layers` applications of a model's layers."""
    if not isinstance(model, LoopMDM):
        return UnrolledLayout(model, n_layers)
    shape = {each.name: getattr(model.cfg, each.name) for each in fields(LoopMDMConfig)}
    shape |= {"n_prelude_layers": n_layers, "n_loop_layers": 0, "n_coda_layers": 0, "max_loops": 1}
    shape |= dict.fromkeys(FORBIDDEN, ())
    return UnrolledConfig(**shape, device=model.device, dtype=model.dtype)
