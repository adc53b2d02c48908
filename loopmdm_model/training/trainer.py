"""The training loop: AdamW, S drawn per step, EMA weights, exact resume, one process or many.

Step k draws its batch, masks and S from (seed, k) alone, and each process takes its rows of that batch: the
data order does not depend on how many there are, and a run killed at any moment and resumed gives the same
weights, bit for bit, as one that was never interrupted (one thread count, one machine). The EMA weights
are what is evaluated and shipped. Several processes, GPUs, bf16 and FSDP are accelerate's configuration:
`accelerate launch --module loopmdm.analysis.cli train SPEC.toml`.
"""

import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import set_seed
from filelock import BaseFileLock
from torch import Tensor, nn

from loopmdm.model.corpora.tokenizer import load_tokenizer
from loopmdm.model.diffusion.likelihood import masked_cross_entropy, masked_draw, nelbo, packed_cross_entropy
from loopmdm.model.errors import DivergedError, Stopped, UsageError
from loopmdm.model.files import LOCK, clear_partial, lock_folder, write_atomic
from loopmdm.model.network import checkpoints
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.taps import TapSource, explicit_taps, no_taps
from loopmdm.model.tasks.batches import Dataset
from loopmdm.model.training import budget, processes, state
from loopmdm.model.training.allocator import keep_freed_memory
from loopmdm.model.training.ema import Ema
from loopmdm.model.training.record import run_record
from loopmdm.model.training.spec import RunSpec, dataset_of

OnStep = Callable[[state.Progress], None]
STOP = 0
"""Place of "stop" in what a step returns."""
CURVE_SEED = 0
"""Masks of the validation sequences: one seed for all runs, so that curves differ by their models alone."""


class _BrokenOff(BaseException):
    """SIGTERM came while a point of the curve was evaluated."""


class Trainer:
    """One run in one folder, which it locks. `train` brings it to its end from wherever it stands.

    The state is written at every curve point, every `checkpoint_seconds`, and when SIGTERM comes: `train` then
    raises Stopped after the step that runs, before it if its batch comes in parts, or within an evaluation, which
    is then done first when the run goes on.
    """

    def __init__(self, spec: RunSpec, folder: Path, resume: bool = False, checkpoint_seconds: float = 600.0):
        self.spec, self.folder, self.checkpoint_seconds = spec, folder, checkpoint_seconds
        self.told_to_stop, self._may_break, self._saved = False, False, time.monotonic()
        budget.check_threads(spec.training.threads)
        self.accelerator = processes.accelerator(spec.training.precision)
        self._check_shares()
        self._check_memory()
        self._new = [path for path in (folder, *folder.parents) if not path.exists()]
        self._kept = set() if self._new else set(folder.iterdir())
        try:
            self._start(resume)
        except BaseException:
            self._leave()
            raise

    def _start(self, resume: bool) -> None:
        """The folder, the data, the model, and where an earlier run of it stood."""
        spec, folder = self.spec, self.folder
        with self.accelerator.main_process_first():
            if self._first:
                self.lock = self._take_folder(resume)
            torch.set_num_threads(spec.training.threads)
            keep_freed_memory()
            self.data = self._dataset()
        self._build()
        self.identity = state.identity_of(spec) | {"corpus sha256": self.data.fingerprint}
        found = state.load(folder, self.identity)
        self.progress = found[1] if found else state.Progress()
        if found:
            state.scatter(found[0], self.model, self._optimizer(), self.ema)
            self.ema.n = self.progress.step
            self._write_metrics()

    def _leave(self) -> None:
        """Take out of the folder what a start that failed has put there."""
        lock = getattr(self, "lock", None)
        if lock is None:  # another process's, or not taken
            return
        for path in (self.folder / checkpoints.TOKENIZER, self.folder / LOCK):
            if path not in self._kept:
                path.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # somebody else's files are there
            for folder in self._new:
                folder.rmdir()

    @property
    def _first(self) -> bool:
        return self.accelerator.is_main_process

    def _take_folder(self, resume: bool) -> BaseFileLock:
        """The folder's lock; what a killed writer of it left behind goes."""
        folder = self.folder
        if not resume and folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
            raise UsageError(f"{folder} is not empty; add --resume to continue it or give another --out")
        if (folder / checkpoints.WEIGHTS).is_file() and not (folder / state.STATE_FILE).is_file():
            raise UsageError(
                f"{folder} holds a model, but no state to go on from; give another --out or move it away"
            )
        lock = lock_folder(folder, "trained")
        clear_partial(folder, folder / Path(state.STATE_FILE).parent)
        return lock

    def _check_shares(self) -> None:
        training, processes = self.spec.training, self.accelerator.num_processes
        if training.batch_size % (training.accumulate * processes):
            raise UsageError(
                f"training.batch_size {training.batch_size} does not divide into {training.accumulate} parts on "
                f"each of {processes} processes; change accumulate or the number of processes"
            )

    def _check_memory(self) -> None:
        """UsageError if one process needs several times what the machine has, as on a CPU it would."""
        training, there = self.spec.training, psutil.virtual_memory().total
        with torch.device("meta"):
            needed = budget.training_memory(self.spec, LoopMDM(self.spec.config).n_parameters)
        if self.accelerator.device.type == "cpu" and needed > 4 * there:
            raise UsageError(
                f"training needs about {needed / 2**30:.0f} GiB of memory, this machine has {there / 2**30:.0f}; "
                f"lower training.batch_size {training.batch_size}, raise accumulate, or shrink the model"
            )

    def _dataset(self) -> Dataset:
        data, path = self.spec.data, self.folder / checkpoints.TOKENIZER
        tokenizer = load_tokenizer(path, data.d_vocab) if path.is_file() else None
        built = dataset_of(self.spec, tokenizer)
        if tokenizer is None and self._first:
            write_atomic(path, lambda temporary: built.tokenizer.save(str(temporary)))
        return built

    def _build(self) -> None:
        training = self.spec.training
        set_seed(self.spec.seed if self.spec.init_seed is None else self.spec.init_seed)
        model = LoopMDM(self.spec.config)
        if training.compile:
            compile_blocks(model, self.accelerator.device)
        decay = [p for p in model.parameters() if p.ndim >= 2]
        plain = [p for p in model.parameters() if p.ndim < 2]
        groups = [
            {"params": decay, "weight_decay": training.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, training.beta2), fused=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.ema = Ema(self.model, training.ema)
        processes.register_entries(self._bare())

    def _bare(self) -> LoopMDM:
        return self.accelerator.unwrap_model(self.model)

    def _optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _share(self) -> float:
        return budget.share_spent(self.spec, self.progress.step, self.progress.flops)

    def train(self, on_step: OnStep | None = None) -> None:
        """Run to the end of the budget, if not there yet; metrics and state are written at every curve point.

        What is missing of a finished run is written again.
        """
        progress = self.progress
        if progress.finished:
            if not all((self.folder / name).is_file() for name in checkpoints.FINISHED):
                self._checkpoint(finished=True)
            return
        started, before = time.monotonic(), progress.seconds
        self._saved = started
        with self._listening():
            if self.progress.window and self._point():  # stopped within it
                self._record_row()
            while self._share() < 1:
                wanted = self._step()
                progress.seconds = before + time.monotonic() - started
                if on_step is not None:
                    on_step(progress)
                point = self._point()
                if point and not wanted[STOP]:
                    self._record_row()
                if point or wanted.any():
                    self._checkpoint()
                if wanted[STOP]:
                    raise self._stopped()
        self._checkpoint(finished=True)

    def _point(self) -> bool:
        """Whether a point of the curve is due."""
        points = self.spec.training.curve_points
        return min(int(points * self._share()), points) > len(self.progress.rows)

    def _stopped(self) -> Stopped:
        return Stopped(f"add --resume to go on from step {self.progress.step} in {self.folder}")

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGTERM asks the run to stop after its step, and breaks off what is done again when it goes on.

        Only a process's first thread can hear it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: Any) -> None:
            self.told_to_stop = True
            if self._may_break:
                self._may_break = False
                raise _BrokenOff

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _wanted(self) -> Tensor:
        """[stop, save]: whether this process was told to stop, and whether a state is due."""
        due = time.monotonic() - self._saved >= self.checkpoint_seconds
        return torch.tensor([float(self.told_to_stop), float(due)], device=self.accelerator.device)

    def _step(self) -> Tensor:
        """One step; [stop, save] as any process wants it, the same in all."""
        spec, progress = self.spec, self.progress
        n_loops = budget.draw_loops(spec, progress.step, self._share())
        parts = self._parts()
        rate = spec.training.learning_rate * min(1.0, (progress.step + 1) / max(1, spec.training.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.accelerator.device)
        for number, part in enumerate(parts):
            if self.told_to_stop and len(parts) > 1 and self.accelerator.num_processes == 1:
                self.optimizer.zero_grad()
                return self._wanted()
            waits = number + 1 < len(parts)
            with self.accelerator.no_sync(self.model) if waits else nullcontext():
                total = total + self._backward(part, n_loops) / len(parts)
        reduced = self.accelerator.reduce(torch.cat([total[None], self._wanted()]), "mean")
        assert isinstance(reduced, Tensor)
        value = reduced[0].item()
        self._check_finite("loss", value, n_loops)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), spec.training.clip) or 0.0)
        self._check_finite("gradient norm", norm, n_loops)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        self._count(n_loops, value, norm)
        return reduced[1:].cpu() > 0

    def _backward(self, part: MaskedBatch, n_loops: int) -> Tensor:
        """Add the gradients of one part; returns its loss.

        Fused attention on a CPU is slow with bf16 inputs of products, so it is explicit then.
        """
        training = self.spec.training
        taps = no_taps if training.matmul_precision == "highest" else explicit_taps
        with matmul_precision(training.matmul_precision):
            loss = self._loss(part, n_loops, taps)
            self.accelerator.backward(loss / training.accumulate)
        return loss.detach()

    def _loss(self, part: MaskedBatch, n_loops: int, taps: TapSource) -> Tensor:
        """Mean cross-entropy after `n_loops` loops; with `loops.earlier` its mean with that at an earlier one."""
        earlier = budget.draw_earlier(self.spec, self.progress.step, n_loops)
        packed = self.spec.training.logits == "masked"
        rows, loss = (part.masked, packed_cross_entropy) if packed else (None, masked_cross_entropy)
        logits = self.model(part.tokens, n_loops=n_loops, taps=taps, earlier=earlier, rows=rows)
        if earlier is None:
            return loss(logits, part).mean()
        return torch.stack([loss(each, part).mean() for each in logits]).mean()

    def _parts(self) -> list[MaskedBatch]:
        """Rows of the step's batch that fall to this process, in parts for gradient accumulation."""
        spec, step = self.spec, self.progress.step
        tokens = self.data.batch(step, spec.training.batch_size)
        sequences = Sequences.of(tokens, self.data.maskable(tokens))
        batch = masked_draw(sequences, spec.config.mask_token_id, spec.seed, step)
        count = spec.training.accumulate * self.accelerator.num_processes
        size, device = len(batch) // count, self.accelerator.device
        parts = []
        for number in range(self.accelerator.process_index, count, self.accelerator.num_processes):
            part = batch.rows(slice(number * size, (number + 1) * size))
            parts.append(
                MaskedBatch(part.tokens, part.clean, part.masked).to(device, pinned=device.type == "cuda")
            )
        return parts

    def _check_finite(self, what: str, value: float, n_loops: int) -> None:
        if not math.isfinite(value):
            first = self.progress.step * self.spec.training.batch_size
            raise DivergedError(
                f"{what} is {value} at step {self.progress.step} (S = {n_loops}, sequences {first} to "
                f"{first + self.spec.training.batch_size - 1} of the data order); the last good state is in "
                f"{self.folder}; lower training.learning_rate"
            )

    def _count(self, n_loops: int, loss: float, norm: float) -> None:
        progress = self.progress
        progress.step += 1
        progress.flops += budget.step_cost(self.spec, n_loops)
        progress.tokens += self.spec.training.batch_size * self.spec.data.length
        progress.loops += n_loops
        for key, value in (("loss", loss), ("gradient_norm", norm), ("n_loops", n_loops), ("steps", 1)):
            progress.window[key] = progress.window.get(key, 0.0) + value

    def _record_row(self) -> None:
        progress, window = self.progress, self.progress.window
        row: dict[str, Any] = {"step": progress.step, "flops": progress.flops, "tokens": progress.tokens}
        row |= {key: window[key] / window["steps"] for key in ("loss", "gradient_norm", "n_loops")}
        try:
            row |= self._evaluated()
        except _BrokenOff:
            self._checkpoint()
            raise self._stopped() from None
        row["seconds"] = round(progress.seconds, 1)
        progress.rows.append(row)
        progress.window = {}

    def _evaluated(self) -> dict[str, float]:
        """NELBO of the averaged weights on validation sequences, at one loop and at S_max."""
        tokens = self.data.evaluation("validation", self.spec.training.curve_sequences)
        tokens = tokens.to(self.accelerator.device)
        sequences = Sequences.of(tokens, self.data.maskable(tokens))
        found, model = {}, self._bare()
        model.eval()
        try:
            with self.ema.swapped(), self._breaking():
                for n_loops in sorted({1, self.spec.config.max_loops}):
                    result = nelbo(model, sequences, n_loops, n_samples=2, seed=CURVE_SEED)
                    found[f"validation_nelbo_{n_loops}"] = result.mean
                    found[f"validation_nelbo_{n_loops}_se"] = result.standard_error
        finally:
            model.train()
        return found

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        """SIGTERM ends what is done inside at once; of several processes none may leave the others waiting."""
        self._may_break = self.accelerator.num_processes == 1
        try:
            yield
        finally:
            self._may_break = False

    def _checkpoint(self, finished: bool = False) -> None:
        tensors = state.gather(self.model, self._optimizer(), self.ema)
        if finished:
            self.progress.finished = True
            averages = {n.removeprefix("ema."): value for n, value in tensors.items() if n.startswith("ema.")}
            if self._first:
                record = run_record(self.spec, self.progress, self.data)
                checkpoints.save_weights(self.folder, self.spec.config, averages, record=record)
        if self._first:
            state.save(self.folder, tensors, self.progress, self.identity)
        self._write_metrics()
        self._saved = time.monotonic()
        self.accelerator.wait_for_everyone()

    def _write_metrics(self) -> None:
        """The rows are part of the state; the file is made from them, so that none is lost or doubled."""
        if self._first:
            text = "".join(json.dumps(row) + "\n" for row in self.progress.rows)
            write_atomic(self.folder / checkpoints.METRICS, lambda path: path.write_text(text, "utf-8"))


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Products of float32 matrices at torch's `precision` inside, as before afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compile_blocks(model: LoopMDM, device: torch.device) -> bool:
    """Compile each block in place (the whole model would recompile for every S); eager if `device` cannot."""
    probe = torch.zeros(1, 2, model.cfg.d_model, device=device)
    try:
        torch.compile(nn.Linear(model.cfg.d_model, 1, device=device), dynamic=False)(probe)
    except Exception as error:  # inductor raises many kinds; all mean "no working compiler"
        warnings.warn(f"torch.compile does not work here, training runs eagerly: {error!s:.200}", stacklevel=2)
        return False
    for block in model.blocks:
        block.compile(dynamic=False)
    return True
