"""The parts add up to the whole."""

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis.measures.quality.decomposition import by_noise_level, nelbo_decomposition
from loopmdm.model.diffusion.likelihood import draw_counts, nelbo_by_loop
from loopmdm.model.errors import UsageError


@pytest.mark.parametrize(("by", "width"), [("mask_ratio", 5), ("position", 10)])
def test_parts_average_to_the_nelbo(model, clean, by, width):
    frame = nelbo_decomposition(model, clean, 3, by=by, n_bins=5, n_samples=25, batch_size=3)
    whole = nelbo_by_loop(model, clean, 3, n_samples=25)
    assert len(frame) == 3 * width
    for n_loops, part in frame.groupby("n_loops"):
        # 100 stratified counts over 10 values: each bin holds its exact share, though not for each sequence
        rough = 0.0 if by == "position" else 0.02
        assert part["nll"].mean() == pytest.approx(whole[n_loops - 1].mean, rel=1e-6 + rough)
    assert (frame.query("n_loops == 1")["gain"] == 0).all()


def test_gain_is_paired(model, clean):
    frame = nelbo_decomposition(model, clean, 2, n_bins=2, n_samples=20)
    one, two = frame.query("n_loops == 1"), frame.query("n_loops == 2")
    np.testing.assert_allclose(two["gain"].to_numpy(), one["nll"].to_numpy() - two["nll"].to_numpy(), atol=1e-9)
    apart = np.hypot(two["standard_error"].to_numpy(), one["standard_error"].to_numpy())
    assert (two["gain_standard_error"].to_numpy() < 0.9 * apart).all()  # pairing pays
    assert (frame["n"] == 4).all()


@pytest.mark.parametrize("by", ["mask_ratio", "position"])
def test_sequences_of_different_lengths_weigh_as_in_the_nelbo(model, clean, by):
    real = torch.zeros_like(clean)
    for row, length in enumerate((2, 3, 10, 10)):
        real[row, :length] = 1
    arguments = {"n_samples": 200, "attention_mask": real}
    frame = nelbo_decomposition(model, clean, 1, by=by, n_bins=1, **arguments)
    whole = nelbo_by_loop(model, clean, 1, **arguments)[0]
    mean = (frame["nll"] * frame["n"]).sum() / frame["n"].sum()
    assert mean == pytest.approx(whole.mean, rel=1e-6)
    if by == "mask_ratio":
        assert frame["standard_error"][0] == pytest.approx(whole.standard_error, rel=1e-6)


def test_positions_that_are_never_masked_are_nan(model, clean):
    maskable = torch.ones(10, dtype=torch.bool)
    maskable[:4] = False
    frame = nelbo_decomposition(model, clean, 1, by="position", maskable=maskable, n_samples=2)
    assert frame["nll"].isna().tolist() == [True] * 4 + [False] * 6
    assert frame["n"].tolist() == [0] * 4 + [4] * 6
    with pytest.raises(UsageError, match="by must be"):
        nelbo_decomposition(model, clean, 1, by="time")


@pytest.mark.parametrize("by", ["mask_ratio", "position"])
def test_named_loop_counts_are_those_of_the_whole_trajectory(model, clean, by):
    whole = nelbo_decomposition(model, clean, 4, by=by, n_bins=2, n_samples=6)
    some = nelbo_decomposition(model, clean, [4, 1], by=by, n_bins=2, n_samples=6)
    pd.testing.assert_frame_equal(some, whole[whole["n_loops"].isin([1, 4])].reset_index(drop=True))


def test_values_measured_before_give_the_same_decomposition(model, clean):
    real = torch.zeros_like(clean)
    for row, length in enumerate((2, 1, 7, 10)):
        real[row, :length] = 1
    whole = nelbo_decomposition(model, clean, 3, n_bins=4, n_samples=1, attention_mask=real)
    results = nelbo_by_loop(model, clean, 3, n_samples=1, attention_mask=real)
    lengths = real.sum(-1)
    values = np.stack([result.per_sequence.numpy() for result in results])
    frame = by_noise_level(values, [1, 2, 3], draw_counts(lengths, seed=0, draw=0), lengths, n_bins=4)
    pd.testing.assert_frame_equal(frame, whole)
