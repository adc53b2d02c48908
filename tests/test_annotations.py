"""Tensor annotations of both packages hold: a session of ordinary use under beartype."""

import subprocess
import sys

import pytest

SESSION = """
from jaxtyping import install_import_hook
install_import_hook(["loopmdm"], "beartype.beartype")
import torch
from loopmdm.analysis import attention_across_loops, mask_attention, measure, read_loops, representation_change
from loopmdm.analysis.measures import MEASURES
from loopmdm.model import HookedLoopMDM, StateDelta, mask_tokens, nelbo, sample
from loopmdm.model.tasks.batches import dataset
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from loopmdm.model.tasks.test_sets import solve_one_shot
from loopmdm.model.diffusion.orders import ORDERS
from loopmdm.model.taps import explicit_taps

m = HookedLoopMDM.from_pretrained("sudoku-loop")
grids = dataset("sudoku6", 36, 7, 0).batch(0, 4)
b = puzzles(BOARDS["sudoku6"], grids, 20)
logits, cache = m.run_with_cache(b.tokens, n_loops=3)
m.model(b.tokens, 2, torch.ones_like(b.tokens), explicit_taps)
m.run(b.tokens, stop=StateDelta(0.5, max_loops=4))
nelbo(m, grids, n_loops=2, n_samples=2)
solve_one_shot(m.model, BOARDS["sudoku6"], b, 2)
mask_attention(m, b, n_loops=2)
representation_change(m, b, n_loops=2)
read_loops(m, b, n_loops=2)
attention_across_loops(cache, layer=1)
mask_tokens(grids, 6, t=0.5)
for order in (*ORDERS, "blocks:6:threshold:0.5"):
    sample(m, 2, steps=6, order=order, n_loops=1, clues={0: 3}, guidance=0.5, top_k=3)
sample(m, 2, steps=6, n_loops=1, suppress=[2], end=[4])
small = {
    "attribution-patching": {"n_sequences": 4, "n_exact": 1},
    "causal-edges": {"n_draws": 1, "n_resamples": 1},
    "dictionaries": {"n_features": 16, "k": 4, "steps": 3, "n_scored": 4},
    "edge-effects": {"n_exact": 2},
    "head-cards": {"n_sequences": 4, "n_effects": 2},
    "lenses": {"n_fit": 12, "steps": 2, "n_jacobian": 1},
    "logit-attribution": {"n_exact": 2},
    "perturbation-gain": {"n_sequences": 2},
    "probes": {"n_rows": 200},
    "propagation-scrubbing": {"n_boards": 20},
    "relay-effects": {"n_sequences": 2},
    "steering": {"n_boards": 4, "strengths": (1.0,)},
    "stopping-in-sampling": {"steps": 6, "n_thresholds": 6},
    "sudoku-orders": {"n_clues": 30},
    "training-free": {"counts": (1, 2)},
}
for name in MEASURES:
    model = {"training-free": "sudoku-base"}.get(name, "sudoku-loop")
    if MEASURES[name].on not in ("tree", "loops"):
        given = small.get(name, {}) | ({"mask_ratios": (0.5,)} if MEASURES[name].on == "masks" else {})
        loops = {"n_loops": max(3, MEASURES[name].loops)}
        assert len(measure(name, model, n=12, **loops | given)), name
try:
    m.model.blocks[0].attn(torch.zeros(2, 3), (logits, logits), None)
except Exception as error:
    assert type(error).__name__ == "TypeCheckError", error
else:
    raise SystemExit("the checker is not on")
"""


@pytest.mark.slow
def test_shapes_hold_under_beartype():
    outcome = subprocess.run([sys.executable, "-c", SESSION], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
