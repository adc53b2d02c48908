"""A run killed anywhere and resumed ends bit for bit where an uninterrupted one does."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loopmdm.analysis.measures.access import Access
from loopmdm.model.diffusion.likelihood import nelbo
from loopmdm.model.errors import DivergedError, Stopped, UsageError
from loopmdm.model.files import LOCK, PARTIAL, sha256, write_atomic
from loopmdm.model.flops import training_flops
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network import checkpoints
from loopmdm.model.training import budget, ship, trainer
from loopmdm.model.training.ema import Ema
from loopmdm.model.training.spec import LoopSchedule, RunSpec
from tests.commands import loopmdm as here
from tests.conftest import toy_spec

SPECS = Path(__file__).parents[3] / "figures" / "specs"
TINY = toy_spec("flops = 4e10", 20, "[loops]\nwiden_from = 0.2\nwiden_until = 0.6")


@pytest.fixture
def spec_file(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of TINY that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.toml").write_text(TINY)
    here("train", folder / "tiny.toml", "--out", folder / "run")
    return folder / "run"


def loopmdm(*arguments, **options):
    command = [sys.executable, "-c", "from loopmdm.analysis.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finished(process, code=0):
    out, err = process.communicate()
    assert process.returncode == code, err
    return out, err


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(spec_file, whole, tmp_path):
    broken = tmp_path / "broken"
    state = broken / "state" / "state.safetensors"
    for _ in range(3):  # kill after the next checkpoint, whatever it is doing then
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = loopmdm("train", spec_file, "--out", broken, "--resume")
        while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns == before):
            time.sleep(0.005)
        time.sleep(0.07)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    killed_at = len(rows(broken))
    assert 0 < killed_at < 20
    dead = subprocess.Popen(["true"])
    dead.wait()
    half = f"{PARTIAL}{socket.gethostname()}-{dead.pid}-01234567-state.safetensors"
    (state.parent / half).write_bytes(b"half")
    finished(loopmdm("train", spec_file, "--out", broken, "--resume"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    assert rows(whole) == rows(broken) and len(rows(whole)) == 20
    assert [path.name for path in broken.rglob(".*")] == [LOCK]

    before = state.stat().st_mtime_ns
    here("train", spec_file, "--out", broken, "--resume")  # finished: nothing to do
    assert state.stat().st_mtime_ns == before
    other = spec_file.with_name("other.toml")
    other.write_text(TINY.replace("batch_size = 8", "batch_size = 4"))
    _, err = here("train", other, "--out", broken, "--resume", code=2)
    assert "training.batch_size was 8, is 4" in err and err.count("\n") == 1
    _, err = here("train", spec_file, "--out", broken, code=2)
    assert "--resume" in err


@pytest.mark.slow
def test_told_to_stop_it_keeps_what_it_has_and_goes_on_from_there(spec_file, whole, tmp_path):
    stopped = tmp_path / "stopped"
    ends, state = [], stopped / "state" / "state.safetensors"
    for _ in range(2):
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = loopmdm("train", spec_file, "--out", stopped, "--resume")
        while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns == before):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        _, err = process.communicate()
        ends.append((process.returncode, err.strip()))
        assert time.monotonic() - told < 60  # not a speed goal: it does not wait for the run to end
    finished(loopmdm("train", spec_file, "--out", stopped, "--resume"))
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
    assert rows(whole) == rows(stopped)
    for code, line in ends:
        assert code == 143 and line.count("\n") == 0
        assert "add --resume to go on" in line


def test_a_point_that_is_broken_off_comes_first_when_the_run_goes_on(tmp_path, monkeypatch):
    spec = RunSpec.from_dict(_values(flops=2e9, curve_points=4))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with torch.enable_grad():
        trainer.Trainer(spec, whole).train()
        points = []

        def interrupted(model, *given, **named):
            points.append(1)
            if len(points) == 3:  # of two loop counts at each point: the second point's first
                os.kill(os.getpid(), signal.SIGTERM)
                raise AssertionError("the evaluation went on")
            return nelbo(model, *given, **named)

        monkeypatch.setattr(trainer, "nelbo", interrupted)
        run = trainer.Trainer(spec, stopped)
        with pytest.raises(Stopped, match="add --resume to go on from step"):
            run.train()
        assert len(rows(stopped)) == 1 and run._bare().training
        run.lock.release()
        trainer.Trainer(spec, stopped, resume=True).train()
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
    assert rows(whole) == rows(stopped) and len(rows(whole)) == 4


def test_a_state_is_written_by_the_clock_too(tmp_path):
    spec = RunSpec.from_dict(_values(flops=2e9, curve_points=1))
    run, saved = trainer.Trainer(spec, tmp_path / "run", checkpoint_seconds=0.0), []
    write = run._checkpoint
    run._checkpoint = lambda *given, **named: (saved.append(run.progress.step), write(*given, **named))
    with torch.enable_grad():
        run.train()
    assert len(saved) > run.progress.step  # at every step, and at the end


@pytest.mark.slow
def test_two_trainers_do_not_share_a_folder(spec_file, tmp_path):
    first = loopmdm("train", spec_file, "--out", tmp_path / "run")
    while first.poll() is None and not (tmp_path / "run" / "tokenizer.json").exists():
        time.sleep(0.005)
    for arguments in (("--resume",), ()):
        second = loopmdm("train", spec_file, "--out", tmp_path / "run", "--seed", "2", *arguments)
        _, err = finished(second, code=2)
        assert ("being trained by another process" in err or "is not empty" in err) and err.count("\n") == 1
    finished(first)


def test_bf16_inputs_of_products_stay_near_and_end_with_the_step(spec_file, tmp_path):
    """Rounding inputs to 8 bits moves a loss of about 2 nats by less than 1e-2; evaluation is not touched."""
    losses = {}
    for precision in ("highest", "medium"):
        spec = RunSpec.load(spec_file, {"training.matmul_precision": precision, "training.threads": 1})
        run = trainer.Trainer(spec, tmp_path / precision)
        with torch.enable_grad():
            run._step()
        losses[precision] = run.progress.window["loss"]
        assert torch.get_float32_matmul_precision() == "highest"
    assert losses["medium"] == pytest.approx(losses["highest"], abs=1e-2)
    with pytest.raises(UsageError, match="matmul_precision"):
        RunSpec.load(spec_file, {"training.matmul_precision": "low"})


@pytest.mark.slow
def test_two_processes_follow_one(tmp_path):
    """Same batches, masks and S; gradients are averaged, so losses agree to float32 rounding grown over steps."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.replace("4e10", "8e9").replace("curve_points = 20", "curve_points = 5"))
    program = ["-c", "from loopmdm.analysis.cli import main; main()", "train", str(path), "--out"]
    finished(subprocess.Popen([sys.executable, *program, str(tmp_path / "one")], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True))  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "--no-python", sys.executable, *program, str(tmp_path / "two")],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 5
    for left, right in zip(one, two, strict=True):
        assert left["step"] == right["step"] and left["flops"] == right["flops"]
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-4)
        assert left["validation_nelbo_3"] == pytest.approx(right["validation_nelbo_3"], abs=1e-4)
    resumed = [*launch, "--no-python", sys.executable, *program, str(tmp_path / "two"), "--resume"]
    assert subprocess.run(resumed, capture_output=True, check=False, env=environment, timeout=300).returncode == 0


def test_accumulated_parts_are_the_whole_batch(tmp_path):
    losses = []
    for parts in (1, 4):
        spec = RunSpec.from_dict(_values(flops=4e9, accumulate=parts, curve_points=3))
        run = trainer.Trainer(spec, tmp_path / str(parts))
        with torch.enable_grad():
            run.train()
        losses.append([row["loss"] for row in run.progress.rows])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_averages_start_as_copies_and_are_put_back():
    layer = torch.nn.Linear(1, 1, bias=False)
    ema = Ema(layer, 0.5)
    values, expected = [3.0, 5.0, -1.0], None
    for n, value in enumerate(values):
        layer.weight.data.fill_(value)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    with ema.swapped():
        assert float(layer.weight) == pytest.approx(expected)
    assert float(layer.weight) == -1.0 and float(ema.shadows[0]) == pytest.approx(expected)


def test_a_budget_may_be_tokens_or_steps(tmp_path):
    values = _values(flops=0.0, steps=7, curve_points=2)
    planned = budget.plan(RunSpec.from_dict(values))
    assert planned.steps == 7 and planned.tokens == 7 * 8 * 36
    values["training"] |= {"steps": 0, "tokens": 7 * 8 * 36 - 5}
    assert budget.plan(RunSpec.from_dict(values)).steps == 7
    run = trainer.Trainer(RunSpec.from_dict(values), tmp_path / "run")
    with torch.enable_grad():
        run.train()
    assert run.progress.step == 7 and len(run.progress.rows) == 2


def test_the_command_line_trains_on_a_budget_in_steps(spec_file, tmp_path):
    spec_file.write_text(
        TINY.replace("flops = 4e10", "steps = 3").replace("curve_points = 20", "curve_points = 2")
    )
    out, _ = here("train", spec_file, "--out", tmp_path / "run")
    assert out.splitlines()[1].split("\t")[0] == "3"


@pytest.mark.parametrize("kind", ["uniform", "fixed", "flop-proportional", "flop-balanced"])
def test_loops_are_drawn_as_the_spec_says(kind):
    spec = RunSpec.from_dict(_values() | {"loops": {"distribution": kind}})
    chances = budget.loop_chances(spec.config, spec.loops, 3, 36)
    cost = [training_flops(spec.config, 36, s) for s in (1, 2, 3)]
    if kind == "flop-balanced":
        assert chances * cost == pytest.approx([chances[0] * cost[0]] * 3)
    if kind == "flop-proportional":
        assert chances / cost == pytest.approx([chances[0] / cost[0]] * 3)
    drawn = torch.tensor([budget.draw_loops(spec, step, 1.0) for step in range(3000)])
    share = torch.bincount(drawn, minlength=4)[1:] / 3000
    torch.testing.assert_close(share, torch.from_numpy(chances).float(), atol=0.03, rtol=0)


def test_the_walk_through_a_budget_equals_its_steps_one_by_one():
    spec = RunSpec.from_dict(_values(flops=3e9))
    spent, steps = 0.0, 0
    while spent < 3e9:
        cap = spec.loops.cap(spent / 3e9, 3)
        spent, steps = spent + budget.step_cost(spec, (1 + cap) / 2), steps + 1
    planned = budget.plan(spec)
    assert planned.steps == steps and planned.flops == pytest.approx(spent)


@pytest.mark.parametrize("corpus", ["owt", "lm1b", "fineweb-edu"])
def test_the_papers_runs_are_matched_in_flops(corpus):
    base, loop = (RunSpec.load(SPECS / f"paper-{corpus}-{arm}.toml") for arm in ("base", "loop"))
    assert (base.config.n_prelude_layers, base.config.n_loop_layers, base.config.n_coda_layers) == (1, 2, 9)
    one, other = budget.plan(base), budget.plan(loop)
    assert one.steps == 1_000_000 and other.e_s == 6.5
    assert 0 <= other.flops - one.flops <= budget.step_cost(loop, 6.5)
    assert base.training.batch_size == loop.training.batch_size == 512
    assert base.data == loop.data and base.data.length == (128 if corpus == "lm1b" else 1024)


def test_with_the_embedding_as_a_product_the_matched_steps_are_those_a_public_follow_up_prints():
    cfg = dataclasses.replace(
        RunSpec.load(SPECS / "paper-owt-loop.toml").config, d_vocab=50_257, mask_token_id=50_256
    )
    base, loop = (training_flops(cfg, 1024, s, embedding=True) for s in (1, 6.5))
    assert abs(1e6 * base / loop - 655_420) < 20


def test_a_full_disk_ends_in_one_line_with_exit_1(spec_file, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    _, err = finished(loopmdm("train", spec_file, "--out", tmp_path / "run", preexec_fn=limit), code=1)
    assert err.strip().count("\n") == 0 and "cannot write" in err
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.slow
def test_training_learns(tmp_path):
    spec = RunSpec.from_dict(_values(flops=8e10, learning_rate=3e-3))
    run = trainer.Trainer(spec, tmp_path / "run")
    with torch.enable_grad():
        run.train()
    first, last = run.progress.rows[0], run.progress.rows[-1]
    assert last["validation_nelbo_3"] < first["validation_nelbo_3"] - 0.1
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert 8e10 <= record["training_flops"]["realised"] <= 8e10 + budget.step_cost(spec, 3)
    assert budget.step_cost(spec, 3) == training_flops(spec.config, 36, 3, batch=8)
    assert record["mean_loops"]["realised"] == pytest.approx(record["mean_loops"]["planned"], rel=0.1)


def _values(**training):
    import tomllib

    values = tomllib.loads(TINY)
    values["training"] |= training
    return values


def test_plan_spends_the_budget_and_no_more_than_a_step_beyond():
    for name in ("sotu-base", "sotu-loop", "sudoku-base", "sudoku-loop", "smoke"):
        spec = RunSpec.load(SPECS / f"{name}.toml")
        planned = budget.plan(spec)
        assert 0 <= planned.flops - spec.training.flops <= budget.step_cost(spec, spec.config.max_loops)
        assert 1 <= planned.e_s <= spec.config.mean_loops


def test_twins_share_size_budget_and_recipe():
    for task in ("sotu", "sudoku"):
        base, loop = (RunSpec.load(SPECS / f"{task}-{arm}.toml") for arm in ("base", "loop"))
        assert base.training == loop.training and base.data == loop.data and base.seed == loop.seed
        assert base.model | {"max_loops": 0} == loop.model | {"max_loops": 0}


def test_schedule_widens_from_one_to_all():
    schedule = LoopSchedule(widen_from=0.2, widen_until=0.5)
    caps = [schedule.cap(p / 100, 6) for p in range(101)]
    assert caps[:20] == [1] * 20 and caps[50:] == [6] * 51 and caps == sorted(caps)
    assert set(caps) == {1, 2, 3, 4, 5, 6}
    assert LoopSchedule().cap(0.0, 6) == 6


def test_drawn_loops_are_uniform_below_the_cap():
    spec = RunSpec.from_dict(_values())
    drawn = torch.tensor([budget.draw_loops(spec, step, 1.0) for step in range(3000)])
    share = torch.bincount(drawn, minlength=4)[1:] / 3000
    torch.testing.assert_close(share, torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    assert {budget.draw_loops(spec, step, 0.0) for step in range(50)} == {1}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = trainer.Trainer(RunSpec.from_dict(_values()), tmp_path / "run")
    run.model.embed.weight.data.fill_(float("nan"))
    with torch.enable_grad(), pytest.raises(DivergedError, match=r"step 0.*learning_rate"):
        run.train()


def test_without_a_compiler_training_is_eager_with_a_warning(monkeypatch, model):
    def broken(*_, **__):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="eagerly"):
        assert trainer.compile_blocks(model, model.device) is False


def test_initial_weights_have_a_seed_of_their_own_and_curves_one_set_of_masks(tmp_path):
    def begun(**seeds):
        spec = RunSpec.from_dict(_values(flops=1e9) | seeds)
        return trainer.Trainer(spec, tmp_path / f"run-{seeds}")

    first, other, crossed = begun(seed=1), begun(seed=2), begun(seed=2, init_seed=1)
    weights = [run._bare().unembed.weight for run in (first, other, crossed)]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(other.data.batch(0, 8), crossed.data.batch(0, 8))
    assert not torch.equal(first.data.batch(0, 8), crossed.data.batch(0, 8))
    for run in (first, crossed):
        run.progress.window = {key: 1.0 for key in ("loss", "gradient_norm", "n_loops", "steps")}
        run._record_row()
    assert first.progress.rows[0]["validation_nelbo_1"] == crossed.progress.rows[0]["validation_nelbo_1"]
    assert "init_seed" not in first.spec.to_dict()  # what was recorded before reads the same
    assert RunSpec.from_dict(crossed.spec.to_dict()) == crossed.spec


def test_a_corrupted_state_is_refused(tmp_path):
    spec, folder = RunSpec.from_dict(_values(flops=1e9)), tmp_path / "run"
    with torch.enable_grad():
        trainer.Trainer(spec, folder).train()
    path = folder / "state" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match="damaged"):
        trainer.Trainer(spec, folder, resume=True)


def _header(**changes):
    return lambda tensors, header: (tensors, {**header, **changes})


def _tensors(change):
    def damage(tensors, header):
        name = next(name for name in tensors if name.startswith("optimizer.") and name.endswith("exp_avg"))
        return change(tensors, name) or tensors, header

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _tensors(lambda tensors, name: tensors.pop(name) is None),
        _tensors(lambda tensors, name: tensors.update({name: tensors[name].flatten()[:-1].clone()})),
        _tensors(lambda tensors, name: tensors.update({"optimizer.nobody.exp_avg": tensors[name].clone()})),
        lambda tensors, header: (tensors, None),
        lambda tensors, header: (tensors, {"identity": header["identity"]}),
        lambda tensors, header: (tensors, {"progress": header["progress"]}),
        _header(progress="["),
        _header(progress="{}" + "["),
        _header(progress='{"step": "many"}'),
        _header(progress='{"of another version": 1}'),
        _header(identity="[" * 100_000),
        lambda tensors, header: (tensors, {"identity": "[]", "progress": header["progress"]}),
        _tensors(lambda tensors, name: tensors[name].view(torch.int32).flatten()[:1].bitwise_xor_(1) is None),
        lambda tensors, header: (tensors, {**header, "progress": header["progress"].replace(": 0.", ": 1.", 1)}),
        _header(sha256="0" * 64),
    ],
)
def test_a_state_that_lacks_or_bends_anything_is_refused_in_one_line(tmp_path, damage):
    spec = RunSpec.from_dict(_values(flops=1e9))
    with torch.enable_grad():
        trainer.Trainer(spec, tmp_path).train()
    path = tmp_path / "state" / "state.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors, header = damage(load_file(path), header)
    save_file(tensors, path, header)
    with pytest.raises(UsageError, match=r"is damaged.*to start again") as told:
        trainer.Trainer(spec, tmp_path, resume=True)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("line", "instead", "says"),
    [
        ("flops = 4e10", "flops = 4e10\nflop = 1", "did you mean flops"),
        ("flops = 4e10", "", "exactly one budget"),
        ("flops = 4e10", "flops = 4e10\nsteps = 5", "exactly one budget"),
        ("flops = 4e10", 'flops = 4e10\nmatch = "x.toml"', "match takes the place"),
        ("flops = 4e10", 'match = "nowhere.toml"', "no file .*nowhere"),
        ("flops = 4e10", 'match = "tiny.toml"', "another spec"),
        ("flops = 4e10", 'match = "a\\u0000b.toml"', "unknown spec"),
        ("batch_size = 8", "batch_size = 8\naccumulate = 3", "does not divide"),
        ("batch_size = 8", 'batch_size = 8\nprecision = "fp8"', "precision"),
        ("widen_from = 0.2", 'widen_from = 0.2\ndistribution = "normal"', "loops.distribution"),
        ("flops = 4e10", "flops = -1.0", "positive"),
        ("batch_size = 8", "batch_size = 'x'", "must be int"),
        ("flops = 4e10", "flops = inf", "finite"),
        ("flops = 4e10", "flops = 4e10\nbeta2 = 2.0", "beta2"),
        ("flops = 4e10", "flops = 4e10\nweight_decay = -1.0", "weight_decay"),
        ("curve_sequences = 16", "curve_sequences = 0", "curve_sequences"),
        ('name = "tiny"', 'name = ""', "name must be"),
        ('corpus = "sudoku6"', 'corpus = "sudoku"', "did you mean sudoku"),
        ("d_model = 32", "d_model = 33", "divisible"),
        ("d_model = 32", "d_modle = 32", "did you mean d_model"),
        ("d_model = 32", "d_model = 32\nd_vocab = 9", "follow from"),
        ("widen_from = 0.2", "widen_from = 0.9", "widen_from <= widen_until"),
        ("seed = 1", "seed = 1 1", "not TOML"),
        ("seed = 1", "seed = 1\ninit_seed = -1", "init_seed"),
        ("[loops]", "[lops]", "did you mean loops"),
    ],
)
def test_wrong_specs_say_what_is_wrong(spec_file, line, instead, says):
    spec_file.write_text(TINY.replace(line, instead))
    with pytest.raises(UsageError, match=says):
        RunSpec.load(spec_file)


def test_a_finished_model_whose_state_went_is_not_trained_over(tmp_path):
    spec = RunSpec.from_dict(_values(flops=1e9))
    with torch.enable_grad():
        trainer.Trainer(spec, tmp_path).train()
    shutil.rmtree(tmp_path / "state")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != LOCK}
    with pytest.raises(UsageError, match="holds a model, but no state"):
        trainer.Trainer(dataclasses.replace(spec, seed=2), tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != LOCK} == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "train.json"])
def test_what_is_missing_of_a_finished_run_is_written_again(name, tmp_path, monkeypatch):
    spec, hashed = RunSpec.from_dict(_values(flops=1e9)), []
    monkeypatch.setattr(checkpoints, "sha256", lambda path: (hashed.append(path.name), sha256(path))[1])
    with torch.enable_grad():
        trainer.Trainer(spec, tmp_path).train()
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        trainer.Trainer(spec, tmp_path, resume=True).train()
    assert (tmp_path / name).read_bytes() == before
    assert hashed == ["model.safetensors"] * 2  # once each time they are written


def test_a_run_of_fewer_steps_than_points_goes_on_where_it_was_broken_off(tmp_path):
    spec = RunSpec.from_dict(_values(flops=0.0, steps=4))

    def broken(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with torch.enable_grad():
        trainer.Trainer(spec, tmp_path / "whole").train()
        with pytest.raises(KeyboardInterrupt):
            trainer.Trainer(spec, tmp_path / "broken").train(broken)
        trainer.Trainer(spec, tmp_path / "broken", resume=True).train()
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken"))
    assert whole == resumed


def test_own_texts_that_changed_since_training_are_not_measured_on(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path / "cache"))
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"the cat sat on mat number {number} " * 30)
    values = _values(flops=0.0, steps=2) | {
        "data": {"corpus": f"files:{tmp_path}/*.txt", "d_vocab": 264, "length": 16}
    }
    with torch.enable_grad():
        trainer.Trainer(RunSpec.from_dict(values), tmp_path / "run").train()
    m = HookedLoopMDM.from_pretrained(tmp_path / "run")
    assert len(Access().test_set(m).tokens)
    (tmp_path / "20.txt").write_text("the cat sat on another mat " * 30)  # 21 texts: another one may be held out
    with pytest.raises(UsageError, match="is not what the model was trained on any more"):
        Access().test_set(m)


@pytest.mark.slow
def test_a_shipping_that_is_broken_off_leaves_the_old_one(tmp_path, monkeypatch):
    spec = RunSpec.from_dict(_values(flops=1e9))
    with torch.enable_grad():
        trainer.Trainer(spec, tmp_path / "run").train()
    home = ship.ship(tmp_path / "run", tmp_path / "home")
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    assert set(before) == {"model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl", "train.json"}
    with torch.enable_grad():
        trainer.Trainer(dataclasses.replace(spec, seed=2), tmp_path / "other").train()

    def broken(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(ship, "evaluate", broken)
        ship.ship(tmp_path / "other", home)
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before

    def broken_at_the_record(path, write):
        return broken() if path.name == "train.json" else write_atomic(path, write)

    monkeypatch.setattr(ship, "write_atomic", broken_at_the_record)
    with pytest.raises(KeyboardInterrupt):
        ship.ship(tmp_path / "other", home)
    assert (home / "train.json").read_bytes() == before["train.json"]
    with pytest.raises(UsageError, match=r"is not what train\.json beside it was written for"):
        HookedLoopMDM.from_pretrained(home)


def test_shipped_specs_have_names(tmp_path, monkeypatch):
    assert RunSpec.load("smoke", {"seed": 3}) == RunSpec.load(SPECS / "smoke.toml", {"seed": 3})
    assert RunSpec.load("sudoku-loop-s4").name == "sudoku-loop-s4"
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(SPECS / "sotu-loop.toml", "smoke")  # a file goes first
    assert RunSpec.load("smoke").name == "sotu-loop"
    with pytest.raises(UsageError, match="unknown spec 'smokee'; did you mean smoke"):
        RunSpec.load("smokee")
