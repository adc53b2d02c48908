"""Several processes train what one does: replicated, sharded, accumulating, in bf16, and after a kill.

Losses of two processes equal those of one up to float32 rounding that Adam amplifies: 1e-5 over these few steps.
In bf16 weights are read with 8 bits: 2e-3.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loopmdm.model.errors import UsageError
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.taps import no_taps
from loopmdm.model.training import budget, processes
from loopmdm.model.training.spec import RunSpec
from loopmdm.model.training.trainer import Trainer
from tests.conftest import toy_spec

WORKER = Path(__file__).with_name("worker.py")
FLOAT32, BF16 = 1e-5, 2e-3
FEW = {"steps": 6, "points": 2}
MANY = {"steps": 60, "points": 6}


def written(folder, steps, points, more=""):
    path = folder / "tiny.toml"
    path.write_text(toy_spec(f"steps = {steps}", points, more))
    return path


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def launched(number, spec, out, *words):
    """Run the worker in `number` processes that know of one another; whatever ends one ends all. Exit codes."""
    shared = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    if number > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(number)}
    command = [sys.executable, str(WORKER), str(spec), str(out), *words]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd(),
                         env=os.environ | shared | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
                         | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {}))
        for rank in range(number)
    ]  # fmt: skip
    told = [workers[-1].communicate()]
    if workers[-1].returncode:
        for worker in workers[:-1]:
            worker.kill()
    told = [*(worker.communicate() for worker in workers[:-1]), *told]
    return [worker.returncode for worker in workers], told


def trained(number, spec, out, *words):
    codes, told = launched(number, spec, out, *words)
    assert not any(codes), told
    return told[0][0].split(), rows_of(out)


def alone(spec, out):
    """The rows of one process: this one."""
    with torch.enable_grad():
        Trainer(RunSpec.load(spec), out).train()
    return rows_of(out)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def apart(one, other):
    """The largest difference of losses and of validation NELBOs."""
    assert [row["step"] for row in one] == [row["step"] for row in other]
    assert [row["flops"] for row in one] == [row["flops"] for row in other]
    kinds = ("loss", "validation_nelbo_1", "validation_nelbo_3")
    return {kind: max(abs(a[kind] - b[kind]) for a, b in zip(one, other, strict=True)) for kind in kinds}


@pytest.mark.slow
def test_two_processes_that_share_the_weights_follow_one(tmp_path):
    spec = written(tmp_path, **FEW)
    said, two = trained(2, spec, tmp_path / "two", "fsdp")
    assert said == ["FSDP", "2"]
    assert max(apart(alone(spec, tmp_path / "one"), two).values()) < FLOAT32


HALF, PACKED = 'precision = "bf16"', 'logits = "masked"'
CELLS = (
    ("", FLOAT32),
    ("accumulate = 2", FLOAT32),
    (PACKED, FLOAT32),
    (HALF, BF16),
    (f"accumulate = 2\n{HALF}", BF16),
)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_matrix_of_processes(kind, tmp_path):
    words, one = ["fsdp"] if kind == "fsdp" else [], alone(written(tmp_path, **MANY), tmp_path / "one")
    for number, (more, most) in enumerate(CELLS):
        said, two = trained(2, written(tmp_path, **MANY, more=more), tmp_path / f"two-{number}", *words)
        assert said == (["FSDP", "2"] if words else ["MULTI_CPU", "2"])
        found = apart(one, two)
        print(f"\n{kind}, 2 processes, {more.split() or 'float32'}: {found}")
        assert max(found.values()) < most


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_killed_it_goes_on_with_another_number_of_processes(kind, tmp_path):
    words, spec = ["fsdp"] if kind == "fsdp" else [], written(tmp_path, **MANY)
    one = alone(spec, tmp_path / "one")
    for number, step, more in ((2, 25, words), (1, 45, [])):
        codes, told = launched(number, spec, tmp_path / "broken", *more, f"die={step}")
        assert codes[-1] == -9, told
        steps = [row["step"] for row in rows_of(tmp_path / "broken")]
        assert steps and steps[-1] < step
    _, broken = trained(2, spec, tmp_path / "broken", *words)
    found = apart(one, broken)
    print(f"\n{kind}, 2 -> 1 -> 2 processes, each killed: {found}")
    assert max(found.values()) < FLOAT32


def test_processes_that_do_not_know_of_one_another_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"^WORLD_SIZE is 2, .* are 1; .*torchrun --nproc_per_node 2"):
        processes._check_number(1)
    processes._check_number(2)
    monkeypatch.delenv("WORLD_SIZE")
    processes._check_number(1)


def test_deepspeed_is_refused_and_fsdp_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"DeepSpeed.*FSDP"):
        processes.accelerator("")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert processes.accelerator("").num_processes == 1


def test_the_first_fsdp_is_refused(monkeypatch):
    class First:
        num_processes = 1
        distributed_type = type("T", (), {"value": "FSDP"})
        state = type("S", (), {"fsdp_plugin": type("P", (), {"fsdp_version": 1})})

        def __init__(self, **_):
            pass

    monkeypatch.setattr(processes, "Accelerator", First)
    with pytest.raises(UsageError, match="fsdp_version: 2"):
        processes.accelerator("")
    First.state.fsdp_plugin.fsdp_version = 2
    assert processes.accelerator("").num_processes == 1


def test_what_was_recorded_reads_the_same():
    spec = RunSpec.from_dict(
        {"name": "a", "seed": 0, "data": {"corpus": "sudoku6"}, "model": {"d_model": 32, "n_heads": 2},
         "training": {"batch_size": 8, "steps": 1}}
    )  # fmt: skip
    assert "logits" not in spec.to_dict()["training"]
    packed = RunSpec.from_dict(spec.to_dict() | {"training": spec.to_dict()["training"] | {"logits": "masked"}})
    assert packed.to_dict()["training"]["logits"] == "masked" and RunSpec.from_dict(packed.to_dict()) == packed


def _losses(spec, folder, **changes):
    with torch.enable_grad():
        run = Trainer(RunSpec.load(spec, {f"training.{key}": value for key, value in changes.items()}), folder)
        run.train()
    return run, rows_of(folder)


@pytest.mark.parametrize("more", ["", "accumulate = 2\n[loops]\nearlier = true"])
def test_logits_at_masked_positions_give_the_loss_of_all(more, tmp_path, monkeypatch):
    """Losses and norms of gradients to float32 rounding; FLOPs, by definition, to the last bit."""
    spec, asked = written(tmp_path, **FEW, more=more), []
    unembedding = LoopMDM.unembedding

    def watched(self, x, taps=no_taps, rows=None):
        asked.append((x.shape[:2].numel(), rows))
        return unembedding(self, x, taps, rows)

    monkeypatch.setattr(LoopMDM, "unembedding", watched)
    _, whole = _losses(spec, tmp_path / "all")
    assert all(rows is None for _, rows in asked[:3])
    asked.clear()
    run, packed = _losses(spec, tmp_path / "masked", logits="masked")
    of, drawn = asked[0]
    assert drawn is not None and 0.3 < int(drawn.sum()) / of < 0.7  # about half of the work and memory
    for a, b in zip(whole, packed, strict=True):
        assert a["flops"] == b["flops"] and a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], abs=FLOAT32)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], abs=FLOAT32)
    assert budget.training_memory(run.spec, 0) < budget.training_memory(RunSpec.load(spec), 0)


def test_the_logit_of_mask_is_closed_bit_for_bit_alike_with_and_without_gradients(model, clean):
    """In place where nobody differentiates, else in a copy: FSDP dies of a write into what a module returned."""
    without = model(clean, n_loops=2)
    with torch.enable_grad():
        logits = model(clean, n_loops=2)
        assert torch.equal(without, logits) and bool((logits[..., 22] == -torch.inf).all())
        assert type(logits.grad_fn).__name__ == "IndexFillBackward0"
        grad = torch.autograd.grad(logits[..., :22].square().sum(), model.unembed.weight)[0]
    assert bool((grad[22] == 0).all()) and bool(grad[:22].any())


@pytest.mark.soak
def test_compiled_blocks_give_the_same_losses(tmp_path):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler, which torch.compile needs on a CPU")
    spec = written(tmp_path, steps=2, points=1)
    (_, plain), (run, compiled) = (_losses(spec, tmp_path / str(on), compile=on) for on in (False, True))
    assert all(block._compiled_call_impl is not None for block in run._bare().blocks)
    assert plain[0]["loss"] == pytest.approx(compiled[0]["loss"], abs=FLOAT32)


def test_batches_go_through_pinned_memory_unchecked_and_whole(batch, monkeypatch):
    pinned, far = [], torch.device("meta")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (pinned.append(self.shape), self)[1])
    moved = batch.to(far, pinned=True)
    assert len(pinned) == 4 and moved.masked.device.type == "meta" and moved.clusters is None
    assert batch.to(batch.tokens.device) is batch
