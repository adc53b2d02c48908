"""Training batches and evaluation sets: step k's batch is a pure function of (seed, k)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from loopmdm_model.data import corpora, sudoku
from loopmdm_model.data.tokenizer import EOS, digit_tokenizer, train_bpe
from loopmdm_model.errors import UsageError, unknown_name
from loopmdm_model.randomness import step_generator

TASKS = ("sudoku6", *corpora.CORPORA)


@runtime_checkable
class Dataset(Protocol):
    """What the trainer needs of a corpus or task."""

    tokenizer: Tokenizer
    length: int
    fingerprint: str

    def batch(self, step: int, size: int) -> Int[Tensor, "batch pos"]:
        """Clean training sequences of one step."""
        ...

    def evaluation(self, split: corpora.Split, limit: int | None = None) -> Int[Tensor, "batch pos"]:
        """Clean sequences of a split."""
        ...


def encode(tokenizer: Tokenizer, documents: list[corpora.Document]) -> list[Int[np.ndarray, " token"]]:
    """Token ids of each document, [EOS] at its end."""
    end = tokenizer.token_to_id(EOS)
    encodings = tokenizer.encode_batch([document.text for document in documents])
    return [np.array([*encoding.ids, end]) for encoding in encodings]


def evaluation_blocks(
    tokenizer: Tokenizer, documents: list[corpora.Document], length: int
) -> tuple[Int[Tensor, "block pos"], Int[Tensor, " block"]]:
    """Blocks of `length` tokens cut from each document (its rest dropped), and the document of each."""
    blocks, owners = [], []
    for index, ids in enumerate(encode(tokenizer, documents)):
        count = len(ids) // length
        blocks.append(ids[: count * length].reshape(count, length))
        owners += [index] * count
    return torch.from_numpy(np.concatenate(blocks)), torch.tensor(owners)


@dataclass
class TextData:
    """Blocks of a text corpus; each epoch shifts the block borders and shuffles the blocks."""

    corpus: str
    tokenizer: Tokenizer
    length: int
    seed: int

    def __post_init__(self):
        """Tokenise the training split once."""
        documents = corpora.load(self.corpus)
        self.fingerprint = corpora.fingerprint(documents)
        self.stream = np.concatenate(encode(self.tokenizer, [d for d in documents if d.split == "train"]))
        self.n_blocks = len(self.stream) // self.length - 1
        if self.n_blocks < 1:
            raise UsageError(f"{self.corpus} has fewer than two blocks of {self.length} tokens; shorten length")
        self._epoch = lru_cache(maxsize=2)(self._epoch_order)

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
        return torch.from_numpy(np.stack(rows))

    def evaluation(self, split: corpora.Split, limit: int | None = None) -> Int[Tensor, "batch pos"]:
        """Blocks of a split, spread evenly over it if limited."""
        blocks, _ = evaluation_blocks(self.tokenizer, corpora.load(self.corpus, split), self.length)
        return spread(blocks, limit)


@dataclass
class SudokuData:
    """6x6 grids; every training grid is a random class under a random relabelling."""

    seed: int

    def __post_init__(self):
        """One token a cell."""
        self.tokenizer = digit_tokenizer(sudoku.SIZE)
        self.length = sudoku.N_CELLS
        self.fingerprint = f"sudoku6 classes {sudoku.SHARES}"

    def batch(self, step: int, size: int) -> Int[Tensor, "batch pos"]:
        """Uniform training grids."""
        pool = sudoku.classes("train")
        index = step_generator(self.seed, "data", step).integers(len(pool), size=size)
        return sudoku.relabel(pool[index], self.seed, first_index=step * size)

    def evaluation(self, split: corpora.Split, limit: int | None = None) -> Int[Tensor, "batch pos"]:
        """Grids of distinct classes."""
        return sudoku.sample_grids(split, limit or 1000)


def spread(blocks: Tensor, limit: int | None) -> Tensor:
    """At most `limit` rows, evenly spread."""
    if limit is None or limit >= len(blocks):
        return blocks
    return blocks[torch.linspace(0, len(blocks) - 1, limit).long()]


def dataset(name: str, length: int, d_vocab: int, seed: int, tokenizer: Tokenizer | None = None) -> Dataset:
    """The data set of a spec; a text tokenizer is trained on the training split unless given."""
    if name not in TASKS:
        raise unknown_name("corpus or task", name, TASKS)
    if name == "sudoku6":
        return SudokuData(seed)
    if tokenizer is None:
        tokenizer = train_bpe((document.text for document in corpora.load(name, "train")), d_vocab)
    return TextData(name, tokenizer, length, seed)
