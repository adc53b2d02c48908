"""What is checked whenever somebody else's model is taken in, on a few random tokens; cheap beside loading it.

logits    the core's against the native forward's own
pattern   its rows sum to 1, over all keys that a query may see
edits     every leaf is offered, and a change of it changes what the layer gives
additive  the stream is the sum of what attention and MLP add, where the family says so
causal    a later token moves earlier logits, or does not, as the family says
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from loopmdm.model.adapters.core import ForeignCore
from loopmdm.model.errors import UsageError
from loopmdm.model.taps import Tap

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Of logits, against the native ones, absolute per unit of the largest; both run the same code, so 0 is usual."""
COARSE = 0.1
"""The same in half precision, where one rounding is worth up to 2^-8 of a state."""
LENGTH = 8


class Edits(Tap):
    """Keeps what it is offered, and scales by random factors what it is asked to."""

    __slots__ = ("edited", "kept", "seed")
    explicit = True

    def __init__(self, edited: Iterable[str] = (), seed: int = 0):
        self.edited, self.seed = frozenset(edited), seed
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Keep `x`; hand it on, edited or not."""
        self.kept[name] = x
        if name not in self.edited:
            return x
        generator = torch.Generator().manual_seed(self.seed)
        return x * (0.5 + torch.rand(x.shape, generator=generator)).to(x)

    def wants(self, *names: str) -> bool:  # noqa: ARG002
        """Everything."""
        return True


@torch.no_grad()
def check(core: ForeignCore) -> dict[str, float]:
    """The largest deviation of each check; UsageError in one line for the first that fails."""
    tokens, other = _tokens(core)
    found = {"logits": _check_logits(core, tokens)}
    if core.family.hears:
        found |= _check_inside(core, tokens)
    _check_causal(core, tokens, other)
    return found


def _tokens(core: ForeignCore) -> tuple[Tensor, Tensor]:
    """Random ids [batch, pos], neither [MASK] nor padding; and the same with another last one.

    One sequence where the native code draws for a whole batch.
    """
    avoided = (core.cfg.mask_token_id, getattr(getattr(core.native, "config", None), "pad_token_id", None))
    known = torch.tensor([token for token in range(core.cfg.d_vocab) if token not in avoided])
    shape = (1 if core.facts.random_start else 2, min(LENGTH, core.cfg.n_ctx))
    drawn = torch.randint(len(known), shape, generator=torch.Generator().manual_seed(0))
    other = drawn.clone()
    other[:, -1] = (drawn[:, -1] + 1) % len(known)
    return known[drawn].to(core.device), known[other].to(core.device)


def tolerance(logits: Tensor) -> float:
    """How far logits may be from the native ones."""
    return TOLERANCE.get(logits.dtype, COARSE) * max(1.0, float(logits.abs().max()))


def apart(core: ForeignCore, logits: Tensor, native: Tensor) -> float:
    """The largest difference of logits from the native ones, [MASK]'s aside."""
    if core.facts.shifted:
        native = torch.cat([native[:, :1], native[:, :-1]], dim=1)
    difference = (logits.float() - native.float()).abs()
    if core.cfg.mask_token_id is not None:
        difference[..., core.cfg.mask_token_id] = 0.0
    return float(difference.max())


def _native_logits(core: ForeignCore, tokens: Tensor) -> Tensor:
    try:
        return core.native_logits(tokens)
    except UsageError:
        raise
    except Exception as error:  # somebody else's code: any kind
        raise UsageError(
            f"{_name(core)}: its own forward fails on {tokens.shape[1]} random tokens "
            f"({' '.join(str(error).split())[:200]}); give family=, or call=, options= as it wants them"
        ) from error


def _ours(core: ForeignCore, tokens: Tensor) -> Tensor:
    try:
        return core(tokens, core.cfg.native_loops)
    except UsageError:
        raise
    except Exception as error:  # somebody else's code again
        raise UsageError(
            f"{_name(core)}: its blocks do not run one by one ({' '.join(str(error).split())[:200]}); "
            "the record describes another model: give family=, or blocks="
        ) from error


def _check_logits(core: ForeignCore, tokens: Tensor) -> float:
    native = _native_logits(core, tokens)
    if native.shape[-1] != core.cfg.d_vocab:
        raise UsageError(
            f"{_name(core)} gives {native.shape[-1]} logits, its config says {core.cfg.d_vocab}; "
            f'give sizes={{"d_vocab": {native.shape[-1]}}}'
        )
    ours = _ours(core, tokens)
    if ours.shape != native.shape:
        raise UsageError(
            f"{_name(core)}: the head gives {list(ours.shape)}, the native forward {list(native.shape)}; "
            "give head= all that leads from the last state to logits"
        )
    off = apart(core, ours, native)
    if not off <= tolerance(native):
        raise UsageError(
            f"{_name(core)}: logits differ from the native forward's by {off:.2g}, expected at most "
            f"{tolerance(native):.0e}; the record describes another model: give family=, or blocks=, head="
        )
    return off


def _check_inside(core: ForeignCore, tokens: Tensor) -> dict[str, float]:
    layer = core.cfg.layers("loop")[0] if core.cfg.n_loop_layers else 0
    context = core.context(tokens)
    x = context.first
    plain = Edits()
    before = core.layer(layer, x, context, plain)
    _check_leaves(core, plain)
    for leaf in core.cfg.leaves:
        if torch.equal(core.layer(layer, x, context, Edits([leaf])), before):
            raise UsageError(
                f"{_name(core)}: an edit at {leaf} changes nothing (layer {layer}); "
                f"the record names a part that the block does not use, or whose weights are zero"
            )
    sums = float((plain.kept["attn.hook_pattern"].float().sum(-1) - 1).abs().max())
    if not sums <= (1e-5 if core.dtype in TOLERANCE else 2e-2):
        raise UsageError(f"{_name(core)}: rows of the attention pattern sum to 1 only within {sums:.2g}")
    found = {"pattern": sums} | ({"heads": _check_heads(core, layer, plain)} if core.facts.linear_heads else {})
    return found | ({"additive": _check_additive(core, plain)} if core.facts.additive else {})


def _check_leaves(core: ForeignCore, plain: Edits) -> None:
    missing = [leaf for leaf in core.cfg.leaves if leaf not in plain.kept]
    if missing:
        raise UsageError(f"{_name(core)} never offers {missing[0]}; the record names a part that is not called")
    wanted = (core.cfg.n_heads, core.cfg.d_head)
    found = tuple(plain.kept["attn.hook_z"].shape[-2:])
    if found != wanted:
        raise UsageError(
            f"{_name(core)} attends with {found[0]} heads of {found[1]}, its config says {wanted[0]} of "
            f'{wanted[1]}; give sizes={{"n_heads": {found[0]}, "d_head": {found[1]}}}'
        )


def _check_heads(core: ForeignCore, layer: int, plain: Edits) -> float:
    """What heads give, through W_O, against what attention adds."""
    z, added = plain.kept["attn.hook_z"].flatten(-2), plain.kept["hook_attn_out"]
    through = (z @ core.output_weight(layer).T + core.output_bias(layer)).float()
    off = float((through - added.float()).abs().max() / added.float().abs().max().clamp(min=1e-30))
    if not off <= (1e-4 if core.dtype in TOLERANCE else COARSE):
        raise UsageError(
            f"{_name(core)}: more than W_O stands between its heads and the stream (off by {off:.2g}), such as a "
            "gate; give linear_heads=False"
        )
    return off


def _check_additive(core: ForeignCore, plain: Edits) -> float:
    kept = {name: value.float() for name, value in plain.kept.items()}
    total = kept["hook_resid_pre"] + kept["hook_attn_out"] + kept["hook_mlp_out"]
    off = float((total - kept["hook_resid_post"]).abs().max() / kept["hook_resid_post"].abs().max())
    if not off <= (1e-4 if core.dtype in TOLERANCE else COARSE):
        raise UsageError(
            f"{_name(core)}: the stream is not the sum of what attention and MLP add (off by {off:.2g} of it); "
            "give additive=False"
        )
    return off


def _check_causal(core: ForeignCore, tokens: Tensor, other: Tensor) -> None:
    """The last token changed: in a causal model nothing before it moves."""
    with core.cycle.unmoved():
        one, two = core.native_logits(tokens), core.native_logits(other)
    moved = float((one - two)[:, :-1].abs().max())
    if (moved > 0) == core.facts.causal and (not core.facts.causal or moved > tolerance(one)):
        says = "is declared causal, but later tokens move" if core.facts.causal else "lets no later token move"
        remedy = (
            "causal=False" if core.facts.causal else "causal=True, or bidirectional=True to open its attention"
        )
        raise UsageError(f"{_name(core)} {says} earlier logits; give {remedy}")


def _name(core: ForeignCore) -> str:
    return type(core.native).__name__
