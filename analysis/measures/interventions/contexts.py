"""Interventions as context managers on a HookedLoopMDM; those that take something away say `by` what."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from loopmdm.analysis.measures.interventions.edges import matched_edges
from loopmdm.analysis.measures.interventions.places import (
    Chosen,
    Loops,
    applications,
    in_heads,
    in_loops,
    several,
)
from loopmdm.analysis.measures.interventions.reference import By, Reference, check_reference
from loopmdm.analysis.measures.interventions.selections import Choose, as_choice, looks
from loopmdm.analysis.measures.interventions.values import replace_values
from loopmdm.analysis.watch.groups import TOKEN_GROUPS, members
from loopmdm.model.errors import UsageError, check_count, check_model, check_number, check_word
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import wide

Group = Literal["masked", "clean"]
Part = Literal["attn", "mlp"]


def _members(m: HookedLoopMDM, group: str) -> Tensor:
    return members(m.context.masked, m.context.real)[group]


def _check_group(group: str) -> str:
    check_word("group", group, TOKEN_GROUPS)
    return group


@contextmanager
def cut(
    m: HookedLoopMDM,
    what: str | Choose = "masked->masked",
    loops: Loops = None,
    layers: Chosen = None,
    heads: Chosen = None,
    matched: bool = False,
    seed: int = 0,
    by: By = "zero",
) -> Iterator[HookedLoopMDM]:
    """Forbid attention along edges "query group->key group" (scores to -inf; self is always kept).

    `loops`, `layers`, `heads` choose where (default: every loop, the looped layers, all heads). With `matched`
    random edges are cut instead that carry the same mass at the same distances: the control for having cut
    anything at all. Attention is explicit in all layers, in every arm; "none" cuts nothing: what a cut is
    compared with. `what` may also be a choice of edges, as in `choice(m, EdgeSet(relation="row"))`. With a
    `Reference` the edges stay and carry its values: `replace_values`, with pattern, mass and scale kept.

    >>> with lm.cut(m, "masked->masked", loops=slice(1, None)):
    ...     logits = m(b, n_loops=4)
    >>> logits.shape
    torch.Size([2, 36, 7])
    """
    check_model(m, "cut", hooked=True)
    reference = check_reference(by)
    if reference is not None:
        with _carrying(m, reference, what, (loops, layers, heads), matched):
            yield m
        return
    where = applications(m.cfg, loops, layers, "attn_scores")
    chosen, choose = several("head", heads, m.cfg.n_heads), as_choice(m, what)
    if matched and not isinstance(what, str):
        raise UsageError("matched goes with named edges; the control of a choice is EdgeSet(side='outside')")

    def forbid(scores: Tensor, hook: Any) -> Tensor:
        pattern = wide(scores).softmax(-1) if matched or looks(choose) else scores
        if matched:
            step = (hook.loop() or 0) * m.cfg.n_layers + hook.layer()
            gone = matched_edges(pattern, m.context, str(what), seed, step)
        else:
            gone = choose(pattern, m.context)
        return scores.masked_fill(in_heads(gone, chosen, m.cfg.n_heads), float("-inf"))

    with m.attention_path("eager"), m.hooks([(where, forbid)]):
        yield m


@contextmanager
def _carrying(
    m: HookedLoopMDM, by: Reference, what: str | Choose, where: tuple[Loops, Chosen, Chosen], matched: bool
) -> Iterator[HookedLoopMDM]:
    loops, layers, heads = where
    if matched:
        raise UsageError('matched goes with by="zero"; the control of a reference is EdgeSet(side="outside")')
    with replace_values(m, by.values, what, loops, heads, layers):
        yield m


@contextmanager
def stale(
    m: HookedLoopMDM, group: Group = "masked", loops: Loops = slice(1, None), layers: Chosen = None
) -> Iterator[HookedLoopMDM]:
    """Keep every pattern, but feed the values that a group's keys had in loop 0.

    Tells whether the *update* of what masked positions say matters, or only that they are there.

    >>> with lm.stale(m, "masked"):
    ...     logits = m(b, n_loops=4)
    """
    check_model(m, "stale", hooked=True)
    places, everywhere = (applications(m.cfg, some, layers, "v") for some in (loops, None))
    if any(layer not in m.cfg.layers("loop") for layer in several("layer", layers, m.cfg.n_layers) or ()):
        raise UsageError(f"only looped layers have a loop 0: {list(m.cfg.layers('loop'))}")
    _check_group(group)

    def replace(value: Tensor, hook: Any) -> Tensor | None:
        kept = m.call.notes.setdefault(replace, {})
        if hook.loop() == 0:
            kept[hook.layer()] = value.clone()  # a later hook may write into it
        if not places(hook.name):
            return None
        if len(kept[hook.layer()]) != len(value):
            raise UsageError("stale needs all sequences to run on; give n_loops, not a stopping rule")
        return torch.where(_members(m, group)[:, :, None, None], kept[hook.layer()], value)

    with m.hooks([(everywhere, replace)]):
        yield m


@contextmanager
def _between(m: HookedLoopMDM, loops: Loops, change: Any) -> Iterator[HookedLoopMDM]:
    """H(i) becomes change(H(i-1), H(i)) after the chosen loops."""

    def enter(state: Tensor, hook: Any) -> None:  # noqa: ARG001
        m.call.notes[enter] = state

    def leave(state: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return change(m.call.notes[enter], state)

    with m.hooks([(in_loops(loops, "hook_in"), enter), (in_loops(loops, "hook_out"), leave)]):
        yield m


@contextmanager
def freeze(
    m: HookedLoopMDM,
    group: Group = "clean",
    loops: Loops = None,
    by: Literal["own"] | Reference = "own",
) -> Iterator[HookedLoopMDM]:
    """Hold the states of a group: what the chosen loops would write to them is dropped.

    With a `Reference` they are its states after each of these loops instead.

    >>> with lm.freeze(m, "clean"):
    ...     logits = m(b, n_loops=4)
    """
    check_model(m, "freeze", hooked=True)
    _check_group(group)
    reference = check_reference(by, "own")
    if reference is not None:

        def replace(after: Tensor, hook: Any) -> Tensor:
            return torch.where(_members(m, group)[..., None], reference.at(hook, after), after)

        with m.hooks([(in_loops(loops, "hook_out"), replace)]):
            yield m
        return

    def change(before: Tensor, after: Tensor) -> Tensor:
        return torch.where(_members(m, group)[..., None], before, after)

    with _between(m, loops, change):
        yield m


@contextmanager
def damp(m: HookedLoopMDM, strength: float, loops: Loops = None) -> Iterator[HookedLoopMDM]:
    """H(i) = H(i-1) + strength x what the loop adds; 1 changes nothing, 1/K makes K loops one step in length.

    >>> with lm.damp(m, 0.5):
    ...     logits = m(b, n_loops=4)
    """
    check_model(m, "damp", hooked=True)
    check_number("strength", strength, 0, above=True)
    with _between(m, loops, lambda before, after: before + strength * (after - before)):
        yield m


@contextmanager
def patch(m: HookedLoopMDM, loop: int, state: Tensor, rows: Tensor | None = None) -> Iterator[HookedLoopMDM]:
    """Put `state` [batch, pos, d_model] in place of H(loop), at the positions `rows` [batch, pos] or at all.

    States of another run: `cache["loop.3.hook_out"]`, or `m.states`.
    """
    check_model(m, "patch", hooked=True)
    check_count("loop", loop, least=0)

    def replace(current: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        if state.shape != current.shape:
            raise UsageError(f"the state to put in has shape {list(state.shape)}, the run's {list(current.shape)}")
        return state if rows is None else torch.where(rows[..., None], state, current)

    with m.hooks([(f"loop.{loop}.hook_out", replace)]):
        yield m


@contextmanager
def skip(
    m: HookedLoopMDM,
    layers: Chosen = None,
    loops: Loops = None,
    by: By = "zero",
    parts: Sequence[Part] = get_args(Part),
) -> Iterator[HookedLoopMDM]:
    """Leave layers out in the chosen loops: they add nothing to the stream, or what a `Reference` adds there.

    `parts`: attention, MLP or both.

    >>> with lm.skip(m, loops=1):
    ...     logits = m(b, n_loops=4)
    """
    check_model(m, "skip", hooked=True)
    for part in parts:
        check_word("part", part, get_args(Part))
    instead = _stand_in(by)
    with m.hooks([(applications(m.cfg, loops, layers, f"hook_{part}_out"), instead) for part in parts]):
        yield m


@contextmanager
def ablate(
    m: HookedLoopMDM, heads: Chosen = None, layers: Chosen = None, loops: Loops = None, by: By = "zero"
) -> Iterator[HookedLoopMDM]:
    """Heads (None: all) of layers (default: the looped ones) give zero, or what they give in a `Reference`.

    >>> with lm.ablate(m, heads=[2], by=lm.Reference.mean(m, b, n_loops=4)):
    ...     logits = m(b, n_loops=4)
    """
    check_model(m, "ablate", hooked=True)
    chosen = several("head", heads, m.cfg.n_heads)
    instead = _stand_in(by)

    def replace(z: Tensor, hook: Any) -> Tensor:
        other = instead(z, hook)
        if chosen is None:
            return other
        z = z.clone()
        z[:, :, chosen] = other[:, :, chosen]
        return z

    with m.hooks([(applications(m.cfg, loops, layers, "z"), replace)]):
        yield m


def _stand_in(by: By) -> Callable[[Tensor, Any], Tensor]:
    """A hook that puts zeros, or what a reference holds, in place of an activation."""
    reference = check_reference(by)

    def replace(x: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(x) if reference is None else reference.at(hook, x)

    return replace
