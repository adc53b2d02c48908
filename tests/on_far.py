"""What is run on the device "far" (far.py) and on the CPU, and gives the same: `python -m tests.on_far NAME..`.

Names are those of the scenarios here, or of measures; without any all of them run. Prints a line for each.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState

from loopmdm.analysis import cut, mask_attention, stale
from loopmdm.analysis.exhibits.measuring import measure_one
from loopmdm.analysis.measures import Access, measure
from loopmdm.analysis.measures.interventions.contexts import damp, freeze, skip
from loopmdm.model import StateDelta, mask_tokens, nelbo, sample
from loopmdm.model.diffusion.likelihood import continuation_nelbo, corpus_nelbo
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.stopping import rules
from loopmdm.model.training import processes, trainer
from loopmdm.model.training.spec import RunSpec
from loopmdm.model.training.trainer import Trainer
from tests import far
from tests.commands import loopmdm
from tests.conftest import toy_config
from tests.small import measures, small

CLOSE = 1e-4
"""Values agree this far: torch fuses some operations on the CPU and not here, and adds in another order."""


def toy(place: str) -> HookedLoopMDM:
    """The same toy on either device."""
    torch.manual_seed(0)
    return HookedLoopMDM(LoopMDM(toy_config()).eval().to(place))


def ids(place: str, n: int = 4) -> torch.Tensor:
    return torch.randint(0, 22, (n, 10), generator=torch.Generator().manual_seed(1)).to(place)


def forward(place: str) -> list[Any]:
    """Logits and caches at every S, with padding, with the unrolled model's names, with a hook."""
    m, tokens, found = toy(place), ids(place), []
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[:, 7:] = False
    for n_loops in (1, 2, 3):
        logits, cache = m.run_with_cache(tokens, n_loops=n_loops)
        half = m.run_with_hooks(tokens, n_loops=n_loops, fwd_hooks=[("loop.0.hook_out", lambda x, hook: x / 2)])
        found += [logits, m(tokens, n_loops=n_loops, attention_mask=real), half, cache["pattern", "loop", -1, 1]]
        found += [cache.unrolled().accumulated_resid()]
        assert logits.device == tokens.device
    held = (tokens % 2).bool()
    return [*found, m.run(tokens, rows=held).logits, m.model(tokens, n_loops=3, rows=held, earlier=1)]


def stopping(place: str) -> list[Any]:
    """Every rule, by sequence and by token."""
    m, tokens = toy(place), mask_tokens(ids(place), 22, mask_ratio=0.5).tokens
    stops = [rules.parse_rule(text, 3) for text in ("state-delta:0.5", "kl-delta:0.05", "argmax-stable:1")]
    stops += [StateDelta(0.5, max_loops=3, scope="token")]
    runs = [m.run(tokens, stop=stop) for stop in stops]
    return [value for run in runs for value in (run.logits, run.loops_used, run.criterion, run.flops)]


def likelihoods(place: str) -> list[Any]:
    """NELBOs: fixed, stopped, of continuations and of documents."""
    m, tokens = toy(place), ids(place)
    texts = [[1, 2, 3], [4, 5]]
    results = [
        nelbo(m, tokens, 3, n_samples=2),
        nelbo(m, tokens, stop=StateDelta(0.5, max_loops=3), n_samples=2, maskable=torch.arange(10) > 2),
        nelbo(m, tokens, 2, n_samples=2, estimator="stratified-t"),
        continuation_nelbo(m, texts, texts, n_samples=2),
        corpus_nelbo(m, [[1] * 40, [2] * 5]),
    ]
    return [r.per_sequence for r in results] + [r.flops for r in results]


def samples(place: str) -> list[Any]:
    """Orders of every kind, with a prompt, clues and guidance."""
    m = toy(place)
    orders = ("random", "confidence", "drawn-confidence", "threshold:0.9", "blocks:4", "first-hitting", "one-shot")
    drawn = [sample(m, n=3, length=8, steps=4, order=order).tokens for order in orders]
    return [*drawn, sample(m, n=2, length=8, steps=4, clues={0: 3}, guidance=1.5, top_p=0.9).tokens]


def interventions(place: str) -> list[Any]:
    """What is done to attention and states, and what is read of it."""
    m = toy(place)
    b = mask_tokens(ids(place), 22, mask_ratio=0.5)
    found = []
    for change in (
        lambda: cut(m, "masked->masked"), lambda: stale(m, loops=[1]), lambda: damp(m, 0.5),
        lambda: freeze(m, loops=[1, 2]), lambda: skip(m, loops=[1]),
    ):  # fmt: skip
        with change():
            found.append(m.run(b.tokens, 3).logits)
    return [*found, mask_attention(m, b, 3)["mass"].to_numpy()]


def training(place: str) -> list[Any]:
    """Three steps, a point of the curve, the state on disk, and going on from it."""
    values = {
        "name": "tiny", "seed": 1, "data": {"corpus": "sudoku6"},
        "model": {"d_model": 32, "n_heads": 2, "max_loops": 3},
        "training": {"steps": 4, "batch_size": 8, "curve_points": 2, "curve_sequences": 16, "accumulate": 2,
                     "logits": "masked"},
    }  # fmt: skip
    made, build = processes.accelerator, trainer.LoopMDM

    def moved(cfg: Any) -> LoopMDM:  # before the optimizer sees its weights: here, moving them makes new ones
        model = build(cfg)
        return model if model.device.type == "meta" else model.to(place)

    def there(precision: str) -> Any:
        found = made(precision)
        found.device_placement = False
        found.state.device = PartialState._shared_state["device"] = torch.device(place)
        return found

    processes.accelerator, trainer.LoopMDM = there, moved
    folder = Path(tempfile.mkdtemp()) / "run"
    try:
        with torch.enable_grad():
            stopped = Trainer(RunSpec.from_dict(values), folder)
            stopped._step()
            stopped._checkpoint()
            stopped.lock.release()
            run = Trainer(RunSpec.from_dict(values), folder, resume=True)
            assert run.progress.step == 1 and run._bare().device.type == torch.device(place).type
            run.train()
    finally:
        processes.accelerator, trainer.LoopMDM = made, build
    return [row[key] for row in run.progress.rows for key in ("loss", "gradient_norm", "validation_nelbo_3")]


def commands(place: str) -> list[Any]:
    """Commands that name a device."""
    device = ["--device", place, "--batch-size", "3"]
    asked = (
        ["measure", "mask-attention", "sudoku-loop-s4", "--n", "8", "--mask-ratios", "0.5", "--n-loops", "2"],
        ["evaluate", "markov-loop", "--n-loops", "1", "--n-samples", "1"],
        ["sample", "sudoku-loop-s4", "--n", "2", "--steps", "3", "--n-loops", "2"],
        ["training-free", "markov-base", "--n", "8", "--n-samples", "1", "--n-loops", "1,2", "--blocks", "1:1"],
    )
    found = []
    for words in asked:
        out, _ = loopmdm(*words, *device)
        rows = pd.DataFrame([line.split("\t") for line in out.splitlines()[1:]])
        found += [pd.to_numeric(rows[column], errors="coerce").to_numpy() for column in rows]
    return found


def tables(place: str) -> list[Any]:
    """A table whose numbers no measure by name gives."""
    with tempfile.TemporaryDirectory() as folder:
        frame = measure_one("attention-maps", Path(folder), place)
        assert frame.attrs.get("device") == (None if place == "cpu" else place)
    return [frame[name].to_numpy() for name in frame.select_dtypes("number")]


SCENARIOS: dict[str, Callable[[str], list[Any]]] = {
    made.__name__: made
    for made in (forward, stopping, likelihoods, samples, interventions, training, commands, tables)
}
AMPLIFIED = {"dictionaries": 0.5, "lenses": 1e-2}
"""Training on states, or thresholds on them, make more of the last bits than `CLOSE`."""


def measured(name: str) -> Callable[[str], list[Any]]:
    """Columns of a measure."""
    model, options = small(name)

    def run(place: str) -> list[Any]:
        frame = measure(name, model, access=Access(device=place), **options)
        return [frame[column].to_numpy(float) for column in frame.select_dtypes("number")]

    return run


def apart(one: Any, other: Any) -> float:
    """The largest difference, relative where numbers are large; infinite where one is NaN alone."""
    one, other = (
        np.asarray(v.detach().cpu() if isinstance(v, torch.Tensor) else v, dtype=float) for v in (one, other)
    )
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(one - other) / np.maximum(1.0, np.abs(other)))
    return float(np.nan_to_num(gap, nan=np.inf).max(initial=0.0))


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in names or [*SCENARIOS, *measures()]:
        run = SCENARIOS.get(name) or measured(name)
        near = run("cpu")
        with far.device():
            there = run("far")
        assert near and len(near) == len(there), name
        gap = max(apart(one, other) for one, other in zip(there, near, strict=True))
        print(f"{name}\t{gap:.1e}", flush=True)
        assert gap < AMPLIFIED.get(name, CLOSE), name


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1:])
