"""Corpora tokenised into shards: the same ids as those of the texts read whole, whatever happens on the way."""

import codecs
import errno
import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopmdm.model.corpora import documents as corpora
from loopmdm.model.corpora import hub, index, own_files, rows, shards, texts
from loopmdm.model.corpora.index import scan
from loopmdm.model.corpora.tokenizer import encode_texts, from_ranks, train_bpe
from loopmdm.model.errors import UsageError
from loopmdm.model.files import sha256
from loopmdm.model.tasks import batches
from tests.loopmdm_model.corpora.conftest import split_of

WORDS = "the cat's café sat, on 42 mats;\tthey'll　see 字。 \u0301x\u00a0y"
TOKENIZER = train_bpe([WORDS * 3], 290)
RANKS = from_ranks(
    {word: n for n, word in enumerate([bytes([b]) for b in range(256)] + [b" t", b"th", b"the", b"  "])}
)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from([*WORDS, " ", " ", "\n", "\x1c", "\x85", "'"]), max_size=60), st.integers(1, 7))
@pytest.mark.parametrize("tokenizer", [TOKENIZER, RANKS])
def test_pieces_have_the_ids_and_the_hashes_of_the_whole(tokenizer, text, size):
    with pytest.MonkeyPatch.context() as small:
        small.setattr(texts, "PIECE", size)
        parts = list(texts.in_pieces([text[:11], text[11:]], "it"))
    assert "".join(parts) == text and shards.reads_in_pieces(tokenizer)
    assert [i for ids in encode_texts(tokenizer, parts) for i in ids] == encode_texts(tokenizer, [text])[0]
    (whole,), (cut,) = (scan([texts.Text(0, 0, iter(pieces))]) for pieces in ([text], parts))
    assert whole == cut


def document(number: int) -> str:
    return " ".join(f"w{(number * 7 + i * i) % 41}" for i in range(20 + number % 13)) + f" number {number}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """60 documents in files of all kinds, of which shards hold a few each."""
    monkeypatch.setattr(texts, "PIECE", 40)
    monkeypatch.setattr(shards, "BATCH", 400)
    monkeypatch.setattr(shards, "SHARD", 300)
    home = tmp_path / "texts"
    home.mkdir()
    rows = [json.dumps({"text": document(n), "more": n}) + "\n" for n in range(30)]
    (home / "a.jsonl").write_text("".join(rows[:10]) + "\n \n")
    (home / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows[10:20]).encode()))
    (home / "c.jsonl.zst").write_bytes(pa.compress("".join(rows[20:]).encode(), "zstd", asbytes=True))
    pq.write_table(pa.table({"text": [document(n) for n in range(30, 50)] + [None, ""]}), home / "d.parquet")
    for n in range(50, 59):
        (home / f"e{n}.txt").write_text(document(n))
    (home / "f.txt.gz").write_bytes(gzip.compress(document(59).encode()))
    (home / "notes.md").write_text("not meant")
    return home


@pytest.fixture
def tokenizer():
    return train_bpe([document(n) for n in range(60)], 300)


def same(one: shards.Prepared, other: shards.Prepared) -> bool:
    held_out = [
        [ids.tolist() for s in ("validation", "test") for ids in each.held_out[s]] for each in (one, other)
    ]
    streams = one.stream[:], other.stream[:]
    return np.array_equal(*streams) and held_out[0] == held_out[1] and one.fingerprint == other.fingerprint


def finished(cache: Path) -> list[Path]:
    return sorted(cache.glob("prepared/*/[0-9]*.json"))


@pytest.mark.filterwarnings("ignore:2 empty files")
def test_sharded_is_whole(folder, tokenizer, cache):
    name = f"files:{folder}"
    documents, found = corpora.load(name), own_files.prepare(name, tokenizer)
    assert sorted(d.text for d in documents) == sorted(map(document, range(60))) and len(finished(cache)) > 5
    whole = {
        split: batches.encode(tokenizer, [d for d in documents if d.split == split]) for split in corpora.SPLITS
    }
    assert np.array_equal(found.stream[:], np.concatenate(whole["train"]))
    for split in ("validation", "test"):
        assert [ids.tolist() for ids in found.held_out[split]] == [ids.tolist() for ids in whole[split]]
    assert found.fingerprint == corpora.fingerprint(documents)
    assert {d.name for d in documents if d.split == "test"} == set(found.names["test"])
    data = batches.dataset(name, 8, 300, 0, tokenizer)
    blocks, owners = batches.cut(whole["test"], 8)
    assert torch.equal(data.evaluation("test"), blocks) and owners.tolist() == sorted(owners.tolist())
    assert torch.equal(data.evaluation("test", 2), batches.spread(blocks, 2))
    rows = torch.cat([data.batch(step, 1) for step in range(data.n_blocks)])
    shift, _ = data._epoch(0)
    expected = np.concatenate(whole["train"])[shift : shift + data.n_blocks * 8].reshape(-1, 8)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.integers(0, 50), st.integers(0, 50))
def test_a_slice_of_the_stream_is_that_of_all_ids(lengths, start, stop):
    maps = [np.arange(start, start + n) for start, n in zip(np.cumsum([0, *lengths]), lengths, strict=False)]
    starts = np.cumsum([0, *lengths])[:-1]
    order = np.argsort([(i * 7) % 11 for i in range(len(lengths))])
    stream = shards.Stream(shards.Shelf(maps, starts, starts[order], np.array(lengths)[order]))
    whole = np.concatenate([maps[i] for i in order])
    assert len(stream) == len(whole) and np.array_equal(stream[start:stop], whole[start:stop])


@pytest.mark.filterwarnings("ignore:2 empty files")
@pytest.mark.parametrize("breaks_at", [3, 25, 47])
def test_finished_shards_are_kept(folder, tokenizer, cache, monkeypatch, breaks_at, tmp_path):
    def broken(*given):
        yield from itertools.islice(read(*given), breaks_at)
        raise KeyboardInterrupt

    read = own_files.read_all
    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(own_files, "read_all", broken)
        own_files.prepare(f"files:{folder}", tokenizer)
    before = {path: path.stat().st_mtime_ns for path in finished(cache)}
    encoded = []
    with monkeypatch.context() as during:
        during.setattr(shards, "encode_texts", lambda t, pieces: encoded.extend(pieces) or encode_texts(t, pieces))
        resumed = own_files.prepare(f"files:{folder}", tokenizer)
        own_files.prepare(f"files:{folder}", tokenizer)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    kept = sum(len(np.load(path.with_suffix(".npy"))) for path in before)
    assert bool(before) == (breaks_at > 3) and len([p for p in encoded if "number" in p]) == 60 - kept
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path / "other"))
    assert same(resumed, own_files.prepare(f"files:{folder}", tokenizer))
    assert not list(cache.rglob(".partial*"))


@pytest.mark.filterwarnings("ignore:2 empty files")
def test_how_much_is_read_at_a_time_changes_nothing(folder, tokenizer, tmp_path, monkeypatch):
    (folder / "g.jsonl").write_text("".join(json.dumps({"text": document(n)}) + "\n" for n in range(0, 60, 3)))
    monkeypatch.setattr(hub, "stream", lambda name: rows_of(3000))
    name, made = f"files:{folder}", []
    for size in (2**16, 7):
        cache = tmp_path / f"{size}"
        monkeypatch.setenv("LOOPMDM_CACHE", str(cache))
        monkeypatch.setattr(rows, "AT_A_TIME", size)
        monkeypatch.setattr(index, "BUCKET", size)
        with pytest.warns(UserWarning, match="20 copies are left out") as said:
            found = [own_files.prepare(name, tokenizer), hub.prepare("lm1b", tokenizer, 9000)]
            sample = own_files.make_tokenizer(name, 280).to_str()
        home = next(cache.glob("prepared/*/about.json")).parent
        about = json.loads((home / "about.json").read_text())
        about["documents.npy"].pop("mtime")
        files = {path.name: path.read_bytes() for path in home.iterdir() if path.suffix in (".ids", ".npy")}
        made.append((found, (sample, about, files, [str(each.message) for each in said])))
    (one, other), known = zip(*made, strict=True)
    assert all(map(same, one, other)) and known[0] == known[1] and one[0].names == other[0].names


KILLED = """
import sys, time
from pathlib import Path
from tokenizers import Tokenizer
from loopmdm.model.corpora import own_files, shards
def slow(*given, read=own_files.read_all):
    for text in read(*given):
        time.sleep(0.02)
        yield text
own_files.read_all, shards.BATCH, shards.SHARD = slow, 400, 300
own_files.prepare(sys.argv[1], own_files.load_tokenizer(Path(sys.argv[2]), 300))
"""


@pytest.mark.filterwarnings("ignore:2 empty files")
def test_a_killed_preparation_goes_on(folder, tokenizer, cache, tmp_path, monkeypatch):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = own_files.load_tokenizer(tmp_path / "tokenizer.json", 300)
    process = subprocess.Popen([sys.executable, "-c", KILLED, f"files:{folder}", str(tmp_path / "tokenizer.json")])
    while len(finished(cache)) < 2:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in finished(cache)}
    resumed = own_files.prepare(f"files:{folder}", tokenizer)
    assert 2 <= len(before) < len(finished(cache)) and not list(cache.rglob(".partial*"))
    assert before == {path: path.stat().st_mtime_ns for path in before}
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path / "other"))
    assert same(resumed, own_files.prepare(f"files:{folder}", tokenizer))


@pytest.mark.filterwarnings("ignore:2 empty files")
def test_files_are_told_by_their_times_and_then_by_what_they_hold(folder, tokenizer, monkeypatch):
    name, encoded, read = f"files:{folder}", [], []
    monkeypatch.setattr(
        shards, "encode_texts", lambda t, pieces: encoded.extend(pieces) or encode_texts(t, pieces)
    )
    whole = own_files.read_all
    monkeypatch.setattr(own_files, "read_all", lambda *given: read.append(1) or whole(*given))
    first, count = own_files.prepare(name, tokenizer), len(encoded)
    assert same(first, own_files.prepare(name, tokenizer)) and len(read) == 1
    os.utime(folder / "a.jsonl", (1, 1))
    held_out = next(Path(path) for names in first.names.values() for path in names if path.endswith(".txt"))
    held_out.rename(folder / "z.txt")
    touched = own_files.prepare(name, tokenizer)
    assert same(first, touched) and len(encoded) == count and len(read) == 2
    for split, names in touched.names.items():
        assert names == [document.name for document in corpora.load(name, split)][:3]
    read.clear()
    own_files.prepare(name, tokenizer)
    assert not read  # the new times are known now
    text = (folder / "e51.txt").read_text()
    (folder / "e51.txt").write_text(text.replace("number", "numbre"))  # as long as before
    with pytest.warns(UserWarning, match="has changed since it was tokenised"):
        changed = own_files.prepare(name, tokenizer)
    assert changed.fingerprint != first.fingerprint and len(encoded) == 2 * count
    (folder / "new.txt").write_text("one more text")
    with pytest.warns(UserWarning, match="has changed since it was tokenised"):
        assert own_files.prepare(name, tokenizer).fingerprint != changed.fingerprint


@pytest.mark.filterwarnings("ignore:2 empty files")
@pytest.mark.parametrize("file", ["00001.ids", "00001.npy", "00001.json", "documents.npy", "about.json"])
@pytest.mark.parametrize("damage", [lambda raw: raw[:-3], lambda raw: b"\1" + raw[1:], lambda raw: b"{}"])
def test_damaged_shards_are_made_again(folder, tokenizer, cache, file, damage):
    own_files.prepare(f"files:{folder}", tokenizer)
    (path,) = cache.glob(f"prepared/*/{file}")
    whole = {each.name: each.read_bytes() for each in path.parent.iterdir() if each.suffix in (".ids", ".npy")}
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged"):
        own_files.prepare(f"files:{folder}", tokenizer)
    assert whole == {
        each.name: each.read_bytes() for each in path.parent.iterdir() if each.suffix in (".ids", ".npy")
    }


@pytest.mark.filterwarnings("ignore:2 empty files")
def test_a_copied_cache_is_hashed_once(folder, tokenizer, cache, monkeypatch):
    def other_times():
        for path in sealed:
            os.utime(path, (path.stat().st_mtime + 9,) * 2)

    def hashed():
        seen = []
        with monkeypatch.context() as during:
            during.setattr(shards, "sha256", lambda path: seen.append(path.name) or sha256(path))
            assert same(own_files.prepare(f"files:{folder}", tokenizer), first)
        return sorted(set(seen))

    first = own_files.prepare(f"files:{folder}", tokenizer)
    sealed = sorted(path for path in cache.glob("prepared/*/*") if path.suffix in (".ids", ".npy"))
    other_times()
    assert hashed() == [path.name for path in sealed] and hashed() == []
    other_times()
    with monkeypatch.context() as during:
        during.setattr(shards, "write_json", lambda *_: Path("not/there").stat())  # a cache to read only
        assert hashed() == hashed() == [path.name for path in sealed]


@pytest.mark.parametrize(
    "file, raw, says",
    [
        ("x.jsonl", b'{"text": "caf\xe9"}\n', r"x\.jsonl line 1 is not JSON \('utf-8' codec"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl line 2 is not JSON"),
        ("x.jsonl", b'["text"]\n', r"x\.jsonl line 1 is no JSON object"),
        ("x.jsonl", b'{"body": "a"}\n', r"x\.jsonl line 1 \(columns body\) holds no text under 'text'"),
        ("x.jsonl", b'{"text": "' + b"a b" * 200 + b'"}\n', r"x\.jsonl line 1 has more than 0 MiB"),
        ("x.txt", b"a" * 500 + b" b", r"x\.txt has 448 characters without the end of a word"),
        ("x.txt", b"plain " * 60 + b"caf\xe9", r"x\.txt is not UTF-8 text \(byte 363\)"),
        ("x.txt", codecs.BOM_UTF8 + b"caf\xe9 is", r"x\.txt is not UTF-8 text \(byte 6\)"),
        ("x.txt", codecs.BOM_UTF8 + b"plain " * 60 + b"caf\xe9", r"x\.txt is not UTF-8 text \(byte 366\)"),
        ("x.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:-9], r"x\.txt\.gz is damaged"),
        ("x.txt.gz", b"no gzip", r"x\.txt\.gz is damaged"),
        ("x.txt.zst", b"no zstandard", r"x\.txt\.zst is damaged"),
        (
            "x.txt.zst",
            pa.compress(bytes(range(256)) * 4, "zstd", asbytes=True)[:-20],
            r"x\.txt\.zst is damaged|is not UTF-8",
        ),
        ("x.parquet", b"no parquet", r"x\.parquet is no parquet file"),
    ],
)
def test_what_cannot_be_read_is_one_line(folder, tokenizer, cache, monkeypatch, file, raw, says):
    monkeypatch.setattr(texts, "LONGEST_LINE", 500)
    monkeypatch.setattr(texts, "LONGEST_WORD", 400)
    monkeypatch.setattr(texts, "CHUNK", 64)
    (folder / file).write_bytes(raw)
    for read in (lambda: own_files.prepare(f"files:{folder}", tokenizer), lambda: corpora.load(f"files:{folder}")):
        with pytest.raises(UsageError, match=says):
            read()
    assert not list(cache.rglob(".partial*"))


def test_a_parquet_file_without_texts_names_its_columns(folder):
    pq.write_table(pa.table({"body": ["a"]}), folder / "x.parquet")
    with pytest.raises(UsageError, match=r"\(columns body\) holds no text under 'text'"):
        corpora.load(f"files:{folder}")


def test_a_folder_without_texts_says_what_it_looked_for(tmp_path, tokenizer):
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"matches 0 files \(\.txt, \.jsonl, \.parquet, also \.gz and \.zst\)"):
        own_files.prepare(f"files:{tmp_path}", tokenizer)


@pytest.mark.filterwarnings("ignore:2 empty files")
def test_a_full_disk_is_one_line_and_keeps_what_is_done(folder, tokenizer, cache, monkeypatch):
    write, left = shards.write_atomic, [7]

    def full(path, content):
        left[0] -= 1
        if left[0] < 0:
            content(path.with_name("half"))
            path.with_name("half").unlink()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    with monkeypatch.context() as during, pytest.raises(OSError, match=r"no space left in .* LOOPMDM_CACHE"):
        during.setattr(shards, "write_atomic", full)
        own_files.prepare(f"files:{folder}", tokenizer)
    assert len(finished(cache)) == 3
    assert len(own_files.prepare(f"files:{folder}", tokenizer).stream) > 1000


def test_a_cache_that_cannot_be_written_to_is_one_line(folder, tokenizer, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot write into the cache .* set LOOPMDM_CACHE"):
        own_files.prepare(f"files:{folder}", tokenizer)


@pytest.mark.filterwarnings("ignore:2 empty files")
def test_a_bpe_of_a_large_corpus_reads_some_training_documents(folder, tokenizer, monkeypatch):
    name = f"files:{folder}"
    training = corpora.load(name, "train")
    whole = own_files.make_tokenizer(name, 280)
    assert whole.to_str() == train_bpe([d.text for d in training], 280).to_str()
    assert own_files.prepare(name, tokenizer).tokenizer_sample.startswith("54 of 54 training documents")
    monkeypatch.setattr(own_files, "BPE_CHARACTERS", 900)
    seen = "".join(own_files._sample(own_files.OwnFiles(name), folder))
    last, count = 0, 0
    while last + len(training[-1 - count].text) <= 900:
        last, count = last + len(training[-1 - count].text), count + 1
    assert len(seen) == last and all(d.text in seen for d in training[-count:]) and count > 3
    monkeypatch.setattr(own_files, "EDITION", 0)  # nothing is in the cache
    assert own_files.prepare(name, tokenizer).tokenizer_sample.startswith(f"{count} of 54 training documents, 900")


def rows_of(number: int) -> list[dict]:
    return [{"text": f"row {n} of the stream says {n * n}"} for n in range(number)]


def test_a_hub_corpus_grows_with_what_is_asked_of_it(tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 3000)
    starts = []

    class Rows(list):
        def skip(self, first):
            starts.append(first)
            return iter(self[first:])

    monkeypatch.setattr(hub, "stream", lambda name: Rows(rows_of(4000)))
    small, large = hub.prepare("lm1b", tokenizer, 30_000), hub.prepare("lm1b", tokenizer, 50_000)
    assert len(small.stream) == 30_000 and np.array_equal(large.stream[:30_000], small.stream[:])
    assert len(starts) == 1 and starts[0] > 500 and small.fingerprint != large.fingerprint
    assert same(hub.prepare("lm1b", tokenizer, 30_000), small) and len(starts) == 1
    every = hub.prepare("lm1b", tokenizer, 10**9)
    rows = [row["text"] for row in rows_of(4000)]
    held_out = {split: [t for t in rows if split_of(t) == split] for split in ("validation", "test")}
    kept = [t for t in rows if split_of(t) is None]
    assert len(every.stream) == sum(len(ids) + 1 for ids in encode_texts(tokenizer, kept))
    for split, found in held_out.items():
        assert [tokenizer.decode(ids.tolist()) for ids in every.held_out[split]] == [f"{text}" for text in found]
    assert same(hub.prepare("lm1b", tokenizer, 10**9), every) and len(starts) == 2


def test_a_hub_corpus_that_lost_its_end_is_streamed_to_it_again(tokenizer, cache, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 9000)
    monkeypatch.setattr(hub, "stream", lambda name: rows_of(3000))
    every = hub.prepare("lm1b", tokenizer, 10**9)
    (end,) = cache.glob("prepared/*/end.json")
    for path in end.parent.glob(f"{len(finished(cache)) - 1:05}.*"):
        path.unlink()
    assert len(finished(cache)) and same(hub.prepare("lm1b", tokenizer, 10**9), every)
    for written in ("", '{"corpus": "lm1b"}'):  # damaged, or of a version that did not count
        end.write_text(written)
        assert same(hub.prepare("lm1b", tokenizer, 10**9), every)
        assert json.loads(end.read_text())["shards"] == len(finished(cache))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_a_local_folder_is_streamed_as_the_hub_is(tmp_path, tokenizer, kind):
    pytest.importorskip("datasets")
    rows = rows_of(3000)
    home = tmp_path / "data"
    home.mkdir()
    if kind == "parquet":
        pq.write_table(pa.table({"text": [row["text"] for row in rows]}), home / "train.parquet")
    else:
        lines = [json.dumps(row) if kind == "jsonl" else row["text"] for row in rows]
        (home / f"train.{kind}").write_text("\n".join(lines) + "\n")
    found = hub.prepare(f"hub:{home}", tokenizer, 20_000)
    kept = [row["text"] for row in rows if split_of(row["text"]) is None]
    ids = [i for text in encode_texts(tokenizer, kept) for i in (*text, tokenizer.token_to_id("[EOS]"))]
    assert found.stream[:].tolist() == ids[:20_000]
    assert hub.prepare(f"hub:{home}", tokenizer, 30_000).stream[:].tolist() == ids[:30_000]


PEAK = """
import sys
from pathlib import Path
from loopmdm.model.corpora import own_files
tokenizer = own_files.make_tokenizer(sys.argv[1], 4096)
own_files.prepare(sys.argv[1], tokenizer)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of memory from /proc")
def test_memory_is_flat(tmp_path):
    """Four times the text takes a few megabytes more: tens of bytes a document, and nothing of the texts."""
    lines = [line for d in corpora.load("sotu-slice") for line in d.text.splitlines() if line]
    draw, peaks = random.Random(0), []
    for megabytes in (20, 80):
        home = tmp_path / str(megabytes)
        home.mkdir()
        for number in range(megabytes):
            rows = ("\n".join(draw.choices(lines, k=20)) for _ in range(200))
            rows = itertools.takewhile(lambda _: file.tell() < 10**6, rows)
            with (home / f"{number}.jsonl").open("w") as file:
                file.writelines(json.dumps({"text": row}) + "\n" for row in rows)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, f"files:{home}"], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout) // 1024)
    assert peaks[1] < 1000 and peaks[1] - peaks[0] < 60, peaks
