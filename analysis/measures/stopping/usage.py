"""Where a stopping rule spends its loops: by noise level, token class, difficulty and denoising step.

The rule runs online, so that both scopes can be asked: with scope "sequence" every hidden token has the loops of
its sequence, with scope "token" its own. A class of tokens is anything that names each position of a batch; loops
are averaged over hidden tokens, with errors over sequences or `clusters`. Difficulty is the loss at `max_loops`
of the unit that stops (sequence or token), in terciles. Definitions are ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from loopmdm.analysis.measures.stopping.record import Data, as_data, masked_draws, rule_name
from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.likelihood import Read, row_cross_entropy
from loopmdm.model.errors import check_count, check_word
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.stopping.rules import StoppingRule
from loopmdm.model.tasks.sudoku import Board

TERCILES = ("low", "middle", "high")
COLUMNS = ["rule", "threshold", "max_loops", "scope", "by", "group", "value", "standard_error", "n", "n_tokens"]


@dataclass(frozen=True)
class TokenClasses:
    """A name for every position: `of(batch)` gives [batch, pos] indices into `names`."""

    names: tuple[str, ...]
    of: Callable[[MaskedBatch], Int[Tensor, "batch pos"]]


def frequency_classes(tokens: Int[Tensor, "batch pos"], d_vocab: int) -> TokenClasses:
    """Terciles of how often the true token occurs in `tokens`, each a third of the occurrences."""
    terciles = _frequency_terciles(tokens, d_vocab)
    return TokenClasses(tuple(f"{name} frequency" for name in TERCILES), lambda b: terciles[b.clean.cpu()])


def piece_classes(tokens: Int[Tensor, "batch pos"], tokenizer: Tokenizer) -> TokenClasses:
    """Frequency terciles of the true piece, apart for pieces that start a word and that continue one.

    A byte-level piece starts a word if it begins with a space (or is no letter: punctuation stands alone).
    """
    size = tokenizer.get_vocab_size()
    terciles = _frequency_terciles(tokens, size)
    starts = torch.tensor([_starts_word(tokenizer.decode([token])) for token in range(size)])
    index = terciles + len(TERCILES) * (~starts).long()
    names = [f"{name} frequency, {place}" for place in ("word start", "inside a word") for name in TERCILES]
    return TokenClasses(tuple(names), lambda b: index[b.clean.cpu()])


def _starts_word(piece: str) -> bool:
    return not piece[:1].isalnum()


def peer_classes(board: Board, width: int = 5) -> TokenClasses:
    """Sudoku: how many of a cell's peers (row, column, box) are hidden, in classes `width` wide."""
    size, cell = board.size, torch.arange(board.n_cells)
    row, column = cell // size, cell % size
    box = row // board.box_rows * board.box_rows + column // board.box_columns
    peers = torch.stack([unit[:, None] == unit[None] for unit in (row, column, box)]).any(0)
    peers &= ~torch.eye(board.n_cells, dtype=torch.bool)
    n_classes = int(peers[0].sum()) // check_count("width", width) + 1
    names = tuple(f"{k * width}-{k * width + width - 1} hidden peers" for k in range(n_classes))
    return TokenClasses(names, lambda b: (b.masked.cpu().double() @ peers.double()).long() // width)


def _frequency_terciles(tokens: Tensor, d_vocab: int) -> Int[Tensor, " token"]:
    counts = torch.bincount(tokens.flatten().cpu().long(), minlength=d_vocab).double()
    order = counts.argsort(stable=True)
    below = torch.empty_like(counts)  # share of occurrences up to the middle of the token's own
    below[order] = (counts[order].cumsum(0) - counts[order] / 2) / counts.sum()
    return (below * len(TERCILES)).long().clamp(max=len(TERCILES) - 1)


@torch.no_grad()
def loop_usage(
    m: LoopedModel,
    data: Tensor | Data,
    rule: StoppingRule,
    scopes: Sequence[str] = ("sequence", "token"),
    classes: TokenClasses | None = None,
    n_bins: int = 5,
    n_samples: int = 2,
    maskable: Tensor | None = None,
    clusters: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Loops that hidden tokens get under `rule`, run online in each scope.

    `data` are clean tokens, masked as in the NELBO (`n_samples` masks a sequence), or a MaskedBatch as it is.
    `by` is "all", "mask_ratio" (`group` is the bin's middle), "difficulty" (terciles of the loss at max_loops, of
    the sequence or of the token) and "token_class" (`classes`, default frequency of the true token in `data`).
    Columns: rule threshold max_loops scope by group value (mean loops) standard_error n (masked sequences with
    such tokens) n_tokens. Groups without tokens are NaN with n = 0.
    """
    check_count("n_bins", n_bins)
    given, read = as_data(m, data, maskable, clusters), Read(None, None, n_samples, seed, batch_size)
    draws = masked_draws(m, given, read)
    classes = classes or frequency_classes(draws[0].clean, m.cfg.d_vocab)
    online = [_in_scope(rule, scope) for scope in scopes]
    parts = [
        _Tokens.run(m, part, online, classes, n_bins) for draw in draws for _, part in draw.batches(batch_size)
    ]
    tokens = _Tokens.join(parts)
    rows = []
    for place, scope in enumerate(scopes):
        for by, names, index in tokens.groupings(scope, classes, n_bins):
            for number, name in enumerate(names):
                found = tokens.mean(tokens.loops[place], index == number, np.tile(given.owners, len(draws)))
                rows.append((rule_name(replace(rule, scope="sequence")), rule.threshold, rule.max_loops, scope, by,
                             name, *found))  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def _in_scope(rule: StoppingRule, scope: str) -> StoppingRule:
    check_word("scopes", scope, ("sequence", "token"))
    return replace(rule, scope=scope)


@dataclass(frozen=True)
class _Tokens:
    """All hidden tokens: `row` of each, `loops` [scope, token], `loss` at the last loop, class; by row: ratio."""

    row: np.ndarray
    loops: np.ndarray
    loss: np.ndarray
    kind: np.ndarray
    ratio: np.ndarray

    @classmethod
    def run(
        cls, m: LoopedModel, part: MaskedBatch, rules: list[StoppingRule], classes: TokenClasses, n_bins: int
    ) -> "_Tokens":
        last = m.run(part.tokens, rules[0].max_loops, attention_mask=part.attention_mask, rows=part.masked)
        loops, nobody = [], torch.zeros_like(part.masked)
        for rule in rules:
            ran = m.run(part.tokens, stop=rule, attention_mask=part.attention_mask, rows=nobody)
            each = ran.loops_used[:, None].expand_as(part.masked) if ran.token_loops is None else ran.token_loops
            loops.append(each[part.masked].cpu().numpy())
        bins = ((part.masked.sum(-1) * n_bins - 1) // part.sequences.lengths).clamp(0, n_bins - 1)
        losses = row_cross_entropy(last.logits, part)
        kind = classes.of(part)[part.masked.cpu()]
        values = (part.masked.nonzero()[:, 0], losses, kind, bins)
        row, loss, kind, ratio = (value.cpu().numpy() for value in values)
        return cls(row, np.stack(loops), loss, kind, ratio)

    @classmethod
    def join(cls, parts: list["_Tokens"]) -> "_Tokens":
        offsets = np.cumsum([0, *(len(part.ratio) for part in parts[:-1])])
        row = np.concatenate([part.row + offset for part, offset in zip(parts, offsets, strict=True)])
        loops = np.concatenate([part.loops for part in parts], axis=1)
        rest = (np.concatenate([getattr(part, name) for part in parts]) for name in ("loss", "kind", "ratio"))
        return cls(row, loops, *rest)

    def groupings(self, scope: str, classes: TokenClasses, n_bins: int) -> list[tuple[str, list, np.ndarray]]:
        """(by, names of groups, group [token])."""
        counts = np.bincount(self.row, minlength=len(self.ratio))
        unit = self.loss
        if scope == "sequence":
            unit = (np.bincount(self.row, self.loss, minlength=len(counts)) / np.maximum(counts, 1))[self.row]
            edges = np.quantile(unit[np.unique(self.row, return_index=True)[1]], [1 / 3, 2 / 3])
        else:
            edges = np.quantile(unit, [1 / 3, 2 / 3])
        middles = [f"{(number + 0.5) / n_bins:.3g}" for number in range(n_bins)]
        return [
            ("all", ["all"], np.zeros_like(self.row)),
            ("mask_ratio", middles, self.ratio[self.row]),
            ("difficulty", list(TERCILES), np.searchsorted(edges, unit)),
            ("token_class", list(classes.names), self.kind),
        ]

    def mean(self, loops: np.ndarray, member: np.ndarray, clusters: np.ndarray) -> tuple[float, float, int, int]:
        """Mean over the tokens `member`, its error, masked sequences and tokens."""
        counts = np.bincount(self.row[member], minlength=len(self.ratio)).astype(float)
        sums = np.bincount(self.row[member], loops[member].astype(float), minlength=len(self.ratio))
        if not counts.any():
            return float("nan"), float("nan"), 0, 0
        value, error, n = stats.weighted_mean_and_error(sums / np.maximum(counts, 1), counts, clusters)
        return float(value), float(error), int(n), int(counts.sum())
