"""A feature's page: when it lives, where it is largest, what it follows, what it does to the answers.

Its effect is measured, not read off weights: at the positions where it is largest it is taken out of the last site
(x - f D), and the model goes on; log p intact less log p without is what the feature adds to an answer, nats.
"""

import html
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.analysis.activations import gather
from loopmdm.analysis.activations.catching import Given
from loopmdm.analysis.measures.mechanism.contrast import questions
from loopmdm.analysis.measures.mechanism.dictionaries.coder import Dictionary
from loopmdm.analysis.measures.mechanism.dictionaries.lives import feature_lives
from loopmdm.analysis.measures.mechanism.dictionaries.meaning import coverage, known_variables, matches
from loopmdm.analysis.measures.mechanism.dictionaries.report import wanted
from loopmdm.analysis.measures.mechanism.dictionaries.splicing import splice
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import wide
from loopmdm.model.sequences import MaskedBatch, as_batch

AROUND = 6
"""Tokens shown on either side."""
SHOWN = 5
"""Answers shown that a feature raises, and lowers, most."""


@dataclass(frozen=True)
class FeaturePage:
    """Shown by Jupyter; its parts are frames.

    `frequency`: share of rows where it is active; `profile`: loop profile; `examples`: sample position code text,
    largest first; `follows`: variable kind auc f1 (one row, or none where nothing follows); `effects`: token
    effect (nats), those raised most and lowered most.
    """

    title: str
    feature: int
    frequency: float
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


@torch.no_grad()
def feature_page(
    dictionary: Dictionary, m: HookedLoopMDM, feature: int, b: MaskedBatch, n_examples: int = 10
) -> FeaturePage:
    """The page of a feature, on a batch; UsageError for a feature or a model that is not the dictionary's."""
    dictionary.check(m)
    check_count("feature", feature, least=0, most=dictionary.shape.n_features - 1)
    check_count("n_examples", n_examples)
    b = as_batch("feature_page", b)
    rows = wanted(dictionary).members(m, b)
    states = gather(Given(m, dictionary.origin.n_loops, b), wanted(dictionary))
    codes = dictionary.encode(states.values)
    lives, last = feature_lives(dictionary, codes), codes[:, -1]
    profile = lives.profiles().query("feature == @feature")[["loop", "profile"]].reset_index(drop=True)
    best = last[:, feature].argsort(descending=True, stable=True)[:n_examples]
    best = best[last[best, feature] > 0]
    frame = states.frame.iloc[best.numpy()]
    examples = pd.DataFrame(
        {
            "sample": frame["sample"].to_numpy(),
            "position": frame["position"].to_numpy(),
            "code": last[best, feature].numpy(),
            "text": [_context(m, b, *at) for at in zip(frame["sample"], frame["position"], strict=True)],
        }
    )
    without = states.values[best, -1] - last[best, feature][:, None] * dictionary.directions(feature)[-1]
    removed = _Removed(dictionary.origin.sites[-1], rows.nonzero()[best], without)
    return FeaturePage(
        repr(dictionary),
        feature,
        float(lives.frequency[:, feature].mean()),
        profile,
        examples,
        _follows(m, b, rows, last, feature),
        _effects(m, b, dictionary.origin.n_loops, removed),
    )


def _context(m: HookedLoopMDM, b: MaskedBatch, sample: int, position: int) -> str:
    """Tokens around a position, which is marked; hidden ones show what they hide in brackets."""
    first, end = max(0, position - AROUND), position + AROUND + 1
    ids, clean = b.tokens[sample, first:end], b.clean[sample, first:end]
    hidden, here = m.cfg.hidden(ids).tolist(), position - first
    words = [str(int(token)) for token in clean] if m.tokenizer is None else m.to_str_tokens(clean)
    shown = [f"[{word}]" if gone else str(word) for word, gone in zip(words, hidden, strict=True)]
    shown[here] = f">>{shown[here]}<<"
    return (" " if m.tokenizer is None else "").join(shown)


def _follows(
    m: HookedLoopMDM, b: MaskedBatch, rows: Tensor, codes: Float[Tensor, "row feature"], feature: int
) -> pd.DataFrame:
    """What the feature alone follows best, on sequences that did not choose it."""
    empty = pd.DataFrame(columns=["variable", "kind", "auc", "f1"])
    try:
        variables = known_variables(m, questions("feature_page", m, b), rows).known()
    except UsageError:  # too few sequences to say
        return empty
    alone = codes[:, [feature]]
    found = matches(alone, variables)
    if not len(found):
        return empty
    f1 = coverage(alone, variables).set_index("variable")["f1"]
    return found.assign(f1=f1.loc[found["variable"]].to_numpy())[list(empty)].reset_index(drop=True)


def _effects(m: HookedLoopMDM, b: MaskedBatch, n_loops: int, what: _Removed) -> pd.DataFrame:
    """Mean of log p intact less log p without the feature, at the chosen rows: token effect."""
    if not len(what.rows):
        return pd.DataFrame({"token": pd.Series(dtype=str), "effect": pd.Series(dtype=float)})
    picked, own = what.rows[:, 0].unique(return_inverse=True)
    part, there = b.rows(picked), torch.zeros(len(picked), b.tokens.shape[1], dtype=torch.bool)
    there[own, what.rows[:, 1]] = True
    order = (own * b.tokens.shape[1] + what.rows[:, 1]).argsort()
    read = there.roll(1, 1) if m.facts.shifted else there  # who is answered by the state at a row
    intact = _log_p(m, part, n_loops, read)
    with splice(m, what.site, what.states[order], there):
        change = (intact - _log_p(m, part, n_loops, read)).mean(0).nan_to_num(0.0)
    first = change.argsort(descending=True)
    ids = torch.cat([first[:SHOWN], first[SHOWN:][-SHOWN:]])
    words = [str(int(token)) for token in ids] if m.tokenizer is None else m.to_str_tokens(ids)
    return pd.DataFrame({"token": words, "effect": change[ids].numpy()})


def _log_p(m: HookedLoopMDM, b: MaskedBatch, n_loops: int, rows: Tensor) -> Float[Tensor, "row d_vocab"]:
    return wide(m.run(b.tokens, n_loops, attention_mask=b.attention_mask, rows=rows).logits).log_softmax(-1)
