"""The registry of measures: any of them on any model, from notebook, command line and tables alike.

    measure("mask-attention", "sudoku-loop", n_loops=18)           the test set at three mask ratios
    measure("mask-attention", "sudoku-loop", along_sampling=16)    before the denoising steps of its own samples

A measure is a function of a `Case` (a model and its test set) and a masked batch, or of the case alone where it
draws its own masks, that gives a tidy frame. To add one: a file with the function, one entry here; from another
package, an entry point of the group "loopmdm.measures" that names a `Measure` or a list of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

import pandas as pd
import torch

from loopmdm.analysis.measures import adapters, attention, interventions, known, representation
from loopmdm.analysis.measures.adapters import RATIOS, looped, plain
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.stopping import predictor, record
from loopmdm.analysis.numbers.editions import Edition
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.registry import Registry
from loopmdm.model.stopping.rules import StoppingRule
from loopmdm.model.tasks.sudoku import BOARDS
from loopmdm.model.tasks.trees import TREE_TASKS


@dataclass(frozen=True)
class Measure(Edition):
    """`run` takes a case and, if `on` is "masks", a masked batch; else `on` is "test set" or the task it needs.

    `samples`: its errors are over samples that the model draws, not over test sequences. `needs`: facts that a
    model must have (`layout.NEEDS`).
    """

    name: str
    what: str
    run: Callable[..., pd.DataFrame]
    on: str = "masks"
    samples: bool = False
    needs: tuple[str, ...] = ("masks", "bidirectional")

    def answers(self, corpus: str) -> bool:
        """Whether models trained on `corpus` have such an answer."""
        return corpus in ANSWERED.get(self.on, (corpus,))

    def check(self, case: Case) -> None:
        """UsageError where the task has no such answer, or the model lacks a fact."""
        case.m.facts.need(*self.needs, by=self.name)
        if not self.answers(case.test.task):
            wanted = ", ".join(ANSWERED[self.on])
            raise UsageError(f"{self.name} needs a model of {wanted}; this one is of {case.test.task}")


ANSWERED = {"Sudoku": BOARDS, "tree": TREE_TASKS}


@torch.no_grad()
def measure(
    name: str,
    model: str,
    n_loops: int | None = None,
    mask_ratios: Sequence[float] = RATIOS,
    n: int = 256,
    along_sampling: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """One measure of one model on `n` test sequences; columns `model` and `task` come first.

    Measures on masks run at each of `mask_ratios` (column `nominal_mask_ratio`), or, with `along_sampling`
    denoising steps, before five steps of the model's own samples (column `step`). `n_units` independent sequences,
    or documents where they share one, are what errors are over; Student's t with n_units - 1 goes with them.
    """
    check_count("along_sampling", along_sampling, least=0)
    item, case = MEASURES[name], Case.of(model, n_loops, n, seed)
    item.check(case)
    if item.on != "masks":
        if along_sampling:
            raise UsageError(f"{name} draws its own masks; leave --along-sampling out")
        frame = item.run(case)
    elif along_sampling:
        parts = [item.run(case, b).assign(step=step) for step, b in case.along_sampling(along_sampling)]
        frame = pd.concat(parts, ignore_index=True)
    else:
        parts = [item.run(case, case.masked(ratio)).assign(nominal_mask_ratio=ratio) for ratio in mask_ratios]
        frame = pd.concat(parts, ignore_index=True)
    frame = frame.drop(columns=["model", "task"], errors="ignore")
    frame.insert(0, "model", str(model))
    frame.insert(1, "task", case.test.task)
    if "n_units" not in frame and not (item.samples or along_sampling):
        frame["n_units"] = case.n_units
    return frame


def _told(rules: list[StoppingRule]) -> list[str]:
    """Each rule by name, with the settings that are not its usual ones."""
    told = []
    for rule in rules:
        usual = {item.name: item.default for item in fields(rule)}
        given = {name: value for name, value in asdict(rule).items() if value != usual[name]}
        told.append(f"{record.rule_name(rule)} {sorted(given.items())}")
    return told


def _rules() -> tuple:
    """What rules are tried by default, and at how many thresholds."""
    return _told(record.default_rules(2)), adapters.N_THRESHOLDS


def _predicted() -> tuple:
    """What the predictor of the remaining gain looks at, and at how many thresholds it is tried."""
    return _told(predictor.feature_rules(2)), adapters.N_THRESHOLDS


def _thresholds() -> int:
    """Among how many thresholds the middle one of state-delta is taken."""
    return adapters.N_THRESHOLDS


def _ratios() -> tuple:
    """At which mask ratios a measure that draws its own masks does."""
    return adapters.RATIOS


MEASURES: Registry[Measure] = Registry(
    "measure",
    Measure,
    "loopmdm.measures",
    (
        Measure(
            "mask-attention",
            "masses, chance, lift, log-odds, content by loop, layer, head",
            plain(attention.mask_attention),
        ),
        Measure(
            "mask-attention-pooled",
            "the same, heads averaged",
            plain(attention.mask_attention, by_head=False),
        ),
        Measure("attention-shape", "row entropy, distance, concentration", plain(attention.attention_shape)),
        Measure(
            "attention-change",
            "distance and rank correlation of maps between successive loops",
            looped(plain(attention.attention_change)),
        ),
        Measure(
            "attention-sinks", "masses with sinks as a group, at three factors", plain(attention.sink_attention)
        ),
        Measure(
            "attention-toggle", "attention to the same key masked less clean", plain(attention.attention_toggle)
        ),
        Measure(
            "attention-heads",
            "heads ranked by growth on one half, tested on the other",
            looped(plain(attention.head_growth)),
        ),
        Measure(
            "attention-tests",
            "does masked-to-masked rise with loops, head by head",
            looped(plain(attention.effect_tests)),
        ),
        Measure(
            "attention-specifications",
            "sign and size of the rise under every definition",
            looped(plain(attention.specification_curve)),
        ),
        Measure(
            "representation-change",
            "change of the state, read-outs by both lenses",
            plain(representation.representation_change),
        ),
        Measure(
            "convergence",
            "does the change fall faster than a drift's 1/i",
            lambda case, b: representation.convergence(case.m, b, max(64, case.n_loops), clusters=case.clusters),
        ),
        Measure("similarity", "debiased linear CKA between loops", plain(representation.loop_similarity)),
        Measure("effective-rank", "effective rank of the states by loop", plain(representation.effective_rank)),
        Measure("settled", "loops by which the answer has appeared, stays, is right", adapters.settled),
        Measure("fixed-points", "residual far out; spectral radius or growth rate", adapters.fixed_points),
        Measure(
            "state-paths", "paths of the mean state in PCA coordinates", looped(plain(representation.state_paths))
        ),
        Measure(
            "stopping-frontier",
            "quality against FLOPs of all rules, with controls",
            looped(adapters.frontier),
            "test set",
            goes_by=_rules,
        ),
        Measure(
            "stopping-verdicts",
            "non-inferiority, and usefulness beside the controls, of every rule",
            looped(adapters.verdicts),
            "test set",
            goes_by=_rules,
        ),
        Measure(
            "stopping-calibration",
            "criterion of each rule against the gain still to come",
            looped(adapters.calibration),
            "test set",
            goes_by=_rules,
        ),
        Measure(
            "stopping-usage",
            "loops used by mask ratio, difficulty and token class",
            looped(adapters.usage),
            "test set",
            goes_by=_thresholds,
        ),
        Measure(
            "stopping-by-step",
            "loops used along a sampling run",
            looped(adapters.by_step),
            "test set",
            samples=True,
            goes_by=_thresholds,
        ),
        Measure(
            "stopping-in-sampling",
            "quality, FLOPs and time of whole sampling runs",
            looped(adapters.sampling),
            "test set",
            samples=True,
            goes_by=_thresholds,
        ),
        Measure(
            "gain-predictor",
            "frontier of stopping by a predicted remaining gain",
            looped(adapters.predictor),
            "test set",
            goes_by=_predicted,
        ),
        Measure(
            "gain-foresight",
            "how well the remaining gain is predicted",
            looped(adapters.foresight),
            "test set",
            goes_by=_predicted,
        ),
        Measure(
            "loops-or-steps",
            "loops against denoising steps at equal FLOPs",
            looped(adapters.loops_or_steps),
            "test set",
            samples=True,
        ),
        Measure(
            "mediated-share",
            "share of the gain of looping that some edges carry",
            looped(adapters.mediated),
            "test set",
        ),
        Measure(
            "cut-effects",
            "NELBO lost by cutting masked-to-masked at or from a loop on",
            looped(adapters.effects(lambda m, loops: interventions.cut(m, "masked->masked", loops))),
            "test set",
        ),
        Measure(
            "stale-effects",
            "NELBO lost where masked keys keep the values of loop 0",
            looped(adapters.effects(lambda m, loops: interventions.stale(m, "masked", loops))),
            "test set",
        ),
        Measure(
            "training-free", "a stack looped without training for it", adapters.looped_without_training, "test set"
        ),
        Measure(
            "sudoku-boards",
            "what is wrong with the boards after every loop",
            adapters.boards(known.boards_by_loop, 20, True),
            "Sudoku",
        ),
        Measure(
            "sudoku-settling",
            "loop at which a cell is right, by propagation depth",
            adapters.boards(known.settling_by_depth, 20, True),
            "Sudoku",
        ),
        Measure(
            "sudoku-depth",
            "rank correlation of that loop with the depth, and its null",
            adapters.boards(known.settling_correlation, 20, True),
            "Sudoku",
        ),
        Measure(
            "sudoku-orders",
            "solve rate by loops and generation order, and their interaction",
            adapters.orders,
            "Sudoku",
        ),
        Measure(
            "belief-rounds",
            "read-out after every loop against rounds of belief propagation",
            adapters.rounds(known.belief_rounds),
            "tree",
            goes_by=_ratios,
        ),
        Measure(
            "best-rounds",
            "nearest round of every loop",
            adapters.rounds(known.best_rounds),
            "tree",
            goes_by=_ratios,
        ),
    ),
)
