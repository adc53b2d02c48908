"""Text in and out of a hooked model: tokens, pieces, padding masks, masked batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from loopmdm.model.corpora.tokenizer import MASK, PAD, encode_texts, reading_text
from loopmdm.model.errors import UsageError, check_count, check_data
from loopmdm.model.layout import Layout
from loopmdm.model.masking import mask_tokens
from loopmdm.model.protocol import Core
from loopmdm.model.sequences import MaskedBatch
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
    hooks: Any

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
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(item, str) for item in texts):
            raise UsageError("give a text or a list of texts; token ids go in as a tensor")
        texts = list(texts)
        board = board_of_model(self.cfg)
        if board is None:
            rows = encode_texts(self._text(), texts)
            self._check_symbols(texts, rows)
        else:  # its tokenizer takes whatever is no symbol for [MASK]
            hidden = self.cfg.mask_token_id
            rows = [[hidden if token < 0 else token for token in board.ids(text)] for text in texts]
        longest = max(len(row) for row in rows)
        pad = self._text().token_to_id(self.pad)
        if pad is None and any(len(row) != longest for row in rows):
            raise UsageError(f"this tokenizer has no {self.pad}; give texts of one length")
        if longest == 0:
            raise UsageError("the text is empty; give at least one token")
        tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        return tokens.to(self.model.device)

    def _check_symbols(self, texts: list[str], rows: list[list[int]]) -> None:
        """A task's tokenizer takes whatever is no symbol for [MASK]; that is for gaps alone (`with_gaps`)."""
        unknown = getattr(self._text().model, "unk_token", None)
        if unknown != MASK:
            return
        symbols = {piece for piece in self._text().get_vocab() if piece != MASK}
        for text, ids in zip(texts, rows, strict=True):
            if self.cfg.mask_token_id in ids:
                wrong = next(sign for sign in text if sign not in symbols)
                raise UsageError(f"{wrong!r} is no symbol of this model: {' '.join(sorted(symbols))}")

    def with_gaps(self, text: str | list[str]) -> MaskedBatch:
        """Texts in which each [MASK] is one token to fill: a batch whose hidden tokens nobody knows.

        The one place where [MASK] in a text is not text; `sample(m, infill=text)` fills it.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(item, str) for item in texts):
            raise UsageError("infill takes a text or a list of texts, with [MASK] for each token to fill")
        rows = [self._gapped(item) for item in texts]
        longest, pad = max(map(len, rows)), self._text().token_to_id(self.pad)
        if pad is None and any(len(row) != longest for row in rows):
            raise UsageError(f"this tokenizer has no {self.pad}; give texts of one length")
        tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in rows]).to(self.model.device)
        real, masked = self.padding_mask(tokens), tokens == self.cfg.mask_token_id
        return MaskedBatch(tokens, tokens, masked, real, real)

    def _gapped(self, text: str) -> list[int]:
        if MASK not in text:
            raise UsageError(f"{text!r:.60} has no gap; write [MASK] for each token to fill")
        if board_of_model(self.cfg) is not None:
            return self.to_tokens(text)[0].tolist()
        ids: list[int] = []
        for number, piece in enumerate(text.split(MASK)):
            ids += [self.cfg.mask_token_id] if number else []
            ids += self._text().encode(piece, add_special_tokens=False).ids
        plain, whole = (self._text().encode("a", add_special_tokens=framed).ids for framed in (False, True))
        start = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
        return whole[:start] + ids + whole[start + len(plain) :]  # in [CLS] and [SEP], where a tokenizer has them

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
        try:
            ids = torch.as_tensor(tokens)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise UsageError(f"ids must be integers in rows of one length; got {str(tokens)[:60]}") from error
        check_data("ids", ids)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise UsageError(f"ids must be integers, got {ids.dtype}")
        wrong = ids[(ids < 0) | (ids >= self.cfg.d_vocab)]
        if wrong.numel():
            most = self.cfg.d_vocab - 1
            raise UsageError(f"token id {int(wrong[0])} is outside 0..{most}; use this model's own tokenizer")
        return ids

    def to_string(self, tokens: Tensor) -> str | list[str]:
        """Text of ids [pos], or a list of texts of ids [batch, pos]."""
        tokens = self._readable(tokens)
        if tokens.ndim == 1:
            return self._text().decode(tokens.tolist(), skip_special_tokens=False)
        return self._text().decode_batch(tokens.tolist(), skip_special_tokens=False)

    def mask(
        self,
        text: str | list[str] | Tensor,
        ratio: float | None = None,
        *,
        t: float | None = None,
        seed: int = 0,
        maskable: Tensor | None = None,
    ) -> MaskedBatch:
        """Text in, MaskedBatch out: hide an exact share `ratio`, or each token with probability `t`.

        A Sudoku model also takes boards as people write them (`Board.read`). With neither `ratio` nor `t`, what
        holds [MASK] already (a puzzle, ids) is taken as it is: nobody knows what is hidden.
        """
        tokens, attention_mask = self._inputs(text, None)
        hidden = tokens == self.cfg.mask_token_id
        if ratio is None and t is None and maskable is None and bool(hidden.any()):
            return MaskedBatch(tokens, tokens, hidden, attention_mask=attention_mask)
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

    def words(self, tokens: Tensor) -> Tensor | None:
        """Where `tokens` are none of `special`, [batch, pos]; None if the model has none."""
        if not self.special:
            return None
        return torch.isin(tokens, torch.tensor(sorted(self.special), device=tokens.device), invert=True)

    def blank(self, length: int | None = None, n: int = 1) -> MaskedBatch:
        """`n` sequences of `length` [MASK]s (default: as fit) between what the tokenizer puts around texts."""
        begin, end = self._around()
        length = self.cfg.n_ctx - len(begin) - len(end) if length is None else check_count("length", length)
        return self._template([*begin, *[self.cfg.mask_token_id] * length, *end], n)

    def gaps(self, text: str, n: int = 1) -> MaskedBatch:
        """`n` times a text with [MASK]s in it, as `sample` takes them for clues."""
        b = self._template(self.to_tokens(text)[0].tolist(), n)
        if not bool(b.masked.any()):
            raise UsageError(f"{text[:30]!r} has no [MASK] to fill; write some where the model shall")
        return b

    def _template(self, row: list[int], n: int) -> MaskedBatch:
        tokens = torch.tensor(row, device=self.model.device).expand(check_count("n", n), -1)
        return MaskedBatch(tokens, tokens, tokens == self.cfg.mask_token_id)

    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        if not self.special:
            return [], []
        found = self._text().encode("a")
        inside = [at for at, added in enumerate(found.special_tokens_mask) if not added]
        return found.ids[: inside[0]], found.ids[inside[-1] + 1 :]

    @contextmanager
    def words_only(self) -> Iterator[None]:
        """No token of `special` is drawn or counted inside: their logits are -inf."""

        def closed(logits: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            return logits.index_fill(-1, torch.tensor(sorted(self.special), device=logits.device), float("-inf"))

        with self.hooks([("hook_logits", closed)] if self.special else []):
            yield
