"""What is known of documents without their texts: which are copies, and which are held out.

A text's identity is its content, the first 16 bytes of its sha256, and so is that of its words, whatever blanks
are between them and however accents are composed: of texts with the same words one is kept, that of the smallest
identity, whatever the files are called. Documents stand in the order of their ranks, a hash of their identities.
"""

import hashlib
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from struct import Struct
from typing import Any

import numpy as np

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


def scan(texts: Iterable[Text], keep: Callable[[str], None] | None = None) -> np.ndarray:
    """The index of documents, in the order they are read; `keep` is given their texts one after the other."""
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
    return np.frombuffer(entries, ENTRY)


def ranked(index: np.ndarray, name: Callable[[Entry], str]) -> np.ndarray:
    """Positions of the distinct documents that are not empty, in the order of their ranks.

    What is left out is said in a line each, by what `name` calls it.
    """
    full = np.flatnonzero(index["characters"])
    _say("empty files are left out", np.flatnonzero(index["characters"] == 0), lambda at: name(index[at]))
    keys = [index[field][full, half] for field in ("identity", "words") for half in (1, 0)]
    grouped = full[np.lexsort((full, *keys))]
    words = index["words"][grouped]
    first = np.r_[True, (words[1:] != words[:-1]).any(1)] if len(full) else np.zeros(0, bool)
    kept_of = grouped[first][np.cumsum(first) - 1]
    order = np.argsort(grouped[~first])
    copies, originals = grouped[~first][order], kept_of[~first][order]
    told = dict(zip(copies[:SAID].tolist(), originals[:SAID].tolist(), strict=True))
    _say("copies are left out", copies, lambda at: f"{name(index[at])} (of {name(index[told[at]])})")
    kept = grouped[first]
    ranks = index["rank"][kept]
    return kept[np.lexsort((ranks[:, 1], ranks[:, 0]))]


def held_out(count: int) -> int:
    """How many of a user's own documents are test, and as many validation."""
    return max(1, count // 20)


def fingerprint(identities: Iterable[str]) -> str:
    """sha256 over identities of documents, in their order."""
    digest = hashlib.sha256()
    for identity in identities:
        digest.update(f"{identity}\0".encode())
    return digest.hexdigest()


def identities(index: np.ndarray) -> Iterator[str]:
    """The identities of documents, as text."""
    return (entry.tobytes().hex() for entry in index["identity"].astype(">u8"))


SAID = 3
"""How many names a warning gives."""


def _say(what: str, left_out: np.ndarray, name: Callable[[int], str]) -> None:
    if len(left_out):
        some = ", ".join(name(at) for at in left_out[:SAID].tolist()) + (", ..." if len(left_out) > SAID else "")
        warnings.warn(f"{len(left_out)} {what}: {some}", stacklevel=2)
