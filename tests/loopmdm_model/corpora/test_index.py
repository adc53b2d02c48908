"""The index of documents, read a part at a time: what is kept, in which order, is what its definition says."""

import json
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopmdm.model.corpora import hub, index, own_files, rows, shards
from loopmdm.model.corpora.texts import Text
from loopmdm.model.corpora.tokenizer import train_bpe


def entries(n: int, n_texts: int, seed: int) -> np.ndarray:
    """Documents with few texts: two of them have the same words, one in four is blank."""
    draw = np.random.default_rng(seed)
    found, text = np.zeros(n, index.ENTRY), draw.integers(0, n_texts, n)
    for field, group in (("identity", text), ("words", text // 2), ("rank", text)):
        hashes = draw.integers(0, 2**64, (n_texts, 2), np.uint64)
        hashes[::3] = hashes[:1, 0, None]  # the first half alone does not tell them apart
        hashes[::3, 1] += np.arange(len(hashes[::3]), dtype=np.uint64)
        found[field] = hashes[group]
    found["row"], found["characters"] = np.arange(n), draw.integers(0, 4, n)
    return found


def plainly(found: np.ndarray) -> tuple[list[int], list[str]]:
    """What is kept, in order, and what is said, one document after the other."""
    full = [at for at in range(len(found)) if found["characters"][at]]
    kept: dict[bytes, int] = {}
    for at in full:
        words = found["words"][at].tobytes()
        kept[words] = min(kept.get(words, at), at, key=lambda at: (found["identity"][at].tobytes(), at))
    original = {at: kept[found["words"][at].tobytes()] for at in full}
    left_out = {
        "empty files": [f"{at}" for at in range(len(found)) if at not in original],
        "copies": [f"{at} (of {original[at]})" for at in full if original[at] != at],
    }
    said = [
        f"{len(names)} {what} are left out: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in left_out.items()
        if names
    ]
    return sorted(kept.values(), key=lambda at: found["rank"][at].tobytes()), said


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 60), st.integers(1, 50), st.integers(0, 9), st.integers(1, 70), st.integers(1, 70))
def test_ranked_is_what_its_definition_says(n, n_texts, seed, bucket, size):
    found = entries(n, n_texts, seed)
    parts = [found[at : at + size] for at in range(0, n, size)]
    with pytest.MonkeyPatch.context() as small, warnings.catch_warnings(record=True) as said:
        small.setattr(index, "BUCKET", bucket)
        small.setattr(rows, "AT_A_TIME", size)
        warnings.simplefilter("always")
        order = index.ranked(parts.__iter__, lambda entry: f"{entry['row']}")
        identities = [*index.identities(parts.__iter__, order)]
    assert (order.tolist(), [str(each.message) for each in said]) == plainly(found)
    assert identities == [found["identity"][at].tobytes().hex() for at in order]


N_DOCUMENTS, N_PARTS = 2**17, 4


@pytest.fixture
def made(tmp_path):
    """Shards of 2**17 documents, one in 20 a copy, without their ids, and the files they are made of."""
    (tmp_path / "one.jsonl").write_text("")
    folder, draw = tmp_path / "prepared", np.random.default_rng(0)
    folder.mkdir()
    part = np.zeros(N_DOCUMENTS // N_PARTS, index.ENTRY)
    for number in range(N_PARTS):
        for field in ("identity", "words", "rank"):
            before = part[field][::20].copy()
            part[field] = draw.integers(0, 2**64, (len(part), 2), np.uint64)
            part[field][::20] = before if field == "words" and number else part[field][::20]
        part["row"] = np.arange(len(part)) + number * len(part)
        part["characters"], part["tokens"] = 10**5, 10**5  # more tokens than four bytes count
        paths = {"ids": folder / f"{number:05}.ids", "index": folder / f"{number:05}.npy"}
        paths["ids"].write_bytes(b"\1\1")
        np.save(paths["index"], part)
        sealed = {name: shards.seal(path) for name, path in paths.items()}
        (folder / f"{number:05}.json").write_text(json.dumps(sealed))
    tokenizer = train_bpe(["the cat sat on the mat"], 264)
    return shards.Shards(folder, tokenizer), own_files.OwnFiles(f"files:{tmp_path}")


@pytest.mark.filterwarnings("ignore:.* copies are left out")
def test_a_document_takes_60_bytes_of_memory(made, monkeypatch):
    monkeypatch.setattr(index, "BUCKET", 2**13)
    monkeypatch.setattr(rows, "AT_A_TIME", 2**12)
    of_shards, files = made
    entries, state = of_shards.index(N_PARTS), files.state()
    monkeypatch.setattr(index, "scan", lambda _: entries())
    monkeypatch.setattr(files, "texts", lambda _: (Text(0, row, iter("a")) for row in range(N_DOCUMENTS)))
    steps = {
        "order": lambda: own_files._arrange(of_shards, files, state) is None,
        "open": lambda: own_files._opened(of_shards, files, state),
        "compare": lambda: own_files._only_touched(of_shards, files, [["elsewhere", *state[0][1:]]]),
        "sample": lambda: all(own_files._sample(files, of_shards.folder)),
        "hub": lambda: hub._opened("lm1b", of_shards, N_DOCUMENTS * 99_000),
    }
    peaks = {}
    for name, step in steps.items():
        tracemalloc.start()
        assert step()
        peaks[name] = tracemalloc.get_traced_memory()[1] / N_DOCUMENTS
        tracemalloc.stop()
    assert max(peaks.values()) < 60, peaks
