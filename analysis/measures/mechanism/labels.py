"""What a probe is asked of a position, as yes or no questions: of a Sudoku cell, of a token of text.

Sudoku, of hidden cells, what is known after k rounds of naked singles (`propagate`): k = 0 is the clues alone

    row, column, box   has the cell's row (column, box) a cell that is known to hold v?
    candidate          may the cell still hold v?
    symbol             is v the solution's symbol there? one of them is

Text, of the token that is asked, by its letters alone, without a tagger (so no parts of speech):

    digit, punctuation, capitalised, starts a word, function word
    first letter       which of a..z its word begins with, of tokens that start one with such a letter
    next first letter  the same of the token after it

The `types` of positions are what a control task's labels hang on (Hewitt & Liang 2019): cells, or token ids.
"""

import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopmdm.analysis.measures.known.boards import board_of
from loopmdm.analysis.measures.mechanism.contrast import questions
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.propagation import candidates_by_round, propagate, units

Target = tuple[str, int | None]
"""What is asked, and after how many rounds (None: rounds have no part in it)."""
_FUNCTION_WORDS = """
a an the and or but nor so if as than that this these those of in on at by to for from with into upon over under i
me my we us our you your he him his she her it its they them their who which what be is are was were been has have
had do does did will would shall should can could may might must not no there when
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
MARKS = "Ġ▁ "
"""How tokenizers write the space before a word; the others write ## where a word goes on."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Positions `rows` [batch, pos] of a batch with answers [row, class] by target, and a type [row] each."""

    batch: MaskedBatch
    rows: Bool[Tensor, "batch pos"]
    answers: dict[Target, Bool[np.ndarray, "row class"]]
    types: Int[np.ndarray, " row"]

    def __post_init__(self):
        """One answer a row."""
        n = int(self.rows.sum())
        wrong = [name for (name, _), values in self.answers.items() if len(values) != n]
        if wrong or len(self.types) != n or self.rows.shape != self.batch.tokens.shape:
            raise UsageError(f"answers and types go by the {n} rows; those of {(wrong or ['types'])[0]} do not")

    @property
    def sequence(self) -> Int[np.ndarray, " row"]:
        """The sequence of each row."""
        return self.rows.nonzero()[:, 0].cpu().numpy()

    def some(self, n_rows: int, seed: int) -> "Labelled":
        """At most `n_rows` of them, at random."""
        number = len(self.types)
        if number <= check_count("n_rows", n_rows):
            return self
        keep = row_uniforms(seed, "order", 1, number)[0].argsort()[:n_rows].sort().values
        rows = torch.zeros_like(self.rows)
        rows[tuple(self.rows.nonzero()[keep.to(self.rows.device)].T)] = True
        answers = {target: values[keep.numpy()] for target, values in self.answers.items()}
        return Labelled(self.batch, rows, answers, self.types[keep.numpy()])


def sudoku_labels(b: MaskedBatch, n_rounds: int = 2) -> Labelled:
    """Questions of the module about the hidden cells of boards, after 0..n_rounds rounds."""
    board, hidden = board_of(b), b.masked.cpu()
    size = board.size
    found = propagate(board, b.tokens, hidden_singles=False)
    rounds = candidates_by_round(board, b.tokens, n_rounds, hidden_singles=False)
    member = units(board).float()
    answers: dict[Target, np.ndarray] = {}
    for step, now in enumerate(rounds):
        known = (found.depth >= 0) & (found.depth <= step)
        symbols = torch.nn.functional.one_hot(found.symbols.clamp(min=0), size) * known[..., None]
        for number, kind in enumerate(("row", "column", "box")):
            mine = member[number * size : (number + 1) * size]
            held = torch.einsum("uc,bcs->bus", mine, symbols.float())
            answers[kind, step] = (torch.einsum("uc,bus->bcs", mine, held)[hidden] > 0).numpy()
        answers["candidate", step] = now[hidden].numpy()
    answers["symbol", None] = (b.clean.cpu()[hidden][:, None] == torch.arange(size)).numpy()
    return Labelled(b, b.masked, answers, hidden.nonzero()[:, 1].numpy())


def text_labels(m: HookedLoopMDM, b: MaskedBatch) -> Labelled:
    """Questions of the module about hidden tokens that have another one after them, by the model's tokenizer.

    Of a causal model each position is asked for the token after it (`questions`); of a shifted one that
    which holds the mask is looked at, not the one before it.
    """
    if m.tokenizer is None:
        raise UsageError("probes of text need a tokenizer; open the model with one, or give Labelled of your own")
    b = questions("probes", m, b)
    told = b.masked if m.facts.causal else b.real
    follows = torch.cat([told[:, 1:], torch.zeros_like(told[:, :1])], 1)
    rows = b.masked & follows
    truth = b.clean if m.facts.causal else b.truth("probes")
    asked, after = truth[rows].cpu().numpy(), b.clean.roll(-1, 1)[rows].cpu().numpy()
    kinds, letters = _spelled(m.tokenizer, np.unique([asked, after]))
    here = np.stack([kinds[int(token)] for token in asked]) if len(asked) else np.zeros((0, len(KINDS)), bool)
    answers: dict[Target, np.ndarray] = {(name, None): here[:, [at]] for at, name in enumerate(KINDS)}
    for name, tokens in (("first letter", asked), ("next first letter", after)):
        answers[name, None] = np.array([letters[int(token)] for token in tokens]).reshape(-1, 26)
    return Labelled(b, rows, answers, asked)


KINDS = ("digit", "punctuation", "capitalised", "starts a word", "function word")


def _spelled(tokenizer: Any, ids: Iterable[int]) -> tuple[dict[int, list[bool]], dict[int, list[bool]]]:
    """By token id: which of `KINDS` it is, and the letter that its word begins with."""
    continued = any(piece.startswith("##") for piece in tokenizer.get_vocab())
    kinds, letters = {}, {}
    for number in map(int, ids):
        piece = tokenizer.id_to_token(number) or ""
        starts = not piece.startswith("##") if continued else piece[:1] in MARKS and bool(piece)
        word = piece.removeprefix("##").lstrip(MARKS)
        kinds[number] = [
            word.isdigit(),
            bool(word) and all(c in string.punctuation or c in "—–‘’“”…" for c in word),
            word[:1].isupper(),
            starts,
            starts and word.lower() in FUNCTION_WORDS,
        ]
        letters[number] = [starts and word[:1].lower() == letter for letter in string.ascii_lowercase]
    return kinds, letters
