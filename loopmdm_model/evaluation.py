"""Test sets of the shipped tasks, test NLL, Sudoku solve rate, and n-gram reference points."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer
from torch import Tensor

from loopmdm_model.data import corpora, gsm
from loopmdm_model.data.batches import HELD_OUT_SEEDS, encode, evaluation_blocks
from loopmdm_model.data.sudoku import BOARDS, Board
from loopmdm_model.data.trees import TREE_TASKS
from loopmdm_model.errors import UsageError, check_count
from loopmdm_model.masking import MaskedBatch
from loopmdm_model.protocol import LoopedModel


@dataclass(frozen=True)
class TestSet:
    """Clean test sequences [batch, pos]; `clusters` [batch] tells which share a document or template.

    `clusters` is None if none do; `bytes_per_token` is NaN where tokens are not all text; `maskable` ([pos], or
    [batch, pos] if it differs) is None where all positions are predicted.
    """

    task: str
    tokens: Int[Tensor, "batch pos"]
    clusters: Int[np.ndarray, " batch"] | None
    bytes_per_token: float
    maskable: Bool[Tensor, "*batch pos"] | None = None

    __test__ = False  # not a pytest class

    @property
    def n_maskable(self) -> Int[Tensor, " batch"]:
        """How many positions of each sequence are predicted."""
        everywhere = torch.ones_like(self.tokens, dtype=torch.bool)
        return (everywhere if self.maskable is None else everywhere & self.maskable).sum(-1)


def task_of(record: dict) -> str:
    """The corpus or task a model was trained on, from its train.json."""
    try:
        return record["spec"]["data"]["corpus"]
    except (KeyError, TypeError) as error:
        raise UsageError("this model has no train.json that names its corpus; evaluate it from Python") from error


def load_test_set(task: str, length: int, tokenizer: Tokenizer | None, split: corpora.Split = "test") -> TestSet:
    """Held-out sequences; text comes from the embedded slice, which holds the whole split."""
    if task in BOARDS:
        return TestSet(task, BOARDS[task].sample_grids(split, 1000), None, float("nan"))
    if task in TREE_TASKS:
        model = TREE_TASKS[task]
        return TestSet(task, model.sample(1000, HELD_OUT_SEEDS[split]), None, float("nan"), model.maskable)
    if tokenizer is None:
        raise UsageError(f"evaluating on {task} needs the model's tokenizer.json")
    if task == gsm.NAME:
        tokens, kept = gsm.fit(tokenizer, gsm.held_out(split), length)
        maskable = gsm.after_question(tokens, tokenizer)
        return TestSet(task, tokens, np.array([problem.template for problem in kept]), float("nan"), maskable)
    documents = corpora.load("sotu-slice" if task == "sotu" else task, split)
    tokens, owners = evaluation_blocks(tokenizer, documents, length)
    n_bytes = sum(len(tokenizer.decode(row).encode()) for row in tokens.tolist())
    return TestSet(task, tokens, owners.numpy(), n_bytes / tokens.numel())


@torch.no_grad()
def solve_one_shot(
    model: LoopedModel, board: Board, b: MaskedBatch, n_loops: int, batch_size: int = 32
) -> list[Bool[Tensor, " batch"]]:
    """For S = 1..n_loops: whether filling every hidden cell with its best symbol, at once, is valid.

    Any valid completion counts; clues stay. Only as many boards as `batch_size` run at a time.
    """
    check_count("batch_size", batch_size)
    if not len(b):
        raise UsageError("no boards to solve; give at least one")
    solved: list[list[Tensor]] = [[] for _ in range(check_count("n_loops", n_loops))]
    for start in range(0, len(b), batch_size):
        part = b.rows(slice(start, start + batch_size))
        for outcomes, (state, context) in zip(solved, model.states(part.tokens, n_loops), strict=True):
            guess = part.tokens.clone()
            guess[part.masked] = model.readout(state, context, rows=part.masked).argmax(-1)
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
        """Counts of the training split; the interpolation weight is chosen on validation."""
        size = tokenizer.get_vocab_size()
        stream = np.concatenate(encode(tokenizer, corpora.load(corpus, "train")))
        counts = np.bincount(stream, minlength=size)
        keys, numbers = np.unique(stream[:-1] * size + stream[1:], return_counts=True)
        pairs = {
            (int(key // size), int(key % size)): int(number) for key, number in zip(keys, numbers, strict=True)
        }
        totals = np.bincount(stream[:-1], minlength=size)
        models = [cls((counts + 1) / (counts + 1).sum(), pairs, totals, w) for w in np.linspace(0.5, 0.99, 11)]
        held_out, _ = evaluation_blocks(tokenizer, corpora.load(corpus, "validation"), 64)
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
