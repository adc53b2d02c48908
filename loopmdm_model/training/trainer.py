"""The training loop: AdamW, S drawn per step, EMA weights, exact resume.

Step k draws its batch, masks and S from (seed, k) alone, so a run killed at any moment and resumed
gives the same weights, bit for bit, as one that was never interrupted (one thread count, one
machine). The EMA weights are what is evaluated and shipped.
"""

import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim.swa_utils import AveragedModel

from loopmdm_model import checkpoints
from loopmdm_model.allocator import keep_freed_memory
from loopmdm_model.data.batches import Dataset, dataset
from loopmdm_model.data.tokenizer import load_tokenizer
from loopmdm_model.errors import DivergedError, UsageError
from loopmdm_model.files import write_atomic, write_json
from loopmdm_model.likelihood import draw_masks, masked_cross_entropy, nelbo
from loopmdm_model.model import LoopMDM
from loopmdm_model.training import budget, state
from loopmdm_model.training.record import run_record
from loopmdm_model.training.spec import RunSpec

OnStep = Callable[[state.Progress], None]


class Trainer:
    """One run in one folder. `train` brings it to its end from wherever it stands."""

    def __init__(self, spec: RunSpec, folder: Path, resume: bool = False):
        self.spec, self.folder = spec, folder
        if not resume and folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty; add --resume to continue it or give another --out")
        torch.set_num_threads(spec.training.threads)
        keep_freed_memory()
        self.data = self._dataset()
        self.accelerator = Accelerator()
        self._build()
        self.identity = spec.to_dict() | {"corpus sha256": self.data.fingerprint}
        found = state.load(folder, self.identity)
        self.progress = found[1] if found else state.Progress()
        if found:
            state.scatter(found[0], self._bare(), self.ema, self._optimizer())

    def _dataset(self) -> Dataset:
        data, path = self.spec.data, self.folder / checkpoints.TOKENIZER
        tokenizer = load_tokenizer(path, data.d_vocab) if path.is_file() else None
        built = dataset(data.corpus, data.length, data.d_vocab, self.spec.seed, tokenizer)
        if tokenizer is None:
            write_atomic(path, lambda temporary: built.tokenizer.save(str(temporary)))
        return built

    def _build(self) -> None:
        training = self.spec.training
        set_seed(self.spec.seed)
        model = LoopMDM(self.spec.config)
        self.ema = AveragedModel(model, multi_avg_fn=ema_update(training.ema))
        if training.compile:
            compile_blocks(model)
        decay = [p for p in model.parameters() if p.ndim >= 2]
        plain = [p for p in model.parameters() if p.ndim < 2]
        groups = [
            {"params": decay, "weight_decay": training.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, training.beta2), fused=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.ema.to(self.accelerator.device)

    def _bare(self) -> LoopMDM:
        return self.accelerator.unwrap_model(self.model)

    def _averaged(self) -> LoopMDM:
        module = self.ema.module
        assert isinstance(module, LoopMDM)
        return module

    def _optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def train(self, on_step: OnStep | None = None) -> None:
        """Run to the end of the budget, if not there yet; metrics and state are written at every curve point."""
        progress, total = self.progress, self.spec.training.flops
        if progress.finished:
            return
        started, before = time.monotonic(), progress.seconds
        while progress.flops < total:
            self._step()
            if on_step is not None:
                on_step(progress)
            points = self.spec.training.curve_points
            due = min(int(points * progress.flops / total), points)
            if due > len(progress.rows):
                progress.seconds = before + time.monotonic() - started
                self._record_row()
                self._checkpoint()
        self._finish()

    def _step(self) -> None:
        spec, progress = self.spec, self.progress
        n_loops = budget.draw_loops(spec, progress.step, progress.flops / spec.training.flops)
        tokens = self.data.batch(progress.step, spec.training.batch_size).to(self.accelerator.device)
        batch = draw_masks(
            tokens,
            spec.config.mask_token_id,
            torch.ones_like(tokens, dtype=torch.bool),
            spec.seed,
            progress.step,
        )
        rate = spec.training.learning_rate * min(1.0, (progress.step + 1) / max(1, spec.training.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = masked_cross_entropy(self.model(batch.tokens, n_loops=n_loops), batch).mean()
        value = loss.item()
        self._check_finite("loss", value, n_loops)
        self.accelerator.backward(loss)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), spec.training.clip) or 0.0)
        self._check_finite("gradient norm", norm, n_loops)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self._bare())
        self._count(n_loops, value, norm, tokens.numel())

    def _check_finite(self, what: str, value: float, n_loops: int) -> None:
        if not math.isfinite(value):
            raise DivergedError(
                f"{what} is {value} at step {self.progress.step} (S = {n_loops}); the last good state is in "
                f"{self.folder}; lower training.learning_rate"
            )

    def _count(self, n_loops: int, loss: float, norm: float, tokens: int) -> None:
        progress = self.progress
        progress.step += 1
        progress.flops += budget.step_cost(self.spec, n_loops)
        progress.tokens += tokens
        progress.loops += n_loops
        for key, value in (("loss", loss), ("gradient_norm", norm), ("n_loops", n_loops), ("steps", 1)):
            progress.window[key] = progress.window.get(key, 0.0) + value

    def _record_row(self) -> None:
        progress, window = self.progress, self.progress.window
        row: dict[str, Any] = {"step": progress.step, "flops": progress.flops, "tokens": progress.tokens}
        row |= {key: window[key] / window["steps"] for key in ("loss", "gradient_norm", "n_loops")}
        tokens = self.data.evaluation("validation", self.spec.training.curve_sequences)
        for n_loops in sorted({1, self.spec.config.max_loops}):
            result = nelbo(self._averaged(), tokens, n_loops=n_loops, n_samples=2, seed=self.spec.seed)
            row[f"validation_nelbo_{n_loops}"] = result.mean
            row[f"validation_nelbo_{n_loops}_se"] = result.standard_error
        row["seconds"] = round(progress.seconds, 1)
        progress.rows.append(row)
        progress.window = {}

    def _checkpoint(self) -> None:
        tensors = state.gather(self._bare(), self.ema, self._optimizer())
        state.save(self.folder, tensors, self.progress, self.identity)
        lines = [json.dumps(row) for row in self.progress.rows]
        write_atomic(self.folder / checkpoints.METRICS, lambda path: path.write_text("\n".join(lines) + "\n"))

    def _finish(self) -> None:
        self.progress.finished = True
        self._averaged().save_pretrained(self.folder)
        record = run_record(self.spec, self.progress, self.data.fingerprint)
        write_json(self.folder / checkpoints.RECORD, record)
        self._checkpoint()


def ema_update(decay: float) -> Callable[..., None]:
    """An exponential moving average whose decay warms up as (1 + n) / (10 + n)."""

    def update(averaged: list, current: list, n_averaged: torch.Tensor) -> None:
        n = float(n_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return torch.no_grad()(update)


def compile_blocks(model: LoopMDM) -> bool:
    """Compile each block in place (the whole model would recompile for every S); eager if impossible."""
    probe = torch.zeros(1, 2, model.cfg.d_model)
    try:
        torch.compile(nn.Linear(model.cfg.d_model, 1), dynamic=False)(probe)
    except Exception as error:  # inductor raises many kinds; all mean "no working C++ compiler"
        warnings.warn(f"torch.compile does not work here, training runs eagerly: {error!s:.200}", stacklevel=2)
        return False
    for block in model.blocks:
        block.compile(dynamic=False)
    return True
