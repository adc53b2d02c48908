"""The loss at an earlier loop beside that at S: what is drawn, what it costs, what it trains; arms resumed."""

import json
import tomllib

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

from loopmdm.model.diffusion.likelihood import masked_cross_entropy
from loopmdm.model.errors import UsageError
from loopmdm.model.flops import readout_flops, training_flops
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.taps import explicit_taps
from loopmdm.model.training import budget, ship, state, trainer
from loopmdm.model.training.spec import LoopSchedule, RunSpec
from tests.loopmdm_model.training.test_training import SPECS, TINY, rows

ARMS = {
    "earlier": {"loops": {"earlier": True}},
    "inject": {"input_injection": "decay"},
    "sandwich": {"sandwich_norm": True},
    "scaled": {"scaled_residual": True},
}


def tiny(loops=None, flops=2e9, curve_points=2, **model) -> RunSpec:
    values = tomllib.loads(TINY)
    values["training"] |= {"flops": flops, "curve_points": curve_points}
    values["model"] |= model
    return RunSpec.from_dict(values | {"loops": loops or {}})


def test_where_it_is_off_specs_draws_and_budgets_are_what_they_were():
    spec = tiny()
    assert "earlier" not in spec.to_dict()["loops"] and "earlier" not in state.identity_of(spec)["loops"]
    assert RunSpec.from_dict(spec.to_dict()) == spec
    assert [budget.draw_earlier(spec, step, 3) for step in range(20)] == [None] * 20
    assert budget.step_cost(spec, 3) == training_flops(spec.config, 36, 3, batch=8)
    on = tiny({"earlier": True})
    assert RunSpec.from_dict(on.to_dict()) == on and on.to_dict()["loops"]["earlier"] is True
    assert [budget.draw_loops(on, step, 1.0) for step in range(50)] == [
        budget.draw_loops(spec, step, 1.0) for step in range(50)
    ]


def test_the_earlier_loop_is_uniform_below_s_and_a_function_of_seed_and_step():
    spec = tiny({"earlier": True}, max_loops=6)
    drawn = [budget.draw_earlier(spec, step, 6) for step in range(3000)]
    assert drawn == [budget.draw_earlier(spec, step, 6) for step in range(3000)]
    share = torch.bincount(torch.tensor(drawn), minlength=6)[1:] / 3000
    torch.testing.assert_close(share, torch.full((5,), 1 / 5), atol=0.03, rtol=0)
    assert {budget.draw_earlier(spec, step, 2) for step in range(20)} == {1}
    assert {budget.draw_earlier(spec, step, 1) for step in range(20)} == {None}
    pairs = [(budget.draw_loops(spec, step, 1.0), drawn[step]) for step in range(3000)]
    odds = torch.zeros(7, 6).index_put(tuple(torch.tensor(pairs).T), torch.tensor(1.0), accumulate=True)[1:, 1:]
    torch.testing.assert_close(odds / 3000, torch.full((6, 5), 1 / 30), atol=0.015, rtol=0)  # S does not tell s'


def test_the_loss_is_the_mean_of_both_and_so_are_its_gradients(tmp_path):
    run = trainer.Trainer(tiny({"earlier": True, "distribution": "fixed"}), tmp_path / "run")
    step = next(step for step in range(50) if budget.draw_earlier(run.spec, step, 3) == 2)
    run.progress.step = step
    (part,) = run._parts()
    with torch.enable_grad():
        loss = run._backward(part, 3)
        found = {name: parameter.grad.clone() for name, parameter in run.model.named_parameters()}
        run.optimizer.zero_grad()
        by_hand = [masked_cross_entropy(run.model(part.tokens, n_loops=n), part).mean() for n in (2, 3)]
        (sum(by_hand) / 2).backward()
    torch.testing.assert_close(loss, (by_hand[0] + by_hand[1]).detach() / 2)
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)
    single = run._loss(part, 1, explicit_taps)
    torch.testing.assert_close(single, masked_cross_entropy(run.model(part.tokens, n_loops=1), part).mean())


@pytest.mark.parametrize(("n_loops", "earlier"), [(3, 1), (3, 2), (2, 1), (1, None)])
def test_a_step_costs_what_torch_counts(n_loops, earlier):
    spec = tiny({"earlier": True})
    model, tokens = LoopMDM(spec.config), torch.randint(0, 6, (8, 36))
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, n_loops=n_loops, taps=explicit_taps, earlier=earlier)[..., :6].sum().backward()
    assert abs(budget.step_cost(spec, n_loops) / counter.get_total_flops() - 1) < 0.02
    more = 3 * 8 * readout_flops(spec.config, 36) if n_loops > 1 else 0
    assert budget.step_cost(spec, n_loops) == training_flops(spec.config, 36, n_loops, batch=8) + more


@pytest.mark.parametrize("distribution", ["uniform", "fixed", "flop-proportional", "flop-balanced"])
def test_the_walk_through_a_budget_equals_its_steps_one_by_one(distribution):
    widening = {"widen_from": 0.2, "widen_until": 0.6, "distribution": distribution}
    spec, spent, steps = tiny({"earlier": True} | widening, flops=3e9), 0.0, 0
    while spent < 3e9:
        cap = spec.loops.cap(spent / 3e9, 3)
        chances = budget.loop_chances(spec.config, spec.loops, cap, 36)
        spent += sum(chance * budget.step_cost(spec, s) for s, chance in enumerate(chances, start=1))
        steps += 1
    planned = budget.plan(spec)
    assert planned.steps == steps and planned.flops == pytest.approx(spent)
    if distribution == "flop-balanced":
        cost = [budget.step_cost(spec, s) for s in (1, 2, 3)]
        assert chances * cost == pytest.approx([chances[0] * cost[0]] * 3)


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_an_arm_broken_off_and_resumed_ends_bit_for_bit_where_a_whole_run_does(arm, tmp_path):
    spec = tiny(**arm)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with torch.enable_grad():
        trainer.Trainer(spec, whole).train()
        first = trainer.Trainer(spec, broken)
        for _ in range(4):
            first._step()
        first._checkpoint()
        first.lock.release()
        trainer.Trainer(spec, broken, resume=True).train()
    for name in ("model.safetensors", "config.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    assert rows(whole) == rows(broken)
    record = json.loads((whole / "train.json").read_text())
    assert RunSpec.from_dict(record["spec"]) == spec
    realised = record["training_flops"]["realised"]
    assert 2e9 <= realised <= 2e9 + budget.step_cost(spec, 3)
    new = [name for name in LoopMDM.from_pretrained(whole).state_dict() if "post" in name or "injection" in name]
    assert bool(new) == bool({"input_injection", "sandwich_norm"} & arm.keys())


def test_what_only_an_arm_has_is_trained(tmp_path):
    for arm in ("inject", "sandwich"):
        run = trainer.Trainer(tiny(**ARMS[arm]), tmp_path / arm)
        before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
        with torch.enable_grad():
            for _ in range(6):  # S = 1 does not ask the injection
                run._step()
        for name, parameter in run.model.named_parameters():
            assert not torch.equal(parameter, before[name]), name


def test_a_run_of_another_arm_is_not_resumed(tmp_path):
    with torch.enable_grad():
        run = trainer.Trainer(tiny(), tmp_path / "run")
        run._step()
        run._checkpoint()
    run.lock.release()
    with pytest.raises(UsageError, match=r"loops\.earlier was None, is True"):
        trainer.Trainer(tiny({"earlier": True}), tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match=r"model\.sandwich_norm was None, is True"):
        trainer.Trainer(tiny(sandwich_norm=True), tmp_path / "run", resume=True)


def test_an_arm_is_shipped_as_any_run(tmp_path):
    with torch.enable_grad():
        trainer.Trainer(tiny(input_injection="decay", flops=5e8), tmp_path / "run").train()
    home = ship.ship(tmp_path / "run", tmp_path / "zoo")
    shipped = LoopMDM.from_pretrained(home)
    assert shipped.cfg.input_injection == "decay" and shipped.injection.weight.isfinite().all()
    assert json.loads((home / "train.json").read_text())["evaluation"]["n_loops"] == 3


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_senseless_values_are_refused(value):
    with pytest.raises(UsageError, match="earlier must be bool") as said:
        tiny({"earlier": value})
    assert "\n" not in str(said.value)


def test_an_earlier_loop_of_one_is_refused():
    with pytest.raises(UsageError, match=r"spec \[loops\]: earlier needs more than one loop") as said:
        tiny({"earlier": True}, max_loops=1)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_in_bf16_an_arm_stays_near(arm, tmp_path):
    """Rounding activations to 8 bits moves a loss of about 2 nats by less than 1e-2."""
    losses = {}
    for precision in ("no", "bf16"):
        values = tiny(**arm).to_dict()
        spec = RunSpec.from_dict(values | {"training": values["training"] | {"precision": precision}})
        AcceleratorState._reset_state(reset_partial_state=True)
        run = trainer.Trainer(spec, tmp_path / precision)
        with torch.enable_grad():
            for _ in range(3):
                run._step()
        losses[precision] = run.progress.window["loss"] / 3
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses["bf16"] == pytest.approx(losses["no"], abs=1e-2)


@pytest.mark.parametrize("arm", ["inject", "sandwich", "scaled", "earlier"])
def test_specs_of_arms_differ_from_sudoku_loop_in_one_thing(arm):
    plain, spec = RunSpec.load(SPECS / "sudoku-loop.toml"), RunSpec.load(SPECS / f"sudoku-loop-{arm}.toml")
    assert spec.name == f"sudoku-loop-{arm}"
    assert (spec.data, spec.training, spec.seed) == (plain.data, plain.training, plain.seed)
    loops = {"earlier": True} if arm == "earlier" else {}
    assert spec.loops == LoopSchedule(**loops) and plain.loops == LoopSchedule()
    field = {key: value for key, value in ARMS[arm].items() if key != "loops"}
    assert spec.model == plain.model | field
    assert 0 <= budget.plan(spec).flops - 4e13 <= budget.step_cost(spec, 6)
