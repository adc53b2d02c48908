"""Token ids of a corpus in files that are mapped, not read: written once, in shards that are whole or not there.

Shard `00017.ids` holds the ids of documents one after the other, [EOS] after each, as uint16 or uint32;
`00017.npy` says which documents these are (`index.ENTRY`), and `00017.json`, written last, how both must look.
What was written before a kill is kept; the next document is the one behind the last of the last shard.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from loopmdm.model.corpora.index import ENTRY, Entry, Look
from loopmdm.model.corpora.rows import Rows, read_rows
from loopmdm.model.corpora.texts import Text
from loopmdm.model.corpora.tokenizer import encode_texts, end_of_text
from loopmdm.model.errors import UsageError
from loopmdm.model.files import clear_partial, read_json, sha256, write_atomic, write_json
from loopmdm.model.places import cache_folder

SHARD = 2**24
"""Tokens after which a shard ends with its document: half a minute of work on two cores."""
BATCH = 2**21
"""Characters encoded at a time; the tokenizers library needs some 50 bytes for each until their ids are taken."""
LONGEST_WHOLE = 2**23
"""Characters of a document, at most, for a tokenizer that may join what stands on both sides of a blank."""
Seal = dict[str, Any]


@dataclass(frozen=True)
class Shelf(Sequence[np.ndarray]):
    """Documents as ids, each a view of a map: `maps` of shards that begin at tokens `bases`.

    `starts` and `lengths` are [document], in tokens.
    """

    maps: list[np.ndarray]
    bases: Int[np.ndarray, " shard"]
    starts: Int[np.ndarray, " document"]
    lengths: Int[np.ndarray, " document"]

    def __len__(self) -> int:
        """How many documents."""
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> "Shelf": ...

    def __getitem__(self, index: int | slice) -> "np.ndarray | Shelf":
        """The ids of a document; a slice is a shelf of some of them."""
        if isinstance(index, slice):
            return Shelf(self.maps, self.bases, self.starts[index], self.lengths[index])
        start = int(self.starts[index])
        shard = int(np.searchsorted(self.bases, start, "right")) - 1
        start -= int(self.bases[shard])
        return self.maps[shard][start : start + int(self.lengths[index])]


class Stream:
    """The ids of a shelf's documents one after the other; a slice of it reads what it needs."""

    def __init__(self, shelf: Shelf):
        self.shelf, self._ends = shelf, np.cumsum(shelf.lengths, dtype=np.int64)

    def __len__(self) -> int:
        """How many tokens."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, span: slice) -> Int[np.ndarray, " token"]:
        """Ids `span.start` up to `span.stop`."""
        start, stop, _ = span.indices(len(self))
        first = int(np.searchsorted(self._ends, start, "right"))
        parts, at = [self.shelf.maps[0][:0]] if self.shelf.maps else [np.zeros(0, np.uint16)], start
        while at < stop:
            document, end = self.shelf[first], int(self._ends[first])
            parts.append(document[at - end + len(document) :][: stop - at])
            at, first = end, first + 1
        return np.concatenate(parts)


@dataclass(frozen=True)
class Prepared:
    """A corpus as ids: its training `stream`, the documents held out by split, and what these are called.

    `tokenizer_sample` says what a BPE of its own is trained on.
    """

    stream: Stream
    held_out: dict[str, Shelf]
    names: dict[str, list[str]]
    fingerprint: str
    tokenizer_sample: str


def prepared_folder(*what: object) -> Path:
    """The place in the cache for what is prepared of all that is named."""
    key = hashlib.sha256("\0".join(map(str, what)).encode(errors="surrogateescape")).hexdigest()[:16]
    return cache_folder() / "prepared" / key


def dtype_of(tokenizer: Tokenizer) -> type:
    """The smallest of the two that holds all ids."""
    return np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32


def seal(path: Path) -> Seal:
    """What tells a file from a damaged one."""
    status = path.stat()
    return {"bytes": status.st_size, "mtime": status.st_mtime_ns, "sha256": sha256(path)}


def are_sealed(record: Path, files: Mapping[str, Path]) -> bool:
    """Whether files are what `record` keeps seals of: by size and time, and where only a time differs by the hash.

    Other times are written down if they can be: files of a cache that was copied are hashed once.
    """
    kept = known_of(record)
    now = {name: _as_it_was(path, kept.get(name)) for name, path in files.items()}
    if None in now.values():
        return False
    if kept != kept | now:
        with suppress(OSError):
            write_json(record, kept | now)
    return True


def _as_it_was(path: Path, kept: Any) -> Seal | None:
    """The seal of a file as it is now; None for another file than was sealed, or none."""
    try:
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) == (kept["bytes"], kept["mtime"]):
            return kept
        same = status.st_size == kept["bytes"] and sha256(path) == kept["sha256"]
        return seal(path) if same else None
    except (OSError, TypeError, KeyError):
        return None


def known_of(record: Path) -> dict[str, Any]:
    """What is known of a preparation, or a part of it; empty if nothing is, or it is damaged."""
    try:
        found = read_json(record)
    except (OSError, UsageError):
        return {}
    return found if isinstance(found, dict) else {}


class Shards:
    """The shards of one folder of the cache."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.folder, self.tokenizer, self.dtype = folder, tokenizer, dtype_of(tokenizer)

    def _paths(self, number: int) -> tuple[Path, Path, Path]:
        ids, index, sealed = (self.folder / f"{number:05}.{suffix}" for suffix in ("ids", "npy", "json"))
        return ids, index, sealed

    def count(self) -> int:
        """How many shards there are, from the first on, that are whole."""
        number = 0
        while self._is_whole(number):
            number += 1
        return number

    def _is_whole(self, number: int) -> bool:
        ids, index, sealed = self._paths(number)
        return are_sealed(sealed, {"ids": ids, "index": index})

    def was_written(self, number: int) -> bool:
        """Whether a shard from `number` on was finished once, and is damaged if it is not whole now."""
        return any(int(path.stem) >= number for path in self.folder.glob("[0-9]*.json") if path.stem.isdecimal())

    def drop(self, first: int = 0) -> None:
        """Remove what is there from shard `first` on, and what dead writers left."""
        clear_partial(self.folder)
        for path in self.folder.glob("[0-9]*.*"):
            if path.stem.isdecimal() and int(path.stem) >= first:
                path.unlink()

    def index(self, count: int) -> Rows:
        """The entries of the first `count` shards."""
        paths = [self._paths(number)[1] for number in range(count)]
        return lambda: chain.from_iterable(map(read_rows, paths))

    def behind(self, count: int) -> tuple[int, int]:
        """File and row from which on the next document is searched, after those of the first `count` shards."""
        if not count:
            return 0, 0
        last = np.load(self._paths(count - 1)[1], mmap_mode="r")[-1]
        return int(last["file"]), int(last["row"]) + 1

    def shelf(self, count: int, starts: np.ndarray, lengths: np.ndarray) -> Shelf:
        """Documents at `starts` in the concatenation of the first `count` shards."""
        maps = [np.memmap(self._paths(number)[0], self.dtype, "r").view(np.ndarray) for number in range(count)]
        bases = np.cumsum([0, *(len(part) for part in maps)])[:-1]
        return Shelf(maps, bases, starts, lengths)

    def write(self, texts: Iterable[Text], enough: Callable[[Entry], bool] = lambda _: False) -> bool:
        """Write documents as further shards until `enough`, given each one's entry, says so; False if they end."""
        documents, number = _encoded(texts, self.tokenizer, self.dtype), self.count()
        end = np.array([end_of_text(self.tokenizer)], self.dtype)
        stopped = ended = False

        def write(path: Path) -> None:
            nonlocal stopped, ended
            tokens, n_ids = 0, 0
            with path.open("wb") as file:
                for ids, look in documents:
                    if look is None or not look.blank:
                        file.write(ids.data)
                        n_ids += len(ids)
                    if look is None:
                        continue
                    if not look.blank:
                        file.write(end.data)
                        n_ids += 1
                    entries.extend(look.entry(n_ids))
                    tokens, n_ids = tokens + n_ids, 0
                    stopped = enough(np.frombuffer(entries[-ENTRY.itemsize :], ENTRY)[0])
                    if stopped or tokens >= SHARD:
                        return
            ended = True

        while not (stopped or ended):
            entries = bytearray()
            ids, index, sealed = self._paths(number)
            write_atomic(ids, write)
            if not entries:
                ids.unlink()
                break
            found = np.frombuffer(entries, ENTRY)
            write_atomic(index, lambda path, found=found: save_array(path, found))
            write_json(sealed, {"ids": seal(ids), "index": seal(index)})
            number += 1
        return stopped


def save_array(path: Path, found: np.ndarray) -> None:
    """Write an array under this very name."""
    with path.open("wb") as file:
        np.save(file, found)


def _encoded(texts: Iterable[Text], tokenizer: Tokenizer, dtype: type) -> Iterator[tuple[np.ndarray, Look | None]]:
    """The ids of each piece, and the document if it ends there; a batch is encoded while the next one is read."""
    waiting: deque[tuple[Future, list[Look | None]]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for pieces, looks in _batches(texts, in_pieces=reads_in_pieces(tokenizer)):
            waiting.append((pool.submit(encode_texts, tokenizer, pieces), looks))
            if len(waiting) > 1:
                yield from _ids(*waiting.popleft(), dtype)
        while waiting:
            yield from _ids(*waiting.popleft(), dtype)


def _ids(encoding: Future, looks: list[Look | None], dtype: type) -> Iterator[tuple[np.ndarray, Look | None]]:
    return ((np.array(ids, dtype), look) for ids, look in zip(encoding.result(), looks, strict=True))


def _batches(texts: Iterable[Text], in_pieces: bool) -> Iterator[tuple[list[str], list[Look | None]]]:
    """Pieces to encode, and beside the last of each document what is known of it."""
    batch: tuple[list[str], list[Look | None]] = [], []
    size = 0
    for text in texts:
        look, before = Look(text), ""
        for piece in text.pieces if in_pieces else [_whole(text)]:
            if before:  # a piece waits until it is known whether another follows
                batch[0].append(before)
                batch[1].append(None)
                if size >= BATCH:
                    yield batch
                    batch, size = ([], []), 0
            look.add(piece)
            before, size = piece, size + len(piece)
        batch[0].append("" if look.blank else before)
        batch[1].append(look)
        if size >= BATCH:
            yield batch
            batch, size = ([], []), 0
    yield batch


def _whole(text: Text) -> str:
    pieces, size = [], 0
    for piece in text.pieces:
        pieces.append(piece)
        size += len(piece)
        if size > LONGEST_WHOLE:
            raise UsageError(
                f"a document has more than {LONGEST_WHOLE:,} characters and needs a byte-level BPE without "
                "post-processor, which this tokenizer.json is not; cut the document"
            )
    return "".join(pieces)


def reads_in_pieces(tokenizer: Tokenizer) -> bool:
    """Whether the ids of pieces are those of the whole: byte-level BPE that splits words as GPT-2 does."""
    told = json.loads(tokenizer.to_str())
    splits = told["pre_tokenizer"] or {}
    plain = told["normalizer"] is None and told["post_processor"] is None
    specials = all(token["special"] for token in told["added_tokens"])
    wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return plain and specials and all(splits.get(key) == value for key, value in wanted.items())
