"""Text in and out of a hooked model: tokens, pieces, padding masks, masked batches."""

import torch
from tokenizers import Tokenizer
from torch import Tensor

from loopmdm.model.corpora.tokenizer import PAD
from loopmdm.model.errors import UsageError
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

    def _text(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError("this model has no tokenizer; give token ids, or set .tokenizer")
        return self.tokenizer

    def to_tokens(self, text: str | list[str]) -> Tensor:
        """Token ids [batch, pos] of a text or several; shorter ones are padded with [PAD]."""
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(item, str) for item in texts):
            raise UsageError("give a text or a list of texts; token ids go in as a tensor")
        board = board_of_model(self.cfg)
        if board is None:
            rows = [encoding.ids for encoding in self._text().encode_batch(texts)]
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

    def padding_mask(self, tokens: Tensor) -> Tensor | None:
        """The attention mask that [PAD] in `tokens` implies, [batch, pos]; None if there is none."""
        pad = self._text().token_to_id(self.pad) if self.tokenizer else None
        return None if pad is None or not bool((tokens == pad).any()) else tokens != pad

    def to_str_tokens(self, tokens: Tensor | str | list[int]) -> list[str]:
        """The pieces of one sequence (a text, or ids [pos] or [1, pos])."""
        ids = self.to_tokens(tokens) if isinstance(tokens, str) else torch.as_tensor(tokens)
        if ids.ndim == 2 and len(ids) != 1:
            raise UsageError(f"to_str_tokens takes one sequence, got {len(ids)}; pick a row")
        return [self._text().decode([int(token)], skip_special_tokens=False) for token in ids.flatten()]

    def to_string(self, tokens: Tensor) -> str | list[str]:
        """Text of ids [pos], or a list of texts of ids [batch, pos]."""
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

        A Sudoku model also takes complete boards as people write them (`Board.read`).
        """
        tokens, attention_mask = self._inputs(text, None)
        return mask_tokens(
            tokens,
            self.cfg.mask_token_id,
            mask_ratio=ratio,
            t=t,
            maskable=maskable,
            attention_mask=attention_mask,
            seed=seed,
        )
