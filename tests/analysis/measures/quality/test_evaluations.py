"""Evaluations on what is known: an oracle has no excess KL, results are cached by content."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis.exhibits import tables
from loopmdm.analysis.measures import MEASURES, Measure, evaluate
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.quality.generation import distinct_pairs, generative, unigram_entropy
from loopmdm.analysis.measures.quality.likelihoods import excess_kl
from loopmdm.analysis.measures.quality.questions import choose, fitted, multiple_choice
from loopmdm.analysis.measures.quality.solving import solve_rate
from loopmdm.model.diffusion.likelihood import nelbo
from loopmdm.model.errors import UsageError
from loopmdm.model.files import read_json, write_json
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.tasks.test_sets import load_test_set
from loopmdm.model.tasks.trees import TREE_TASKS
from tests.conftest import toy_config


class Oracle:
    """Answers with the exact posterior, after the first loop; before, with the prior."""

    def __init__(self, name: str):
        self.task = TREE_TASKS[name]
        self.cfg = toy_config(d_vocab=self.task.n_states + 1, n_ctx=self.task.n_nodes)

    def states(self, tokens, n_loops, attention_mask=None):
        for loop in range(n_loops):
            yield torch.tensor(loop), tokens

    def readout(self, state, context, *, rows):
        masked = context == self.cfg.mask_token_id
        exact = self.task.posterior(context, masked)[rows].clamp(min=1e-30).log()
        logits = exact if int(state) else torch.zeros_like(exact)
        return torch.cat([logits, torch.full((len(logits), 1), float("-inf"))], dim=1)


@pytest.mark.parametrize("task", ["tree", "markov"])
def test_an_oracle_has_no_excess(task):
    case = Case(Oracle(task), load_test_set(task, 0, None))
    frame = excess_kl(case, [1, 2], 2)
    after, before = frame.query("n_loops == 2"), frame.query("n_loops == 1")
    np.testing.assert_allclose(after["excess_kl"], 0.0, atol=1e-9)
    assert (before.query("hops == 1")["excess_kl"] > 0.1).all()  # the prior is not good enough
    assert before["excess_kl"].max() <= np.log(TREE_TASKS[task].n_states) + 1e-9
    assert frame.groupby("n_loops")["n_nodes"].sum().nunique() == 1
    pd.testing.assert_frame_equal(excess_kl(case, [1, 2], 2, batch_size=700), frame)
    with pytest.raises(UsageError, match="batch_size"):
        excess_kl(case, [1, 2], batch_size=0)


def test_results_are_cached_by_weights_and_question(monkeypatch, tmp_path):
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path))
    frame = evaluate("sudoku-base", "nll", [1], n_samples=1)
    assert len(list((tmp_path / "evaluations").iterdir())) == 1
    model = LoopMDM.from_pretrained("sudoku-base")
    expected = nelbo(model, load_test_set("sudoku6", 36, None).tokens, 1, n_samples=1)
    assert frame["nelbo"][0] == pytest.approx(expected.mean) and frame["n"][0] == 1000
    unmeasured = Measure("nll", "nothing", lambda case, counts, n_samples=2: None, "loops")
    monkeypatch.setitem(MEASURES, "nll", unmeasured)  # from the cache, nothing is measured
    again = evaluate("sudoku-base", "nll", [1, 1], n_samples=1)
    assert again.equals(frame)
    with pytest.raises(AttributeError):
        evaluate("sudoku-base", "nll", [1], n_samples=3)
    with pytest.raises(UsageError, match="nll takes no n_clues; it takes n_loops, n_samples"):
        evaluate("sudoku-base", "nll", [1], n_clues=[10])
    with pytest.raises(UsageError, match="did you mean nll"):
        evaluate("sudoku-base", "nl", [1])
    with pytest.raises(UsageError, match="at least 1"):
        evaluate("sudoku-base", "nll", [0])
    with pytest.raises(UsageError, match="no text model"):
        evaluate("sudoku-base", "zero-shot", [1])
    with pytest.raises(UsageError, match="no exact posterior"):
        evaluate("sudoku-base", "excess-kl", [1])


def test_zero_shot_scores_short_documents_too(monkeypatch, tmp_path):
    from loopmdm.model.corpora import documents as corpora

    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path))
    documents = [corpora.Document(str(i), f"a short text, number {i}", "test") for i in range(5)]
    documents.append(corpora.Document("long", "and a longer one " * 60, "test"))
    monkeypatch.setattr(corpora, "load", lambda *_: documents)
    frame = evaluate("sotu-loop", "zero-shot", [1, 2], n_samples=1)
    assert len(frame) == 7 * 2 and (frame["n_documents"] == 6).all() and frame["nelbo"].between(2, 9).all()


@pytest.fixture(scope="module")
def sudoku():
    return Case.of("sudoku-loop")


@pytest.fixture(scope="module")
def text():
    return Case.of("sotu-loop")


def test_solving_by_clues_order_and_loops(sudoku):
    frame = solve_rate(sudoku, [1, 6], n_clues=[32], orders=("confidence", "row-major"), n=20)
    assert frame[["n_loops", "order"]].apply(tuple, axis=1).tolist() == [
        (1, "confidence"), (6, "confidence"), (1, "row-major"), (6, "row-major")
    ]  # fmt: skip
    assert (frame["solve_rate"] > 0.9).all() and (frame["low"] <= frame["solve_rate"]).all()
    six = frame[frame["n_loops"] == 6].set_index("order")
    one = frame[frame["n_loops"] == 1].set_index("order")
    np.testing.assert_allclose(six["gain"], six["solve_rate"] - one["solve_rate"])
    np.testing.assert_allclose(
        six["interaction"]["row-major"], six["gain"]["row-major"] - six["gain"]["confidence"], atol=1e-12
    )
    assert (one["gain"] == 0).all() and six["interaction"]["confidence"] == 0
    # One cell a step: the fourth forward runs on a board with one cell hidden.
    assert (frame["steps"] == 4).all() and (six["flops"] > one["flops"]).all()


def test_unique_puzzles_of_another_kind(sudoku):
    frame = solve_rate(sudoku, [6], n_clues=[14], orders=("confidence",), unique=True, n=10)
    assert frame["unique"].all() and frame["hidden"].tolist() == [22] and frame["n"].tolist() == [10]


def test_diversity_by_hand():
    tokens = torch.tensor([[0, 1, 0, 1], [2, 2, 2, 2]])
    np.testing.assert_allclose(unigram_entropy(tokens), [np.log(2), 0])
    assert distinct_pairs(tokens) == 3 / 6  # (0, 1), (1, 0), (2, 2)


def test_judge_scores_equal_one_text_at_a_time():
    from transformers import GPT2Config, GPT2LMHeadModel

    from loopmdm.analysis.measures.quality.judge import START, judge_nats

    class Letters:
        def convert_tokens_to_ids(self, token):
            assert token == START
            return 0

        def __call__(self, text, add_special_tokens):
            assert add_special_tokens is False
            return {"input_ids": [ord(letter) - 96 for letter in text]}

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=27, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    texts = ["strong", "", "the union is".replace(" ", ""), "a"]
    nats, lengths = judge_nats(texts, model, Letters(), batch_size=3)
    assert lengths.tolist() == [6, 0, 10, 1]
    for text, value in zip(texts, nats, strict=True):
        ids = torch.tensor([[0, *(ord(letter) - 96 for letter in text)]])
        loss = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) if text else 0.0
        assert value == pytest.approx(loss, rel=1e-5)


def test_generative_table_has_its_diversity_and_a_reference(text, monkeypatch):
    from loopmdm.analysis.measures.quality import generation

    def judge(texts):  # one nat a letter, one token a letter
        lengths = np.array([len(text) for text in texts])
        return lengths.astype(float), lengths

    monkeypatch.setattr(generation, "judge_nats", judge)
    frame = generative(text, [1, 2], steps=(2, 4), n=4)
    assert frame["source"].tolist() == ["test text"] + ["samples"] * 4
    np.testing.assert_allclose(frame["generative_perplexity"], np.e)
    flops = frame.set_index(["n_loops", "steps"])["flops"]
    assert flops[(1, 4)] > flops[(1, 2)] and flops[(2, 4)] > flops[(1, 4)]
    assert (frame["unigram_entropy"] > 2).all() and frame["distinct_2"].between(0, 1).all()


def test_multiple_choice_prefers_the_likelier_answer(text):
    from loopmdm.model.diffusion.likelihood import continuation_nelbo
    from loopmdm.model.tasks.benchmarks import Choice

    items = [Choice("0", "The people of the United", (" zxqj zxqj", " States of America"), 1)]
    picks = choose(text, items, 2, n_samples=4)
    assert picks["total"].tolist() == picks["per byte"].tolist() == [1]
    prompt, continuation = fitted(text, "w " * 200 + "The people of the United", " States")
    assert len(prompt) + len(continuation) == text.m.cfg.n_ctx
    assert text.tokenizer.decode(prompt).endswith("the United")
    value = continuation_nelbo(text.m, [prompt], [continuation], 2, n_samples=4)
    assert value.lengths.item() == len(continuation)


def test_multiple_choice_accuracy_is_counted(text, monkeypatch):
    from loopmdm.analysis.measures.quality import questions
    from loopmdm.model.tasks.benchmarks import Choice

    items = [Choice(str(i), "c", ("a", "b"), answer) for i, answer in enumerate([0, 1, 1, 1])]
    monkeypatch.setattr(questions.benchmarks, "multiple_choice", lambda _: items)
    monkeypatch.setattr(questions, "choose", lambda *_: {"total": np.array([0, 0, 1, 1])})
    row = multiple_choice(text, [1], tasks=["piqa"]).iloc[0]
    assert (row["accuracy"], row["chance"], row["constant"], row["n"]) == (0.75, 0.5, 0.75, 4)


def test_a_run_without_weights_still_says_what_was_measured(tmp_path, monkeypatch):
    from loopmdm.analysis.numbers.provenance import model_hashes
    from loopmdm.analysis.numbers.store import Question, Store
    from loopmdm.model.network import checkpoints
    from loopmdm.model.training.ship import forget_weights

    folder = tmp_path / "sudoku-loop-seed3"
    shutil.copytree(checkpoints.ZOO / "sudoku-loop", folder)
    monkeypatch.setattr(checkpoints, "ZOO", tmp_path)
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path / "cache"))
    record = read_json(folder / checkpoints.RECORD)
    record["spec"] |= {"name": folder.name, "seed": 3}
    write_json(folder / checkpoints.RECORD, record)
    before = model_hashes((folder.name,))
    measured = pd.DataFrame({"nll": [0.5]})
    Question(folder.name, "nll", ["asked"], lambda: measured).answer(Store.beside(folder.name))
    forget_weights(folder)
    assert folder.name in checkpoints.list_runs() and folder.name not in checkpoints.list_models()
    assert model_hashes((folder.name,)) == before
    found = Question(folder.name, "nll", ["asked"], lambda: pytest.fail("measured again")).answer()
    pd.testing.assert_frame_equal(found, measured, check_like=True)
    with pytest.raises(UsageError, match=r"loopmdm train sudoku-loop --seed 3"):
        LoopMDM.from_pretrained(folder.name)
    with pytest.raises(UsageError, match="record only"):
        evaluate(folder.name, "nll", [1], n_samples=1)


def test_what_the_tables_ask_is_kept_before_the_weights_go(tmp_path, monkeypatch):
    from loopmdm.analysis.exhibits.tables import quality
    from loopmdm.model.network import checkpoints
    from loopmdm.model.training.ship import forget_weights
    from loopmdm.model.zoo.runs import Zoo

    committed = tables.load("sudoku-solve-rate")
    expected = committed[committed["model"] == "sudoku-deep"].reset_index(drop=True)
    shutil.copytree(checkpoints.ZOO / "sudoku-deep", tmp_path / "sudoku-deep")
    monkeypatch.setattr(checkpoints, "ZOO", tmp_path)
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path / "cache"))
    zoo = Zoo.roster()
    run = zoo["sudoku-deep"]
    assert not quality.is_kept(run, zoo)
    quality.keep(run, zoo)
    forget_weights(tmp_path / "sudoku-deep")
    assert quality.is_kept(run, zoo)
    solved = quality.solve_rate_table(quality.select(task="sudoku", arm="deep", seed=0), zoo)
    pd.testing.assert_frame_equal(solved[expected.columns], expected, check_like=True)
