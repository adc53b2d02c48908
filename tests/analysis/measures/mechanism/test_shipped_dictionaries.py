"""A shipped dictionary is what its record says, of one model and no other; one command makes one, or nothing."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from loopmdm.analysis import Dictionary
from loopmdm.analysis.activations import identity
from loopmdm.analysis.measures import Case
from loopmdm.analysis.measures.mechanism.dictionaries import list_dictionaries, making, splice_losses
from loopmdm.analysis.measures.mechanism.dictionaries.coder import FILE, RECORD
from loopmdm.model import HookedLoopMDM, UsageError
from loopmdm.model.network.checkpoints import ZOO, model_hash
from tests.commands import loopmdm, one_line
from tests.conftest import toy_model

NAMES = ["sotu-loop", "sudoku-loop"]
LIKELY = 5
"""Standard errors of a small sample around a record."""


def test_two_are_shipped_and_small():
    assert list_dictionaries() == NAMES
    for name in NAMES:
        assert (ZOO / name / FILE).stat().st_size + (ZOO / name / RECORD).stat().st_size < 1.5e6


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_dictionary_keeps_what_its_record_says(name):
    case = Case.of(name, n=16)
    dictionary = Dictionary.from_pretrained(name, case.m)
    told = dictionary.origin.told
    assert told["model_files"] == model_hash(ZOO / name) and told["layer"] == case.m.cfg.layers("loop")[0]
    assert {"training", "n_rows", "data", "versions", "scores"} <= told.keys()
    assert dictionary.origin.loops == list(range(case.m.cfg.max_loops))
    found = splice_losses(case.m, case.asked(0.5), dictionary, ("spliced", "mean"))
    for metric, read in (("explained_variance", found.explained), ("kl_recovered", found.kl_recovered)):
        kept, control = (told["scores"][arm][metric] for arm in ("trained", "untrained"))
        assert len(kept["value"]) == len(control["value"]) == case.m.cfg.max_loops
        for loop, (value, error) in enumerate(zip(kept["value"], kept["standard_error"], strict=True)):
            least = LIKELY * error * np.sqrt(kept["n"] / 16)
            assert read(loop)[0] == pytest.approx(value, abs=least), (metric, loop)
    shares = np.array([told["scores"]["trained"][what]["value"] for what in ("born", "last")])
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-4)
    codes = dictionary.encode(torch.randn(8, len(dictionary.origin.sites), case.m.cfg.d_model))
    assert codes.shape == (8, len(dictionary.origin.sites), dictionary.shape.n_features)


def test_another_model_is_refused_in_a_line():
    other = HookedLoopMDM.from_pretrained("sudoku-loop-seed1")
    with pytest.raises(
        UsageError, match=r"is of sudoku-loop .* not of sudoku-loop-seed1 .* open that model"
    ) as error:
        Dictionary.from_pretrained("sudoku-loop", other)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"holds no dictionary .*shipped with one: sotu-loop, sudoku-loop"):
        Dictionary.from_pretrained("sudoku-loop-seed1")
    with pytest.raises(UsageError, match="did you mean sudoku-loop"):
        Dictionary.from_pretrained("sudoku-lop")


def test_weights_beside_the_record_of_others_are_refused(tmp_path):
    for name in (FILE, RECORD):
        shutil.copy(ZOO / "sudoku-loop" / name, tmp_path / name)
    shutil.copy(ZOO / "sotu-loop" / FILE, tmp_path / FILE)  # a break between the two writes
    with pytest.raises(UsageError, match=r"is damaged .*not what dictionary.json was written for"):
        Dictionary.from_pretrained(tmp_path)
    for text in ("[]", "{}", '{"origin": 3}'):
        (tmp_path / RECORD).write_text(text)
        with pytest.raises(UsageError, match="is damaged"):
            Dictionary.from_pretrained(tmp_path)


def test_a_config_that_gained_keys_is_the_same_model_while_they_have_their_defaults():
    m = HookedLoopMDM(toy_model())
    now = identity(m)
    before = {name: value for name, value in now.config.items() if name != "scaled_residual"}
    old = replace(now, config=before, hash=now.hash.partition(":")[0] + ":" + "0" * 16)
    old.check(m, "it")
    for changed in (replace(old, config=before | {"eps": 1.0}), replace(old, config=before | {"gone": 1}),
                    replace(old, hash="1" * 16 + ":" + "0" * 16)):  # fmt: skip
        with pytest.raises(UsageError, match="open that model"):
            changed.check(m, "it")
    other = HookedLoopMDM(toy_model(scaled_residual=True))
    with pytest.raises(UsageError, match="open that model"):
        old.check(other, "it")


# --- the command ---

SMALL = ["--features", 12, "-k", 3, "--steps", 4, "--n", 48]


def command(*arguments, code=0):
    return loopmdm("dictionary", *arguments, code=code)


def test_the_command_writes_what_opens_again(tmp_path):
    out = tmp_path / "made"
    said, _ = command("sudoku-loop-s4", *SMALL, "--layer", 1, "--kind", "crosscoder", "--out", out)
    m = HookedLoopMDM.from_pretrained("sudoku-loop-s4")
    dictionary = Dictionary.from_pretrained(out, m)
    assert dictionary.origin.sites == tuple(f"loop.{loop}.blocks.1.hook_resid_post" for loop in range(4))
    assert asdict(dictionary.shape) == {"kind": "crosscoder", "n_features": 12, "activation": "batchtopk", "k": 3}
    told = json.loads((out / RECORD).read_text())["origin"]["told"]
    assert told["training"]["steps"] == 4 and told["data"]["trained_on"]["n"] == 48
    again = f"loopmdm dictionary sudoku-loop-s4 --kind crosscoder {' '.join(map(str, SMALL[:6]))} --n-loops 4"
    assert making.command(dictionary) == f"{again} --n 48 --seed 0 --layer 1"
    head, *rows = [line.split("\t") for line in said.splitlines()]
    assert head == ["arm", "loop", "metric", "value", "standard_error", "n"]
    (dead,) = [row for row in rows if row[0] == "trained" and row[2] == "dead"]
    assert told["scores"]["trained"]["dead"]["value"] == pytest.approx(float(dead[3]), rel=1e-4)


def test_the_list_is_of_records():
    head, *rows = [line.split("\t") for line in command("list")[0].splitlines()]
    assert head[0] == "model" and [row[0] for row in rows] == NAMES


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["sudoku-loop-s4", "--layer", 0], "layer 0 is not looped; the looped layers are 1"),
        (["sudoku-loop-s4", "--kind", "tree"], "kind must be"),
        (["sudoku-loop-s4", "-k", 300], "k must be at most 256"),
        (["sudoku-loop-s4", "--steps", 0], "steps must be at least 1"),
        (["no-such-model"], "unknown model"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(given, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, said = command(*given, code=2)
    assert says in said and one_line(said)
    assert list(tmp_path.iterdir()) == []
