"""Every specification equals what the measures give, and a planted rise rises under all of them."""

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis.measures.attention import attention_toggle, mask_attention, specification_curve
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from tests.conftest import toy_config


def sequences(n=12, ratio=0.5, seed=4):
    tokens = torch.randint(0, 22, (n, 10), generator=torch.Generator().manual_seed(seed))
    return mask_tokens(tokens, 22, mask_ratio=ratio, seed=1)


def planted(slope) -> HookedLoopMDM:
    """Scores are slope * loop for masked keys, with some noise of the model's own."""
    m = HookedLoopMDM(toy_config())

    def plant(scores, hook):
        return 0.02 * scores + slope * int(hook.name.split(".")[1]) * m.context.masked[:, None, None, :]

    where = lambda name: name.startswith("loop") and name.endswith("hook_attn_scores")  # noqa: E731
    m.add_hook(where, plant, is_permanent=True)
    return m


def pick(frame, **at) -> pd.Series:
    for name, value in at.items():
        frame = frame[frame[name].isna()] if value is None else frame[frame[name] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def masses(m, b, by_head=False):
    frame = mask_attention(m, b, n_loops=3, by_head=by_head)
    frame = frame[(frame["query_group"] == "masked") & (frame["key_group"] == "masked")]
    return frame[frame["segment"] == "loop"].set_index(["loop", "layer"])


def test_every_choice_stands_in_the_curve_once(hooked):
    frame = specification_curve(hooked, sequences(), n_loops=3, n_keys=1)
    assert len(frame) == 3 * 3 * 15  # two layers and both; three weightings of heads; fifteen measures
    keys = ["measure", "self", "sinks", "heads", "layers", "layer"]
    one = frame[(frame["layers"] == "one") | (frame["heads"] != "growth")]
    assert not one.duplicated(keys).any()
    assert frame["measure"].value_counts().to_dict() == {
        "mass": 36, "lift": 36, "log_odds": 36, "content": 18, "toggle": 9
    }  # fmt: skip
    assert (frame["low"] <= frame["estimate"]).all() and (frame["estimate"] <= frame["high"]).all()


def test_averages_equal_the_measures_themselves(hooked):
    b = sequences()
    frame = specification_curve(hooked, b, n_loops=3, n_keys=10, factor=1e9)
    by = masses(hooked, b)
    toggle = attention_toggle(hooked, b, n_loops=3, n_keys=10, by_head=False)
    toggle = toggle[toggle["segment"] == "loop"].set_index(["loop", "layer"])["toggle"]
    for layer in (1, 2):
        at = {"heads": "average", "layers": "one", "layer": layer, "sinks": "in"}
        for measure in ("mass", "lift", "log_odds", "content"):
            row = pick(frame, measure=measure, self="out", **at)
            assert row["estimate"] == pytest.approx(by[measure][2, layer] - by[measure][0, layer], abs=1e-5)
            # No position is a sink at this factor: sinks in or out is the same.
            assert pick(frame, measure=measure, self="out", **at | {"sinks": "out"})["estimate"] == pytest.approx(
                row["estimate"], abs=1e-6
            )
        row = pick(frame, measure="mass", self="in", **at)
        assert row["estimate"] == pytest.approx(
            by["mass_with_self"][2, layer] - by["mass_with_self"][0, layer], abs=1e-5
        )
        row = pick(frame, measure="toggle", self="out", **at)
        assert row["estimate"] == pytest.approx(toggle[2, layer] - toggle[0, layer], abs=1e-5)
    both = pick(frame, measure="mass", self="out", sinks="in", heads="average", layers="all", layer=None)
    each = [by["mass"][2, layer] - by["mass"][0, layer] for layer in (1, 2)]
    assert both["estimate"] == pytest.approx(np.mean(each), abs=1e-5)


@pytest.mark.parametrize(("slope", "verdict"), [(0.8, "rises"), (-0.8, "falls")])
def test_a_planted_change_has_its_sign_everywhere(slope, verdict):
    frame = specification_curve(planted(slope), sequences(24), n_loops=3, n_keys=2)
    attention = frame[frame["measure"] != "content"]
    assert (attention["verdict"] == verdict).all()
    log_odds = frame[(frame["measure"] == "log_odds") & (frame["self"] == "out") & (frame["heads"] != "growth")]
    np.testing.assert_allclose(log_odds["estimate"], 2 * slope, atol=0.15)


def test_a_model_that_does_not_change_is_not_called():
    m = HookedLoopMDM(toy_config())
    fixed = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    with m.hooks([(lambda name: name.endswith("hook_attn_scores"), lambda x, hook: x * 0 + fixed)]):
        frame = specification_curve(m, sequences(), n_loops=3)
    still = frame[frame["measure"] != "content"]
    np.testing.assert_allclose(still["estimate"], 0, atol=1e-6)


def test_the_growing_head_is_measured_on_the_other_half(hooked):
    from loopmdm.analysis.measures.attention.sinks import halves

    b = sequences()
    first = torch.from_numpy(halves(np.arange(12), 0))
    row = pick(
        specification_curve(hooked, b, n_loops=3, n_keys=1),
        measure="mass", self="out", sinks="in", heads="growth", layers="one", layer=2,
    )  # fmt: skip
    chosen, measured = (
        masses(hooked, b.rows(half), by_head=True).loc[[(2, 2), (0, 2)]] for half in (first, ~first)
    )
    growth = chosen.reset_index().pivot(index="head", columns="loop", values="log_odds")
    assert row["head"] == (growth[2] - growth[0]).idxmax()
    expected = measured[measured["head"] == row["head"]]["mass"]
    assert row["estimate"] == pytest.approx(expected[2, 2] - expected[0, 2], abs=1e-5)
    assert row["n"] == 6


def test_clusters_and_parts(hooked):
    b, clusters = sequences(), np.arange(12) // 2
    plain = specification_curve(hooked, b, n_loops=2, clusters=clusters)
    parts = specification_curve(hooked, b, n_loops=2, clusters=clusters, batch_size=5)
    pd.testing.assert_frame_equal(plain, parts, atol=1e-4, check_dtype=False)
    copies = mask_tokens(b.clean[:6].repeat(3, 1), 22, mask_ratio=0.5)
    copies = type(b)(b.tokens[:6].repeat(3, 1), b.clean[:6].repeat(3, 1), b.masked[:6].repeat(3, 1))
    at = {"measure": "mass", "self": "out", "sinks": "in", "heads": "average", "layers": "all"}
    error = pick(specification_curve(hooked, copies, n_loops=2, clusters=np.tile(np.arange(6), 3)), **at)
    alone = pick(specification_curve(hooked, b.rows(slice(0, 6)), n_loops=2), **at)
    assert error["standard_error"] == pytest.approx(alone["standard_error"], rel=1e-4)
    assert error["high"] == pytest.approx(alone["high"], rel=1e-3)


def test_several_mask_ratios_and_empty_groups(hooked):
    frame = specification_curve(hooked, [sequences(ratio=r) for r in (0.3, 1.0)], n_loops=2)
    assert sorted(frame["mask_ratio"].unique()) == pytest.approx([0.3, 1.0])
    all_masked = frame[frame["mask_ratio"] == 1.0]
    log_odds = all_masked[all_masked["measure"] == "log_odds"]
    assert (log_odds["verdict"] == "undefined").all() and log_odds["low"].isna().all()
    assert (log_odds["n"] == 0).all()
    nothing = specification_curve(hooked, sequences(ratio=0.0), n_loops=2)
    assert (nothing["verdict"] == "undefined").all() and (nothing["n"] == 0).all()


def test_misuse_is_refused(hooked):
    with pytest.raises(UsageError, match="at least 2"):
        specification_curve(hooked, sequences(), n_loops=1)
    with pytest.raises(UsageError, match="no batch"):
        specification_curve(hooked, [])
    with pytest.raises(UsageError, match="MaskedBatch"):
        specification_curve(hooked, [sequences().tokens])
    with pytest.raises(UsageError, match="two halves"):
        specification_curve(hooked, sequences(1))
