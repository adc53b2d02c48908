"""Corpora of the Hugging Face hub: streamed once, tokenised into one file of ids, read at random from there.

The file makes step k's batch a function of (seed, k), which a stream is not. It lies in the cache
(`prepared/`); an interrupted preparation starts again. One document in 1,000 is validation, one test, by the hash
of its text: copies of one text stand on one side, those with other blanks too.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from loopmdm.model.corpora.fetch import cache_folder
from loopmdm.model.corpora.own_files import words_of
from loopmdm.model.corpora.tokenizer import encode_texts, end_of_text
from loopmdm.model.errors import UsageError
from loopmdm.model.files import read_json, sha256, write_atomic, write_json

HUB = {
    "lm1b": ("billion-word-benchmark/lm1b", None),
    "openwebtext": ("Skylion007/openwebtext", None),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-100BT"),
}
PREFIX = "hub:"
HELD_OUT_EVERY, MOST_HELD_OUT = 1000, 1000
BATCH = 1000
EDITION = 2
"""Of what `prepare` writes; another one where a text is held out, or read, as it was not before."""


def is_hub(name: str) -> bool:
    """Whether a corpus name means a hub data set: one of HUB, or "hub:OWNER/NAME" or "hub:OWNER/NAME:CONFIG"."""
    return name in HUB or name.startswith(PREFIX)


@dataclass(frozen=True)
class Prepared:
    """Token ids: `train` is a memory map [token]; `held_out` maps split names to documents of ids."""

    train: np.ndarray
    held_out: dict[str, list[np.ndarray]]
    fingerprint: str


def stream(name: str) -> Iterable[dict[str, Any]]:
    """The rows of a hub data set's training split, one after the other."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError("hub corpora need the datasets package: pip install 'loopmdm[hub]'") from error
    if name in HUB:
        path, config = HUB[name]
    else:
        path, _, config = name.removeprefix(PREFIX).partition(":")
    try:
        return load_dataset(path, config or None, split="train", streaming=True)
    except Exception as error:  # the library raises many kinds; all mean "not to be had"
        raise OSError(
            f"{name} was not to be had from the hub ({error}); check the name and the network"
        ) from error


def prepare(name: str, tokenizer: Tokenizer, limit: int) -> Prepared:
    """The first `limit` training tokens of a hub corpus, from the cache if they are there."""
    key = hashlib.sha256(f"{EDITION}\0{name}\0{limit}\0{tokenizer.to_str()}".encode()).hexdigest()[:16]
    folder = cache_folder() / "prepared" / key
    if (folder / "about.json").is_file():  # written last
        try:
            return _read(folder)
        except (OSError, ValueError, KeyError, TypeError):
            warnings.warn(f"{folder} is damaged; {name} is prepared again", stacklevel=2)
    _write(name, tokenizer, limit, folder)
    return _read(folder)


def _read(folder: Path) -> Prepared:
    """What was prepared; ValueError if it is not what was written."""
    about = read_json(folder / "about.json")
    if sha256(folder / "train.bin") != about["sha256"]:
        raise ValueError("other training tokens")
    held_out: dict[str, list[np.ndarray]] = {}
    for split in ("validation", "test"):
        path = folder / f"{split}.json"
        if about.get(split, sha256(path)) != sha256(path):
            raise ValueError("other held-out documents")
        held_out[split] = [np.array(row) for row in read_json(path)]
    return Prepared(np.memmap(folder / "train.bin", dtype=about["dtype"], mode="r"), held_out, about["sha256"])


def texts(name: str) -> Iterator[str]:
    """The texts of a hub data set, line ends plain; UsageError for rows that hold none.

    Empty rows are left out, and what no text file could hold: NUL characters, halves of surrogate pairs.
    """
    for number, row in enumerate(stream(name)):
        text = row.get("text", 0) or ("" if "text" in row else 0)
        if not isinstance(text, str):
            have = f"columns {', '.join(map(str, row))}"
            raise UsageError(f"{name}: row {number} ({have}) holds no text under 'text'; name one that does")
        text = text.encode(errors="ignore").decode().replace("\0", "").replace("\r\n", "\n").replace("\r", "\n")
        if text.strip():
            yield text


def split_of(text: str) -> str | None:
    """The split that a text is held out for, if it is; blanks make no other text of it."""
    rank = int.from_bytes(hashlib.sha256(words_of(text).encode()).digest()[:8]) % HELD_OUT_EVERY
    return {1: "validation", 2: "test"}.get(rank)


def _write(name: str, tokenizer: Tokenizer, limit: int, folder: Path) -> None:
    end, kind = end_of_text(tokenizer), np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    held_out: dict[str, list[list[int]]] = {"validation": [], "test": []}
    digest, written = hashlib.sha256(), 0

    def write(path: Path) -> None:
        nonlocal written
        batch: list[str] = []
        with path.open("wb") as file:

            def flush() -> None:
                nonlocal written
                for found in encode_texts(tokenizer, batch):
                    ids = np.array([*found, end], dtype=kind)[: limit - written]
                    file.write(ids.tobytes())
                    digest.update(ids.tobytes())
                    written += len(ids)
                batch.clear()

            for text in texts(name):
                split = split_of(text)
                if split:  # beyond the most that are kept, left out: a copy of it may be held out
                    if len(held_out[split]) < MOST_HELD_OUT:
                        held_out[split].append([*encode_texts(tokenizer, [text])[0], end])
                    continue
                if written >= limit and all(held_out.values()):
                    break
                batch.append(text)
                if len(batch) == BATCH:
                    flush()
            flush()

    write_atomic(folder / "train.bin", write)
    for split, rows in held_out.items():
        if not rows:
            raise UsageError(f"{name} has too few documents to hold any out for {split}")
        write_json(folder / f"{split}.json", rows)
    kept = {split: sha256(folder / f"{split}.json") for split in held_out}
    write_json(folder / "about.json", {"corpus": name, "tokens": written, "dtype": np.dtype(kind).name,
                                       "sha256": digest.hexdigest()} | kept)  # fmt: skip
