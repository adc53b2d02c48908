"""Tables of the analysis suite: any registered measure, on any models, kept by their weights."""

from typing import Any

import pandas as pd

from loopmdm.analysis.numbers.store import Question
from loopmdm.model.network.checkpoints import CONFIG, resolve
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.zoo.runs import MAIN_TASKS, Run, Select, Zoo, select

HALF = {"mask_ratios": (0.5,)}
ALL_ITEMS = {"n": 2048}
"""No test set of ours is larger."""
THREE = {"mask_ratios": (0.25, 0.5, 0.75)}
"""At which shares of masked positions a measure is asked."""
READ_TO = 3
POOLED = "mask-attention-pooled"
AT_CHANCE = "gsm"
"""A task that no shipped model has learned: what goes on inside explains nothing."""
ASIDE = (AT_CHANCE, "arithmetic", "imdb-d48")
"""Beside it tasks of declared sets that are not whole: of their runs only curves, NELBOs and the excess over exact
answers are for drawing."""


def main_tasks(arm: str) -> Select:
    """Models of an arm with weights, every seed, of the two main tasks."""
    return select(task=MAIN_TASKS, arm=arm, weights=True)


FIRST = select(task=MAIN_TASKS, arm="loop", seed=0)
"""The looped models that are looked at in detail."""
LEARNED = select(arm="loop", weights=True, but_task=ASIDE)
"""Every looped model with weights, but of tasks aside."""
BOARDS = select(task="sudoku", arm="loop", weights=True)
SOLVERS = BOARDS | select(task="sudoku", arm="loop-s4", seed=0)
SHOWN = FIRST | select(task="sudoku", arm="loop-s4", seed=0)
"""The looped models whose computation is taken apart."""
TREES = select(task=("tree", "markov"), arm="loop", weights=True)
CONFIRMING = select(task="sudoku", arm="loop-s4", seed=range(3, 10))
"""Looped runs of a declared set (figures/claims.toml): their attention is measured before their weights go."""
AMOUNTS = (
    select(task="sudoku", arm=("loop-s2", "loop-s4", "loop", "loop-s8", "loop-s12"), weights=True) | CONFIRMING
)
"""The three-layer Sudoku models that loop, whatever their S_max of training."""
UNLOOPED = select(arm=("base", "deep"), seed=0, weights=True, but_task=ASIDE)
CONTROLS = UNLOOPED | FIRST
"""Models that were not looped, and those whose shape the untrained ones have."""


def measured(measure: str, models: Select, zoo: Zoo, read_to: int = 1, **options: Any) -> pd.DataFrame:
    """One measure of several models, read to `read_to` x S_max of their task; columns as the measure's."""
    frames = [asked(measure, run, read_to * zoo.s_max(run), **options).answer() for run in models.of(zoo)]
    return pd.concat(frames, ignore_index=True)


def asked(measure: str, run: Run, n_loops: int, **options: Any) -> Question:
    """One measure of one model."""
    from loopmdm.analysis.measures import question

    return question(run.name, measure, n_loops, **options)


def pooled_by_loop(run: Run, zoo: Zoo) -> Question:
    """What the table of attention by S_max asks of one run."""
    return asked(POOLED, run, READ_TO * zoo.s_max(run), **HALF)


def pooled_table(models: Select, zoo: Zoo) -> pd.DataFrame:
    """Attention between groups, heads averaged, half masked, of several models to 3 x S_max of their own."""
    return pd.concat([pooled_by_loop(run, zoo).answer() for run in models.of(zoo)], ignore_index=True)


def controls_table(zoo: Zoo) -> pd.DataFrame:
    """Attention of masked queries by depth where nothing was looped in training: base, deep, untrained stacks.

    Base and deep at S = 1 and, as equal depth, base at S_max; an untrained model of the looped one's shape, three
    initialisations (`arm` "untrained", `seed`).
    """
    rows = []
    for run in UNLOOPED.of(zoo):
        for n_loops in (1, zoo.s_max(run)) if run.arm == "base" else (1,):
            frame = asked("mask-attention", run, n_loops, **HALF).answer()
            rows.append(frame.assign(arm=run.arm, seed=run.seed))
    for run in FIRST.of(zoo):
        for seed in range(3):
            rows.append(_untrained(run, seed).answer().assign(arm="untrained", seed=seed))
    keep = ["model", "task", "arm", "seed", "n_loops", "segment", "loop", "layer", "depth", "head", "query_group",
            "key_group", "mass", "chance", "log_odds", "log_odds_se", "content", "n", "n_units"]  # fmt: skip
    frame = pd.concat(rows, ignore_index=True)[keep]
    return frame[frame["query_group"] == "masked"].reset_index(drop=True)


def _untrained(run: Run, seed: int) -> Question:
    """mask-attention of fresh weights in the shape of a shipped model, on that model's test set."""
    import torch

    from loopmdm.analysis.measures import MEASURES, Case
    from loopmdm.analysis.measures.attention import mask_attention
    from loopmdm.model.hooks.hooked import HookedLoopMDM
    from loopmdm.model.network.model import LoopMDM

    def compute() -> pd.DataFrame:
        case = Case.of(run.name)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            m = HookedLoopMDM(LoopMDM(case.m.cfg).to(case.m.model.device).eval())
        frame = mask_attention(m, case.masked(0.5), case.n_loops, clusters=case.clusters)
        return frame.assign(model=run.name, task=case.test.task, n_units=case.n_units)

    return Question(run.name, MEASURES["mask-attention"].label, ["untrained", seed], compute)


def training_free_table(zoo: Zoo) -> pd.DataFrame:
    """Base models with the layers repeated that their looped twins loop: training-free, of one block.

    One mask a sequence.
    """
    frames, last = [], ["model", "task", "n_units"]
    for run in main_tasks("base").of(zoo):
        twin = LoopMDMConfig.load(resolve(zoo.first(run.task).name) / CONFIG)
        block = (twin.n_prelude_layers, twin.n_loop_layers)
        frame = asked("training-free", run, 1, blocks=(block,), n_samples=1).answer()
        frames.append(frame[[*frame.columns.drop(last), *last]])
    return pd.concat(frames, ignore_index=True)


def verdicts_table(zoo: Zoo) -> pd.DataFrame:
    """Non-inferiority of every rule, and whether it beats its controls, for every looped model.

    Columns of `loopmdm.analysis.measures.stopping.verdicts` with model, task, seed and rule.
    """
    answers = ((run, asked("stopping-verdicts", run, run.s_max, **ALL_ITEMS).answer()) for run in LEARNED.of(zoo))
    frames = [answer.assign(seed=run.seed) for run, answer in answers]
    return pd.concat(frames, ignore_index=True)


PLAIN: tuple[tuple[str, Select, tuple[str, ...], dict], ...] = (
    ("attention-shape", FIRST, ("loop", "entropy"), HALF),
    ("attention-change", FIRST, ("loop", "metric", "value"), HALF),
    ("attention-sinks", FIRST, ("loop", "factor", "log_odds"), HALF),
    ("attention-toggle", FIRST, ("loop", "toggle"), HALF),
    ("attention-heads", FIRST, ("head", "growth", "p_holm"), HALF),
    ("attention-tests", FIRST, ("head", "growth", "effect"), HALF),
    ("attention-specifications", FIRST, ("measure", "estimate", "verdict"), THREE),
    ("convergence", LEARNED, ("metric", "value", "verdict"), HALF),
    ("similarity", FIRST, ("loop", "other_loop", "value"), HALF | {"read_to": 2}),
    ("effective-rank", FIRST, ("loop", "value"), HALF | {"read_to": READ_TO}),
    ("settled", FIRST, ("loop", "metric", "value"), THREE),
    ("fixed-points", FIRST, ("metric", "value"), HALF),
    ("state-paths", FIRST, ("loop", "pc1", "pc2"), HALF),
    ("stopping-frontier", FIRST, ("rule", "threshold", "flops", "nll", "against_fixed"), {"read_to": 2}),
    ("stopping-usage", FIRST, ("rule", "by", "group", "value"), {}),
    ("stopping-by-step", FIRST, ("step", "value"), {"n": 64}),
    ("stopping-in-sampling", FIRST, ("rule", "quality", "time_ratio"), {"n": 64}),
    ("gain-predictor", FIRST, ("rule", "flops", "nll"), {"read_to": 2}),
    ("loops-or-steps", FIRST, ("budget", "n_loops", "steps", "quality"), {"n": 64}),
    ("mediated-share", main_tasks("loop"), ("edges", "matched", "share"), {}),
    ("causal-edges", main_tasks("loop"), ("kind", "edges", "side", "mask_ratio", "effect"), {"n": 64}),
    ("cut-effects", FIRST, ("loop", "mask_ratio", "effect"), {"n": 128}),
    ("stale-effects", FIRST, ("loop", "mask_ratio", "effect"), {"n": 128}),
    ("sudoku-boards", BOARDS, ("loop", "metric", "value"), {"read_to": READ_TO}),
    ("sudoku-settling", select(task="sudoku", arm="loop", seed=0), ("depth", "loop_settled", "share"), {}),
    ("sudoku-depth", BOARDS | select(task="sudoku", arm="base", seed=0), ("arm", "correlation"), {}),
    ("sudoku-orders", BOARDS, ("n_loops", "order", "solve_rate"), {"n": 100}),
    ("candidates", SOLVERS, ("arm", "rule", "metric", "loop", "round", "value"), {}),
    ("edge-effects", SHOWN, ("loop", "relation", "keys", "queries", "value"), {"n_exact": 32}),
    ("relay-effects", main_tasks("loop") | SHOWN, ("loop", "relay", "relation", "value"), {"n_sequences": 32}),
    ("head-cards", main_tasks("loop") | SHOWN, ("loop", "head", "label", "metric", "value"), {}),
    ("logit-attribution", SHOWN, ("read", "part", "loop", "value"), HALF),
    (
        "attribution-patching",
        main_tasks("loop") | SHOWN,
        ("component", "loop", "value"),
        HALF | {"wrong": "any", "n_exact": 32},
    ),
    ("propagation-scrubbing", SOLVERS, ("loop", "arm", "round", "kl"), {"n_boards": 256}),
    ("probes", SHOWN, ("target", "loop", "value"), {}),
    ("steering", select(task="sudoku", arm=("loop", "loop-s4"), seed=0), ("direction", "loop", "value"), {}),
    ("lenses", SHOWN, ("lens", "loop", "metric", "value"), {}),
    ("perturbation-gain", SHOWN, ("loop", "metric", "value"), HALF),
    ("dictionaries", SHOWN, ("arm", "kind", "loop", "metric", "value"), {"kind": "both"}),
    ("belief-rounds", TREES, ("loop", "round", "kl"), {}),
    ("best-rounds", TREES, ("loop", "best_round"), {}),
)  # fmt: skip
"""Tables that are one measure each: its name, the models, columns, and what `measured` is given."""
