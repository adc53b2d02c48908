"""Nothing assumes a CPU, batches take memory and no values, and narrow weights are summed widely."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis.exhibits.measuring import measure_one
from loopmdm.analysis.measures import Access, measure, question
from loopmdm.analysis.numbers import place
from loopmdm.model.batching import at_a_time, size_of_batches
from loopmdm.model.diffusion.likelihood import nelbo
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.network import checkpoints
from loopmdm.model.network.model import LoopMDM
from tests.commands import loopmdm as run
from tests.conftest import toy_model
from tests.small import measures, small

QUICK = ("forward", "stopping", "likelihoods", "samples", "interventions", "training")
PROGRAM = [sys.executable, "-m", "tests.on_far"]


def on_far(*names, timeout=None):
    """Scenarios in a process of their own: a device that is registered there stays there."""
    done = subprocess.run([*PROGRAM, *names], capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]


@pytest.mark.slow
def test_what_runs_on_another_device_asks_for_no_cpu():
    assert [name for name, _ in on_far(*QUICK)] == list(QUICK)


@pytest.mark.soak
def test_every_measure_and_command_runs_on_another_device():
    found = on_far()
    print("".join(f"\n{name}: {gap}" for name, gap in found))
    assert len(found) > len(measures())


def test_the_other_device_notices_what_a_gpu_would_refuse():
    code = """
import torch
from tests import far
with far.device() as place:
    a, b = torch.ones(3, device=place), torch.ones(3)
    for wrong in (lambda: a + b, a.numpy, lambda: b[a.long()], lambda: torch.cat([a, b]), lambda: a @ b):
        try:
            wrong()
        except (RuntimeError, TypeError):
            continue
        raise SystemExit("nobody noticed")
    assert (a + 1).tolist() == [2, 2, 2] and (a + b[0]).device == place and a[b.long()].device == place
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- devices that are named ---


RUN = {
    "measure": ["mask-attention", "markov-loop"], "evaluate": ["markov-loop"], "sample": ["markov-loop"],
    "record": ["markov-loop", "store", "--n", "4"], "training-free": ["markov-base"], "report": ["markov-loop"],
    "lm-eval": ["--model", "sotu-loop", "--tasks", "none.yaml"], "table": ["attention-maps"],
    "figures": ["mask-to-mask-by-loop", "--from", "checkpoints", "--out", "pictures"],
}  # fmt: skip


@pytest.mark.parametrize("command", RUN)
def test_every_command_that_runs_a_model_takes_a_device_and_a_batch_size(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.yaml").write_text("task: none\n")
    _, said = run(command, *RUN[command], "--device", "cuda:77", code=2)
    assert "'cuda:77' cannot be used here" in said and said.strip().endswith("cpu")
    assert "batch_size must be at least 1" in run(command, *RUN[command], "--batch-size", "0", code=2)[1]


def test_from_tables_no_model_runs():
    assert "--from checkpoints" in run("figures", "--device", "cuda", code=2)[1]


def test_auto_takes_a_gpu_if_there_is_one(monkeypatch):
    assert checkpoints.check_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert checkpoints.devices_here() == ["cuda:0", "cuda:1", "cpu"]
    with pytest.raises(UsageError, match=r"'cuda' cannot be used here .*there is cuda:0, cuda:1, cpu"):
        checkpoints.check_device("auto")  # this torch knows none


def test_apples_gpu_is_refused_with_its_reason(monkeypatch):
    there = type("T", (), {"device": torch.device("mps")})
    monkeypatch.setattr(torch, "empty", lambda *_, **__: there)
    with pytest.raises(UsageError, match="no float64"):
        checkpoints.check_device("mps")


def test_what_is_kept_of_another_device_is_kept_apart():
    asked = question("markov-loop", "mask-attention", 2)
    usual = asked.key
    with place.on_device("meta"):
        assert asked.key != usual and {"device": "meta"} in asked.key.question
    with place.on_device("auto"):
        assert asked.key == usual  # there is only the CPU here
    with pytest.raises(UsageError, match="'cuda:77' cannot be used here"), place.on_device("cuda:77"):
        pass
    assert asked.key == usual


# --- batches ---

AMPLIFIED = ("dictionaries", "lenses")
"""They train on states, which makes more of the last bits."""


def test_one_size_holds_for_all_that_runs_inside():
    assert size_of_batches(32) == 32
    with at_a_time(3):
        assert size_of_batches(32) == 3
        with at_a_time(None):
            assert size_of_batches(32) == 3
        with at_a_time(5):
            assert size_of_batches(32) == 5
    assert size_of_batches(32) == 32
    with pytest.raises(UsageError, match="batch_size"), at_a_time(0):
        pass


@pytest.fixture
def most(monkeypatch):
    """The largest batch that any model was given."""
    seen, context = [0], LoopMDM.context

    def watched(self, tokens, attention_mask=None):
        seen[0] = max(seen[0], len(tokens))
        return context(self, tokens, attention_mask)

    monkeypatch.setattr(LoopMDM, "context", watched)
    return seen


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    """Equal up to float32 sums in another order: what a product of matrices adds first depends on their size."""
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-5, check_exact=False)


@pytest.mark.parametrize("name", ["mask-attention", "representation-change", "settled"])
def test_a_batch_size_changes_memory_and_no_values(name, most):
    options = {"n": 8, "mask_ratios": (0.5,)}
    whole = measure(name, "sudoku-loop-s4", 2, **options)
    assert most[0] > 3
    most[0] = 0
    same(measure(name, "sudoku-loop-s4", 2, batch_size=3, **options), whole)
    assert most[0] == 3
    most[0] = 0
    with at_a_time(2):
        same(measure(name, "sudoku-loop-s4", 2, **options), whole)
    assert most[0] == 2


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_no_measure_runs_more_sequences_than_it_may(most):
    """Of every measure, and it gives the same."""
    for name in measures():
        model, options = small(name)
        whole = measure(name, model, **options)
        most[0] = 0
        part = measure(name, model, batch_size=5, **options)
        print(f"\n{name}: at most {most[0]} sequences at a time")
        assert most[0] <= 5, name
        if name not in AMPLIFIED:
            same(part, whole)


def test_samples_and_masks_are_exactly_the_same_in_any_batches():
    m = HookedLoopMDM(toy_model())
    drawn = [sample(m, n=7, length=8, steps=4, batch_size=size).tokens for size in (1, 3, 32)]
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
    tokens = torch.randint(0, 22, (7, 10), generator=torch.Generator().manual_seed(1))
    values = [nelbo(m, tokens, 3, n_samples=3, batch_size=size).per_sequence for size in (1, 3, 32)]
    for other in values[1:]:
        torch.testing.assert_close(values[0], other, atol=1e-6, rtol=1e-6)


def test_a_command_passes_its_batch_size_on(most):
    run("measure", "mask-attention", "sudoku-loop-s4", "--n", 8, "--mask-ratios", 0.5, "--n-loops", 1,
        "--batch-size", 3)  # fmt: skip
    assert most[0] == 3


def test_a_table_is_measured_in_batches_too(most, tmp_path):
    frame = measure_one("attention-maps", tmp_path, batch_size=1)
    assert most[0] == 1 and "device" not in frame.attrs


# --- narrow weights ---

NARROW = {"mask-attention": "mass", "representation-change": "value"}


@pytest.mark.parametrize("name", NARROW)
def test_narrow_weights_are_near_and_are_summed_widely(name):
    """bfloat16 has 8 bits, 0.4% a number: measures agree to 2% of 1, or of the value where that is larger."""
    options = {"n": 16, "mask_ratios": (0.5,)}
    wide, narrow = (
        measure(name, "sudoku-loop-s4", 2, access=Access(dtype=dtype), **options) for dtype in (None, "bfloat16")
    )
    a, b = wide[NARROW[name]].to_numpy(), narrow[NARROW[name]].to_numpy()
    assert not np.array_equal(a, b)  # it did run in bfloat16
    gap = np.nanmax(np.abs(a - b) / np.maximum(1.0, np.abs(a)))
    assert gap < 0.02, gap
    if name == "mask-attention":
        keys = ["segment", "loop", "layer", "head", "query_group"]
        total = narrow.groupby(keys, dropna=False)["mass"].sum(min_count=1).dropna().to_numpy()
        assert np.abs(total - 1).max() < 5e-3


def test_sums_over_long_sequences_do_not_stop_growing():
    """In bfloat16 1 added to 256 is 256: 4,096 losses of about 3 nats are summed in float64."""
    m = HookedLoopMDM(toy_model(n_ctx=4096))
    tokens = torch.randint(0, 22, (1, 4096), generator=torch.Generator().manual_seed(1))
    b = mask_tokens(tokens, 22, mask_ratio=1.0)
    narrow = HookedLoopMDM(toy_model(n_ctx=4096).bfloat16())
    logits = narrow.run(b.tokens, 1, rows=b.masked).logits
    assert logits.dtype == torch.bfloat16
    one, other = (nelbo(each, tokens, 1, n_samples=1) for each in (m, narrow))
    assert other.per_sequence.dtype == torch.float64
    assert other.mean == pytest.approx(one.mean, rel=2e-2)
