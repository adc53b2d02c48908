"""Our models in the lm-eval harness give our own numbers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from loopmdm.analysis.harness import HarnessModel, read_task, run_harness
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.quality.questions import choose
from loopmdm.model.diffusion.likelihood import continuation_nelbo, corpus_nelbo
from loopmdm.model.errors import UsageError
from loopmdm.model.tasks.benchmarks import Choice
from tests.commands import loopmdm as run

TASK = """
task: mini
dataset_path: json
dataset_kwargs: {data_files: {test: mini.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROWS = [
    ("The people of the United", ["zebra quickly", "States of America"], 1),
    ("the Congress of the", ["United States", "xylophone"], 1),  # a wrong key: accuracy must fall
    ("I have the honor", ["grape", "to be"], 1),
    ("the state of the", ["Union is", "purple is"], 0),
]


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [json.dumps({"context": c, "choices": choices, "answer": answer}) for c, choices, answer in ROWS]
    (tmp_path / "mini.jsonl").write_text("\n".join(lines) + "\n")
    path = tmp_path / "mini.yaml"
    path.write_text(TASK)
    return path


@pytest.fixture(scope="module")
def text():
    return Case.of("sotu-loop")


def request(*arguments):
    return SimpleNamespace(args=arguments)


def test_accuracy_is_our_own(task, text):
    frame = run_harness("sotu-loop", task, n_loops=3, n_samples=4)
    items = [Choice("", context, tuple(f" {c}" for c in choices), a) for context, choices, a in ROWS]
    picked = choose(text, items, 3, 4)["total"]
    accuracy = np.mean(picked == [item.answer for item in items])
    row = frame.set_index("metric").loc["acc"]
    assert row["value"] == pytest.approx(accuracy) and 0 < accuracy < 1
    assert row["n"] == 4 and row["n_loops"] == 3 and row["standard_error"] > 0


def test_log_likelihoods_are_minus_our_nelbo(text):
    model = HarnessModel(text, 2, n_samples=4)
    pairs = [("The people of the", " United States"), ("a", " b")]
    found = model.loglikelihood([request(*pair) for pair in pairs])
    ids = [[text.tokenizer.encode(part).ids for part in column] for column in zip(*pairs, strict=True)]
    r = continuation_nelbo(text.m, *ids, n_loops=2, n_samples=4)
    assert [value for value, _ in found] == pytest.approx((-r.per_sequence * r.lengths).tolist())


def test_whole_texts_sum_to_our_corpus_nelbo(text):
    model = HarnessModel(text, 2, n_samples=4)
    texts = ["The state of the union. " * 40, "A short one."]
    found = model.loglikelihood_rolling([request(value) for value in texts])
    ids = [text.tokenizer.encode(value).ids for value in texts]
    r = corpus_nelbo(text.m, ids, n_loops=2, n_samples=4)
    assert -sum(found) / sum(map(len, ids)) == pytest.approx(r.mean)
    assert len(found) == 2 and found[0] < found[1] < 0


def test_generation_stops_where_the_task_says(text):
    model = HarnessModel(text, 2, steps=8)
    (whole,) = model.generate_until([request("The people of the", {"until": [], "max_gen_toks": 8})])
    assert whole and len(text.tokenizer.encode(whole).ids) <= 10
    (cut,) = model.generate_until([request("The people of the", {"until": [whole[3]], "max_gen_toks": 8})])
    assert cut == whole.split(whole[3])[0]


def test_wrong_tasks_are_refused(task):
    with pytest.raises(UsageError, match="no task file"):
        read_task(task.with_name("nowhere.yaml"))
    task.with_name("mini.jsonl").unlink()
    with pytest.raises(UsageError, match="no data file"):
        read_task(task)
    task.write_text("just: [a")
    with pytest.raises(UsageError, match="not YAML"):
        read_task(task)
    task.write_text("a: 1")
    with pytest.raises(UsageError, match="describes no task"):
        read_task(task)


ESCAPE = "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("{{context}}", ESCAPE, "reaches for Python itself"),
        ("{{context}}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "reaches for Python itself"),
        ("{{context}}", "{{ nowhere }}", "'nowhere' is undefined"),
        ("{{context}}", "{{ context", "a template fails"),
        ("metric: acc", "metric: ./evil", "none of lm-eval's own"),
        ("metric: acc", "metric: acc, hf_evaluate: true", "none of lm-eval's own"),
        ("{data_files", "{trust_remote_code: true, data_files", "data set's script"),
        ("task: mini", "task: " + "[" * 50_000, "not YAML"),
    ],
)
def test_a_task_file_runs_no_code(task, old, new, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task.write_text(task.read_text().replace(old, new))
    with pytest.raises(UsageError, match=says):
        run_harness("sotu-loop", task, n_loops=1, n_samples=1)
    assert not (tmp_path / "PWNED").exists()


def test_the_command(task):
    out, _ = run("lm-eval", "--model", "sotu-loop", "--tasks", task, "--n-loops", 1, "--n-samples", 1)
    assert out.splitlines()[1].split("\t")[:5] == ["sotu-loop", "mini", "1", "1", "acc"]
    _, err = run("lm-eval", "--model", "sudoku-loop", "--tasks", task, code=2)
    assert "no text model" in err
