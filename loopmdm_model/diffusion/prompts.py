"""What a sampler starts from: prompts and clues, read once.

A prompt is what a sequence begins with: a text, ids, or one of these for each sequence. Clues are ids anywhere in
it. What neither gives is free, and to be filled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopmdm.model.corpora.ids import as_list
from loopmdm.model.corpora.tokenizer import as_texts
from loopmdm.model.errors import UsageError, check_count, check_data, shown
from loopmdm.model.layout import Layout
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.sudoku import board_of_model


@dataclass(frozen=True)
class Start:
    """Ids `tokens` [n, pos] with [MASK] where something is to be filled: the positions `free` [n, pos].

    `given` [n, pos]: what prompts and clues say, without what a tokenizer puts around texts; `real` [n, pos]: what
    is not padding, None without any.
    """

    tokens: Int[Tensor, "n pos"]
    free: Bool[Tensor, "n pos"]
    given: Bool[Tensor, "n pos"]
    real: Bool[Tensor, "n pos"] | None = None

    def __len__(self) -> int:
        """Sequences."""
        return len(self.tokens)

    def rows(self, keep: slice) -> "Start":
        """Some of the sequences."""
        real = None if self.real is None else self.real[keep]
        return Start(self.tokens[keep], self.free[keep], self.given[keep], real)

    @classmethod
    def of(
        cls,
        model: LoopedModel,
        prompt: Any = None,
        clues: Any = None,
        n: int | None = None,
        length: int | None = None,
    ) -> "Start":
        """Read what `sample` is given; UsageError for what does not fit the model or each other."""
        model.cfg.facts.need("masks", by="sample")
        cfg, around = model.cfg, cache(lambda: _around(model))
        frame = _frame(around, prompt, clues)
        real = clues.sequences.real if isinstance(clues, MaskedBatch) else None
        prompts, clues = _prompts(model, prompt, around), _clues(model, clues)
        n = _count(n, prompts, clues)
        known = _framed(n, _inside(cfg, frame, clues, length), frame).to(_device(model))
        check_data("the model's weights", known)
        if prompts is not None:
            _begin(known, prompts, known.shape[1] - len(frame[1]), cfg.n_ctx)
        known = _place(known, clues)
        _check_known(known, cfg.d_vocab, cfg.mask_token_id)
        tokens, free = known.masked_fill(known < 0, cfg.mask_token_id), known < 0
        words = getattr(model, "words", lambda _: None)(tokens)
        given = ~free if words is None else ~free & words
        if real is None:
            return cls(tokens, free, given)
        real = real.to(free.device).expand_as(free)
        return cls(tokens, free & real, given & real, real)


def infilled(model: LoopedModel, infill: Any, prompt: Any, clues: Any, length: Any) -> Any:
    """The clues that `infill` gives, or those that were given; UsageError for it beside others."""
    if infill is None:
        return clues
    given = [
        name for name, value in (("prompt", prompt), ("clues", clues), ("length", length)) if value is not None
    ]
    if given:
        raise UsageError(f"infill is a whole text; leave {given[0]} out")
    with_gaps = getattr(model, "with_gaps", None)
    if with_gaps is None:
        raise UsageError("infill needs a tokenizer: use HookedLoopMDM, or give clues= by id")
    return with_gaps(infill)


Frame = tuple[list[int], list[int]]
"""Ids before and after a text."""
Around = Callable[[], Frame]
"""Looks up what a model puts around every text, once, and only where there is text."""


def _frame(around: Around, prompt: Any, clues: Any) -> Frame:
    """What stands around the sequences; nothing where ids or whole rows are given, which are what they are."""
    written = prompt is None or as_texts(prompt) is not None
    return around() if written and (clues is None or isinstance(clues, Mapping)) else ([], [])


def _around(model: LoopedModel) -> Frame:
    around = getattr(model, "around", None)
    return ([], []) if around is None else around()


def _inside(cfg: Layout, frame: Frame, clues: dict | Tensor | None, length: int | None) -> int:
    """How many positions stand inside the frame."""
    room = cfg.n_ctx - sum(map(len, frame))
    if length is None:
        length = clues.shape[1] if isinstance(clues, Tensor) else room
    if check_count("length", length) > room:
        less = f" less {cfg.n_ctx - room} around a text" if any(frame) else ""
        raise UsageError(f"length {length} exceeds n_ctx = {cfg.n_ctx}{less}; shorten it")
    return length


def _framed(n: int, inside: int, frame: Frame) -> Int[Tensor, "n pos"]:
    """Ids with -1 where nothing is known: all but the frame."""
    begin, end = frame
    return torch.tensor([*begin, *[-1] * inside, *end], dtype=torch.long).repeat(n, 1)


def _device(model: LoopedModel) -> torch.device:
    return next(model.parameters()).device if isinstance(model, torch.nn.Module) else torch.device("cpu")


def _count(n: int | None, prompts: list | None, clues: dict | Tensor | None) -> int:
    """How many sequences there are: one prompt, or one row of clues, serves any number."""
    held = {len(rows) for rows in (prompts, clues) if isinstance(rows, list | Tensor) and len(rows) > 1}
    if len(held) > 1 or (held and n not in (None, *held)):
        raise UsageError(f"n, prompts and clues disagree on the number of sequences: {sorted({n or 1} | held)}")
    return held.pop() if held else check_count("n", 1 if n is None else n)


def _begin(known: Tensor, prompts: list[list[int]], length: int, n_ctx: int) -> None:
    """Write the prompts into `known` [n, pos], each at the beginning of its sequences, up to `length`."""
    longest = max(len(ids) for ids in prompts)
    if longest > length:
        raise UsageError(f"the prompt of {longest} tokens exceeds the length of {length} (n_ctx = {n_ctx})")
    for row in range(len(known)):
        ids = prompts[row % len(prompts)]
        known[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)


def _place(known: Tensor, clues: dict[int, int] | Tensor | None) -> Tensor:
    """`known` [n, pos] with the clues where they belong."""
    prompts, length = known.clone(), known.shape[1]
    if isinstance(clues, dict):
        for position, token in clues.items():
            if not 0 <= position < length:
                raise UsageError(f"clue at position {shown(position)} lies outside 0..{length - 1}")
            known[:, position] = token
    elif clues is not None:
        if clues.shape[1] != length:
            raise UsageError(
                f"clues have {clues.shape[1]} positions, the sequence {length}; mark free ones with -1"
            )
        known = torch.where(clues.to(known) >= 0, clues.to(known), known)
    _check_apart(prompts, known)
    return known


def _check_apart(known: Tensor, placed: Tensor) -> None:
    """UsageError where a clue would replace an id of the prompt."""
    clash = ((known >= 0) & (placed != known)).nonzero()
    if len(clash):
        row, position = clash[0].tolist()
        token, given = int(placed[row, position]), int(known[row, position])
        raise UsageError(
            f"the clue {token} stands at position {position}, which holds {given} already (of the prompt, or "
            "around every text); leave it out"
        )


def _check_known(known: Tensor, d_vocab: int, mask_token_id: int) -> None:
    wrong = (known >= d_vocab) | (known == mask_token_id)
    if bool(wrong.any()):
        row, position = wrong.nonzero()[0].tolist()
        token = int(known[row, position])
        what = "[MASK]" if token == mask_token_id else f"outside 0..{d_vocab - 1}"
        raise UsageError(f"the given id {token} at position {position} is {what}; mark free positions with -1")


def _prompts(model: LoopedModel, prompt: Any, around: Around) -> list[list[int]] | None:
    """The ids of each prompt, without padding: a sequence goes on where its own text ends."""
    if prompt is None:
        return None
    check_data("prompts", prompt)
    if isinstance(prompt, Tensor | np.ndarray):
        prompt = prompt.tolist()
    if isinstance(prompt, list | tuple):
        prompt = [part.tolist() if isinstance(part, Tensor | np.ndarray) else part for part in prompt]
    if isinstance(prompt, str) or (
        isinstance(prompt, Sequence) and prompt and not isinstance(prompt[0], Sequence)
    ):
        prompt = [prompt]
    rows = []
    for item in prompt if isinstance(prompt, Sequence) else [prompt]:
        if isinstance(item, str):
            to_tokens = getattr(model, "to_tokens", None)
            if to_tokens is None:
                raise UsageError("a text prompt needs a tokenizer: use HookedLoopMDM, or give token ids")
            item = to_tokens(item)[0].tolist() if item else []
            item = item[: len(item) - len(around()[1])]  # the text goes on
        ids = as_list(item)
        if ids is None or any(token < 0 for token in ids):
            raise UsageError(f"a prompt must be a text or token ids, got {item!r:.80}")
        rows.append(_unpadded(model, ids))
    return rows or None


def _unpadded(model: LoopedModel, ids: list[int]) -> list[int]:
    infer = getattr(model, "padding_mask", None)
    real = infer(torch.tensor([ids])) if infer is not None and ids else None
    return ids if real is None else [token for token, kept in zip(ids, real[0].tolist(), strict=True) if kept]


def _clues(model: LoopedModel, clues: Any) -> dict[int, int] | Tensor | None:
    """Clues by position, or ids [n, pos] with -1 where free."""
    check_data("clues", clues)
    if clues is None:
        return None
    if isinstance(clues, MaskedBatch):
        clues = clues.clean.masked_fill(clues.masked, -1)
    if isinstance(clues, Mapping):
        return _by_position(dict(clues), model.cfg.mask_token_id, model.cfg.d_vocab)
    board = board_of_model(model.cfg)
    if board is not None and board.is_written(clues):
        return board.read(clues)
    wanted = "clues must be {position: id}, or integer ids [pos] or [n, pos] with -1 where free"
    try:
        clues = torch.as_tensor(clues)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise UsageError(f"{wanted}; got {clues!r:.60}") from None
    wrong_kind = clues.is_floating_point() or clues.dtype == torch.bool
    if clues.ndim not in (1, 2) or 0 in clues.shape or wrong_kind or bool((clues < -1).any()):
        raise UsageError(wanted)
    return clues.reshape(-1, clues.shape[-1])


def _by_position(pairs: dict[Any, Any], mask_token_id: int, d_vocab: int) -> dict[int, int]:
    words = [word for pair in pairs.items() for word in pair]
    if not all(isinstance(word, int) and not isinstance(word, bool) for word in words):
        raise UsageError(f"clues must be {{position: id}} with integers, got {pairs!r:.80}")
    wrong = [token for token in pairs.values() if token < 0]
    if wrong:
        raise UsageError(f"clue {wrong[0]} is no token id; leave free positions out")
    wrong = [token for token in pairs.values() if token >= d_vocab]
    if wrong:
        raise UsageError(f"the clue {shown(wrong[0])} is outside 0..{d_vocab - 1}; give an id of this model")
    if mask_token_id in pairs.values():
        raise UsageError("a clue is [MASK]; leave free positions out")
    return pairs
