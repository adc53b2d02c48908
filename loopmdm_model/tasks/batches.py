"""Training batches and evaluation sets: step k's batch is a pure function of (seed, k)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer
from torch import Tensor

from loopmdm.model.corpora import documents as corpora
from loopmdm.model.corpora import hub, own_files
from loopmdm.model.corpora.shards import Prepared, Shelf
from loopmdm.model.corpora.tokenizer import (
    digit_tokenizer,
    encode_texts,
    end_of_text,
    gpt2_tokenizer,
    symbol_tokenizer,
    train_bpe,
)
from loopmdm.model.errors import UsageError, unknown_name
from loopmdm.model.randomness import step_generator
from loopmdm.model.tasks import gsm
from loopmdm.model.tasks.arithmetic import ARITHMETIC_TASKS
from loopmdm.model.tasks.sudoku import BOARDS
from loopmdm.model.tasks.trees import TREE_TASKS

GENERATED = {**TREE_TASKS, **ARITHMETIC_TASKS}
"""Tasks whose sequences are made as they are needed, and whose exact posterior is known."""
TASK_SIZES = {name: (board.n_cells, board.size + 1) for name, board in BOARDS.items()} | {
    name: (task.n_nodes, len(task.symbols) + 1) for name, task in GENERATED.items()
}
"""Tasks that fix their own length and number of ids, [MASK] included."""


@runtime_checkable
class Dataset(Protocol):
    """What the trainer needs of a corpus or task."""

    tokenizer: Tokenizer
    length: int
    fingerprint: str
    epoch_tokens: int
    """Tokens of one pass over the training data; 0 where every sequence is new."""

    def batch(self, step: int, size: int) -> Int[Tensor, "batch pos"]:
        """Clean training sequences of one step."""
        ...

    def evaluation(self, split: corpora.Split, limit: int | None = None) -> Int[Tensor, "batch pos"]:
        """Clean sequences of a split."""
        ...

    def maskable(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Which positions of clean sequences are predicted; the others are condition."""
        ...


def encode(tokenizer: Tokenizer, documents: list[corpora.Document]) -> list[Int[np.ndarray, " token"]]:
    """Token ids of each document, [EOS] at its end."""
    end = end_of_text(tokenizer)
    return [np.array([*ids, end]) for ids in encode_texts(tokenizer, [document.text for document in documents])]


def cut(
    documents: Sequence[Int[np.ndarray, " token"]], length: int, limit: int | None = None
) -> tuple[Int[Tensor, "block pos"], Int[Tensor, " block"]]:
    """Blocks of `length` tokens cut from each document (its rest dropped), and the document of each.

    At most `limit` blocks, evenly spread, are read.
    """
    counts = np.array(documents.lengths if isinstance(documents, Shelf) else [len(ids) for ids in documents], int)
    ends = np.cumsum(counts // length)
    chosen = spread(torch.arange(int(ends[-1]) if len(ends) else 0), limit).numpy()
    owners = np.searchsorted(ends, chosen, "right")
    blocks = np.zeros((len(chosen), length), np.int64)
    for row, (block, owner) in enumerate(zip(chosen, owners, strict=True)):
        start = (block - ends[owner] + counts[owner] // length) * length
        blocks[row] = documents[owner][start : start + length]
    return torch.from_numpy(blocks), torch.from_numpy(owners)


class Everywhere:
    """Mixed into data sets whose positions are all predicted."""

    def maskable(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """All."""
        return torch.ones_like(tokens, dtype=torch.bool)


@dataclass
class TextData(Everywhere):
    """Blocks of a text corpus; each epoch shifts the block borders and shuffles the blocks.

    `limit` is the number of training tokens to take of a hub corpus.
    """

    corpus: str
    tokenizer: Tokenizer
    length: int
    seed: int
    limit: int = 0

    def __post_init__(self):
        """Tokenise the training split once."""
        self.prepared = prepared_texts(self.corpus, self.tokenizer, self.limit)
        if self.prepared is not None:
            self.stream, self.fingerprint = self.prepared.stream, self.prepared.fingerprint
        else:
            documents = corpora.load(self.corpus)
            self.fingerprint = corpora.fingerprint(documents)
            self.stream = np.concatenate(encode(self.tokenizer, [d for d in documents if d.split == "train"]))
        self.n_blocks = len(self.stream) // self.length - 1
        if self.n_blocks < 1:
            raise UsageError(f"{self.corpus} has fewer than two blocks of {self.length} tokens; shorten length")
        self._check_held_out()
        self.epoch_tokens = self.n_blocks * self.length
        self._epoch = lru_cache(maxsize=2)(self._epoch_order)

    def _check_held_out(self) -> None:
        """UsageError, before anything is trained, if a split has no block to evaluate on."""
        for split in ("validation", "test"):
            if not len(self.evaluation(split, 1)):
                if self.prepared is not None:
                    names = [Path(name).name for name in self.prepared.names.get(split, ["of the hub"])]
                else:
                    names = [document.id for document in corpora.load(self.corpus, split)[:3]]
                some = ", ".join(names)
                raise UsageError(
                    f"{self.corpus}: no document held out for {split} ({some}) fills a block of {self.length} "
                    "tokens; give longer texts or shorten data.length"
                )

    def _epoch_order(self, epoch: int) -> tuple[int, np.ndarray]:
        generator = step_generator(self.seed, "data", epoch)
        return int(generator.integers(self.length)), generator.permutation(self.n_blocks)

    def batch(self, step: int, size: int) -> Int[Tensor, "batch pos"]:
        """Blocks number step * size .. of the endless sequence of epochs."""
        rows = []
        for index in range(step * size, (step + 1) * size):
            shift, order = self._epoch(index // self.n_blocks)
            start = shift + order[index % self.n_blocks] * self.length
            rows.append(self.stream[start : start + self.length])
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def evaluation(self, split: corpora.Split, limit: int | None = None) -> Int[Tensor, "batch pos"]:
        """Blocks of a split, spread evenly over it if limited."""
        if self.prepared is not None:
            documents = self.prepared.held_out[split]
        else:
            documents = encode(self.tokenizer, corpora.load(self.corpus, split))
        return cut(documents, self.length, limit)[0]


@dataclass
class MadeData:
    """Sequences made by a task whose exact answers are known; what is not predicted is condition."""

    name: str
    seed: int

    def __post_init__(self):
        """One token a symbol."""
        self.task = GENERATED[self.name]
        self.tokenizer = symbol_tokenizer(self.task.symbols)
        self.length = self.task.n_nodes
        self.fingerprint = repr(self.task)
        self.epoch_tokens = 0

    def batch(self, step: int, size: int) -> Int[Tensor, "batch pos"]:
        """Fresh sequences at every step."""
        return self.task.sample(size, FIRST_TRAINING_SEED + self.seed, first_index=step * size)

    def evaluation(self, split: corpora.Split, limit: int | None = None) -> Int[Tensor, "batch pos"]:
        """The same sequences for every run."""
        return self.task.sample(limit or 1000, HELD_OUT_SEEDS[split])

    def maskable(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """What the task predicts."""
        return self.task.predicted(tokens)


HELD_OUT_SEEDS, FIRST_TRAINING_SEED = {"validation": 0, "test": 1}, 1000


@dataclass
class SudokuData(Everywhere):
    """Solved grids of one size; every training grid is a random class under a random relabelling."""

    name: str
    seed: int

    def __post_init__(self):
        """One token a cell."""
        self.board = BOARDS[self.name]
        self.tokenizer = digit_tokenizer(self.board.size)
        self.length = self.board.n_cells
        self.fingerprint = f"{self.name} classes {self.board.classes}"
        self.epoch_tokens = self.board.classes["train"] * self.length  # whatever their relabelling

    def batch(self, step: int, size: int) -> Int[Tensor, "batch pos"]:
        """Uniform training grids."""
        pool = self.board.pool("train")
        index = step_generator(self.seed, "data", step).integers(len(pool), size=size)
        return self.board.relabel(pool[index], self.seed, first_index=step * size)

    def evaluation(self, split: corpora.Split, limit: int | None = None) -> Int[Tensor, "batch pos"]:
        """Grids of distinct classes."""
        return self.board.sample_grids(split, limit or 1000)


def spread(blocks: Tensor, limit: int | None) -> Tensor:
    """At most `limit` rows, evenly spread."""
    if limit is None or limit >= len(blocks):
        return blocks
    exact = torch.float64 if len(blocks) > 2**20 else torch.float32
    return blocks[torch.linspace(0, len(blocks) - 1, limit, dtype=exact).long()]


def check_name(name: str) -> str:
    """The name of a corpus or task, or UsageError with near matches."""
    if name in TASK_SIZES or name == gsm.NAME or hub.is_hub(name):
        return name
    try:
        return corpora.check_name(name)
    except UsageError:
        known = [*TASK_SIZES, gsm.NAME, *corpora.CORPORA, *hub.HUB, "hub:OWNER/NAME", "files:PATTERN"]
        raise unknown_name("corpus or task", name, known) from None


def make_tokenizer(kind: str, corpus: str, d_vocab: int) -> Tokenizer:
    """GPT-2's, or a byte-level BPE trained on the corpus."""
    if kind == "gpt2":
        return gpt2_tokenizer()
    if hub.is_hub(corpus):
        return train_bpe(islice(hub.texts(corpus), hub.BPE_DOCUMENTS), d_vocab)
    if corpus.startswith(corpora.FILES):
        return own_files.make_tokenizer(corpus, d_vocab)
    return train_bpe((document.text for document in corpora.load(corpus, "train")), d_vocab)


def prepared_texts(corpus: str, tokenizer: Tokenizer, limit: int = 0) -> Prepared | None:
    """The ids of a corpus that is tokenised into the cache, the hub's or a user's own; None for another."""
    if hub.is_hub(corpus):
        return hub.prepare(corpus, tokenizer, limit)
    return own_files.prepare(corpus, tokenizer) if corpus.startswith(corpora.FILES) else None


def dataset(
    name: str,
    length: int,
    d_vocab: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
    kind: str = "bpe",
    limit: int = 0,
) -> Dataset:
    """The data set of a spec; a text tokenizer is made unless given."""
    check_name(name)
    if name in BOARDS:
        return SudokuData(name, seed)
    if name in GENERATED:
        return MadeData(name, seed)
    if name == gsm.NAME:
        return gsm.GSMData(seed, tokenizer or (gpt2_tokenizer() if kind == "gpt2" else None), length, d_vocab)
    return TextData(name, tokenizer or make_tokenizer(kind, name, d_vocab), length, seed, limit)
