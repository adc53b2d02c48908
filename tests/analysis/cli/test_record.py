"""`loopmdm record`: what it writes is what `record` writes; what cannot be is one line and writes nothing."""

import pytest
import torch

from loopmdm.analysis import ActivationStore, Case, record
from loopmdm.analysis.activations import Wanted
from loopmdm.analysis.measures.options import OnMasks
from tests.commands import run


def test_a_store_from_a_shell_is_that_of_python(tmp_path):
    asked = [
        "record",
        "markov-loop",
        str(tmp_path / "a"),
        "--n",
        "6",
        "--n-loops",
        "2",
        "--mask-ratios",
        "0.25,0.5",
    ]
    dry = run([*asked, "--dry-run"])
    assert dry.code == 0 and not (tmp_path / "a").exists()
    done = run([*asked, "--sites", "loop.*.hook_out, loop.1.hook_in", "--kept-as", "float32"])
    assert done.code == 0, done.err
    head, line = (text.split("\t") for text in done.out.splitlines())
    found = ActivationStore.open(tmp_path / "a")
    assert dict(zip(head, line, strict=True))["rows"] == str(len(found)) and len(found.sites) == 3
    case = Case.of("markov-loop", options=OnMasks(2, 6, 0, (0.25, 0.5)))
    wanted = record(case, tmp_path / "b", Wanted(["loop.*.hook_out", "loop.1.hook_in"]), dtype="float32")
    assert found.frame.equals(wanted.frame)
    assert torch.equal(found.select(loop=1, leaf="hook_out"), wanted.select(loop=1, leaf="hook_out"))
    size = int(run([*asked, "--dry-run"]).out.splitlines()[1].split("\t")[1])
    assert 0 < size < found.n_bytes


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--sites", "nope"], "unknown site 'nope'"),
        (["--sites", " ,"], "--sites names none"),
        (["--positions", "some"], "positions must be"),
        (["--kept-as", "int8"], '--kept-as must be "float16" or "float32"'),
        (["--mask-ratios", "half"], "--mask-ratios takes shares"),
        (["--mask-ratios", "0"], "no position is masked"),
        (["--n", "0"], "n must be at least 1"),
        (["--n-loops", "0"], "n_loops must be at least 1"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(asked, said, tmp_path):
    done = run(["record", "markov-loop", str(tmp_path / "a"), *asked])
    assert done.code == 2 and done.clear and said in done.err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_taken_says_what_it_is(tmp_path):
    asked = ["record", "markov-loop", str(tmp_path), "--n", "2"]
    (tmp_path / "mine.txt").write_text("mine")
    done = run(asked)
    assert done.code == 2 and "is no activation store; give a new folder" in done.err
    asked[2] = str(tmp_path / "store")
    assert run(asked).code == 0
    again = run(asked)
    assert again.code == 2 and "holds a store already, which is whole" in again.err
    assert run([*asked, "--resume"]).code == 0
    assert "begun with another" in run([*asked, "--seed", "1", "--resume"]).err
