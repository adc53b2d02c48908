"""Documents out of files, a piece at a time: nothing but a line of .jsonl, or 256 rows of .parquet, is ever held.

By its suffix a file is one document (.txt and whatever else is text), a document a line (.jsonl, the text under
"text") or a document a row (.parquet, the column "text"); .gz and .zst behind it are unpacked. Pieces end before a
blank that follows a word: there byte-level BPE never joins what stands on both sides, so that the ids of the
pieces are those of the whole.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from loopmdm.model.errors import UsageError

COLUMN = "text"
KINDS, PACKED = (".txt", ".jsonl", ".parquet"), ("", ".gz", ".zst")
MARKS = {  # longest first: UTF-32's mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CHUNK = 2**20
"""Bytes read at a time."""
PIECE, LONGEST_WORD, LONGEST_LINE = 2**15, 2**24, 2**27
"""Characters of a piece and, at most, of a word; bytes of a line of .jsonl, which must be read whole."""
CUT = re.compile(r"(?<=\S)[ \n]")


@dataclass(frozen=True)
class Text:
    """A document: the number of its file, its row there, and its pieces, to be read before the next document."""

    file: int
    row: int
    pieces: Iterator[str]


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, without that of its packing."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_all(
    paths: Sequence[Path], first: tuple[int, int] = (0, 0), told: Callable[[int], object] = lambda _: None
) -> Iterator[Text]:
    """The documents of files, from row `first[1]` of file `first[0]` on; `told` hears how many bytes are read."""
    before = sum(path.stat().st_size for path in paths[: first[0]])
    for number, path in enumerate(paths[first[0] :], start=first[0]):
        start = first[1] if number == first[0] else 0
        for row, pieces in _documents(path, start, lambda at, before=before: told(before + at)):
            yield Text(number, row, pieces)
        before += path.stat().st_size


def name_of(path: str, row: int) -> str:
    """What a document is called: its file, and its row if there are several."""
    return f"{path}:{row + 1}" if kind_of(Path(path)) in (".jsonl", ".parquet") else path


def read_text(path: Path) -> str:
    """A file as text with plain line ends: UTF-8, or whatever its byte-order mark says."""
    with _opened(path, lambda _: None) as file:
        return "".join(_decoded(path, file))


def plain(text: str) -> str:
    """A text as a text file could hold it: no NUL characters or halves of surrogate pairs, line ends plain."""
    return text.encode(errors="ignore").decode().replace("\0", "").replace("\r\n", "\n").replace("\r", "\n")


def text_of(row: dict[str, Any], what: str) -> str:
    """The text of a record, empty if it is null; UsageError for one that holds none."""
    text = row.get(COLUMN, 0) or ("" if COLUMN in row else 0)
    if not isinstance(text, str):
        have = f"columns {', '.join(map(str, row))}"
        raise UsageError(f"{what} ({have}) holds no text under '{COLUMN}'; name one that does")
    return plain(text)


def in_pieces(chunks: Iterable[str], what: str) -> Iterator[str]:
    """The same text in pieces of at least PIECE characters, each but the last ended before a blank."""
    held = ""
    for chunk in chunks:
        held, start = held + chunk, 0
        while cut := CUT.search(held, start + PIECE):
            yield held[start : cut.start()]
            start = cut.start()
        held = held[start:]
        if len(held) > LONGEST_WORD:
            raise UsageError(f"{what} has {len(held):,} characters without the end of a word; leave it out")
    if held:
        yield held


def _documents(path: Path, first: int, told: Callable[[int], object]) -> Iterator[tuple[int, Iterator[str]]]:
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _rows(path, first, told)
        return
    with _opened(path, told) as file:
        if kind == ".jsonl":
            yield from _lines(path, file, first)
        elif not first:
            yield 0, in_pieces(_decoded(path, file), str(path))


class _Counted(io.RawIOBase):
    """A file that tells how far it was read."""

    def __init__(self, path: Path, told: Callable[[int], object]):
        self._file, self._told = path.open("rb", buffering=0), told

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count = self._file.readinto(buffer)
        self._told(self._file.tell())
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _opened(path: Path, told: Callable[[int], object]) -> IO[bytes]:
    """The file, unpacked by its suffix."""
    raw = io.BufferedReader(_Counted(path, told), CHUNK)
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(_Unpacked(path, gzip.GzipFile(fileobj=raw)), CHUNK)
    if path.suffix.lower() == ".zst":
        import pyarrow as pa

        unpacked = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
        return io.BufferedReader(_Unpacked(path, unpacked), CHUNK)
    return raw


class _Unpacked(io.RawIOBase):
    """What an unpacker gives; UsageError where it gives up."""

    def __init__(self, path: Path, file: Any):
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found = self._file.read(len(buffer))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UsageError(f"{self._path} is damaged ({error!s:.80}); copy or pack it again") from None
        buffer[: len(found)] = found
        return len(found)


def _decoded(path: Path, file: IO[bytes]) -> Iterator[str]:
    raw = file.read(CHUNK)
    encoding = next((name for mark, name in MARKS.items() if raw.startswith(mark)), "utf-8")
    inner = codecs.getincrementaldecoder(encoding)()
    decoder, before = io.IncrementalNewlineDecoder(inner, translate=True), 0
    while True:
        pending = len(inner.getstate()[0])
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            remedy = f"convert it, as by: iconv -f latin1 -t utf-8 {path.name}"
            place = before - pending + error.start
            if encoding == "utf-8-sig" and not before:  # its mark is not counted
                place += len(codecs.BOM_UTF8)
            raise UsageError(f"{path} is not UTF-8 text (byte {place}); {remedy}") from None
        if "\0" in text:
            raise UsageError(f"{path} holds NUL characters and is no text file; leave it out of the pattern")
        yield text
        if not raw:
            return
        before += len(raw)
        raw = file.read(CHUNK)


def _lines(path: Path, file: IO[bytes], first: int) -> Iterator[tuple[int, Iterator[str]]]:
    row = 0
    while line := file.readline(LONGEST_LINE + 1):
        what = f"{path} line {row + 1}"
        if len(line) > LONGEST_LINE:
            raise UsageError(
                f"{what} has more than {LONGEST_LINE >> 20} MiB; write it as several, or as a .txt file"
            )
        if row >= first and line.strip():
            yield row, in_pieces([_record(line, what)], what)
        row += 1


def _record(line: bytes, what: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError, too
        raise UsageError(f"{what} is not JSON ({error!s:.80}); mend it, or call the file .txt") from None
    if not isinstance(record, dict):
        raise UsageError(f"{what} is no JSON object with a text under '{COLUMN}'")
    return text_of(record, what)


def _rows(path: Path, first: int, told: Callable[[int], object]) -> Iterator[tuple[int, Iterator[str]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names, n_rows, row, size = file.schema_arrow.names, file.metadata.num_rows, 0, path.stat().st_size
            if COLUMN not in names:
                text_of(dict.fromkeys(names), str(path))
            for batch in file.iter_batches(256, columns=[COLUMN], use_threads=False):
                for value in batch.column(0):
                    if row >= first:
                        what = f"{path} row {row + 1}"
                        yield row, in_pieces([text_of({COLUMN: value.as_py()}, what)], what)
                    row += 1
                told(size * row // n_rows)
    except pa.ArrowException as error:
        raise UsageError(f"{path} is no parquet file that can be read ({error!s:.80}); write it again") from None
