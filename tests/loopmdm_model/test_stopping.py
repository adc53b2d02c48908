import pytest
import torch

from loopmdm_model.errors import UsageError
from loopmdm_model.stopping import FixedLoops, LoopView, StateDelta, relative_change


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
    assert rule.criterion(nobody).isnan().all() and not rule.stops(1, rule.criterion(nobody)).any()


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
    ],
)
def test_senseless_rules_are_refused(arguments):
    with pytest.raises(UsageError):
        StateDelta(**arguments)


def test_only_rules_are_rules(model, batch):
    with pytest.raises(UsageError, match="stopping rule"):
        model.run(batch.tokens, stop=3)
