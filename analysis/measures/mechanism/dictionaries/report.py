"""What a dictionary is worth and what it says, beside one of an untrained model: the measure "dictionaries".

Arms "trained" and "untrained" (a twin): the same kind, size, steps and seed. Metrics, by loop or over all (loop
missing), a crosscoder's code being one for all loops:

    explained_variance   share of the states' variance given back
    loss_intact, loss_spliced, loss_mean, loss_recovered, kl_recovered   `splicing`, nats and shares
    l0                   active features a row;  dead: share of features active nowhere
    born, last           share of live features whose first (last) loop this is (`lives`); for a crosscoder by the
                         norms of directions, for an SAE by how often they are active
    turn                 mean cosine of a feature's directions in this loop and the one before (crosscoder)
    matched, auc         share of live features that follow a known variable (AUC of 0.9 or more on sequences that
                         did not choose it), and their mean AUC; place does not count (`meaning`)
    coverage             mean F1 of known variables by their best feature; "coverage <kind>" by kind
    .._shuffled          the same with variables of other sequences at the same positions: chance

Errors are over sequences or documents; of shares and means over features or variables, over those.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.analysis.activations import Gathered, Wanted, gather
from loopmdm.analysis.activations.catching import LOOPS, Given
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.mechanism.contrast import questions
from loopmdm.analysis.measures.mechanism.dictionaries.coder import Dictionary, Kind, Shape
from loopmdm.analysis.measures.mechanism.dictionaries.lives import feature_lives
from loopmdm.analysis.measures.mechanism.dictionaries.meaning import (
    Variables,
    coverage,
    known_variables,
    matches,
)
from loopmdm.analysis.measures.mechanism.dictionaries.splicing import ARMS, splice_losses
from loopmdm.analysis.measures.mechanism.dictionaries.training import Training, train_dictionary
from loopmdm.analysis.measures.options import RATIOS, OnMasks
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.measures.twins import untrained
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.states import row_mean
from loopmdm.model.errors import check_count, check_word
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch, as_batch

MATCHED = 0.9
"""AUC from which on a feature is said to follow a variable."""
KINDS = (*get_args(Kind), "both")
Row = tuple[int | None, str, float, float, int]
"""Loop, metric, value, error, n."""


@torch.no_grad()
def dictionary_scores(
    m: HookedLoopMDM, b: MaskedBatch, dictionary: Dictionary, meanings: bool = True, batch_size: int = 32
) -> pd.DataFrame:
    """What a dictionary is worth on a batch that it was not trained on: loop metric value standard_error n.

    UsageError for a dictionary of another model; `meanings` False leaves known variables out.
    """
    b = as_batch("dictionary_scores", b)
    rows = [*_fidelity(m, b, dictionary, batch_size)]
    states = gather(Given(m, dictionary.origin.n_loops, b), wanted(dictionary, batch_size))
    codes = dictionary.encode(states.values)
    rows += [*_sparsity(m, b, dictionary, codes), *_lives(dictionary, codes)]
    if meanings:
        asked = questions("dictionary_scores", m, b)
        rows += _meanings(known_variables(m, asked, wanted(dictionary).members(m, b)).known(), dictionary, codes)
    frame = pd.DataFrame(rows, columns=["loop", "metric", "value", "standard_error", "n"])
    return frame.astype({"loop": "Int64"})


def wanted(dictionary: Dictionary, batch_size: int = 64) -> Wanted:
    """What `gather` is asked for the states that a dictionary reads."""
    return Wanted(list(dictionary.origin.sites), dictionary.origin.positions, batch_size)  # pyright: ignore


def _fidelity(m: HookedLoopMDM, b: MaskedBatch, dictionary: Dictionary, batch_size: int) -> Iterator[Row]:
    found = splice_losses(m, b, dictionary, ARMS[:2], batch_size)
    yield (None, "loss_intact", *_estimate(found.intact, b.clusters))
    for site, loop in enumerate(dictionary.origin.loops):
        yield (loop, "explained_variance", *found.explained(site))
        for arm in (0, 1):
            yield (loop, f"loss_{ARMS[arm]}", *_estimate(found.losses[arm, site], b.clusters))
        yield (loop, "loss_recovered", *found.loss_recovered(site))
        yield (loop, "kl_recovered", *found.kl_recovered(site))


def _estimate(values: np.ndarray, clusters: np.ndarray | None = None) -> tuple[float, float, int]:
    mean, error, n = stats.mean_and_error(values, clusters)
    return float(mean), float(error), int(n)


def _sparsity(m: HookedLoopMDM, b: MaskedBatch, dictionary: Dictionary, codes: Tensor) -> Iterator[Row]:
    rows = wanted(dictionary).members(m, b).to(codes.device)
    active = (codes > 0).sum(-1).double()
    for loop, part in zip(_code_loops(dictionary), active.T, strict=True):
        yield (loop, "l0", *_estimate(row_mean(part, rows).cpu().numpy(), b.clusters))
    yield (None, "dead", *_share((codes > 0).flatten(0, 1).any(0).logical_not()))


def _code_loops(dictionary: Dictionary) -> list[int | None]:
    return [None] if dictionary.shared else dictionary.origin.loops


def _share(which: Tensor | np.ndarray) -> tuple[float, float, int]:
    return _estimate(np.asarray(which.cpu() if isinstance(which, Tensor) else which, dtype=float))


def _lives(dictionary: Dictionary, codes: Tensor) -> Iterator[Row]:
    lives = feature_lives(dictionary, codes)
    if not bool(lives.alive.any()):
        return
    birth, death, both = lives.birth[lives.alive], lives.death[lives.alive], lives.present[1:] & lives.present[:-1]
    for site, loop in enumerate(dictionary.origin.loops):
        yield (loop, "born", *_share(birth == site))
        yield (loop, "last", *_share(death == site))
        if site and dictionary.shared:
            yield (loop, "turn", *_estimate(lives.cosine[site - 1][both[site - 1]].numpy()))


def _meanings(variables: Variables, dictionary: Dictionary, codes: Float[Tensor, "row code feature"]) -> list[Row]:
    found: list[Row] = []
    content = replace(
        variables,
        values=variables.values[:, torch.from_numpy(variables.content)],
        names=[name for name, keep in zip(variables.names, variables.content, strict=True) if keep],
        kinds=[kind for kind, keep in zip(variables.kinds, variables.content, strict=True) if keep],
    )
    for place, loop in enumerate(_code_loops(dictionary)):
        for label, of in (("", content), ("_shuffled", content.shuffled())):
            follows = matches(codes[:, place], of)
            covered = coverage(codes[:, place], of)
            found.append((loop, f"matched{label}", *_share(follows["auc"].to_numpy() >= MATCHED)))
            found.append((loop, f"auc{label}", *_estimate(follows["auc"].to_numpy())))
            found.append((loop, f"coverage{label}", *_estimate(covered["f1"].to_numpy())))
            for kind, part in covered.groupby("kind", sort=False):
                found.append((loop, f"coverage {kind}{label}", *_estimate(part["f1"].to_numpy())))
    return found


# --- the measure ---


@dataclass(frozen=True)
class Reading:
    """How a case is read: on masks where masked positions are a group of the model, else as it is.

    Trained on validation sequences, scored on at most `n_scored` of the test set's; `sites` as of `Wanted`.
    """

    case: Case
    mask_ratio: float = 0.5
    n_scored: int = 64
    sites: str = LOOPS

    def __post_init__(self):
        """Counts only."""
        check_count("n_scored", self.n_scored)

    def training(self, m: HookedLoopMDM) -> Gathered:
        """Rows of validation sequences."""
        case = replace(self.case, m=m, test=self.case.validation)
        if not m.facts.grouped:
            return gather(Given(m, case.n_loops, case.unmasked()), Wanted(self.sites, "all"))
        masks = OnMasks(case.n_loops, case.n, case.seed, RATIOS)
        return gather(replace(case, options=masks), Wanted(self.sites))

    def scored(self) -> MaskedBatch:
        """Test sequences."""
        case = replace(self.case, options=replace(self.case.options, n=min(self.n_scored, self.case.n)))
        return case.asked(self.mask_ratio)


def dictionaries(
    case: Case,
    folder: str = "",
    kind: str = "crosscoder",
    n_features: int = 256,
    k: int = 16,
    steps: int = 150,
    mask_ratio: float = 0.5,
    n_scored: int = 64,
    control: bool = True,
) -> pd.DataFrame:
    """A saved dictionary's scores, or those of a small one trained here on `n` validation sequences.

    `folder` is one, or a shipped name; `kind` crosscoder, sae, or both, one after the other. Columns: arm kind
    n_features k loop metric value standard_error n. One trained here makes a table in about a minute; its figures
    are those of a small dictionary after few steps. UsageError for a dictionary of another model.
    """
    check_word("kind", kind, KINDS)
    reading = Reading(case, mask_ratio, n_scored)
    saved = Dictionary.from_pretrained(folder, case.m) if folder else None
    if saved is not None:
        kept = Training(**saved.origin.told.get("training", {"steps": steps}))
        asked = [(saved.shape, kept)]
    else:
        training = Training(steps=steps, seed=case.seed)
        words = get_args(Kind) if kind == "both" else (kind,)
        asked = [(Shape(word, n_features, k=k), training) for word in words]
    arms = {"trained": case.m} | ({"untrained": untrained(case.m, case.seed)} if control else {})
    rows = {arm: reading.training(m) for arm, m in arms.items() if saved is None or arm != "trained"}
    b, frames = reading.scored(), []
    for shape, training in asked:
        for arm, m in arms.items():
            own = saved if saved is not None and arm == "trained" else None
            scores = dictionary_scores(m, b, own or train_dictionary(rows[arm], shape, training))
            told = {"arm": arm, "kind": shape.kind, "n_features": shape.n_features, "k": shape.k}
            for number, (name, value) in enumerate(told.items()):
                scores.insert(number, name, value)
            frames.append(scores)
    return pd.concat(frames, ignore_index=True)


MEASURES = (
    Measure(
        "dictionaries",
        "sparse features over loops: what they keep, when they live, what they follow; beside an untrained model",
        dictionaries,
        on="test set",
        needs=(),
    ),
)
