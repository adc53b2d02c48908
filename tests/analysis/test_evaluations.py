"""Evaluations on what is known: an oracle has no excess KL, results are cached by content."""

import numpy as np
import pytest
import torch

from analysis import evaluations
from analysis.evaluations import Subject, evaluate, excess_kl, solve_rate
from loopmdm_model.data.trees import TREE_TASKS
from loopmdm_model.errors import UsageError
from loopmdm_model.evaluation import load_test_set
from loopmdm_model.likelihood import nelbo
from loopmdm_model.model import LoopMDM
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
    subject = Subject("oracle", Oracle(task), load_test_set(task, 0, None))
    frame = excess_kl(subject, [1, 2], 2)
    after, before = frame.query("n_loops == 2"), frame.query("n_loops == 1")
    np.testing.assert_allclose(after["excess_kl"], 0.0, atol=1e-9)
    assert (before.query("hops == 1")["excess_kl"] > 0.1).all()  # the prior is not good enough
    assert before["excess_kl"].max() <= np.log(TREE_TASKS[task].n_states) + 1e-9
    assert frame.groupby("n_loops")["n_nodes"].sum().nunique() == 1


def test_results_are_cached_by_weights_and_question(monkeypatch, tmp_path):
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path))
    frame = evaluate("sudoku-base", "nll", [1], 1)
    assert len(list((tmp_path / "evaluations").iterdir())) == 1
    model = LoopMDM.from_pretrained("sudoku-base")
    expected = nelbo(model, load_test_set("sudoku6", 36, None).tokens, 1, n_samples=1)
    assert frame["nelbo"][0] == pytest.approx(expected.mean) and frame["n"][0] == 1000
    monkeypatch.setitem(evaluations.MEASURES, "nll", None)  # from the cache, nothing is measured
    again = evaluate("sudoku-base", "nll", [1, 1], 1)
    assert again.equals(frame)
    with pytest.raises(TypeError):
        evaluate("sudoku-base", "nll", [1], 2)
    with pytest.raises(UsageError, match="did you mean nll"):
        evaluate("sudoku-base", "nl", [1])
    with pytest.raises(UsageError, match="at least 1"):
        evaluate("sudoku-base", "nll", [0])
    with pytest.raises(UsageError, match="no text model"):
        evaluate("sudoku-base", "zero-shot", [1])
    with pytest.raises(UsageError, match="no exact posterior"):
        evaluate("sudoku-base", "excess-kl", [1])


def test_zero_shot_scores_short_documents_too(monkeypatch, tmp_path):
    from loopmdm_model.data import corpora

    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path))
    documents = [corpora.Document(str(i), f"a short text, number {i}", "test") for i in range(5)]
    documents.append(corpora.Document("long", "and a longer one " * 60, "test"))
    monkeypatch.setattr(evaluations.corpora, "load", lambda *_: documents)
    frame = evaluate("sotu-loop", "zero-shot", [1, 2], 1)
    assert len(frame) == 7 * 2 and (frame["n_documents"] == 6).all() and frame["nelbo"].between(2, 9).all()


def test_solving_by_order(monkeypatch):
    monkeypatch.setattr(evaluations, "HIDDEN", (4,))
    monkeypatch.setattr(evaluations, "SOLVE_GRIDS", 20)
    subject = Subject("sudoku-loop", LoopMDM.from_pretrained("sudoku-loop"), load_test_set("sudoku6", 36, None))
    frame = solve_rate(subject, [6], 1)
    assert set(frame["order"]) == set(evaluations.ORDERS) and (frame["n"] == 20).all()
    assert (frame["solve_rate"] > 0.9).all() and (frame["low"] <= frame["solve_rate"]).all()
