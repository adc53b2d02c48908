"""Test sets of the shipped tasks and of a user's own texts, Sudoku solve rate, and n-gram reference points."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer
from torch import Tensor

from loopmdm.model.corpora import documents as corpora
from loopmdm.model.corpora import own_files
from loopmdm.model.corpora.shards import Prepared
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.precision import check_logits
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.tasks import gsm
from loopmdm.model.tasks.batches import GENERATED, HELD_OUT_SEEDS, cut, encode
from loopmdm.model.tasks.sudoku import BOARDS, Board


@dataclass(frozen=True)
class TestSet:
    """Clean test `sequences`, whose clusters share a document or template; NaN bytes where not all is text."""

    task: str
    sequences: Sequences
    bytes_per_token: float = float("nan")

    __test__ = False  # not a pytest class

    @property
    def label(self) -> str:
        """The task as tables have it, which are passed on: of own texts without the folder."""
        _, own, pattern = self.task.rpartition(own_files.FILES)
        return own + PurePath(pattern).name if own else self.task

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """Their ids."""
        return self.sequences.tokens

    @property
    def maskable(self) -> Bool[Tensor, "batch pos"] | None:
        """What is predicted, if not everything."""
        return self.sequences.maskable

    @property
    def clusters(self) -> np.ndarray | None:
        """Which of them share a document or template."""
        return self.sequences.clusters

    def to(self, device: torch.device) -> "TestSet":
        """The same there."""
        return replace(self, sequences=self.sequences.to(device))

    @property
    def n_maskable(self) -> Int[Tensor, " batch"]:
        """How many positions of each sequence are predicted."""
        return self.sequences.lengths


def task_of(record: dict) -> str:
    """The corpus or task a model was trained on, from its train.json."""
    try:
        corpus = record["spec"]["data"]["corpus"]
    except (KeyError, TypeError):
        corpus = None
    if not isinstance(corpus, str):
        raise UsageError("this model has no train.json that names its corpus; evaluate it from Python")
    return corpus


def test_set_of(
    record: dict, length: int, tokenizer: Tokenizer | None, split: corpora.Split = "test", n: int | None = None
) -> TestSet:
    """The held-out sequences of what a model was trained on, by its train.json; own files must be those of then.

    Files that came or went move others from split to split: what was trained on would be measured on.
    """
    task, then = task_of(record), record.get("corpus_sha256")
    own = None if tokenizer is None else _own(task, tokenizer)
    if tokenizer is None or own is None:
        return load_test_set(task, length, tokenizer, split, n)
    if then not in (None, own.fingerprint):
        raise UsageError(
            f"{task} is not what the model was trained on any more, or it was trained by a version before 0.2.0; "
            "restore it, train again, or give --text FILE"
        )
    return _text_set(task, own.held_out[split], length, tokenizer)


MOST_TOKENS = 2**22
"""Of a test set; of a longer one, as of own files, blocks are taken that are spread evenly over it."""


GENERATED_TESTS = 1000
"""Boards and generated sequences in a test set, unless more are asked for."""


def load_test_set(
    task: str, length: int, tokenizer: Tokenizer | None, split: corpora.Split = "test", n: int | None = None
) -> TestSet:
    """Held-out sequences; text comes from the embedded slice, which holds the whole split.

    Of what is generated there are `n`, but no fewer than `GENERATED_TESTS`; the first ones never change.
    """
    size = max(GENERATED_TESTS, n or 0)
    if task in BOARDS:
        return TestSet(task, Sequences.of(BOARDS[task].sample_grids(split, size)))
    if task in GENERATED:
        tokens = GENERATED[task].sample(size, HELD_OUT_SEEDS[split])
        return TestSet(task, Sequences.of(tokens, GENERATED[task].predicted(tokens)))
    if tokenizer is None:
        raise UsageError(f"evaluating on {task} needs the model's tokenizer.json")
    if task == gsm.NAME:
        tokens, kept = gsm.fit(tokenizer, gsm.held_out(split), length)
        maskable = gsm.after_question(tokens, tokenizer)
        return TestSet(task, Sequences.of(tokens, maskable, clusters=[problem.template for problem in kept]))
    own = _own(task, tokenizer)
    if own is not None:
        documents = own.held_out[split]
    else:
        documents = encode(tokenizer, corpora.load("sotu-slice" if task == "sotu" else task, split))
    return _text_set(task, documents, length, tokenizer)


def _text_set(task: str, documents: Sequence[np.ndarray], length: int, tokenizer: Tokenizer) -> TestSet:
    """Blocks of documents given as ids."""
    tokens, owners = cut(documents, length, max(1, MOST_TOKENS // length))
    n_bytes = sum(len(tokenizer.decode(row).encode()) for row in tokens.tolist())
    return TestSet(task, Sequences.of(tokens, clusters=owners), n_bytes / tokens.numel())


def _own(task: str, tokenizer: Tokenizer) -> Prepared | None:
    """A user's own texts as ids; None for another task."""
    return own_files.prepare(task, tokenizer) if task.startswith(own_files.FILES) else None


HELD_OUT_EVERY = 4
"""Of a user's own texts every fourth is there to choose thresholds on, and is not measured on."""


@runtime_checkable
class Reader(Protocol):
    """The model that reads texts: `pad` is the word that fills up, `words` tells a text's own tokens."""

    cfg: Any
    tokenizer: Any
    pad: Any
    model: Any

    def words(self, tokens: Tensor) -> Tensor | None:
        """What may be masked [batch, pos], if not everything."""
        ...


def text_set(
    name: str, texts: Sequence[str], m: Reader, split: corpora.Split = "test", every: int = HELD_OUT_EVERY
) -> TestSet:
    """Texts as sequences of their own, cut to n_ctx; every `every`th is validation's, the others are the test's.

    What the tokenizer puts around a text is not predicted. Without a tokenizer a text is ids with spaces between.
    """
    held_out = [index % every == every - 1 for index in range(len(texts))]
    chosen = [text for text, held in zip(texts, held_out, strict=True) if held == (split == "validation")]
    if not chosen:
        raise UsageError(f"{name} has {len(texts)} texts, none for {split}; give at least {every}")
    rows = [_ids(m, text)[: m.cfg.n_ctx] for text in chosen]
    longest = max(map(len, rows))
    pad = next((token for token in (m.tokenizer and m.tokenizer.token_to_id(m.pad),) if token is not None), 0)
    tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    real = torch.tensor([[at < len(row) for at in range(longest)] for row in rows])
    padded = None if bool(real.all()) else real
    sequences = Sequences.of(tokens.to(m.model.device), m.words(tokens), padded)
    return TestSet(name, sequences)


def _ids(m: Reader, text: str) -> list[int]:
    if m.tokenizer is not None:
        return m.tokenizer.encode(text).ids
    try:
        return [int(word) for word in text.split()]
    except ValueError:
        raise UsageError(f"this model has no tokenizer, and {text[:20]!r} is no list of token ids") from None


@torch.no_grad()
def solve_one_shot(
    model: LoopedModel, board: Board, b: MaskedBatch, n_loops: int, batch_size: int = 32
) -> list[Bool[Tensor, " batch"]]:
    """For S = 1..n_loops: whether filling every hidden cell with its best symbol, at once, is valid.

    Any valid completion counts; clues stay. Only as many boards as `batch_size` run at a time.
    """
    if not len(b):
        raise UsageError("no boards to solve; give at least one")
    solved: list[list[Tensor]] = [[] for _ in range(check_count("n_loops", n_loops))]
    for _, part in b.batches(batch_size):
        for outcomes, (state, context) in zip(solved, model.states(part.tokens, n_loops), strict=True):
            guess = part.tokens.clone()
            logits = model.readout(state, context, rows=part.masked)
            check_logits(logits)
            guess[part.masked] = logits.argmax(-1)
            outcomes.append(board.is_valid(guess))
    return [torch.cat(outcomes) for outcomes in solved]


@dataclass(frozen=True)
class NGrams:
    """Add-one unigram, and a bigram interpolated with it; log-probabilities are exact and left-to-right."""

    unigram: np.ndarray
    pairs: dict[tuple[int, int], int]
    totals: np.ndarray
    weight: float

    @classmethod
    def fit(cls, tokenizer: Tokenizer, corpus: str) -> "NGrams":
        """Counts of the training split, of long own files its beginning; the weight is chosen on validation."""
        size = tokenizer.get_vocab_size()
        own = _own(corpus, tokenizer)
        if own is not None:
            stream, validation = own.stream[: 8 * MOST_TOKENS].astype(np.int64), own.held_out["validation"]
        else:
            stream = np.concatenate(encode(tokenizer, corpora.load(corpus, "train")))
            validation = encode(tokenizer, corpora.load(corpus, "validation"))
        counts = np.bincount(stream, minlength=size)
        keys, numbers = np.unique(stream[:-1] * size + stream[1:], return_counts=True)
        pairs = {
            (int(key // size), int(key % size)): int(number) for key, number in zip(keys, numbers, strict=True)
        }
        totals = np.bincount(stream[:-1], minlength=size)
        models = [cls((counts + 1) / (counts + 1).sum(), pairs, totals, w) for w in np.linspace(0.5, 0.99, 11)]
        held_out, _ = cut(validation, 64, MOST_TOKENS // 64)
        return min(models, key=lambda model: model.bigram_nll(held_out.numpy()).mean())

    def unigram_nll(self, tokens: Int[np.ndarray, "batch pos"]) -> np.ndarray:
        """Nats per token of each sequence [batch]."""
        return -np.log(self.unigram[tokens]).mean(-1)

    def bigram_nll(self, tokens: Int[np.ndarray, "batch pos"]) -> np.ndarray:
        """Nats per token of each sequence [batch]; the first token by the unigram."""
        left, right = tokens[:, :-1], tokens[:, 1:]
        flat = zip(left.ravel().tolist(), right.ravel().tolist(), strict=True)
        count = np.array([self.pairs.get(pair, 0) for pair in flat]).reshape(left.shape)
        seen = np.where(self.totals[left] > 0, count / np.maximum(self.totals[left], 1), self.unigram[right])
        probability = self.weight * seen + (1 - self.weight) * self.unigram[right]
        first = -np.log(self.unigram[tokens[:, :1]])
        return np.concatenate([first, -np.log(probability)], axis=1).mean(-1)
