"""Four lenses side by side: what each loop's state would answer through coda, direct, tuned and Jacobian lens.

At hidden positions of test sequences, by loop; lenses are learned on validation sequences.

    kl_final        KL(final answer || lens), nats: how much of the answer is not yet there to be read
    cross_entropy   - log p(true token), nats
    agreement       share of positions whose best token is the final answer's
    accuracy        share whose best token is the true one

At the last loop the coda's kl_final is 0. A learned map of d_model^2 numbers can say something of any state, so
its nulls stand beside it: "shuffled", tuned on other rows' answers, and all lenses of an untrained twin
(`weights`).
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.mechanism.contrast import questions
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.measures.representation.learned_lenses import LearnedLens
from loopmdm.analysis.measures.representation.lens_fitting import Descent, fit_jacobian, fit_tuned
from loopmdm.analysis.measures.representation.lenses import LEARNED, LENSES, read
from loopmdm.analysis.measures.twins import untrained
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.states import check_loops, row_mean
from loopmdm.model.context import Context
from loopmdm.model.errors import UsageError, check_count, check_model, unknown_name
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.information import kl
from loopmdm.model.sequences import MaskedBatch

NULL = "shuffled"
READ = (*LENSES, *LEARNED, NULL)
TWINS = 64
"""Test sequences that untrained twins are read on."""
METRICS = ("kl_final", "cross_entropy", "agreement", "accuracy")
Reader = Callable[[int, Tensor, Context, Tensor], Tensor]
"""From loop, state, context and rows to log-probabilities."""


def reader(m: HookedLoopMDM, name: str, learned: dict[str, LearnedLens]) -> Reader:
    """How a lens reads `m`; UsageError for one that is neither built in nor among `learned`."""
    if name in learned:
        lens = learned[name].check(m)
        return lambda loop, state, context, rows: lens.read(m, state, loop, rows)  # noqa: ARG005
    if name in LENSES:
        return lambda loop, state, context, rows: read(m, state, context, name, rows)  # noqa: ARG005
    raise unknown_name("lens", name, (*LENSES, *learned))


@torch.no_grad()
def compare_lenses(
    m: HookedLoopMDM,
    b: MaskedBatch,
    learned: dict[str, LearnedLens],
    n_loops: int | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Columns: n_loops loop lens mask_ratio metric value standard_error n, for "coda", "direct" and `learned`.

    Errors are over sequences or documents. Logits of one batch's hidden positions are held for the final answer
    and one lens. UsageError where nothing is hidden, nobody knows what, or a lens is of other weights.
    """
    check_model(m, "compare_lenses", hooked=True)
    b, n_loops = questions("compare_lenses", m, b), check_loops(m, n_loops)
    if not m.facts.causal:
        b.truth("compare_lenses")
    short = [name for name, lens in learned.items() if lens.n_loops < n_loops]
    if short:
        raise UsageError(f"the lens {short[0]} reads {learned[short[0]].n_loops} loops of {n_loops}; fit it again")
    readers = {name: reader(m, name, learned) for name in (*LENSES, *learned)}
    parts = [_part(m, part, n_loops, readers) for _, part in b.batches(batch_size)]
    values = torch.cat(parts, -1).permute(3, 0, 1, 2).double().cpu().numpy()
    found = [array.ravel() for array in stats.mean_and_error(values, b.clusters)]
    places = [(n_loops, loop, name) for loop in range(n_loops) for name in readers]
    rows = [(*place, b.mask_ratio, metric) for place in places for metric in METRICS]
    frame = pd.DataFrame(rows, columns=["n_loops", "loop", "lens", "mask_ratio", "metric"])
    return frame.assign(value=found[0], standard_error=found[1], n=np.asarray(found[2]).astype(int))


def _part(m: HookedLoopMDM, part: MaskedBatch, n_loops: int, readers: dict[str, Reader]) -> Tensor:
    """Means of each sequence, [loop, lens, metric, batch]; one more trajectory finds the final answer."""
    rows, clean, last = part.masked, part.clean[part.masked], None
    for last in m.states(part.tokens, n_loops, part.attention_mask):  # noqa: B007
        pass
    assert last is not None
    final = read(m, *last, "coda", rows)
    found = []
    for loop, (state, context) in enumerate(m.states(part.tokens, n_loops, part.attention_mask)):
        for of in readers.values():
            now = of(loop, state, context, rows)
            own = now.gather(-1, clean[:, None])[:, 0]
            best = now.argmax(-1)
            metrics = [kl(final, now), -own, (best == final.argmax(-1)).to(own), (best == clean).to(own)]
            found.append(torch.stack([row_mean(value, rows) for value in metrics]))
    return torch.stack(found).unflatten(0, (n_loops, len(readers)))


def fitted(
    m: HookedLoopMDM, b: MaskedBatch, n_loops: int, lenses: tuple[str, ...], descent: Descent, few: int
) -> dict[str, LearnedLens]:
    """The learned ones among `lenses`, from validation sequences `b`; the Jacobian of `few` of them."""
    found = {}
    if "tuned" in lenses:
        found["tuned"] = fit_tuned(m, b, n_loops, descent)
    if "jacobian" in lenses:
        found["jacobian"] = fit_jacobian(m, b, n_loops, few, descent.seed)
    if NULL in lenses:
        found[NULL] = fit_tuned(m, b, n_loops, descent, shuffled=True)
    return found


def of_case(
    case: Case,
    lenses: tuple[str, ...] = READ,
    mask_ratio: float = 0.5,
    n_fit: int = 192,
    steps: int = 120,
    n_jacobian: int = 8,
    twins: int = 1,
) -> pd.DataFrame:
    """Lenses of the case's model, and those of `twins` untrained ones, fitted to `n_fit` validation sequences."""
    check_count("n_fit", n_fit, least=2)
    check_count("n_jacobian", n_jacobian)
    check_count("twins", twins, least=0)
    for name in lenses:
        if name not in READ:
            raise unknown_name("lens", name, READ)
    parts = case.sequences, case.validation.sequences.spread(n_fit)
    test, held = (case.asked(mask_ratio, part) for part in parts)
    few = test.rows(torch.linspace(0, len(test) - 1, min(TWINS, len(test))).long())
    arms = {"trained": case.m} | {f"untrained {seed}": untrained(case.m, seed) for seed in range(twins)}
    frames = []
    for name, m in arms.items():
        wanted = lenses if name == "trained" else tuple(lens for lens in lenses if lens != NULL)
        learned = fitted(m, held, case.n_loops, wanted, Descent(steps=steps, seed=case.seed), n_jacobian)
        asked = test if name == "trained" else few
        frame = compare_lenses(m, asked, learned, case.n_loops).assign(n_units=asked.n_units)
        frames.append(frame[frame["lens"].isin(lenses)].assign(weights=name))
    return pd.concat(frames, ignore_index=True)


MEASURES = (
    Measure(
        "lenses", "coda, direct, tuned and Jacobian lens by loop, and their nulls", of_case, "test set", needs=()
    ),
)
