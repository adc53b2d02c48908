import torch

from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.diffusion.trajectories import Trajectory
from loopmdm.model.stopping.rules import StateDelta


def test_a_trajectory_holds_what_the_model_would_answer(model):
    t = Trajectory(steps=(0, 2), loops=(1,))
    r = sample(model, 3, 8, steps=4, order="confidence", n_loops=3, callback=t, first_index=2)
    frame = t.frame()
    assert set(frame["step"]) == {0, 2} and set(frame["loop"]) == {1} and frame["masked"].all()
    assert len(frame) == 3 * (8 + 4)
    history = r.history
    for step, part in frame.groupby("step"):
        log_probs = model(history[step], n_loops=2).log_softmax(-1)  # loop 1 is the model at S = 2
        row, position = torch.tensor(part["sequence"].to_numpy()) - 2, torch.tensor(part["position"].to_numpy())
        here = log_probs[row, position]
        assert here.argmax(-1).tolist() == part["top1"].tolist()
        torch.testing.assert_close(here.amax(-1).exp(), torch.tensor(part["p_top1"].to_numpy()), atol=1e-5, rtol=0)
        entropy = torch.distributions.Categorical(logits=here[:, :22]).entropy()
        torch.testing.assert_close(entropy, torch.tensor(part["entropy"].to_numpy()), atol=1e-4, rtol=0)
    x = list(model.states(history[0], 2))
    change = (x[1][0] - x[0][0]).norm(dim=-1) / x[1][0].norm(dim=-1)
    first = frame.query("step == 0")["state_change"].to_numpy()
    torch.testing.assert_close(torch.tensor(first), change.flatten(), atol=1e-5, rtol=0)


def test_recording_changes_nothing_and_follows_who_runs(model):
    rule = StateDelta(0.8, max_loops=4)
    t = Trajectory(lens="direct", masked_only=False)
    r = sample(model, 4, 8, steps=3, stop=rule, callback=t)
    plain = sample(model, 4, 8, steps=3, stop=rule)
    assert torch.equal(r.tokens, plain.tokens) and r.flops == plain.flops
    rows = t.frame().groupby(["step", "sequence"])["loop"].nunique()
    for (step, sequence), loops in rows.items():
        assert loops == int(r.loops_used[step, sequence])
    assert len(rows) == r.forwards


def test_nothing_recorded_is_an_empty_frame(model):
    frame = Trajectory(steps=()).frame()
    assert len(frame) == 0 and "entropy" in frame.columns
    t = Trajectory(steps=(99,))
    sample(model, 1, 8, steps=2, callback=t)
    assert len(t.frame()) == 0
