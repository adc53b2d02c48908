"""What a LoopMDM is made of: one frozen, validated record that round-trips through JSON.

Field names follow TransformerLens. The defaults are the backbone the paper most likely used
(MDLM's transformer with its time conditioning off: LayerNorm with bias, tanh-GELU, MLP x4,
attention without biases, untied embeddings); all of it can be changed here.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from loopmdm.model.errors import UsageError, check_count, check_keys, check_word
from loopmdm.model.files import read_json
from loopmdm.model.layout import SEGMENTS, Facts, Layout
from loopmdm.model.sites import LEAVES, OUTER

FORBIDDEN = ("forbid_mask_to_mask", "forbid_masked_keys")
STABILISERS = {"input_injection": "none", "sandwich_norm": False, "scaled_residual": False}
"""Fields of the arms that are no LoopMDM of the paper, and what they are where they are off."""
LARGEST_TABLE = 2**26
"""Numbers in a table of rotary angles, n_ctx x d_head."""


@dataclass(frozen=True, kw_only=True)
class LoopMDMConfig(Layout):
    """Shape of a LoopMDM: `n_prelude_layers`, then `n_loop_layers` run S times, then `n_coda_layers`.

    `mask_token_id` is always the last id, d_vocab - 1. `max_loops` is the largest S drawn in
    training (S_max) and the default S at inference. `forbid_mask_to_mask` names the segments in
    which a masked query may not attend to *other* masked keys; `forbid_masked_keys` those in which no
    query at all may (itself excepted), so that no clean position relays what a masked one says.
    `normalization_type` is "LN" or "RMS"; `gated_mlp` with `act_fn="silu"` is SwiGLU. Output
    projections start smaller by sqrt(2 x depth): `init_depth` "all" counts the effective depth in every
    layer, "looped" in the looped layers alone and n_layers elsewhere, so that arms which differ in their
    loops start from the same prelude and coda.

    Three arms, off by default, that others found to steady loops and the paper does not have:
    `input_injection` "decay" mixes e, what the prelude gives, into every loop's input, h <- a h + (1 - a) e
    (`layers.Injection`); `sandwich_norm` norms what attention and MLP give before it is added, in looped layers;
    `scaled_residual` multiplies what looped layers add by 1 / sqrt(max_loops), whatever n_loops a call runs.
    """

    d_vocab: int
    n_ctx: int
    d_model: int
    n_heads: int
    n_prelude_layers: int = 1
    n_loop_layers: int = 1
    n_coda_layers: int = 1
    max_loops: int = 1
    mask_token_id: int = -1
    d_head: int = -1
    d_mlp: int = -1
    normalization_type: Literal["LN", "RMS"] = "LN"
    act_fn: Literal["gelu_new", "gelu", "silu"] = "gelu_new"
    gated_mlp: bool = False
    norm_bias: bool = True
    attn_bias: bool = False
    mlp_bias: bool = True
    unembed_bias: bool = True
    eps: float = 1e-5
    rotary_base: float = 10000.0
    initializer_range: float = 0.02
    forbid_mask_to_mask: tuple[str, ...] = ()
    forbid_masked_keys: tuple[str, ...] = ()
    init_depth: Literal["all", "looped"] = "all"
    input_injection: Literal["none", "decay"] = "none"
    sandwich_norm: bool = False
    scaled_residual: bool = False

    def __post_init__(self):
        """Fill derived fields and refuse shapes that cannot run."""
        self._check_types()
        if self.d_head == -1 and self.n_heads > 0 and self.d_model % self.n_heads:
            raise UsageError(f"d_model {self.d_model} must be divisible by n_heads {self.n_heads}, or give d_head")
        derived = {
            "mask_token_id": (-1, self.d_vocab - 1),
            "d_head": (-1, self.d_model // max(self.n_heads, 1)),
            "d_mlp": (-1, 4 * self.d_model),
        }
        for field, (unset, value) in derived.items():
            if getattr(self, field) == unset:
                object.__setattr__(self, field, value)
        self._check_sizes()
        self._check_choices()

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                check_count(field.name, value, least=-1)
            elif field.type is bool and not isinstance(value, bool):
                raise UsageError(f"{field.name} must be true or false, got {value!r}")
            elif field.type is float and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UsageError(f"{field.name} must be a number, got {value!r}")
            elif field.type is float and not 0 < value <= sys.float_info.max:
                raise UsageError(f"{field.name} must be positive and finite, got {value!r}")

    def _check_sizes(self) -> None:
        least = {"d_vocab": 2, "n_ctx": 1, "d_model": 1, "n_heads": 1, "d_head": 2, "d_mlp": 1}
        least |= {"n_prelude_layers": 0, "n_loop_layers": 0, "n_coda_layers": 0, "max_loops": 1}
        for field, low in least.items():
            check_count(field, getattr(self, field), least=low)
        if self.n_ctx * self.d_head > LARGEST_TABLE:
            raise UsageError(
                f"n_ctx {self.n_ctx} x d_head {self.d_head} exceeds {LARGEST_TABLE}; lower one of them"
            )
        if self.d_head % 2:
            raise UsageError(f"d_head must be even for rotary embeddings, got {self.d_head}")
        if self.mask_token_id != self.d_vocab - 1:
            raise UsageError(
                f"mask_token_id must be the last id, d_vocab - 1 = {self.d_vocab - 1}, "
                f"got {self.mask_token_id}; put [MASK] last in the tokenizer"
            )
        if self.n_layers == 0:
            raise UsageError("a model needs at least one layer; set n_prelude_, n_loop_ or n_coda_layers")

    def _check_choices(self) -> None:
        choices = {"normalization_type": ("LN", "RMS"), "act_fn": ("gelu_new", "gelu", "silu")}
        choices |= {"init_depth": ("all", "looped"), "input_injection": ("none", "decay")}
        for field, allowed in choices.items():
            check_word(field, getattr(self, field), allowed)
        for field in FORBIDDEN:
            if not isinstance(getattr(self, field), tuple):
                raise UsageError(f"{field} must be a tuple of segments, got {getattr(self, field)!r:.80}")
            for segment in getattr(self, field):
                if segment not in SEGMENTS:
                    raise UsageError(f"{field} takes segments of {SEGMENTS}, got {segment!r}")
        if self.sandwich_norm and self.scaled_residual:
            raise UsageError("scaled_residual does nothing before the norms of sandwich_norm; take one of them")

    @property
    def facts(self) -> Facts:
        """What kind of model it is."""
        said = {
            "what the prelude gives is mixed into the state before every loop": self.input_injection != "none",
            "looped layers norm once more what they add": self.sandwich_norm,
            "what looped layers add is multiplied by 1 / sqrt(S_max)": self.scaled_residual,
        }
        return Facts(
            mask_token_id=self.mask_token_id,
            additive=self.input_injection == "none",
            linear_heads=not self.sandwich_norm,
            remarks=tuple(remark for remark, holds in said.items() if holds),
        )

    @property
    def residual_scale(self) -> float:
        """What looped layers add is multiplied by this."""
        return self.max_loops**-0.5 if self.scaled_residual else 1.0

    @cached_property
    def leaves(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Leaf names of one layer application."""
        return tuple(leaf for leaf in LEAVES if leaf != "mlp.hook_pre_linear" or self.gated_mlp)

    @property
    def outer_leaves(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Names outside layers and loops."""
        return OUTER

    @property
    def mean_loops(self) -> float:
        """E[S] for S uniform on 1..max_loops."""
        return (1 + self.max_loops) / 2

    @property
    def effective_depth(self) -> float:
        """Layer applications of an average training forward: prelude + E[S] * loop + coda."""
        return self.n_prelude_layers + self.mean_loops * self.n_loop_layers + self.n_coda_layers

    def initial_depth(self, segment: str) -> float:
        """Layer applications by which output projections of a segment start smaller."""
        counts = self.init_depth == "all" or segment == "loop"
        return self.effective_depth if counts else float(self.n_layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready dict of all fields; those of arms only where they are on, so that other files stay."""
        off = [field for field, value in STABILISERS.items() if getattr(self, field) == value]
        values = dataclasses.asdict(self) | {field: list(getattr(self, field)) for field in FORBIDDEN}
        return {field: value for field, value in values.items() if field not in off}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LoopMDMConfig":
        """Inverse of `to_dict`; UsageError on unknown or missing keys."""
        known = [field.name for field in dataclasses.fields(cls)]
        check_keys(values, known, "config")
        missing = [key for key in ("d_vocab", "n_ctx", "d_model", "n_heads") if key not in values]
        if missing:
            raise UsageError(f"config: missing {', '.join(missing)}")
        for field in FORBIDDEN:
            if not isinstance(values.get(field, ()), list | tuple):
                raise UsageError(f"{field} must be a list of segments, got {values[field]!r:.80}")
        complete: dict[str, Any] = values | {field: tuple(values.get(field, ())) for field in FORBIDDEN}
        return cls(**complete)

    def save(self, path: Path | str) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path | str) -> "LoopMDMConfig":
        """Read JSON; UsageError names what is wrong with the file, and another model's family."""
        from loopmdm.model.adapters.families import looks_like

        values = read_json(Path(path))
        if not isinstance(values, dict):
            raise UsageError(f"{path} holds no config (a JSON object is expected); restore the file")
        if other := looks_like(values):
            raise UsageError(
                f"{path} describes another model ({other}), not a LoopMDM; "
                'open it with open_model: its folder, or "hf:owner/name"'
            )
        return cls.from_dict(values)
