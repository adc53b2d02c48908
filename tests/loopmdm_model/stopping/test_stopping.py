import math

import pytest
import torch

from loopmdm.model.errors import UsageError
from loopmdm.model.stopping.rules import (
    ArgmaxStable,
    EntropyDelta,
    FixedLoops,
    KLDelta,
    LoopView,
    NoiseSchedule,
    SecondDifference,
    StateDelta,
    oracle_loops,
    relative_change,
)


def test_relative_change_by_hand():
    state, previous = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 0.0]]])
    assert float(relative_change(state, previous)) == 1.0
    assert float(relative_change(state, torch.tensor([[[3.0, 3.0]]]))) == pytest.approx(0.2)


def test_positions_choose_who_is_averaged():
    state = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    previous = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]]])
    view = LoopView(1, state, previous, torch.tensor([[True, False, True]]), torch.tensor([[True, True, False]]))
    assert float(StateDelta(max_loops=3).criterion(view)) == 0.5  # the padded third is left out
    assert float(StateDelta(max_loops=3, positions="masked").criterion(view)) == 1.0
    nobody = LoopView(1, state, previous, torch.zeros(1, 3, dtype=torch.bool), view.real)
    rule = StateDelta(9.0, max_loops=3, positions="masked")
    assert rule.criterion(nobody).isnan().all() and not rule.calm(rule.criterion(nobody)).any()


def test_fixed_loops_look_at_nothing(model, batch):
    run = model.run(batch.tokens, stop=FixedLoops(max_loops=4))
    assert run.loops_used.tolist() == [4] * 4 and run.criterion.isnan().all()
    assert torch.equal(run.logits, model(batch.tokens, n_loops=4))


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_loops": 0},
        {"max_loops": 2.0},
        {"max_loops": 2, "min_loops": 3},
        {"max_loops": 4, "threshold": -1.0},
        {"max_loops": 4, "threshold": float("nan")},
        {"max_loops": 4, "positions": "some"},
        {"max_loops": 4, "scope": "layer"},
        {"max_loops": 4, "patience": 0},
        {},
    ],
)
def test_senseless_rules_are_refused(arguments):
    with pytest.raises(UsageError):
        StateDelta(**arguments)


def test_a_rule_without_maximum_says_what_it_needs():
    with pytest.raises(UsageError, match="needs max_loops="):
        StateDelta(0.03)


def test_second_difference_by_hand():
    states = [torch.tensor([[[value, 0.0]]]) for value in (1.0, 3.0, 4.0)]
    rule, group = SecondDifference(max_loops=4), torch.tensor([[True]])
    view = LoopView(2, states[2], states[1], ~group, group, earlier=states[0])
    assert float(rule.criterion(view)) == pytest.approx(1 / 4)  # |(4 - 3) - (3 - 1)| / 4
    assert rule.criterion(LoopView(1, states[1], states[0], ~group, group)).isnan().all()


def test_readings_by_hand():
    minus = float("-inf")
    before, now = torch.tensor([[0.0, 0.0, minus]]), torch.tensor([[math.log(3.0), 0.0, minus]])
    kl, delta, stable = (kind(max_loops=2) for kind in (KLDelta, EntropyDelta, ArgmaxStable))
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(kl.change(kl.read(now), kl.read(before))) == pytest.approx(expected)
    drop = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert float(delta.change(delta.read(now), delta.read(before))) == pytest.approx(drop, rel=1e-5)
    assert float(stable.change(stable.read(now), torch.tensor([1]))) == 1.0
    assert float(stable.change(stable.read(now), torch.tensor([0]))) == 0.0


def test_noise_schedule_plans_by_share_of_masked_among_real():
    masked = torch.tensor([[True, False, False, False], [True, True, False, False], [True, True, True, False]])
    real = torch.ones_like(masked)
    real[0, 2:] = False  # padding is no clean token: 1 of 2
    rule, x = NoiseSchedule(loops=(2, 5)), torch.zeros(3, 4, 1)
    left = rule.criterion(LoopView(0, x, x, masked, real))
    assert left.tolist() == [1.0, 1.0, 4.0] and rule.max_loops == 5
    with pytest.raises(UsageError, match="equal bins"):
        NoiseSchedule()
    for wrong in ({"scope": "token"}, {"patience": 2}):
        with pytest.raises(UsageError, match="do not apply"):
            NoiseSchedule(loops=(1, 2), **wrong)
    with pytest.raises(UsageError, match="equal bins"):
        NoiseSchedule(loops=3)


def test_replay_follows_patience_and_minimum():
    criterion = torch.tensor([[float("nan"), 0.1, 0.9, 0.1, 0.1, 0.1]]).T
    for arguments, loops in (({}, 2), ({"patience": 2}, 5), ({"min_loops": 3}, 4), ({"patience": 4}, 6)):
        assert StateDelta(0.5, max_loops=6, **arguments).replay(criterion).tolist() == [loops]
    with pytest.raises(UsageError, match="record has 6"):
        StateDelta(0.5, max_loops=7).replay(criterion)
    with pytest.raises(UsageError, match="online"):
        StateDelta(0.5, max_loops=6, scope="token").replay(criterion)


def test_the_oracle_weighs_loss_against_flops():
    losses = torch.tensor([[3.0, 1.0], [1.0, 0.9], [0.5, 2.0]])
    flops = torch.tensor([1.0, 2.0, 3.0])
    assert oracle_loops(losses, flops, 0.0).tolist() == [3, 2]
    assert oracle_loops(losses, flops, 1.0).tolist() == [2, 1]


def test_only_rules_are_rules(model, batch):
    with pytest.raises(UsageError, match="stopping rule"):
        model.run(batch.tokens, stop=3)
