"""Training-free looping is what it says: the same weights, other layers repeated, nothing left behind."""

import dataclasses

import numpy as np
import pytest
import torch

from loopmdm.analysis.measures.attention import mask_attention
from loopmdm.analysis.measures.interventions import damp
from loopmdm.analysis.measures.interventions.training_free import _groups, middle_blocks, training_free
from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.likelihood import nelbo
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.sequences import Sequences
from tests.conftest import toy_config, toy_model


@pytest.fixture
def plain():
    return toy_model(max_loops=1, n_loop_layers=1, n_coda_layers=2)


@pytest.fixture
def tokens():
    return torch.randint(0, 22, (12, 10), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_changes_are_those_of_the_nelbo_and_rises_those_of_the_attention(plain, tokens):
    maskable = torch.arange(10) > 1
    frame = training_free(plain, tokens, maskable, n_loops=(3,), batch_size=5)
    frame = frame.set_index(["first_layer", "n_layers", "damping", "n_loops"])
    assert len(frame) == 3 * 2 * 2 and (frame["n"] == 12).all() and (frame["n_groups"] == 10).all()
    b = mask_tokens(tokens, 22, mask_ratio=0.5, maskable=maskable)
    for first, size in ((1, 1), (2, 1), (1, 2)):
        m = HookedLoopMDM(plain.looping(first, size))
        once = nelbo(m, tokens, 1, n_samples=2, maskable=maskable)
        for damping, strength in (("none", 1.0), ("1/n_loops", 1 / 3)):
            with damp(m, strength):
                often = nelbo(m, tokens, 3, n_samples=2, maskable=maskable)
                odds = [late_odds(m, part) for part in _groups(b)]
            row = frame.loc[(first, size, damping, 3)]
            difference = (often.per_sequence - once.per_sequence).numpy()
            assert row["nelbo"] == pytest.approx(often.mean, rel=1e-5)
            assert row["change"] == pytest.approx(difference.mean(), rel=1e-4)
            assert row["change_se"] == pytest.approx(float(stats.mean_and_error(difference)[1]), rel=1e-3)
            last, first_loop = np.array(odds).T
            for name, values in (("log_odds", last), ("rise", last - first_loop)):
                mean, error, _ = stats.mean_and_error(values)
                assert row[name] == pytest.approx(float(mean), rel=1e-3, abs=1e-5)
                assert row[f"{name}_se"] == pytest.approx(float(error), rel=1e-3)
    naive, damped = (frame.xs(damping, level="damping")["change"].xs(3, level="n_loops").abs().mean()
                     for damping in ("none", "1/n_loops"))  # fmt: skip
    assert damped < naive
    assert (frame.xs(1, level="n_loops")[["change", "change_se", "rise", "rise_se"]] == 0).all(axis=None)


def late_odds(m, b):
    """Mean log-odds of the looped layers' heads in the last of three loops, and in the first."""
    frame = mask_attention(m, b, n_loops=3).query('segment == "loop" and query_group == "masked"')
    frame = frame[frame["key_group"] == "masked"]
    return [frame[frame["loop"] == loop]["log_odds"].mean() for loop in (2, 0)]


def test_layers_that_add_nothing_change_nothing(plain, tokens):
    for module in (plain.blocks[1].attn.out, plain.blocks[1].mlp.out):
        for parameter in module.parameters():
            parameter.zero_()
    frame = training_free(plain, tokens, n_loops=(2, 4), blocks=[(1, 1)])
    np.testing.assert_allclose(frame["change"], 0, atol=1e-6)
    np.testing.assert_allclose(frame["rise"], 0, atol=1e-6)
    assert frame["n_loops"].tolist() == [1, 2, 4] * 2


def test_the_model_is_left_as_it_was(plain, tokens):
    m = HookedLoopMDM(plain)
    before, weights = m(tokens, n_loops=1), {k: v.clone() for k, v in plain.state_dict().items()}
    training_free(m, tokens, n_loops=(2,), blocks=[(1, 2)], dampings=("1/n_loops",))
    assert torch.equal(m(tokens, n_loops=1), before) and m.cfg.n_loop_layers == 1
    assert all(torch.equal(v, weights[k]) for k, v in plain.state_dict().items())


def test_groups_are_whole_clusters():
    clusters = np.array([3, 3, 5, 5, 5, 9] * 10)
    numbered = torch.arange(60)[:, None]
    b = mask_tokens(Sequences.of(numbered, clusters=clusters), 60, mask_ratio=0)
    members = [group.clean[:, 0].tolist() for group in _groups(b)]
    assert len(members) == 3 and sorted(place for group in members for place in group) == list(range(60))
    assert sorted(len(set(clusters[group])) for group in members) == [1, 1, 1]
    alone = mask_tokens(numbered[:25], 60, mask_ratio=0)
    assert [len(group) for group in _groups(alone)] == [3] * 5 + [2] * 5
    assert len(_groups(alone.rows(slice(1)))) == 1


def test_one_sequence_has_no_error(plain, tokens):
    frame = training_free(plain, tokens[:1], n_loops=(2,), blocks=[(1, 1)], dampings=("none",))
    assert frame[["change_se", "rise_se", "log_odds_se"]].isna().all(axis=None)
    assert frame["change"].notna().all() and (frame["n"] == 1).all() and (frame["n_groups"] == 1).all()


def test_a_head_that_ignores_masked_keys_is_no_number(tokens):
    """Without a finite log-odds there is NaN and n_groups = 0."""
    cfg = toy_config(max_loops=1, forbid_mask_to_mask=("prelude", "loop", "coda"))
    frame = training_free(LoopMDM(cfg).eval(), tokens, n_loops=(2,), blocks=[(1, 1)], dampings=("none",))
    assert frame[["log_odds", "rise"]].isna().all(axis=None) and (frame["n_groups"] == 0).all()
    assert frame["change"].notna().all()


def test_middle_blocks_leave_a_layer_on_either_side():
    assert middle_blocks(3) == [(1, 1)]
    assert middle_blocks(4) == [(1, 1), (2, 1), (1, 2)]
    assert len(middle_blocks(6)) == 10 and middle_blocks(2) == []


def test_misuse_is_refused(plain, hooked, tokens):
    with pytest.raises(UsageError, match="loops by itself"):
        training_free(hooked, tokens)
    with pytest.raises(UsageError, match="unknown damping"):
        training_free(plain, tokens, dampings=("1/K",))
    with pytest.raises(UsageError, match="do not fit"):
        training_free(plain, tokens, blocks=[(3, 4)])
    with pytest.raises(UsageError, match="one per sequence"):
        training_free(plain, tokens, clusters=np.zeros(3))
    with pytest.raises(UsageError, match="no middle layer"):
        training_free(LoopMDM(dataclasses.replace(plain.cfg, n_prelude_layers=0, n_coda_layers=1)), tokens)
