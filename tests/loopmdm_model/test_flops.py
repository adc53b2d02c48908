import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from loopmdm.model.flops import applied_parameters, forward_flops, training_flops
from loopmdm.model.taps import explicit_taps
from tests.conftest import toy_model


@pytest.mark.parametrize("changes", [{}, {"gated_mlp": True, "act_fn": "silu"}, {"d_head": 4, "n_coda_layers": 3}])
@pytest.mark.parametrize("n_loops", [1, 4])
def test_counts_agree_with_torch_within_one_percent(changes, n_loops):
    model, tokens = toy_model(**changes), torch.randint(0, 22, (3, 12))
    with FlopCounterMode(display=False) as counter:
        model(tokens, n_loops=n_loops, taps=explicit_taps)
    ours = forward_flops(model.cfg, 12, n_loops, batch=3)
    assert abs(ours / counter.get_total_flops() - 1) < 0.01


def test_training_costs_three_forwards():
    model, tokens = toy_model(), torch.randint(0, 22, (3, 12))
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, n_loops=3, taps=explicit_taps)[..., :22].sum().backward()
    assert abs(training_flops(model.cfg, 12, 3, 3) / counter.get_total_flops() - 1) < 0.02


def test_looped_parameters_are_applied_again():
    model = toy_model()
    layer = sum(p.numel() for p in model.blocks[0].parameters())
    assert applied_parameters(model.cfg, model.n_parameters, layer, 3) == model.n_parameters + 2 * 2 * layer
