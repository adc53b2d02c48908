"""A user's own text files: found as people name them, read as documents, each text once, tokenised once.

`files:` takes a file, a folder (all .txt, .jsonl and .parquet files below it, packed or not; `texts.py` says how
they are read), or a pattern; `~` is the home folder. Brackets in the name of a folder that exists are no pattern.
A text's identity is its content: the same texts under another path, through a link, relative or absolute, are the
same documents in the same split.

Their ids lie in the cache (`prepared/`), for a pattern and a tokenizer. They are read from there as long as the
files' paths, sizes and times are those of then; where only paths or times differ the files are read and their
fingerprint decides. Files that changed are tokenised again.
"""

import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from loopmdm.model.corpora import index as entries
from loopmdm.model.corpora.rows import Rows, column, read_rows, save_columns, spilled
from loopmdm.model.corpora.shards import (
    Prepared,
    Shards,
    Stream,
    are_sealed,
    known_of,
    prepared_folder,
    seal,
)
from loopmdm.model.corpora.texts import KINDS, PACKED, Text, name_of, read_all
from loopmdm.model.corpora.tokenizer import load_tokenizer, train_bpe
from loopmdm.model.errors import UsageError
from loopmdm.model.files import is_file, is_folder, taken, write_atomic, write_json

FILES = "files:"
EDITION = 1
"""Of what is prepared; another one where the same files would give other ids or splits."""
BPE_CHARACTERS = 2**27
"""Of training documents, at most, that a corpus' own BPE is trained on."""
State = list[list[Any]]
"""Path, bytes and nanoseconds of the last change of each file."""


class OwnFiles:
    """The files that a name means now."""

    def __init__(self, name: str):
        self.name, self.pattern = name, name.removeprefix(FILES)
        self.paths = find(self.pattern)

    def state(self) -> State:
        """What tells that nothing has changed."""
        found = [(path, path.stat()) for path in self.paths]
        return [[str(path.absolute()), status.st_size, status.st_mtime_ns] for path, status in found]

    def texts(self, doing: str, first: tuple[int, int] = (0, 0)) -> Iterator[Text]:
        """The documents, with a progress bar on a terminal that says what is being done."""
        total = sum(path.stat().st_size for path in self.paths)
        with tqdm(
            total=total, unit="B", unit_scale=True, desc=f"{doing} {self.name}", disable=None, leave=False
        ) as bar:
            yield from read_all(self.paths, first, lambda at: bar.update(at - bar.n))

    def ranked(self, index: Rows) -> np.ndarray:
        """Positions of the documents that count, in the order of their ranks; UsageError for fewer than three."""
        found = entries.ranked(index, lambda entry: self.called(entry, short=True))
        if len(found) < 3:
            n_read = sum(map(len, index()))
            few = n_read < 3
            what = "documents" if self.paths and few and n_read != len(self.paths) else "files"
            what = what if few else "distinct texts (the others are empty or copies)"
            count = n_read if few else len(found)
            kinds = f" ({', '.join(KINDS)}, also .gz and .zst)" if not self.paths else ""
            raise UsageError(f"{self.name} matches {count} {what}{kinds}; training needs at least 3, one a split")
        return found

    def called(self, entry: entries.Entry, short: bool = False) -> str:
        """The name of a document."""
        path = self.paths[int(entry["file"])]
        return name_of(path.name if short else str(path), int(entry["row"]))


def read_documents(name: str) -> list[tuple[str, str, str]]:
    """Identity, name and text of all distinct documents, in the order of their ranks; all are held at once."""
    files, texts = OwnFiles(name), []
    parts = [*entries.scan(files.texts("reading"), texts.append)]
    order = files.ranked(parts.__iter__)
    known = zip(entries.identities(parts.__iter__, order), order, strict=True)
    names = [files.called(entry) for part in parts for entry in part]
    return [(identity, names[at], texts[at]) for identity, at in known]


def prepare(name: str, tokenizer: Tokenizer) -> Prepared:
    """The ids of a user's own texts, from the cache if they are there."""
    files = OwnFiles(name)
    folder = prepared_folder(EDITION, FILES, Path(files.pattern).expanduser().absolute(), tokenizer.to_str())
    shards, state = Shards(folder, tokenizer), files.state()
    found = _opened(shards, files, state)
    if found is not None:
        return found
    with taken(folder, "tokenised into"):
        found = _opened(shards, files, state)  # another process may have prepared it meanwhile
        if found is None and not _only_touched(shards, files, state):
            _tokenise(shards, files, state)
        found = found or _opened(shards, files, state)
    assert found is not None
    return found


ABOUT, ORDER = "about.json", "documents.npy"
PLACE = np.dtype([("start", "i8"), ("length", "i8"), ("file", "i4"), ("row", "i8")])
"""Where a document's ids begin in the shards, how many they are, and where its text stands."""


def _is_whole(shards: Shards, about: dict[str, Any]) -> bool:
    ordered = are_sealed(shards.folder / ABOUT, {ORDER: shards.folder / ORDER})
    return ordered and shards.count() == about.get("shards")


def _opened(shards: Shards, files: OwnFiles, state: State) -> Prepared | None:
    """The finished preparation of these very files; None if it is none, or damaged."""
    about = known_of(shards.folder / ABOUT)
    if about.get("files") != state or not _is_whole(shards, about):
        return None
    starts, lengths = (column(read_rows(shards.folder / ORDER), field) for field in ("start", "length"))
    shelf = shards.shelf(about["shards"], starts, lengths)
    places = np.load(shards.folder / ORDER, mmap_mode="r")
    count = entries.held_out(len(shelf))
    parts = {"test": slice(count), "validation": slice(count, 2 * count)}
    names = {
        split: [files.called(entry) for entry in places[part][: entries.SAID]] for split, part in parts.items()
    }
    return Prepared(
        Stream(shelf[2 * count :]),
        {split: shelf[part] for split, part in parts.items()},
        names,
        about["fingerprint"],
        about["tokenizer sample"],
    )


def _only_touched(shards: Shards, files: OwnFiles, state: State) -> bool:
    """Whether the files hold what they held when they were tokenised, only under other paths or times.

    If so, that is written down. Files of other sizes are not read for it.
    """
    about = known_of(shards.folder / ABOUT)
    sizes = [sorted(size for _, size, _ in known) for known in (about.get("files") or [], state)]
    if about.get("files") == state or sizes[0] != sizes[1] or not _is_whole(shards, about):
        return False
    with spilled(entries.scan(files.texts("comparing")), entries.ENTRY, shards.folder) as index:
        order = files.ranked(index)
        if entries.fingerprint(entries.identities(index, order)) != about["fingerprint"]:
            return False
        columns = _texts_of(index, order)
    for field in ("start", "length"):
        columns[field] = column(read_rows(shards.folder / ORDER), field)
    _finish(shards, columns, about | {"files": state})
    return True


def _tokenise(shards: Shards, files: OwnFiles, state: State) -> None:
    """Tokenise the files, from where an earlier call was stopped unless they, or what it left, have changed."""
    about, count = known_of(shards.folder / ABOUT), shards.count()
    if about.get("files") != state:
        count = 0
        if about.get("files"):
            warnings.warn(f"{files.name} has changed since it was tokenised; it is tokenised again", stacklevel=4)
    if (ORDER in about and about["files"] == state) or (shards.was_written(count) and not about.get("files")):
        warnings.warn(f"{shards.folder} is damaged; {files.name} is prepared again", stacklevel=4)
    shards.drop(count)
    write_json(shards.folder / ABOUT, {"corpus": files.name, "files": state})
    shards.write(files.texts("tokenising", shards.behind(count)))
    if files.state() != state:
        raise UsageError(f"{files.name} changed while it was read; run it again when nothing writes there")
    _arrange(shards, files, state)


def _arrange(shards: Shards, files: OwnFiles, state: State) -> None:
    """Write down in which order the documents of all shards are read, and where they are."""
    count = shards.count()
    index = shards.index(count)
    order = files.ranked(index)
    training = column(index(), "characters")[order[2 * entries.held_out(len(order)) :]]
    sample = f"{_n_sampled(training):,} of {len(training):,} training documents"
    told = {
        "corpus": files.name,
        "files": state,
        "shards": count,
        "fingerprint": entries.fingerprint(entries.identities(index, order)),
        "tokenizer sample": f"{sample}, {BPE_CHARACTERS:,} characters at most",
    }
    lengths = column(index(), "tokens")
    starts = np.cumsum(lengths, dtype=np.int64)
    starts -= lengths
    spans = {"start": starts[order], "length": lengths[order]}
    _finish(shards, spans | _texts_of(index, order), told)


def _texts_of(index: Rows, order: np.ndarray) -> dict[str, np.ndarray]:
    """Where the texts stand of which documents are made, as columns of `PLACE`."""
    return {field: column(index(), field)[order] for field in ("file", "row")}


def _finish(shards: Shards, columns: dict[str, np.ndarray], told: dict[str, Any]) -> None:
    write_atomic(shards.folder / ORDER, lambda path: save_columns(path, PLACE, columns))
    write_json(shards.folder / ABOUT, told | {ORDER: seal(shards.folder / ORDER)})


def _n_sampled(characters: np.ndarray) -> int:
    """How many training documents a BPE is trained on, from the highest rank down; all if they are few."""
    return max(1, int(np.searchsorted(np.cumsum(characters[::-1]), BPE_CHARACTERS, "right")))


def make_tokenizer(name: str, d_vocab: int) -> Tokenizer:
    """The BPE of a user's own texts, from the cache if it is there.

    It is trained on the training documents, or, of more than BPE_CHARACTERS, on those of the highest ranks.
    """
    files = OwnFiles(name)
    path = prepared_folder(EDITION, "bpe", json.dumps(files.state()), d_vocab) / "tokenizer.json"
    if not path.is_file():
        with taken(path.parent, "tokenised into"):
            if not path.is_file():
                made = train_bpe(_sample(files, path.parent), d_vocab)
                write_atomic(path, lambda temporary: made.save(str(temporary)))
    return load_tokenizer(path, d_vocab)


def _sample(files: OwnFiles, folder: Path) -> Iterator[str]:
    """The texts that a BPE is trained on, in pieces; what is known of all waits in a folder."""
    with spilled(entries.scan(files.texts("reading")), entries.ENTRY, folder) as index:
        training = files.ranked(index)
        training = training[2 * entries.held_out(len(training)) :]
        characters = column(index(), "characters")
    chosen = np.zeros(len(characters), bool)
    chosen[training[-_n_sampled(characters[training]) :]] = True
    left = BPE_CHARACTERS
    for text, wanted in zip(files.texts("sampling"), chosen, strict=True):
        for piece in text.pieces if wanted else ():
            yield piece
            left -= len(piece)
            if left <= 0:
                return


def find(pattern: str) -> list[Path]:
    """The files that are meant, sorted; UsageError for no pattern, or one that cannot be one."""
    if not pattern.strip("/. "):
        raise UsageError(f"{FILES} needs a pattern, such as {FILES}texts/*.txt, or a folder of them")
    try:
        whole = Path(pattern).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{FILES}{pattern}: {error}") from None
    if is_file(whole):
        return [whole]
    if is_folder(whole):
        return _files(path for path in whole.rglob("*") if _is_text(path))
    folder, rest = _split(whole)
    try:
        return _files(folder.glob(str(rest)))
    except (ValueError, NotImplementedError) as error:
        raise UsageError(
            f"{FILES}{pattern} is no pattern ({error}); write one such as {FILES}texts/*.txt"
        ) from None


def _files(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_file())


def _is_text(path: Path) -> bool:
    return path.name.lower().endswith(tuple(kind + packing for kind in KINDS for packing in PACKED))


def _split(path: Path) -> tuple[Path, Path]:
    """The longest part of a path that is a folder as it is written, and the pattern that is left."""
    folder, parts = Path(path.anchor or "."), path.parts[1:] if path.anchor else path.parts
    for number, part in enumerate(parts):
        if part != ".." and not is_folder(folder / part):
            return folder, Path(*parts[number:])
        folder = folder / part
    return folder, Path("*")
