"""Tables of the analysis suite: any registered measure, on any models, cached by their weights."""

from collections.abc import Iterable
from functools import partial

import pandas as pd

from analysis import zoo
from analysis.evaluations import cached
from loopmdm_model.checkpoints import CONFIG, list_models, resolve
from loopmdm_model.config import LoopMDMConfig

LOOPED = ("sotu-loop", "sudoku-loop")
HALF = (0.5,)
READ_TO = 3
AT_CHANCE = ("gsm",)
"""Tasks that no shipped model has learned: what goes on inside explains nothing."""


def with_weights(*arms: str) -> tuple[str, ...]:
    """Models of some arms whose weights are here, every seed, of tasks that were learned."""
    listed = list_models()
    return tuple(m.name for m in zoo.shipped(None, *arms) if m.name in listed and m.task not in AT_CHANCE)


def main_tasks(arm: str) -> tuple[str, ...]:
    """Models of an arm with weights, every seed, of the tasks of `LOOPED`."""
    tasks = tuple(name.partition("-")[0] + "-" for name in LOOPED)
    return tuple(name for name in with_weights(arm) if name.startswith(tasks))


def looped() -> tuple[str, ...]:
    """Every looped model with weights."""
    return with_weights("loop")


def measured(
    measure: str,
    models: Iterable[str],
    ratios: tuple[float, ...] = HALF,
    n: int = 256,
    read_to: int = 1,
    along_sampling: int = 0,
) -> pd.DataFrame:
    """One measure of several models, read to `read_to` x S_max of their task; columns as the measure's."""
    frames = []
    for name in models:
        n_loops = read_to * zoo.s_max(name)
        frames.append(_one(measure, name, n_loops, ratios, n, along_sampling))
    return pd.concat(frames, ignore_index=True)


def _one(
    measure: str, name: str, n_loops: int, ratios: tuple[float, ...], n: int = 256, along_sampling: int = 0
) -> pd.DataFrame:
    def compute() -> pd.DataFrame:
        from analysis import measures

        return measures.measure(measure, name, n_loops, ratios, n, along_sampling)

    return cached(name, ["measure", measure, n_loops, list(ratios), n, along_sampling], compute)


def amounts() -> tuple[str, ...]:
    """The three-layer Sudoku models with weights that loop, whatever their S_max of training."""
    arms = ("loop-s2", "loop-s4", "loop", "loop-s8", "loop-s12")
    return tuple(name for name in with_weights(*arms) if name.startswith("sudoku-"))


def controls() -> tuple[str, ...]:
    """Models that were not looped, seed 0, and those whose shape the untrained ones have."""
    return tuple(name for name in with_weights("base", "deep") if "-seed" not in name) + LOOPED


def controls_table() -> pd.DataFrame:
    """Attention of masked queries by depth where nothing was looped in training: base, deep, untrained stacks.

    Base and deep at S = 1 and, as equal depth, base at S_max; an untrained model of the looped one's shape, three
    initialisations (`arm` "untrained", `seed`).
    """
    rows = []
    for model in zoo.shipped(None, "base", "deep"):
        if model.name not in controls():
            continue
        for n_loops in (1, zoo.s_max(model.name)) if model.arm == "base" else (1,):
            frame = _one("mask-attention", model.name, n_loops, HALF)
            rows.append(frame.assign(arm=model.arm, seed=model.seed))
    for name in LOOPED:
        for seed in range(3):
            rows.append(_untrained(name, seed))
    keep = ["model", "task", "arm", "seed", "n_loops", "segment", "loop", "layer", "depth", "head", "query_group",
            "key_group", "mass", "chance", "log_odds", "log_odds_se", "content", "n", "n_units"]  # fmt: skip
    frame = pd.concat(rows, ignore_index=True)[keep]
    return frame[frame["query_group"] == "masked"].reset_index(drop=True)


def _untrained(name: str, seed: int) -> pd.DataFrame:
    """mask-attention of fresh weights in the shape of a shipped model, on that model's test set."""
    import torch

    from analysis.attention import mask_attention
    from analysis.cases import Case
    from loopmdm_model.hooked import HookedLoopMDM
    from loopmdm_model.model import LoopMDM

    def compute() -> pd.DataFrame:
        case = Case.of(name)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            m = HookedLoopMDM(LoopMDM(case.m.cfg).eval())
        frame = mask_attention(m, case.masked(HALF[0]), case.n_loops, clusters=case.clusters)
        return frame.assign(model=name, task=case.test.task, n_units=case.n_units)

    return cached(name, ["untrained mask-attention", seed], compute).assign(arm="untrained", seed=seed)


def training_free_table() -> pd.DataFrame:
    """Base models with the layers repeated that their looped twins loop: training-free, of one block.

    One mask a sequence.
    """
    from analysis.cases import Case
    from analysis.measures.adapters import looped_without_training

    def compute(name: str, block: tuple[int, int]) -> pd.DataFrame:
        case = Case.of(name)
        frame = looped_without_training(case, [block], n_samples=1)
        return frame.assign(model=name, task=case.test.task, n_units=case.n_units)

    frames = []
    for name in main_tasks("base"):
        twin = LoopMDMConfig.load(resolve(f"{name.partition('-')[0]}-loop") / CONFIG)
        block = (twin.n_prelude_layers, twin.n_loop_layers)
        frames.append(cached(name, ["training-free, 1 mask", *block], partial(compute, name, block)))
    return pd.concat(frames, ignore_index=True)


def verdicts_table() -> pd.DataFrame:
    """Non-inferiority of every rule, and whether it beats its controls, for every looped model.

    Columns of `analysis.stopping.verdicts` with model, task, seed and rule.
    """
    frames, names = [], looped()
    for model in zoo.shipped(None, "loop"):
        if model.name in names:
            frame = measured("stopping-verdicts", (model.name,))
            frames.append(frame.assign(seed=model.seed))
    return pd.concat(frames, ignore_index=True)


def _sudoku() -> tuple[str, ...]:
    return tuple(name for name in looped() if name.startswith("sudoku-"))


_TREES = tuple(name for name in looped() if name.startswith(("tree-", "markov-")))

PLAIN: tuple[tuple[str, tuple[str, ...], tuple[str, ...], dict], ...] = (
    ("attention-shape", LOOPED, ("loop", "entropy"), {}),
    ("attention-change", LOOPED, ("loop", "metric", "value"), {}),
    ("attention-sinks", LOOPED, ("loop", "factor", "log_odds"), {}),
    ("attention-toggle", LOOPED, ("loop", "toggle"), {}),
    ("attention-heads", LOOPED, ("head", "growth", "p_holm"), {}),
    ("attention-tests", LOOPED, ("head", "growth", "effect"), {}),
    ("attention-specifications", LOOPED, ("measure", "estimate", "verdict"), {"ratios": (0.25, 0.5, 0.75)}),
    ("convergence", looped(), ("metric", "value", "verdict"), {}),
    ("similarity", LOOPED, ("loop", "other_loop", "value"), {"read_to": 2}),
    ("effective-rank", LOOPED, ("loop", "value"), {"read_to": READ_TO}),
    ("settled", LOOPED, ("loop", "metric", "value"), {"ratios": (0.25, 0.5, 0.75)}),
    ("fixed-points", LOOPED, ("metric", "value"), {}),
    ("state-paths", LOOPED, ("loop", "pc1", "pc2"), {}),
    ("stopping-frontier", LOOPED, ("rule", "threshold", "flops", "nll", "against_fixed"), {"read_to": 2}),
    ("stopping-usage", LOOPED, ("rule", "by", "group", "value"), {}),
    ("stopping-by-step", LOOPED, ("step", "value"), {"n": 64}),
    ("stopping-in-sampling", LOOPED, ("rule", "quality", "time_ratio"), {"n": 64}),
    ("gain-predictor", LOOPED, ("rule", "flops", "nll"), {"read_to": 2}),
    ("loops-or-steps", LOOPED, ("budget", "n_loops", "steps", "quality"), {"n": 64}),
    ("mediated-share", main_tasks("loop"), ("edges", "matched", "share"), {}),
    ("cut-effects", LOOPED, ("loop", "mask_ratio", "effect"), {"n": 128}),
    ("stale-effects", LOOPED, ("loop", "mask_ratio", "effect"), {"n": 128}),
    ("sudoku-boards", _sudoku(), ("loop", "metric", "value"), {"read_to": READ_TO}),
    ("sudoku-settling", _sudoku()[:1], ("depth", "loop_settled", "share"), {}),
    ("sudoku-depth", (*_sudoku(), "sudoku-base"), ("arm", "correlation"), {}),
    ("sudoku-orders", _sudoku(), ("n_loops", "order", "solve_rate"), {"n": 100}),
    ("belief-rounds", _TREES, ("loop", "round", "kl"), {}),
    ("best-rounds", _TREES, ("loop", "best_round"), {}),
)  # fmt: skip
"""Tables that are one measure each: its name, the models, columns, and what `measured` is given."""
