"""Wrong arguments of the Python API by the thousand, drawn by Hypothesis, and right ids and masks of any kind."""

import sys
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st

from loopmdm.analysis import (
    attention_across_loops,
    cut,
    mask_attention,
    measure,
    read_loops,
    representation_change,
    stale,
    stopping_frontier,
)
from loopmdm.analysis.measures.interventions import record_values, replace_values
from loopmdm.analysis.measures.interventions.causal import Arm, Trial, causal_effects
from loopmdm.analysis.measures.interventions.selections import EdgeSet
from loopmdm.model import (
    ExitGate,
    MaskedBatch,
    NoiseSchedule,
    Sequences,
    StateDelta,
    UsageError,
    hook_model,
    mask_tokens,
    nelbo,
    nelbo_by_loop,
    open_model,
    sample,
)
from loopmdm.model.adapters.convert import to_loopmdm
from loopmdm.model.hooks.hooked import HookedLoopMDM
from tests.conftest import toy_config, toy_model
from tests.fuzz import HUGE, MODEL, NAMES, OWN

Call = Callable[[Any], Any]

ODD = st.one_of(
    st.text(max_size=10), st.binary(max_size=4), st.just(float("nan")), st.just(1.5), st.booleans(), st.just([]),
    st.just({}), st.just([1, "x"]), st.builds(object), st.just(torch.zeros(2)), st.just(len),
)  # fmt: skip


def integers(least: int = 1, most: int = 2**31 - 1) -> st.SearchStrategy[Any]:
    """What is no integer in `least`..`most`."""
    return st.one_of(st.integers(max_value=least - 1), st.integers(min_value=most + 1), ODD)


def reals(*good: tuple[float, float]) -> st.SearchStrategy[Any]:
    """What is no number in any of these closed ranges."""
    plain = ODD.filter(lambda value: not isinstance(value, float))
    return st.one_of(st.floats().filter(lambda x: not any(low <= x <= high for low, high in good)), plain)


TOY = HookedLoopMDM(toy_model())
CLEAN = torch.randint(0, 22, (3, 10), generator=torch.Generator().manual_seed(1))
BATCH = mask_tokens(CLEAN, 22, mask_ratio=0.5, seed=0)
_, CACHE = TOY.run_with_cache(BATCH.tokens, n_loops=2)
some = lambda value: not isinstance(value, list | dict | str | bytes | bool) or bool(value)  # noqa: E731
SOME = ODD.filter(some)
IDS = integers(0, 22).filter(some)
LOOPS, SEED, TEXT_NAMES = integers(most=10_000), integers(0, HUGE - 1), NAMES.map(lambda name: f"{name}?")
SHAPES = st.sampled_from([(), (0,), (1, 0), (0, 4), (1, 17), (1, 2, 3)])
TOKENS = st.one_of(
    st.sampled_from([-1, -(2**40), 23, 2**40]).map(lambda low: torch.full((1, 4), low)),
    SHAPES.map(lambda shape: torch.zeros(shape, dtype=torch.int64)),
    st.sampled_from([torch.float32, torch.bool, torch.complex64]).map(lambda dtype: torch.zeros(1, 4).to(dtype)),
)
NO_TENSOR = lambda value: not isinstance(value, torch.Tensor)  # noqa: E731 - one number a sequence is right
FIELDS = (
    "d_vocab",
    "n_ctx",
    "d_model",
    "n_heads",
    "n_loop_layers",
    "max_loops",
    "eps",
    "act_fn",
    "forbid_mask_to_mask",
)
NO_FIELD = st.one_of(st.integers(max_value=-2), st.just(2**40), ODD.filter(lambda v: not isinstance(v, float)))


def other(*kinds: type) -> st.SearchStrategy[Any]:
    """What is none of these."""
    return ODD.filter(lambda value: not isinstance(value, kinds) or isinstance(value, bool))


NO_EDGES = st.one_of(st.none(), st.integers(), other(str).filter(lambda value: not callable(value)))
"""Neither the name of edges nor a choice of them; a name is drawn elsewhere."""


def _entered(change: Any) -> None:
    with change:
        TOY(BATCH.tokens, n_loops=2)


WHOLE = {"tokens": BATCH.tokens, "clean": BATCH.clean, "masked": BATCH.masked}
VALUES = record_values(TOY, BATCH.tokens, 2)


@cache
def _bert() -> torch.nn.Module:
    from tests.loopmdm_model.adapters.natives import native  # late: transformers is slow to import

    return native("Bert")


OF_MODELS: dict[str, Call] = {
    "nelbo": lambda m: nelbo(m, CLEAN, n_samples=1), "sample": lambda m: sample(m, length=4, steps=1),
    "mask_attention": lambda m: mask_attention(m, BATCH), "change": lambda m: representation_change(m, BATCH),
    "read_loops": lambda m: read_loops(m, BATCH), "cut": lambda m: _entered(cut(m)),
    "stale": lambda m: _entered(stale(m)), "effects": lambda m: causal_effects(m, CLEAN),
    "frontier": lambda m: stopping_frontier(m, CLEAN), "maps": lambda cache: attention_across_loops(cache, 1),
    "measure": lambda m: measure("effective-rank", m, batch=BATCH),
    "by_loop": lambda m: nelbo_by_loop(m, CLEAN, 2),
}  # fmt: skip
WRONG: dict[str, tuple[Call, st.SearchStrategy[Any]]] = {
    "forward tokens": (TOY, TOKENS),
    "forward n_loops": (lambda v: TOY(CLEAN, n_loops=v), LOOPS),
    "forward attn_path": (lambda v: TOY(CLEAN, attn_path=v), TEXT_NAMES),
    "run stop": (lambda v: TOY.run(CLEAN, stop=v), ODD),
    "rule threshold": (lambda v: StateDelta(v, max_loops=3), reals((0.0, float("inf")))),
    "rule max_loops": (lambda v: StateDelta(0.1, max_loops=v), LOOPS),
    "rule patience": (lambda v: StateDelta(0.1, max_loops=3, patience=v), integers()),
    "schedule": (lambda v: NoiseSchedule((2, v)), LOOPS),
    "mask_ratio": (lambda v: mask_tokens(CLEAN, 22, mask_ratio=v), reals((0.0, 1.0))),
    "t": (lambda v: mask_tokens(CLEAN, 22, t=v), reals((0.0, 1.0)).filter(NO_TENSOR)),
    "mask seed": (lambda v: mask_tokens(CLEAN, 22, t=0.5, seed=v), SEED),
    "mask first_index": (lambda v: mask_tokens(CLEAN, 22, t=0.5, first_index=v), SEED),
    "mask tokens": (lambda v: mask_tokens(v, 22, t=0.5), TOKENS.filter(lambda v: v.ndim != 2 or v.numel() == 0)),
    "nelbo n_loops": (lambda v: nelbo(TOY, CLEAN, n_loops=v), LOOPS),
    "nelbo n_samples": (lambda v: nelbo(TOY, CLEAN, n_samples=v), integers()),
    "nelbo seed": (lambda v: nelbo(TOY, CLEAN, n_samples=1, seed=v), SEED),
    "nelbo tokens": (lambda v: nelbo(TOY, v, n_samples=1), TOKENS),
    **{
        f"sample {name}": (lambda v, name=name: sample(TOY, **{"steps": 2, "length": 4, name: v}), strategy)
        for name, strategy in {
            "n": integers(), "steps": integers(), "length": integers(most=16), "batch_size": integers(),
            "first_index": SEED, "seed": SEED, "n_loops": LOOPS, "order": TEXT_NAMES, "stop": ODD,
            "temperature": reals((0.0, 0.0), (1e-4, sys.float_info.max)), "top_p": reals((5e-324, 1.0)),
            "top_k": integers(), "guidance": reals((0.0, sys.float_info.max)), "infill": other(type(None)),
            "suppress": st.one_of(IDS, st.lists(IDS, min_size=1)), "end": IDS,
            "clues": st.builds(lambda at, token: {at: token}, st.integers(0, 3), integers(0, 21)),
        }.items()
    },
    "cache key": (CACHE.__getitem__, st.one_of(TEXT_NAMES, st.tuples(TEXT_NAMES, integers(0)))),
    "cache names": (lambda v: TOY.run_with_cache(CLEAN, names_filter=v), TEXT_NAMES),
    "hook name": (lambda v: TOY.run_with_hooks(CLEAN, fwd_hooks=[(v, lambda x, hook: x)]), TEXT_NAMES),
    "cut edges": (lambda v: _entered(cut(TOY, v)), TEXT_NAMES),
    "cut choice": (lambda v: _entered(cut(TOY, v)), NO_EDGES),
    "cut loops": (lambda v: _entered(cut(TOY, loops=v)), st.one_of(TEXT_NAMES, st.just(1.5), st.just([1, "x"]))),
    "config": (lambda v: toy_config(**v), st.builds(lambda key, v: {key: v}, st.sampled_from(FIELDS), NO_FIELD)),
    **{f"model of {name}": (call, ODD) for name, call in OF_MODELS.items()},
    "open_model name": (open_model, st.one_of(TEXT_NAMES, other(str))),
    "open_model device": (lambda v: open_model(MODEL, v), TEXT_NAMES),
    "open_model changes": (lambda v: open_model(MODEL, **{v: 1}), TEXT_NAMES),
    "hook_model native": (hook_model, other(torch.nn.Module)),
    "hook_model family": (lambda v: hook_model(_bert(), v), st.one_of(TEXT_NAMES, other(str))),
    "hook_model loop": (lambda v: hook_model(_bert(), loop=v), st.one_of(ODD, st.tuples(integers(0), integers()))),
    "hook_model max_loops": (lambda v: hook_model(_bert(), loop=(1, 1), max_loops=v), LOOPS),
    "hook_model changes": (lambda v: hook_model(_bert(), **{v: 1}), TEXT_NAMES),
    "to_loopmdm": (to_loopmdm, st.one_of(ODD, st.just(TOY))),
    "gate": (lambda v: TOY.run(CLEAN, stop=ExitGate(v, max_loops=3)), st.one_of(st.floats(), ODD)),
    "m.mask text": (TOY.mask, st.one_of(TEXT_NAMES, TOKENS, ODD)),
    "m.mask ratio": (lambda v: TOY.mask(CLEAN, v), reals((0.0, 1.0))),
    "m.mask maskable": (lambda v: TOY.mask(CLEAN, 0.5, maskable=v), ODD),
    "m.with_gaps": (TOY.with_gaps, st.one_of(TEXT_NAMES, ODD)),
    **{
        f"MaskedBatch {name}": (lambda v, name=name: MaskedBatch(**(WHOLE | {name: v})), other(torch.Tensor))
        for name in WHOLE
    },
    **{
        f"Sequences {name}": (lambda v, name=name: Sequences(CLEAN, **{name: v}), ODD)
        for name in ("maskable", "real", "clusters")
    },
    "sequences": (Sequences.of, ODD),
    **{f"trial {name}": (lambda v, name=name: Trial(**{name: v}), integers()) for name in OWN},
    "arm kind": (lambda v: Arm(v, EdgeSet()), st.one_of(TEXT_NAMES, ODD)),
    **{
        f"edges {name}": (lambda v, name=name: EdgeSet(**{name: v}), st.one_of(TEXT_NAMES, ODD))
        for name in ("groups", "relation", "side")
    },
    "edges share": (lambda v: EdgeSet(share=v), reals((5e-324, 1.0))),
    "effects arms": (lambda v: causal_effects(TOY, CLEAN, v), SOME),
    "effects trial": (lambda v: causal_effects(TOY, CLEAN, trial=v), ODD),
    "effects n_loops": (lambda v: causal_effects(TOY, CLEAN, trial=Trial(v)), st.one_of(st.just(1), LOOPS)),
    "values": (lambda v: _entered(replace_values(TOY, v)), ODD),
    "values edges": (lambda v: _entered(replace_values(TOY, VALUES, v)), TEXT_NAMES),
    "values choice": (lambda v: _entered(replace_values(TOY, VALUES, v)), NO_EDGES),
    "values heads": (lambda v: _entered(replace_values(TOY, VALUES, heads=v)), integers(0, 1)),
    "values loops": (lambda v: _entered(replace_values(TOY, VALUES, loops=v)), st.sampled_from(["x", 1.5])),
    "hooks": (lambda v: TOY.run_with_hooks(CLEAN, fwd_hooks=v), SOME),
    "measure n_loops": (lambda v: mask_attention(TOY, BATCH, n_loops=v), LOOPS),
    "change n_loops": (lambda v: representation_change(TOY, BATCH, n_loops=v), LOOPS),
}  # fmt: skip
RUNS = st.tuples(st.integers(1, 3), st.integers(1, 16), st.integers(0, 2**32), st.integers(1, 3))
CALLS = st.one_of(
    *(strategy.map(lambda value, name=name: (name, value)) for name, (_, strategy) in WRONG.items()),
    *(
        RUNS.map(lambda shape, name=name: (name, shape))
        for name in ("finite nelbo", "finite masses")
        for _ in "ab"
    ),
)


def _sequences(batch: int, length: int, seed: int) -> Sequences:
    """Any ids, any part of them real, any part maskable."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 22, (batch, length), generator=generator)
    real = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=generator)
    maskable = torch.rand(batch, length, generator=generator) < 0.7
    return Sequences.of(tokens, maskable, real)


def _finite(name: str, shape: tuple[int, int, int, int]) -> str:
    """No NaN beside n > 0."""
    batch, length, seed, n_loops = shape
    s = _sequences(batch, length, seed)
    if name == "finite nelbo":
        r = nelbo(TOY, s, n_loops=n_loops, n_samples=1, seed=seed)
        good = bool(r.per_sequence.isfinite()[s.lengths > 0].all()) and r.mean == r.mean
        return "fine" if good or not bool((s.lengths > 0).any()) else f"NaN: {r}"
    b = mask_tokens(s, 22, mask_ratio=0.5, seed=seed)
    for frame, column in (
        (mask_attention(TOY, b, n_loops), "mass"),
        (representation_change(TOY, b, n_loops), "value"),
    ):
        wrong = frame[(frame["n"] > 0) & frame[column].isna()]
        if len(wrong):
            return f"NaN beside n > 0: {wrong.head(3).to_dict('records')}"
    return "fine"


def end_of(name: str, value: Any) -> str:
    """ "UsageError", "fine" where the input may be right, or what else came of a call."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name.startswith("finite"):
                return _finite(name, value)
            WRONG[name][0](value)
    except UsageError:
        return "UsageError"
    except Exception:
        return traceback.format_exc()
    return "accepted"
