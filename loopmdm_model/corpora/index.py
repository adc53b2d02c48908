"""What is known of documents without their texts: which are copies, and which are held out.

A text's identity is its content, the first 16 bytes of its sha256, and so is that of its words, whatever blanks
are between them and however accents are composed: of texts with the same words one is kept, that of the smallest
identity, whatever the files are called. Documents stand in the order of their ranks, a hash of their identities.
"""

import hashlib
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from struct import Struct
from typing import Any

import numpy as np

from loopmdm.model.corpora import rows
from loopmdm.model.corpora.rows import Rows, numbered
from loopmdm.model.corpora.texts import Text

HASH = (">u8", (2,))  # as numbers they are ordered as in hexadecimal
ENTRY = np.dtype(
    [("identity", *HASH), ("words", *HASH), ("rank", *HASH), ("file", "i4"), ("row", "i8")]
    + [("characters", "i8"), ("tokens", "i8")]
)  # fmt: skip
LAYOUT = Struct("=16s16s16siqqq")
"""A document of the index: characters are 0 if all are blanks; tokens of its ids, [EOS] included."""
Entry = Any
"""One of an index; numpy has no type for it that checkers know."""
RANK = "loopmdm split: "


def rank(identity: str) -> bytes:
    """What documents are ordered by."""
    return hashlib.sha256(f"{RANK}{identity}".encode()).digest()


def words_of(text: str) -> str:
    """What tells texts from their copies: the words, whatever is between them and however accents are composed."""
    return " ".join(unicodedata.normalize("NFC", text).split())


class Look:
    """What the index holds of one document, learnt from its pieces as they pass by."""

    def __init__(self, text: Text):
        self._place = text.file, text.row
        self._characters, self._text, self._words = 0, hashlib.sha256(), hashlib.sha256()
        self.blank = True

    def add(self, piece: str) -> None:
        """The next piece; it begins with a blank unless it is the first."""
        words = words_of(piece)
        if words:
            self._words.update((words if self.blank else f" {words}").encode())
            self.blank = False
        self._text.update(piece.encode())
        self._characters += len(piece)

    def entry(self, tokens: int = 0) -> bytes:
        """The document as one `ENTRY`."""
        identity = self._text.digest()[:16]
        hashes = identity, self._words.digest()[:16], rank(identity.hex())[:16]
        return LAYOUT.pack(*hashes, *self._place, 0 if self.blank else self._characters, tokens)


def scan(texts: Iterable[Text], keep: Callable[[str], None] | None = None) -> Iterator[np.ndarray]:
    """The index of documents, in the order they are read, in parts of `ENTRY`.

    `keep` is given their texts one after the other.
    """
    entries = bytearray()
    for text in texts:
        look, pieces = Look(text), []
        for piece in text.pieces:
            look.add(piece)
            if keep is not None:
                pieces.append(piece)
        entries += look.entry()
        if keep is not None:
            keep("".join(pieces))
        if len(entries) >= rows.AT_A_TIME * ENTRY.itemsize:
            yield np.frombuffer(entries, ENTRY)
            entries = bytearray()
    yield np.frombuffer(entries, ENTRY)


BUCKET = 2**19
"""Documents, about, whose hashes are in memory at a time."""


def ranked(index: Rows, name: Callable[[Entry], str]) -> np.ndarray:
    """Positions of the distinct documents that are not empty, in the order of their ranks.

    What is left out is said in a line each, by what `name` calls it. `index` is read some times for each `BUCKET`.
    """
    full = np.concatenate([np.zeros(0, bool), *(part["characters"] > 0 for part in index())])
    kept, fields = full.copy(), ("words", "identity")
    # by parts first, so that a text of many copies fills no bucket
    for at, words, texts in chain(_hashes(index, kept, *fields), _buckets(index, kept, *fields)):
        order = np.lexsort((*texts.T[::-1], *words.T[::-1]))  # stable: of one text the first is kept
        at, words = at[order], words[order]
        kept[at[1:][(words[1:] == words[:-1]).all(1)]] = False
    empty, copies = np.flatnonzero(~full), np.flatnonzero(full & ~kept)
    _say("empty files are left out", empty, [name(entry) for entry in _entries(index, empty[:SAID])])
    some = [(entry, _original(index, kept, entry)) for entry in _entries(index, copies[:SAID])]
    _say("copies are left out", copies, [f"{name(entry)} (of {name(original)})" for entry, original in some])
    order = [at[np.lexsort(ranks.T[::-1])] for at, ranks in _buckets(index, kept, "rank")]
    return np.concatenate([np.zeros(0, int), *order])


def _hashes(
    index: Rows, among: np.ndarray, *fields: str, bucket: int = 0, count: int = 1
) -> Iterator[tuple[np.ndarray, ...]]:
    """Part by part, positions and hashes of documents `among` all whose first hash is in one of `count` spans."""
    for start, part in numbered(index()):
        span = (part[fields[0]][:, 0] >> 32) * count >> 32
        at = np.flatnonzero(among[start : start + len(part)] & (span == bucket))
        yield start + at, *(part[field][at].astype(np.uint64) for field in fields)


def _buckets(index: Rows, among: np.ndarray, *fields: str) -> Iterator[Iterator[np.ndarray]]:
    """The same of all parts together, for one span after the other."""
    count = -(-int(np.count_nonzero(among)) // BUCKET)
    for bucket in range(count):
        parts = _hashes(index, among, *fields, bucket=bucket, count=count)
        yield map(np.concatenate, zip(*parts, strict=True))


def _entries(index: Rows, positions: np.ndarray) -> list[Entry]:
    """A few documents, by their positions in rising order."""
    return [
        part[at - start]
        for start, part in numbered(index())
        for at in positions
        if start <= at < start + len(part)
    ]


def _original(index: Rows, kept: np.ndarray, copy: Entry) -> Entry:
    """The document that is kept of those with the same words."""
    for start, part in numbered(index()):
        same = kept[start : start + len(part)] & (part["words"] == copy["words"]).all(1)
        if same.any():
            return part[same.argmax()]
    raise AssertionError("of equal texts one is kept")


def held_out(count: int) -> int:
    """How many of a user's own documents are test, and as many validation."""
    return max(1, count // 20)


def fingerprint(identities: Iterable[str]) -> str:
    """sha256 over identities of documents, in their order."""
    digest = hashlib.sha256()
    for identity in identities:
        digest.update(f"{identity}\0".encode())
    return digest.hexdigest()


def identities(index: Rows, order: np.ndarray) -> Iterator[str]:
    """The identities of documents at these positions, as text."""
    known = bytearray()  # grows in place, as no array does
    for part in index():
        known += part["identity"].tobytes()
    found = np.frombuffer(known, "V16")
    for start in range(0, len(order), rows.AT_A_TIME):
        text = found[order[start : start + rows.AT_A_TIME]].tobytes().hex()
        yield from (text[at : at + 32] for at in range(0, len(text), 32))


SAID = 3
"""How many names a warning gives."""


def _say(what: str, left_out: np.ndarray, names: list[str]) -> None:
    if len(left_out):
        some = ", ".join(names) + (", ..." if len(left_out) > SAID else "")
        warnings.warn(f"{len(left_out)} {what}: {some}", stacklevel=2)
