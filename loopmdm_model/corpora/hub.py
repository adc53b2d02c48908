"""Corpora of the Hugging Face hub: streamed once, tokenised into shards of ids, read at random from there.

The shards make step k's batch a function of (seed, k), which a stream is not. They lie in the cache (`prepared/`),
for a name and a tokenizer; a preparation that was stopped, or that is to give more tokens than before, goes on
behind the last row. Whether the hub's data have changed since is not asked. One document in 1,000 is validation,
one test, by the hash of its text: copies of one text stand on one side, those with other blanks too.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from loopmdm.model.corpora.index import Entry
from loopmdm.model.corpora.rows import Rows, column, numbered
from loopmdm.model.corpora.shards import Prepared, Shards, Stream, known_of, prepared_folder
from loopmdm.model.corpora.texts import Text, in_pieces, text_of
from loopmdm.model.errors import UsageError
from loopmdm.model.files import taken, write_json

HUB = {
    "lm1b": ("billion-word-benchmark/lm1b", None),
    "openwebtext": ("Skylion007/openwebtext", None),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-100BT"),
}
PREFIX = "hub:"
HELD_OUT_EVERY, MOST_HELD_OUT = 1000, 1000
HELD_OUT = {"validation": 1, "test": 2}
"""Which of HELD_OUT_EVERY ranks are held out."""
BPE_DOCUMENTS = 20_000
"""Of the stream, at most, that a corpus' own BPE is trained on."""
EDITION = 3
"""Of what `prepare` writes; another one where a text is held out, or read, as it was not before."""


def is_hub(name: str) -> bool:
    """Whether a corpus name means a hub data set: one of HUB, or "hub:OWNER/NAME" or "hub:OWNER/NAME:CONFIG"."""
    return name in HUB or name.startswith(PREFIX)


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
    shards = Shards(prepared_folder(EDITION, "hub", name, tokenizer.to_str()), tokenizer)
    found = _opened(name, shards, limit)
    if found is None:
        with taken(shards.folder, "tokenised into"):
            found = _opened(name, shards, limit)  # another process may have prepared it meanwhile
            if found is None:
                _continue(name, shards, limit)
                found = _opened(name, shards, limit)
    assert found is not None
    return found


END = "end.json"
"""There once the stream has ended; it says with how many shards."""


def _opened(name: str, shards: Shards, limit: int) -> Prepared | None:
    """What was prepared; None if it is too little, or damaged."""
    count = shards.count()
    if shards.was_written(count):
        return None
    index = shards.index(count)
    splits = {split: _positions(index, split) for split in HELD_OUT}
    trained, lengths = _positions(index, None), column(index(), "tokens")
    reached = int(np.searchsorted(np.cumsum(lengths[trained], dtype=np.int64), limit))
    ended = known_of(shards.folder / END).get("shards") == count
    if ended and not all(map(len, splits.values())):
        few = next(split for split, found in splits.items() if not len(found))
        raise UsageError(f"{name} has too few documents to hold any out for {few}")
    if not all(map(len, splits.values())) or (reached == len(trained) and not ended):
        return None
    trained = trained[: reached + 1]
    last = max(trained[-1:].max(initial=0), *(found[0] for found in splits.values()))
    starts = np.cumsum(lengths, dtype=np.int64)
    starts -= lengths
    lengths[trained[-1:]] -= max(0, int(lengths[trained].sum()) - limit)
    chosen = {split: found[found <= last][:MOST_HELD_OUT] for split, found in splits.items()}
    held_out = {split: shards.shelf(count, starts[found], lengths[found]) for split, found in chosen.items()}
    digest = hashlib.sha256(f"{EDITION}\0{limit}\0".encode())
    for start, part in numbered(index()):
        digest.update(part["identity"][: max(0, last + 1 - start)].tobytes())
    stream = Stream(shards.shelf(count, starts[trained], lengths[trained]))
    taken_from = f"the first documents of the stream, at most {BPE_DOCUMENTS:,}"
    return Prepared(stream, held_out, {}, digest.hexdigest(), taken_from)


def _positions(index: Rows, split: str | None) -> np.ndarray:
    """Positions of the documents of a split; None: those that are trained on."""
    found = [np.zeros(0, int)]
    for start, part in numbered(index()):
        ranks = part["words"][:, 0] % HELD_OUT_EVERY
        chosen = ~np.isin(ranks, list(HELD_OUT.values())) if split is None else ranks == HELD_OUT[split]
        found.append(start + np.flatnonzero(chosen & (part["characters"] > 0)))
    return np.concatenate(found)


def _continue(name: str, shards: Shards, limit: int) -> None:
    """Stream from behind the last whole shard until there are enough tokens, and a document of each split."""
    count = shards.count()
    if shards.was_written(count):
        warnings.warn(f"{shards.folder} is damaged; {name} is prepared again", stacklevel=3)
    (shards.folder / END).unlink(missing_ok=True)
    shards.drop(count)
    index = shards.index(count)
    missing = {split for split in HELD_OUT if not len(_positions(index, split))}
    written = int(column(index(), "tokens")[_positions(index, None)].sum())
    _, first = shards.behind(count)
    with tqdm(
        total=limit, initial=written, unit="token", unit_scale=True, desc=name, disable=None, leave=False
    ) as bar:

        def enough(entry: Entry) -> bool:
            nonlocal written
            split = _held_out_for(entry["words"][0])
            missing.discard(split or "")
            if split is None:
                written += int(entry["tokens"])
                bar.update(int(entry["tokens"]))
            return written >= limit and not missing

        documents = (Text(0, row, in_pieces([text], name)) for row, text in _rows(name, first))
        if not shards.write(documents, enough):
            write_json(shards.folder / END, {"corpus": name, "shards": shards.count()})


def texts(name: str) -> Iterator[str]:
    """The texts of a hub data set, line ends plain; UsageError for rows that hold none.

    Empty rows are left out, and what no text file could hold: NUL characters, halves of surrogate pairs.
    """
    return (text for _, text in _rows(name))


def _rows(name: str, first: int = 0) -> Iterator[tuple[int, str]]:
    """The rows that hold texts, from `first` on, and their numbers."""
    rows = stream(name)
    skip = getattr(rows, "skip", None)
    later = skip(first) if first and skip else islice(rows, first, None)
    for number, row in enumerate(later, start=first):
        text = text_of(row, f"{name}: row {number}")
        if text.strip():
            yield number, text


def _held_out_for(rank: int) -> str | None:
    return next((split for split, value in HELD_OUT.items() if rank % HELD_OUT_EVERY == value), None)
