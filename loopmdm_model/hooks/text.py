"""Text in and out of a hooked model: tokens, pieces, padding masks, masked batches."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from loopmdm.model.corpora.tokenizer import MASK, PAD, as_texts, encode_offsets, encode_texts, reading_text
from loopmdm.model.errors import UsageError, check_data
from loopmdm.model.layout import Layout
from loopmdm.model.masking import hide, mask_tokens
from loopmdm.model.protocol import Core
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.tasks.sudoku import board_of_model


class TextEntries:
    """What a model with a tokenizer offers for text; mixed into HookedLoopMDM."""

    cfg: Layout
    tokenizer: Tokenizer | None
    model: Core
    pad: str = PAD
    """The token that fills short texts up."""
    special: frozenset[int] = frozenset()
    """Ids that are neither hidden nor drawn, where a tokenizer puts such tokens around every text."""
    gap_words: tuple[str, ...] = (MASK,)
    """What stands for a token to fill where gaps are asked for, beside the tokenizer's own word for [MASK]."""

    def reads_as(self, other: "TextEntries") -> None:
        """Take over what `other` knows of texts: its tokenizer and all that is above."""
        for name in ("tokenizer", "pad", "special", "gap_words"):
            setattr(self, name, getattr(other, name))

    def _inputs(self, tokens: Tensor | str | list[str], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Token ids of text or ids, and the padding mask that [PAD] implies unless one is given."""
        boards = self._boards(tokens)
        tokens = tokens if boards is None else boards
        if not isinstance(tokens, Tensor):
            tokens = self.to_tokens(tokens)
        return tokens, self.padding_mask(tokens) if mask is None else mask

    def _boards(self, given: object) -> Tensor | None:
        """Ids of boards as people write them, [MASK] where a cell is empty; None if they are none."""
        board = None if isinstance(given, Tensor | str) else board_of_model(self.cfg)
        found = None if board is None else board.find(given)
        if found is None:
            return None
        return found.masked_fill(found < 0, self.cfg.mask_token_id).to(self.model.device)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled; a tokenizer forgets there that it reads text as text."""
        plainly = self.tokenizer is not None and self.tokenizer.encode_special_tokens
        return self.__dict__ | {"_reads_text": plainly}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back, with a tokenizer that reads as it did."""
        plainly = state.pop("_reads_text")
        super().__setstate__(state)  # pyright: ignore[reportAttributeAccessIssue]
        if plainly and self.tokenizer is not None:
            reading_text(self.tokenizer)

    def _text(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError("this model has no tokenizer; give token ids, or set .tokenizer")
        return self.tokenizer

    def to_tokens(self, text: str | list[str]) -> Tensor:
        """Token ids [batch, pos] of a text or several; shorter ones are padded with [PAD]."""
        texts = _texts(text, "give a text or a list of texts; token ids go in as a tensor")
        board = board_of_model(self.cfg)
        if board is None:
            texts = [self._closed_up(text) for text in texts]
            rows = encode_texts(self._text(), texts)
            self._check_symbols(texts, rows)
        else:  # its tokenizer takes whatever is no symbol for [MASK]
            hidden = self.cfg.mask_token_id
            rows = [[hidden if token < 0 else token for token in board.ids(text)] for text in texts]
        return self._padded(rows)

    def _padded(self, rows: list[list[int]]) -> Tensor:
        longest, pad = max(map(len, rows)), self._text().token_to_id(self.pad)
        if pad is None and any(len(row) != longest for row in rows):
            raise UsageError(f"this tokenizer has no {self.pad}; give texts of one length")
        if longest == 0:
            raise UsageError("the text is empty; give at least one token")
        return torch.tensor([row + [pad] * (longest - len(row)) for row in rows]).to(self.model.device)

    @property
    def _of_symbols(self) -> bool:
        """Whether the tokenizer is a task's, one sign a token, which takes any other sign for [MASK]."""
        return getattr(self._text().model, "unk_token", None) == MASK

    def _closed_up(self, text: str) -> str:
        """Without the blanks that stand between symbols where a sequence of them is printed."""
        return "".join(text.split()) if self._of_symbols else text

    def _check_symbols(self, texts: list[str], rows: list[list[int]]) -> None:
        """UsageError for signs that are no symbols."""
        if not self._of_symbols:
            return
        symbols = {piece for piece in self._text().get_vocab() if piece != MASK}
        for text, ids in zip(texts, rows, strict=True):
            if self.cfg.mask_token_id in ids:
                wrong = next(sign for sign in text if sign not in symbols)
                raise UsageError(f"{wrong!r} is no symbol of this model: {' '.join(sorted(symbols))}")

    def with_gaps(self, text: str | list[str]) -> MaskedBatch:
        """Texts in which each [MASK] is one token to fill: a batch whose hidden tokens nobody knows.

        The tokenizer's own word for it does as well, and a specimen's sign (`gap_words`); elsewhere these letters
        are text. `sample(m, infill=text)` fills them; a Sudoku model also takes boards.
        """
        self.cfg.facts.need("masks", by="infill")
        texts = _texts(text, "infill takes a text or a list of texts, with [MASK] for each token to fill")
        board = board_of_model(self.cfg)
        tokens = self._padded([self._gapped(item) for item in texts]) if board is None else self.to_tokens(texts)
        for item, row in zip(texts, tokens, strict=True):
            if self.cfg.mask_token_id not in row:
                raise UsageError(f"{item!r:.60} has no gap; write [MASK] for each token to fill")
        return self._as_hidden(tokens)

    def _as_hidden(self, tokens: Tensor, attention_mask: Tensor | None = None) -> MaskedBatch:
        """Ids with [MASK] among them, as a batch."""
        real = self.padding_mask(tokens) if attention_mask is None else attention_mask
        return MaskedBatch(tokens, tokens, tokens == self.cfg.mask_token_id, self.words(tokens), real)

    def _gapped(self, text: str) -> list[int]:
        """Ids of a text with gaps; the blanks that a tokenizer's own [MASK] takes in go with each.

        Where words are tokens with the blank before them, a gap has that blank, too.
        """
        pieces, mask = self._gaps.split(self._closed_up(text)), self.cfg.mask_token_id
        word = self._text().get_added_tokens_decoder().get(mask)
        if word is not None and word.lstrip:
            pieces[:-1] = [piece.rstrip() for piece in pieces[:-1]]
        if word is not None and word.rstrip:
            pieces[1:] = [piece.lstrip() for piece in pieces[1:]]
        if self._blank_leads():
            pieces[:-1] = [piece.removesuffix(" ") for piece in pieces[:-1]]
        first, *others = rows = encode_texts(self._text(), pieces, framed=False)
        self._check_symbols(pieces, rows)
        begin, end = self.around()
        return [*begin, *first, *(token for ids in others for token in (mask, *ids)), *end]

    def _blank_leads(self) -> bool:
        """Whether a word's token holds the blank before it, as in byte-level vocabularies."""
        ((first, *_),) = encode_texts(self._text(), [" a"], framed=False)
        return self._text().decode([first]).startswith(" ") and self._text().decode([first]) != " "

    @property
    def _gaps(self) -> re.Pattern[str]:
        """What stands for a gap in a text."""
        mask = self.cfg.mask_token_id
        own = None if mask is None else self._text().id_to_token(mask)
        words = {*self.gap_words, *([own] if own else [])}
        return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))

    def around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        if self.tokenizer is None or not self.tokenizer.num_special_tokens_to_add(False):
            return [], []
        found = self.tokenizer.encode("a")
        inside = [at for at, added in enumerate(found.special_tokens_mask) if not added]
        return found.ids[: inside[0]], found.ids[inside[-1] + 1 :]

    def padding_mask(self, tokens: Tensor) -> Tensor | None:
        """The attention mask that [PAD] in `tokens` implies, [batch, pos]; None if there is none."""
        pad = self._text().token_to_id(self.pad) if self.tokenizer else None
        return None if pad is None or not bool((tokens == pad).any()) else tokens != pad

    def to_str_tokens(self, tokens: Tensor | str | list[int]) -> list[str]:
        """The pieces of one sequence (a text, or ids [pos] or [1, pos])."""
        ids = self.to_tokens(tokens) if isinstance(tokens, str) else self._readable(tokens)
        if ids.ndim == 2 and len(ids) != 1:
            raise UsageError(f"to_str_tokens takes one sequence, got {len(ids)}; pick a row")
        return [self._text().decode([int(token)], skip_special_tokens=False) for token in ids.flatten()]

    def _readable(self, tokens: Any) -> Tensor:
        """Ids as a tensor; UsageError for what are none of this model's."""
        ids = as_ids(tokens)
        check_data("ids", ids)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise UsageError(f"ids must be integers, got {ids.dtype}")
        wrong = ids[(ids < 0) | (ids >= self.cfg.d_vocab)]
        if wrong.numel():
            most = self.cfg.d_vocab - 1
            raise UsageError(f"token id {int(wrong[0])} is outside 0..{most}; use this model's own tokenizer")
        return ids

    def to_string(self, tokens: Tensor | list[int]) -> str | list[str]:
        """Text of ids [pos], or a list of texts of ids [batch, pos]."""
        ids = self._readable(tokens)
        if ids.ndim not in (1, 2):
            raise UsageError(f"to_string takes ids [pos] or [batch, pos], got {list(ids.shape)}; pick one step")
        if ids.ndim == 1:
            return self._text().decode(ids.tolist(), skip_special_tokens=False)
        return self._text().decode_batch(ids.tolist(), skip_special_tokens=False)

    def mask(
        self,
        text: str | list[str] | Tensor,
        ratio: float | None = None,
        *,
        t: float | None = None,
        words: str | Sequence[str] | None = None,
        positions: int | Sequence[int] | None = None,
        seed: int = 0,
        maskable: Tensor | None = None,
    ) -> MaskedBatch:
        """Text in, MaskedBatch out: hide an exact share `ratio`, or each token with probability `t`.

        Or hide what you name: `words`, wherever they stand in a text as whole words, with all their tokens, and
        `positions`, of tokens or cells; -1 is the last one. UsageError where there is no such word or position.

        A Sudoku model also takes boards as people write them (`Board.read`). With neither `ratio` nor `t`, what
        holds [MASK] already (a puzzle, ids, a text with gaps) is taken as it is: nobody knows what is hidden,
        and what needs to know it says so.
        """
        if words is not None or positions is not None:
            if (ratio, t, maskable) != (None, None, None):
                raise UsageError("words= and positions= say what is hidden; leave ratio=, t= and maskable= out")
            return self._hidden(text, _listed(words), _listed(positions))
        as_it_is = ratio is None and t is None and maskable is None
        if as_it_is and self._has_gaps(text):
            return self.with_gaps(text)  # pyright: ignore[reportArgumentType]
        tokens, attention_mask = self._inputs(text, None)
        if as_it_is and bool((tokens == self.cfg.mask_token_id).any()):
            return self._as_hidden(tokens, attention_mask)
        if (ratio is None) == (t is None):
            named = "exactly one of ratio= (an exact share) and t= (a probability)"
            raise UsageError(f"say what to hide: {named}, or words=, positions=, or [MASK] in the text")
        maskable = self.words(tokens) if maskable is None else maskable
        return mask_tokens(
            tokens,
            self.cfg.mask_token_id,
            mask_ratio=ratio,
            t=t,
            maskable=maskable,
            attention_mask=attention_mask,
            seed=seed,
        )

    def _hidden(self, text: Any, words: list[str], positions: list[int]) -> MaskedBatch:
        """A text, or several, or ids, with named words and positions hidden."""
        tokens, attention_mask = self._inputs(text, None)
        real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        chosen = torch.zeros_like(real)
        if words:
            chosen |= self._where(_texts(text, "words= needs texts; ids have positions="), words, tokens.shape[1])
        allowed = self.words(tokens)
        allowed = real if allowed is None else real & allowed
        for row, length in enumerate(real.sum(1).tolist()):
            for position in positions:
                if isinstance(position, bool) or not isinstance(position, int) or not -length <= position < length:
                    raise UsageError(f"no position {position!r} in {length} tokens; to_str_tokens shows them")
                if not allowed[row, position % length]:
                    raise UsageError(f"position {position} is none that can be hidden; to_str_tokens shows them")
                chosen[row, position % length] = True
        if not bool(chosen.any()):
            raise UsageError("nothing is named; give words=, positions= or ratio=")
        return hide(Sequences(tokens, allowed, attention_mask), chosen, self.cfg.mask_token_id)

    def _where(self, texts: list[str], words: list[str], length: int) -> Tensor:
        """Which tokens [text, pos] hold a letter of one of the words."""
        if board_of_model(self.cfg) is not None:
            raise UsageError("a board has cells, not words; hide them by positions=")
        offsets = [self._spans(text) for text in texts]
        found = torch.zeros(len(texts), length, dtype=torch.bool)
        for word in words:
            wanted = re.escape(word) if self._of_symbols else rf"(?<!\w){re.escape(word)}(?!\w)"
            places = [list(re.finditer(wanted, text)) for text in texts]
            if not word or not any(places):
                raise UsageError(f"no word {word!r} in the text; words are whole, with their own capitals")
            for row, (tokens, spans) in enumerate(zip(offsets, places, strict=True)):
                for token, (start, end) in enumerate(tokens):
                    found[row, token] |= any(start < span.end() and span.start() < end for span in spans)
        return found.to(self.model.device)

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """From where to where in a text each of its tokens stands."""
        if self._of_symbols:
            return [(at, at + 1) for at, sign in enumerate(text) if not sign.isspace()]
        return encode_offsets(self._text(), text)

    def _has_gaps(self, text: object) -> bool:
        texts = as_texts(text)
        return bool(texts) and self.tokenizer is not None and any(map(self._gaps.search, texts))

    def words(self, tokens: Tensor) -> Tensor | None:
        """Where `tokens` are none of `special`, [batch, pos]; None if the model has none."""
        if not self.special:
            return None
        return torch.isin(tokens, torch.tensor(sorted(self.special), device=tokens.device), invert=True)


def as_ids(tokens: Any, device: torch.device | None = None) -> Tensor:
    """A tensor of what may be ids; UsageError for what makes none."""
    try:
        return torch.as_tensor(tokens, device=device)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise UsageError(f"ids must be integers in rows of one length; got {str(tokens)[:60]}") from error


def _listed(given: Any) -> list[Any]:
    """One or several, or none, as a list."""
    if given is None:
        return []
    return [given] if isinstance(given, str | int) else list(given)


def _texts(text: object, says: str) -> list[str]:
    """A text or several, as a list; UsageError with what is wanted."""
    texts = as_texts(text)
    if not texts:
        raise UsageError(says)
    _check_whole(texts)
    return texts


def _check_whole(texts: list[str]) -> None:
    """UsageError for half a surrogate pair, which no encoding has."""
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            which = "the text" if len(texts) == 1 else f"text {number}"
            raise UsageError(f"{which} holds half a surrogate pair ({error}); decode it again") from error
