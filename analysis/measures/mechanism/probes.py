"""What can be read off the states with a straight line: linear probes, and what they find in nothing.

A probe of a place H(i) answers yes or no questions (`labels.py`) by ridge regression on standardised states x
(scikit-learn's `StandardScaler` and `Ridge`):

    score = W^T (x - mean) / std + b,      (W, b) least squares with penalty lambda n |W|^2

all questions at once; lambda is chosen by question, by the error on sequences held out of those that are fitted.
Probes are fitted on other sequences (boards, documents) than they are tested on, validation's.

    auc        of a yes above a no (ties half), mean over a target's classes that have both
    accuracy   score above 1/2; of targets with one true class in each row, the best class is it
    base       the accuracy of always answering the commoner way of the fitted sequences
    selectivity   auc less that of a control task: answers drawn by the type of a position (cell, token id) and
               held for all sequences (Hewitt & Liang 2019), which a probe can only learn by heart

Arms (`labels`): true; control; shuffled, answers permuted over rows, where auc is 1/2 but for chance: 95% of such
intervals hold it. `weights`: trained, untrained (`twins.py`). Loop -1 is the prelude's output: what loops had
no part in. That something can be read does not say that the model reads it: steering.py asks. Errors over
sequences or clusters: an AUC's by what each row adds to it (DeLong et al. 1988), summed within units (Obuchowski
1997).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.known.boards import puzzles_of
from loopmdm.analysis.measures.mechanism.labels import Labelled, Target, sudoku_labels, text_labels
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.measures.twins import untrained
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.states import check_loops, trajectory
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.tasks.sudoku import BOARDS

PENALTIES = tuple(10.0**power for power in range(-6, 2))
HELD_OUT = 0.25
"""Share of the fitted sequences on which the penalty is chosen."""
LABELS = ("true", "control", "shuffled")


@dataclass(frozen=True, eq=False)
class Probe:
    """score = x @ weight + bias, of raw states x [row, d_model]: `weight` [d_model, class], `bias` [class]."""

    weight: Float[np.ndarray, "d_model class"]
    bias: Float[np.ndarray, " class"]

    def scores(self, x: Float[np.ndarray, "row d_model"]) -> Float[np.ndarray, "row class"]:
        """Near 1 for yes, near 0 for no."""
        return x.astype(np.float64) @ self.weight + self.bias


def fit_probe(
    x: Float[np.ndarray, "row d_model"], y: np.ndarray, owner: np.ndarray | None = None, seed: int = 0
) -> Probe:
    """scikit-learn's `Ridge` of answers `y` [row, class] on standardised states, a penalty a question.

    `owner` [row] names what is held out together; default: each row its own. UsageError for fewer than two.
    """
    owner = np.arange(len(x)) if owner is None else owner
    names, index = np.unique(owner, return_inverse=True)
    if len(names) < 2:
        raise UsageError("a probe needs rows of two sequences or documents at least: some choose its penalty")
    lots = row_uniforms(seed, "order", 1, len(names))[0].argsort().argsort().numpy()
    held = lots[index] < max(1, round(HELD_OUT * len(names)))
    x, y = x.astype(np.float64), y.astype(np.float64)
    n, k = y.shape[1], len(PENALTIES)
    tried = _ridge(x[~held], np.tile(y[~held], k), np.repeat(PENALTIES, n))  # one SVD serves all penalties
    errors = ((tried.scores(x[held]) - np.tile(y[held], k)) ** 2).mean(0).reshape(k, n)
    return _ridge(x, y, np.array(PENALTIES)[errors.argmin(0)])


def _ridge(x: np.ndarray, y: np.ndarray, penalty: np.ndarray) -> Probe:
    """Fitted on standardised states, written for raw ones; `penalty` [class] counts rows as one each."""
    from sklearn.linear_model import Ridge  # a second of import that only probes need
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    ridge = Ridge(alpha=penalty * len(x), solver="svd").fit(scaler.transform(x), y)
    weight = (np.atleast_2d(ridge.coef_) / scaler.scale_).T
    return Probe(weight, np.atleast_1d(ridge.intercept_) - np.asarray(scaler.mean_) @ weight)


def auc_and_influence(
    score: Float[np.ndarray, " row"], yes: np.ndarray, unit: Int[np.ndarray, " row"], n_units: int
) -> tuple[float, Float[np.ndarray, " unit"]]:
    """Area under the ROC, and each unit's influence on it; NaN where all rows are of one kind."""
    from scipy.stats import rankdata  # late: half a second

    a, b = score[yes], score[~yes]
    if not len(a) or not len(b):
        return float("nan"), np.full(n_units, np.nan)
    ranks = rankdata(score)
    below = np.empty(len(score))  # the share of the other kind that a row beats
    below[yes], below[~yes] = (ranks[yes] - rankdata(a)) / len(b), 1 - (ranks[~yes] - rankdata(b)) / len(a)
    area = below[yes].mean()
    weight = np.where(yes, 1 / len(a), 1 / len(b)) * (below - area)
    return float(area), n_units * np.bincount(unit, weight, n_units)


@torch.no_grad()
def states_at(
    m: HookedLoopMDM, some: Labelled, n_loops: int, batch_size: int = 32
) -> list[Float[np.ndarray, "row d_model"]]:
    """H(-1), H(0), .. at the rows, in reading order."""
    parts: list[list[np.ndarray]] = [[] for _ in range(n_loops + 1)]
    for start, part in some.batch.batches(batch_size):
        rows = some.rows[start : start + len(part)]
        if bool(rows.any()):
            for loop, state, _ in trajectory(m, part, n_loops):
                parts[loop + 1].append(state[rows].cpu().numpy())
    return [np.concatenate(found) for found in parts]


def probe(
    m: HookedLoopMDM, fit: Labelled, test: Labelled, n_loops: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Probes of all places, fitted on `fit`, and how well they do on `test`, which must be other sequences.

    Columns: n_loops loop target round labels metric value standard_error low high n_rows n. `round` is missing
    where rounds have no part; `low`..`high`: 95%, Student's t over the test's n sequences or documents.
    """
    n_loops = check_loops(m, n_loops)
    if not len(fit.types) or not len(test.types):
        raise UsageError("probes were given no position to look at; mask some, or give more sequences")
    if fit.answers.keys() != test.answers.keys():
        raise UsageError("the fitted and the tested sequences are asked different questions; label both alike")
    learned = {labels: _answers(fit, labels, seed) for labels in LABELS}
    asked = {labels: _answers(test, labels, seed, fit) for labels in LABELS}
    together, owner = np.concatenate(list(learned.values()), 1), fit.batch.owners[fit.sequence]
    rows: list[dict] = []
    for place, (x, z) in enumerate(zip(states_at(m, fit, n_loops), states_at(m, test, n_loops), strict=True)):
        scores = np.split(fit_probe(x, together, owner, seed).scores(z), len(LABELS), 1)
        seen = {
            (labels, target): _Seen(score[:, at], asked[labels][:, at], learned[labels][:, at], test)
            for labels, score in zip(LABELS, scores, strict=True)
            for target, at in _columns(fit).items()
        }
        rows += [{"loop": place - 1} | row for row in _said(seen)]
    frame = pd.DataFrame(rows).astype({"round": "Int64"})
    frame.insert(0, "n_loops", n_loops)
    return frame


def _said(seen: "dict[tuple[str, Target], _Seen]") -> Iterator[dict]:
    """All metrics of one place."""
    areas = {key: one.area() for key, one in seen.items()}
    for (labels, target), one in seen.items():
        at = {"target": target[0], "round": target[1], "labels": labels}
        yield at | {"metric": "auc"} | one.said(*areas[labels, target])
        yield at | {"metric": "accuracy"} | one.said(*one.accuracy(labels == "true"))
        if labels == "true":
            yield at | {"metric": "base"} | one.said(*one.base())
            (area, part), (other, rest) = areas["true", target], areas["control", target]
            yield at | {"labels": "true - control", "metric": "selectivity"} | one.said(area - other, part - rest)


def _columns(some: Labelled) -> dict[Target, slice]:
    ends = np.cumsum([values.shape[1] for values in some.answers.values()]).tolist()
    return {
        target: slice(end - values.shape[1], end)
        for (target, values), end in zip(some.answers.items(), ends, strict=True)
    }


def _answers(some: Labelled, labels: str, seed: int, first: Labelled | None = None) -> np.ndarray:
    """All answers side by side [row, class]: true, permuted over rows, or by type; those by type are `first`'s."""
    true = np.concatenate(list(some.answers.values()), 1)
    if labels == "true":
        return true
    if labels == "shuffled":
        return true[row_uniforms(seed, "order", 1, len(true), step=1 if first is None else 2)[0].argsort().numpy()]
    pool = true if first is None else np.concatenate(list(first.answers.values()), 1)
    n_types = 1 + int(max(some.types.max(), 0 if first is None else first.types.max()))
    lots = row_uniforms(seed, "order", 1, n_types, step=3)[0].numpy()
    return pool[(lots[some.types] * len(pool)).astype(int)]


@dataclass(frozen=True, eq=False)
class _Seen:
    """Scores and answers [row, class] of one target on the tested rows, and the fitted answers."""

    scores: np.ndarray
    asked: np.ndarray
    learned: np.ndarray
    test: Labelled

    def area(self) -> tuple[float, np.ndarray]:
        """AUC and influences [sequence], mean over classes with both answers."""
        unit, n = self.test.sequence, len(self.test.batch)
        found = [
            auc_and_influence(self.scores[:, at], self.asked[:, at], unit, n) for at in range(self.scores.shape[1])
        ]
        known = [(area, part) for area, part in found if np.isfinite(area)]
        if not known:
            return float("nan"), np.full(n, np.nan)
        return float(np.mean([area for area, _ in known])), np.mean([part for _, part in known], 0)

    def accuracy(self, true: bool) -> tuple[float, np.ndarray]:
        """Share of answers that are right; where one class of several is true, of rows."""
        if true and self._one_of:
            return self._share((self.scores.argmax(1) == self.asked.argmax(1)).astype(float))
        return self._share(((self.scores > 0.5) == self.asked).mean(1))

    def base(self) -> tuple[float, np.ndarray]:
        """The accuracy of the answer that is right most often in the fitted rows."""
        often = self.learned.mean(0)
        if self._one_of:
            return self._share(self.asked[:, often.argmax()].astype(float))
        return self._share(((often > 0.5) == self.asked).mean(1))

    @property
    def _one_of(self) -> bool:
        both = np.concatenate([self.asked, self.learned])
        return both.shape[1] > 1 and bool((both.sum(1) == 1).all())

    def _share(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        n = len(self.test.batch)
        return float(values.mean()), n * np.bincount(self.test.sequence, values - values.mean(), n) / len(values)

    def said(self, value: float, influence: np.ndarray) -> dict:
        """A row's numbers: its error from the influences of the sequences that have rows."""
        present = np.bincount(self.test.sequence, minlength=len(self.test.batch)) > 0
        n, clusters = int(present.sum()), self.test.batch.clusters
        kept = influence[present] * n / len(present)
        error = float(stats.influence_error(kept, None if clusters is None else clusters[present]))
        units = stats.count_units(n, None if clusters is None else clusters[present])
        half = error * stats.t95(units)
        return {"value": value, "standard_error": error, "low": value - half, "high": value + half,
                "n_rows": len(self.test.types), "n": units}  # fmt: skip


def on_case(
    case: Case, mask_ratio: float = 0.5, n_clues: int = 20, n_rounds: int = 2, n_rows: int = 3000
) -> pd.DataFrame:
    """Of Sudoku boards with `n_clues` of 36 cells given, else of text at a mask ratio; fitted on validation's.

    At most `n_rows` positions are fitted and as many tested.
    """
    fit, test = (
        labelled(part, mask_ratio, n_clues, n_rounds).some(n_rows, case.seed) for part in (_validating(case), case)
    )
    bare = probe(untrained(case.m, case.seed), fit, test, case.n_loops, case.seed)
    found = probe(case.m, fit, test, case.n_loops, case.seed)
    return pd.concat([found.assign(weights="trained"), bare.assign(weights="untrained")], ignore_index=True)


def labelled(case: Case, mask_ratio: float, n_clues: int, n_rounds: int) -> Labelled:
    """A case's hidden positions with their questions."""
    if case.test.task in BOARDS:
        return sudoku_labels(puzzles_of(case, n_clues, False), n_rounds)
    return text_labels(case.m, case.asked(mask_ratio))


def _validating(case: Case) -> Case:
    return Case(case.m, case.validation, case.options, case.access)


MEASURES = (
    Measure(
        "probes",
        "what linear probes read off states after every loop, with controls",
        on_case,
        "test set",
        needs=(),
    ),
)
