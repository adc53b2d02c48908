"""Head cards: where each looped head looks, loop by loop, what that does to the answer, and a label by rule.

Of hidden queries (of a causal model: of all that have a next token):

    attention, lift   share of attention by relation (`relations.py`); over what even attention would give it
    sink              share on the head's sinks (`sinks.py`), chosen on validation sequences
    entropy           of a row of the pattern, nats
    direct, gradient, now, removed, erasure    what it does (`head_effects.py`), by kind of key

    label    "sink" if sinks get half or more; "self" if one's own key does, "renew" if the head also takes away
             what the place holds (erasure of 0.5 or more); else the relation of most lift, if that is 2 or more
             and the relation gets a tenth or more; "broad" if none. "none" and "far" cannot be a label
    effect   "copies" or "suppresses" by the sign of "now" for symbols on clean keys, if it is of 0.1 nats or more
             and beyond two standard errors; else "neither"

How often a rule finds something in heads that learned nothing is its null: `label_rates` of an untrained twin.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopmdm.analysis.measures.attention.head_effects import READS, Seen, effects
from loopmdm.analysis.measures.attention.sinks import Sinks, received_attention
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.interventions.places import applications
from loopmdm.analysis.measures.mechanism.contrast import questions
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.measures.relations import Relations
from loopmdm.analysis.measures.twins import untrained
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.numbers.estimate import with_interval
from loopmdm.analysis.watch.states import check_loops
from loopmdm.model.errors import UsageError, check_count, check_model
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.information import entropy
from loopmdm.model.precision import wide
from loopmdm.model.sequences import MaskedBatch

HALF, LIFT, TENTH, EFFECT = 0.5, 2.0, 0.1, 0.1
"""Thresholds of labels: a half of attention or erasure, lift, least attention, nats."""
NO_LABELS = ("none", "far", "self")
NEEDS = ("additive", "linear_heads", "unshifted")
FACTOR = 5.0
"""A sink receives this many times what other positions do."""
Values = dict[tuple[int, int, str, str], list[Tensor]]
"""By loop, layer, metric and what it is of: [batch, head], batch by batch."""


@dataclass(frozen=True)
class Looks:
    """How heads are looked at: `n_effects` sequences for what heads do, one query each; `sinks` or None."""

    n_effects: int = 64
    seed: int = 0
    sinks: Sinks | None = None


def check_heads(m: HookedLoopMDM) -> None:
    """UsageError for a model whose heads have no cards."""
    check_model(m, "head-cards", hooked=True)
    m.facts.need(*NEEDS, by="head-cards")
    if not m.cfg.layers("loop"):
        raise UsageError("head-cards are of looped heads; this model loops no layer: give loop=(first, n)")


@torch.no_grad()
def head_cards(
    m: HookedLoopMDM, b: MaskedBatch, n_loops: int | None = None, looks: Looks | None = None, batch_size: int = 32
) -> pd.DataFrame:
    """Columns: n_loops loop layer head label effect metric of mask_ratio value standard_error n.

    `of` is a relation, a kind of key or "". Errors are over sequences or documents. UsageError, by the fact, for
    models whose heads do not add to the stream through W_O alone, or whose logits are shifted.

    >>> cards = lm.head_cards(m, b, n_loops=4)
    >>> cards[["loop", "head", "label"]].drop_duplicates().shape
    (16, 3)
    """
    check_heads(m)
    b, n_loops, looks = questions("head-cards", m, b), check_loops(m, n_loops), looks or Looks()
    values: Values = {}
    for _, part in b.batches(batch_size):
        _attention(m, part, n_loops, looks.sinks, values)
    few = b.rows(torch.linspace(0, len(b) - 1, min(check_count("n_effects", looks.n_effects), len(b))).long())
    few = few.rows(few.masked.any(-1))
    for first, part in few.batches(batch_size):
        for (loop, layer), scores in effects(Seen(m, part, n_loops, looks.seed, first)):
            for (metric, of), found in scores.items():
                values.setdefault((loop, layer, metric, of), []).append(found)
    frame = _lifted(_frame(values, {"all": b.clusters, "few": few.clusters}))
    frame = frame.assign(n_loops=n_loops, mask_ratio=b.mask_ratio)
    return _labelled(frame)


def _attention(m: HookedLoopMDM, part: MaskedBatch, n_loops: int, sinks: Sinks | None, values: Values) -> None:
    """Shares by relation and of sinks, chances and entropies of a batch."""
    relations, asked = Relations.of(m, part), part.masked
    chance = relations.shares(asked)
    weights = asked / asked.sum(-1, keepdim=True)

    def see(pattern: Tensor, hook: Any) -> None:
        pattern, place = wide(pattern), (hook.loop(), hook.layer())
        masses = relations.masses(pattern, asked)
        rows = entropy(pattern.log(), pattern)
        found = {("entropy", ""): torch.einsum("bq,bhq->bh", weights.to(rows), rows)}
        for number, name in enumerate(relations.names):
            found["attention", name] = masses[..., number]
            found["chance", name] = chance[:, None, number].expand(-1, pattern.shape[1])
        if sinks is not None:
            there = sinks.places[f"loop.{place[0]}.blocks.{place[1]}."].any(-1).to(pattern)
            found["sink", ""] = torch.einsum("bq,bhqk,hk->bh", weights.to(pattern), pattern, there)
        for key, value in found.items():
            values.setdefault((*place, *key), []).append(value)

    with m.hooks([(applications(m.cfg, None, None, "pattern"), see)]):
        for _ in m.states(part.tokens, n_loops, part.attention_mask):
            pass


def _frame(values: Values, clusters: dict[str, np.ndarray | None]) -> pd.DataFrame:
    """Means over sequences, one row a head."""
    parts = []
    for (loop, layer, metric, of), found in values.items():
        numbers = torch.cat(found).double().cpu().numpy()
        owners = clusters["few" if metric in (*READS, "erasure") else "all"]
        mean, error, n = stats.mean_and_error(numbers, owners)
        place = {"loop": loop, "layer": layer, "head": np.arange(len(mean)), "metric": metric, "of": of}
        parts.append(pd.DataFrame(place | {"value": mean, "standard_error": error, "n": n}))
    return pd.concat(parts, ignore_index=True)


def _lifted(frame: pd.DataFrame) -> pd.DataFrame:
    """Chances become lifts; a chance hardly varies over sequences, so the error is the mass's."""
    keys = ["loop", "layer", "head", "of"]
    mass = frame[frame["metric"] == "attention"].set_index(keys)
    chance = frame[frame["metric"] == "chance"].set_index(keys)["value"].reindex(mass.index)
    chance = chance.where(chance > 0)
    lift = mass.assign(metric="lift", value=mass["value"] / chance, standard_error=mass["standard_error"] / chance)
    return pd.concat([frame[frame["metric"] != "chance"], lift.reset_index()], ignore_index=True)


# --- labels ---


def _labelled(frame: pd.DataFrame) -> pd.DataFrame:
    places = ["loop", "layer", "head"]
    told = [(*place, *label(part)) for place, part in frame.groupby(places, sort=True)]  # pyright: ignore
    labels = pd.DataFrame(told, columns=[*places, "label", "effect"])
    order = ["n_loops", *places, "label", "effect", "metric", "of", "mask_ratio", "value", "standard_error", "n"]
    return frame.merge(labels, on=places)[order].sort_values([*places, "metric"], kind="stable", ignore_index=True)


def label(card: pd.DataFrame) -> tuple[str, str]:
    """Label and effect of one head at one loop, by the rules above; `card` has metric of value standard_error."""
    names = list(zip(card["metric"], card["of"], strict=True))
    value, error = (dict(zip(names, card[name].tolist(), strict=True)) for name in ("value", "standard_error"))
    change, spread = value.get(("now", "clean"), np.nan), error.get(("now", "clean"), np.nan)
    strong = abs(change) >= EFFECT and not abs(change) <= 2 * spread
    effect = ("copies" if change > 0 else "suppresses") if strong else "neither"
    if value.get(("sink", ""), 0.0) >= HALF:
        return "sink", effect
    if value["attention", "self"] >= HALF:
        return ("renew" if value.get(("erasure", ""), np.nan) >= HALF else "self"), effect
    lifts = {of: number for (metric, of), number in value.items() if metric == "lift" and of not in NO_LABELS}
    found = {of: lift for of, lift in lifts.items() if lift >= LIFT and value["attention", of] >= TENTH}
    return (max(found, key=lambda of: found[of]) if found else "broad"), effect


def label_rates(frame: pd.DataFrame) -> pd.DataFrame:
    """Share of heads (at a loop) with each label and each effect: columns weights what name share n."""
    frame = frame if "weights" in frame else frame.assign(weights="trained")
    heads = frame.drop_duplicates(["weights", "mask_ratio", "loop", "layer", "head"])
    rows = []
    for weights, part in heads.groupby("weights", sort=False):
        for what in ("label", "effect"):
            for name, share in part[what].value_counts(normalize=True).items():
                rows.append((weights, what, name, float(share), len(part)))
    return pd.DataFrame(rows, columns=["weights", "what", "name", "share", "n"])


# --- cards ---


@dataclass(frozen=True, eq=False)
class HeadCard:
    """One head over loops, from the rows `frame` of one model and mask ratio; shows itself in notebooks."""

    layer: int
    head: int
    frame: pd.DataFrame

    @property
    def labels(self) -> list[str]:
        """Label and effect at each loop."""
        each = self.frame.drop_duplicates("loop").sort_values("loop")
        return [f"{name}, {effect}" for name, effect in zip(each["label"], each["effect"], strict=True)]

    def table(self) -> pd.DataFrame:
        """Values, a row a metric, a column a loop."""
        found = self.frame.pivot_table(index=["metric", "of"], columns="loop", values="value", sort=False)
        return found.loc[[name for name in found.index if name[0] != "lift"]]

    def plot(self, example: Any = None):
        """The card as a figure; `example` is a map [query, key] to show beside it, or None."""
        from loopmdm.analysis.plots.cards import plot_card

        found = with_interval(self.frame, "value", "standard_error")
        return plot_card(found, f"layer {self.layer}, head {self.head}", example)

    def _repr_html_(self) -> str:
        loops = "; ".join(f"loop {number}: {name}" for number, name in enumerate(self.labels))
        return f"<b>layer {self.layer}, head {self.head}</b><br>{loops}{self.table().round(3).to_html()}"


def head_card(frame: pd.DataFrame, layer: int, head: int) -> HeadCard:
    """The card of one head from `head_cards`; UsageError where it is not there, or rows are of several models."""
    own = frame[(frame["layer"] == layer) & (frame["head"] == head)]
    if own.empty:
        known = sorted(set(zip(frame["layer"].tolist(), frame["head"].tolist(), strict=True)))
        raise UsageError(f"no head {head} of layer {layer} is among the cards; (layer, head) are {known[:8]}")
    if own.duplicated(["loop", "metric", "of"]).any():
        raise UsageError("a card is of one model at one mask ratio; choose rows by weights and mask_ratio first")
    return HeadCard(layer, head, own.reset_index(drop=True))


def of_case(
    case: Case, mask_ratio: float = 0.5, n_sequences: int = 128, n_effects: int = 48, twins: int = 1
) -> pd.DataFrame:
    """Cards of a model's heads and of `twins` untrained ones' (`weights`)."""
    check_count("n_sequences", n_sequences)
    check_count("twins", twins, least=0)
    test, held = (case.asked(mask_ratio, part.spread(n_sequences)) for part in
                  (case.sequences, case.validation.sequences))  # fmt: skip
    arms = {"trained": case.m} | {f"untrained {seed}": untrained(case.m, seed) for seed in range(twins)}
    frames = []
    for name, m in arms.items():
        sinks = None
        if held.tokens.shape[1] == test.tokens.shape[1]:
            sinks = received_attention(m, held, case.n_loops, loops=range(case.n_loops)).sinks(FACTOR)
        looks = Looks(n_effects, case.seed, sinks)
        frames.append(head_cards(m, test, case.n_loops, looks).assign(weights=name))
    return pd.concat(frames, ignore_index=True).assign(n_units=test.n_units)


MEASURES = (
    Measure("head-cards", "where looped heads look and what they do, labelled", of_case, "test set", needs=NEEDS),
)
