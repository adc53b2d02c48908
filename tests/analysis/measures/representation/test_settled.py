import numpy as np
import pytest
import torch

from loopmdm.analysis.measures.representation import read_loops, settled_curve, settled_loops, settled_means
from loopmdm.analysis.measures.representation.settled import first_loops
from loopmdm.model.errors import UsageError
from loopmdm.model.masking import mask_tokens
from loopmdm.model.sequences import MaskedBatch
from tests.analysis.measures.representation.test_change import planted

EVENTS = ("appears", "settled", "first_right", "right_settled")


def test_by_hand():
    # Columns: wanders and returns; right, lost, right again; right from the start; never right; right but lost.
    answers = torch.tensor([[1, 7, 5, 2, 9], [2, 3, 5, 2, 9], [1, 7, 5, 2, 4]])
    truth = torch.tensor([1, 7, 5, 8, 9])
    found = first_loops(answers, truth)
    assert found["appears"].tolist() == [0, 0, 0, 0, 2]
    assert found["settled"].tolist() == [2, 2, 0, 0, 2]
    np.testing.assert_array_equal(found["first_right"], [0, 0, 0, np.nan, 0])
    np.testing.assert_array_equal(found["right_settled"], [2, 2, 0, np.nan, np.nan])


@pytest.mark.parametrize("lens", ["coda", "direct"])
def test_equals_a_walk_over_the_readouts(hooked, batch, lens):
    frame = settled_loops(hooked, batch, n_loops=5, lens=lens, batch_size=3)
    read = read_loops(hooked, batch, n_loops=5, lens=lens)
    assert len(frame) == int(batch.masked.sum())
    for row in frame.itertuples():
        part = read[(read["sequence"] == row.sequence) & (read["position"] == row.position)].sort_values("loop")
        answers, truth = part["top1_id"].tolist(), int(part["true_id"].iloc[0])
        assert row.final_id == answers[-1] and row.correct == (answers[-1] == truth)
        assert row.appears == answers.index(answers[-1])
        loop = len(answers)
        while loop and answers[loop - 1] == answers[-1]:
            loop -= 1
        assert row.settled == loop
        right = [i for i, answer in enumerate(answers) if answer == truth]
        assert row.first_right == right[0] if right else np.isnan(row.first_right)
        assert row.right_settled == loop if row.correct else np.isnan(row.right_settled)


def test_a_state_that_stops_moving_settles_there(hooked, batch):
    kick = torch.randn(8, 16, generator=torch.Generator().manual_seed(2)) * 20
    m = planted(hooked, lambda loop, x: (kick[loop] if loop < 4 else kick[4]).expand_as(x) + 0 * x)
    frame = settled_loops(m, batch, n_loops=8, lens="direct")
    assert (frame["settled"] <= 4).all() and frame["settled"].max() >= 1


def test_means_and_curve_are_sequence_means_of_the_frame(hooked, batch):
    frame = settled_loops(hooked, batch, n_loops=4)
    means, curve = settled_means(frame).set_index("metric"), settled_curve(frame)
    by_sequence = frame.groupby("sequence")["settled"].mean()
    assert means.loc["settled", "value"] == pytest.approx(by_sequence.mean())
    assert means.loc["settled", "standard_error"] == pytest.approx(by_sequence.std(ddof=1) / 2)
    right = frame.dropna(subset="right_settled").groupby("sequence")["right_settled"].mean()
    assert means.loc["right_settled", "n"] == len(right)
    assert means.loc["correct", "value"] == pytest.approx(frame["correct"].mean())  # equal counts a sequence
    for metric in EVENTS:
        part = curve[curve["metric"] == metric].sort_values("loop")["value"].to_numpy()
        assert (np.diff(part) >= 0).all()
    last = curve[curve["loop"] == 3].set_index("metric")["value"]
    assert last["settled"] == last["appears"] == 1
    assert last["right_settled"] == pytest.approx(means.loc["correct", "value"])
    assert (curve[(curve["metric"] == "appears")]["value"].to_numpy() >= 0).all()


def test_clusters_widen_the_error_and_are_found_by_sequence(hooked):
    tokens = torch.randint(0, 22, (6, 10), generator=torch.Generator().manual_seed(3)).repeat_interleave(3, 0)
    # The same sequence and mask thrice: three copies in a cluster carry the information of one.
    masked = torch.rand(6, 10, generator=torch.Generator().manual_seed(4)).repeat_interleave(3, 0) < 0.5
    b = MaskedBatch(tokens.masked_fill(masked, 22), tokens, masked)
    frame = settled_loops(hooked, b, n_loops=4)
    copies = settled_means(frame, np.arange(6).repeat(3)).set_index("metric").loc["appears"]
    once = settled_means(frame[frame["sequence"] % 3 == 0]).set_index("metric").loc["appears"]
    assert copies["value"] == pytest.approx(once["value"])
    assert copies["standard_error"] == pytest.approx(once["standard_error"])


def test_padding_changes_nothing(hooked, clean):
    short = mask_tokens(clean[:, :7], 22, mask_ratio=0.5)
    real = torch.zeros(4, 10, dtype=torch.long)
    real[:, :7] = 1
    masked = torch.zeros(4, 10, dtype=torch.bool)
    masked[:, :7], tokens = short.masked, torch.full((4, 10), 22)  # padding that looks like [MASK]
    tokens[:, :7] = short.tokens
    truth = tokens.clone()
    truth[:, :7] = short.clean
    padded = MaskedBatch(tokens, truth, masked, attention_mask=real)
    columns = ["sequence", "position", "final_id", *EVENTS]
    ours, theirs = (settled_loops(hooked, b, n_loops=4)[columns] for b in (padded, short))
    np.testing.assert_array_equal(ours.to_numpy(float), theirs.to_numpy(float))


def test_misuse_and_edges(hooked, batch, clean):
    one = settled_loops(hooked, batch, n_loops=1)
    assert (one["appears"] == 0).all() and (one["settled"] == 0).all()
    nothing = MaskedBatch(clean, clean, torch.zeros_like(clean, dtype=torch.bool))
    with pytest.raises(UsageError, match="no position is masked"):
        settled_loops(hooked, nothing)
    with pytest.raises(UsageError, match="lens"):
        settled_loops(hooked, batch, lens="tuned")
    with pytest.raises(UsageError, match="clusters"):
        settled_means(one, np.arange(2))
    with pytest.raises(UsageError, match="MaskedBatch"):
        settled_loops(hooked, batch.tokens)
