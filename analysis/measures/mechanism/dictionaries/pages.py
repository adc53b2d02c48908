"""A feature's page: when it lives, where it is largest, what it follows, what it does to the answers.

A crosscoder's feature is read at the last site; an SAE's, which has a code at each loop, at the loop where it is
active most often (of equal ones the last). Its effect is measured, not read off weights: at the positions where it
is largest it is taken out of that site (x - f D), and the model goes on; log p intact less log p without is what
the feature adds to an answer, nats.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.analysis.activations import gather
from loopmdm.analysis.activations.catching import Gathered, Given
from loopmdm.analysis.measures.mechanism.contrast import questions
from loopmdm.analysis.measures.mechanism.dictionaries.coder import Dictionary
from loopmdm.analysis.measures.mechanism.dictionaries.lives import Lives, feature_lives
from loopmdm.analysis.measures.mechanism.dictionaries.meaning import (
    Variables,
    coverage,
    known_variables,
    matches,
)
from loopmdm.analysis.measures.mechanism.dictionaries.report import wanted
from loopmdm.analysis.measures.mechanism.dictionaries.splicing import splice
from loopmdm.analysis.numbers import stats
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import wide
from loopmdm.model.sequences import MaskedBatch, as_batch

AROUND = 6
"""Tokens shown on either side."""
SHOWN = 5
"""Answers shown that a feature raises, and lowers, most."""
Word = tuple[str, bool, bool]
"""A token as text, whether it is hidden, whether it is the position meant."""


@dataclass(frozen=True)
class FeaturePage:
    """Shown by Jupyter; its parts are frames.

    `loop`: where it is read (None outside the loop); `frequency`: share of the `n` rows, of `n_sequences`, where
    it is active, mean over loops; `profile`: loop profile (over its largest) active (share of rows); `examples`:
    sample position code text, largest first, one a sequence; `follows`: variable kind auc f1 n (rows that did not
    choose it; one row, or none where nothing follows); `effects`: token effect (nats) standard_error n, those
    raised most and lowered most.
    """

    title: str
    feature: int
    loop: int | None
    frequency: float
    n: int
    n_sequences: int
    profile: pd.DataFrame
    examples: pd.DataFrame
    follows: pd.DataFrame
    effects: pd.DataFrame

    def __repr__(self) -> str:
        """Number, frequency and what it follows."""
        what = ""
        if len(self.follows):
            first = self.follows.iloc[0]
            what = f", follows {first['variable']} (AUC {first['auc']:.2f})"
        return f"FeaturePage({self.feature} of {self.title}: active at {self.frequency:.1%} of positions{what})"

    def _repr_html_(self) -> str:
        """The frames one under the other."""
        parts = [f"<h4>{html.escape(repr(self))}</h4>"]
        for name in ("profile", "follows", "effects", "examples"):
            frame = getattr(self, name)
            parts.append(f"<h5>{name}</h5>" + frame.to_html(index=False, float_format="{:.3f}".format, border=0))
        return "".join(parts)


@dataclass(frozen=True, eq=False)
class _Removed:
    """A site, rows [row, 2] as (sequence, position), and their states [row, d_model] without a feature."""

    site: str
    rows: Tensor
    states: Tensor


@dataclass(frozen=True, eq=False)
class _Looked:
    """A dictionary on a batch: positions, their states and `codes` [row, code, feature], lives, variables."""

    dictionary: Dictionary
    m: HookedLoopMDM
    b: MaskedBatch
    rows: Bool[Tensor, "batch pos"]
    states: Gathered
    codes: Float[Tensor, "row code feature"]
    lives: Lives
    variables: Variables | None

    @classmethod
    def of(cls, dictionary: Dictionary, m: HookedLoopMDM, b: MaskedBatch) -> "_Looked":
        dictionary.check(m)
        b = as_batch("feature_page", b)
        rows = wanted(dictionary).members(m, b)
        states = gather(Given(m, dictionary.origin.n_loops, b), wanted(dictionary))
        codes = dictionary.encode(states.values)
        try:
            variables = known_variables(m, questions("feature_page", m, b), rows).known()
        except UsageError:  # too few sequences to say
            variables = None
        return cls(dictionary, m, b, rows, states, codes, feature_lives(dictionary, codes), variables)

    def site(self, feature: int) -> int:
        """Where a feature is read."""
        last = len(self.dictionary.origin.sites) - 1
        return last if self.dictionary.shared else last - int(self.lives.profile[:, feature].flip(0).argmax())

    def page(self, feature: int, n_examples: int) -> FeaturePage:
        """The page of a feature."""
        site = self.site(feature)
        own = self.codes[:, 0 if self.dictionary.shared else site, feature]
        best = self._best(own, n_examples)
        profile = self.lives.profiles().query("feature == @feature")[["loop", "profile"]].reset_index(drop=True)
        active = self.lives.frequency[:, feature].expand(len(self.lives.profile))
        without = self.states.values[best, site] - own[best, None] * self.dictionary.directions(feature)[site]
        removed = _Removed(self.dictionary.origin.sites[site], self.rows.nonzero()[best], without)
        return FeaturePage(
            repr(self.dictionary),
            feature,
            self.dictionary.origin.loops[site],
            float(self.lives.frequency[:, feature].mean()),
            len(own),
            int(self.states.frame["sample"].nunique()),
            profile.assign(active=active.numpy() if len(profile) else []),
            self._examples(best, own),
            self._follows(own),
            _effects(self.m, self.b, self.dictionary.origin.n_loops, removed),
        )

    def _best(self, own: Float[Tensor, " row"], n: int) -> Tensor:
        """Rows where a feature is largest, one a sequence, and active."""
        order = own.argsort(descending=True, stable=True)
        order = order[own[order] > 0]
        again = self.states.frame["sample"].iloc[order.numpy()].duplicated().tolist()
        return order[~torch.tensor(again, dtype=torch.bool)][:n]

    def _examples(self, best: Tensor, own: Float[Tensor, " row"]) -> pd.DataFrame:
        frame = self.states.frame.iloc[best.numpy()]
        places = list(zip(frame["sample"], frame["position"], strict=True))
        return pd.DataFrame(
            {
                "sample": frame["sample"].to_numpy(),
                "position": frame["position"].to_numpy(),
                "code": own[best].numpy(),
                "text": [_written(around(self.m, self.b, *at), self.m.tokenizer is None) for at in places],
            }
        )

    def _follows(self, own: Float[Tensor, " row"]) -> pd.DataFrame:
        """What the feature alone follows best, on sequences that did not choose it."""
        empty = pd.DataFrame(columns=["variable", "kind", "auc", "f1", "n"])
        found = pd.DataFrame() if self.variables is None else matches(own[:, None], self.variables)
        if self.variables is None or not len(found):
            return empty
        f1 = coverage(own[:, None], self.variables).set_index("variable")["f1"]
        n = len(self.variables.halves[1])
        found = found.assign(f1=f1.loc[found["variable"]].to_numpy(), n=n)
        return found[list(empty)].reset_index(drop=True)


@torch.no_grad()
def feature_page(
    dictionary: Dictionary, m: HookedLoopMDM, feature: int, b: MaskedBatch, n_examples: int = 10
) -> FeaturePage:
    """The page of a feature, on a batch; UsageError for a feature or a model that is not the dictionary's."""
    check_count("feature", feature, least=0, most=dictionary.shape.n_features - 1)
    return feature_pages(dictionary, m, b, [feature], n_examples)[0]


@torch.no_grad()
def feature_pages(
    dictionary: Dictionary,
    m: HookedLoopMDM,
    b: MaskedBatch,
    features: Sequence[int] | int,
    n_examples: int = 10,
) -> list[FeaturePage]:
    """Pages of several features on one batch, or of so many of the strongest (`strength`), strongest first."""
    check_count("n_examples", n_examples)
    looked = _Looked.of(dictionary, m, b)
    if isinstance(features, int):
        n = min(check_count("features", features), dictionary.shape.n_features)
        order = strength(looked.codes).argsort(descending=True, stable=True)[:n].tolist()
        features = [feature for feature in order if bool(looked.lives.alive[feature])]
    return [looked.page(feature, n_examples) for feature in features]


def strength(codes: Float[Tensor, "row code feature"]) -> Float[Tensor, " feature"]:
    """Mean square of each feature's code: what it adds to the states on average, directions being of length 1."""
    return codes.square().mean((0, 1))


def around(m: HookedLoopMDM, b: MaskedBatch, sample: int, position: int) -> list[Word]:
    """Tokens around a position, those that stand there or are hidden."""
    first, end = max(0, position - AROUND), position + AROUND + 1
    ids, clean = b.tokens[sample, first:end], b.clean[sample, first:end]
    hidden = m.cfg.hidden(ids).tolist()
    words = [str(int(token)) for token in clean] if m.tokenizer is None else m.to_str_tokens(clean)
    places = [number == position - first for number in range(len(words))]
    return list(zip(map(str, words), hidden, places, strict=True))


def _written(words: list[Word], apart: bool) -> str:
    """As text: what is hidden in brackets, the position meant marked."""
    shown = [f"[{word}]" if hidden else word for word, hidden, _ in words]
    shown = [f">>{word}<<" if here else word for word, (*_, here) in zip(shown, words, strict=True)]
    return (" " if apart else "").join(shown)


def _effects(m: HookedLoopMDM, b: MaskedBatch, n_loops: int, what: _Removed) -> pd.DataFrame:
    """Log p intact less log p without the feature, mean over the chosen rows: token effect standard_error n."""
    if not len(what.rows):
        kinds = {"token": str, "effect": float, "standard_error": float, "n": int}
        return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in kinds.items()})
    picked, own = what.rows[:, 0].unique(return_inverse=True)
    part, there = b.rows(picked), torch.zeros(len(picked), b.tokens.shape[1], dtype=torch.bool)
    there[own, what.rows[:, 1]] = True
    order = (own * b.tokens.shape[1] + what.rows[:, 1]).argsort()
    read = there.roll(1, 1) if m.facts.shifted else there  # who is answered by the state at a row
    intact = _log_p(m, part, n_loops, read)
    with splice(m, what.site, what.states[order], there):
        changes = intact - _log_p(m, part, n_loops, read)
    change, errors, _ = stats.mean_and_error(changes.double().cpu().numpy())
    first = torch.from_numpy(change).argsort(descending=True, stable=True)
    first = first[changes.isfinite().any(0).cpu()[first]]  # [MASK] is no answer
    ids = torch.cat([first[:SHOWN], first[SHOWN:][-SHOWN:]])
    words = [str(int(token)) for token in ids] if m.tokenizer is None else m.to_str_tokens(ids)
    return pd.DataFrame({"token": words, "effect": change[ids], "standard_error": errors[ids], "n": len(changes)})


def _log_p(m: HookedLoopMDM, b: MaskedBatch, n_loops: int, rows: Tensor) -> Float[Tensor, "row d_vocab"]:
    return wide(m.run(b.tokens, n_loops, attention_mask=b.attention_mask, rows=rows).logits).log_softmax(-1)
