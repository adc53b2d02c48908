"""A user's own text files: found as people name them, read as text, each text once.

`files:` takes a file, a folder (all .txt files below it), or a pattern; `~` is the home folder. Brackets in the
name of a folder that exists are no pattern. A text's identity is its content: the same texts under another path,
through a link, relative or absolute, are the same documents in the same split. Of texts that differ in blanks, or
in how accents are composed, one is kept, the same one whatever the files are called.
"""

import codecs
import hashlib
import unicodedata
import warnings
from collections.abc import Iterable
from pathlib import Path

from loopmdm.model.errors import UsageError
from loopmdm.model.files import is_file, is_folder

FILES = "files:"
MARKS = {  # longest first: UTF-32's mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_files(pattern: str) -> dict[str, tuple[str, str]]:
    """Identity -> (file, text) of all distinct texts; UsageError names what cannot be read.

    Empty files and copies are left out, said in one line each.
    """
    paths = find(pattern)
    kept: dict[str, tuple[str, str, str]] = {}  # by what the words are: identity, file, text
    empty, copies = [], []
    for path in paths:
        text = read_text(path)
        if not text.strip():
            empty.append(path.name)
            continue
        words, one = _hash(words_of(text)), (_hash(text)[:32], str(path), text)
        other = kept.setdefault(words, one)
        if other is not one:
            kept[words], left = (other, one) if other[0] <= one[0] else (one, other)
            copies.append(f"{Path(left[1]).name} (of {Path(kept[words][1]).name})")
    found = {identity: (file, text) for identity, file, text in kept.values()}
    _say("empty files are left out", empty)
    _say("copies are left out", copies)
    if len(found) < 3:
        what = "files" if len(paths) < 3 else "distinct texts (the others are empty or copies)"
        count = len(paths) if len(paths) < 3 else len(found)
        raise UsageError(f"{FILES}{pattern} matches {count} {what}; training needs at least 3, one a split")
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def words_of(text: str) -> str:
    """What tells texts from their copies: the words, whatever is between them and however accents are composed."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def find(pattern: str) -> list[Path]:
    """The files that are meant, sorted; UsageError for no pattern, or one that cannot be one."""
    if not pattern.strip("/. "):
        raise UsageError(f"{FILES} needs a pattern, such as {FILES}texts/*.txt, or a folder of .txt files")
    try:
        whole = Path(pattern).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{FILES}{pattern}: {error}") from None
    if is_file(whole):
        return [whole]
    if is_folder(whole):
        return _files(whole.rglob("*.txt"))
    folder, rest = _split(whole)
    try:
        return _files(folder.glob(str(rest)))
    except (ValueError, NotImplementedError) as error:
        raise UsageError(
            f"{FILES}{pattern} is no pattern ({error}); write one such as {FILES}texts/*.txt"
        ) from None


def _files(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_file())


def _split(path: Path) -> tuple[Path, Path]:
    """The longest part of a path that is a folder as it is written, and the pattern that is left."""
    folder, parts = Path(path.anchor or "."), path.parts[1:] if path.anchor else path.parts
    for number, part in enumerate(parts):
        if part != ".." and not is_folder(folder / part):
            return folder, Path(*parts[number:])
        folder = folder / part
    return folder, Path("*")


def read_text(path: Path) -> str:
    """A file as text with plain line ends: UTF-8, or whatever its byte-order mark says."""
    raw = path.read_bytes()
    encoding = next((name for mark, name in MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        remedy = f"convert it, as by: iconv -f latin1 -t utf-8 {path.name}"
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); {remedy}") from None
    if "\0" in text:
        raise UsageError(f"{path} holds NUL characters and is no text file; leave it out of the pattern")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _say(what: str, names: list[str]) -> None:
    if names:
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        warnings.warn(f"{len(names)} {what}: {some}", stacklevel=4)
