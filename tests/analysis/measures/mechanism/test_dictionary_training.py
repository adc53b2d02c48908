"""Training finds planted sparse directions, for all loops at once, and does the same twice."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from loopmdm.analysis.activations import Gathered, Identity, Wanted
from loopmdm.analysis.measures.mechanism.dictionaries import Dictionary, Shape, Training, train_dictionary
from loopmdm.analysis.measures.mechanism.dictionaries.coder import keep_largest
from loopmdm.analysis.measures.mechanism.dictionaries.training import _Fit, least_kept
from loopmdm.model.errors import NotFiniteError

D, TRUE, ACTIVE = 24, 32, 3
FAST = Training(steps=400, batch_size=256, learning_rate=5e-3, dead_after=3000)


def planted(n_sites: int, present: torch.Tensor | None = None, rows: int = 6000) -> tuple[Gathered, torch.Tensor]:
    """Rows that are sums of three of 32 random directions by site, and these directions [site, feature, d]."""
    draw = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(n_sites, TRUE, D, generator=draw), dim=-1)
    directions = directions if present is None else directions * present[..., None]
    on = torch.rand(rows, TRUE, generator=draw).argsort(1) < ACTIVE
    codes = on * (1 + torch.rand(rows, TRUE, generator=draw))
    names = [f"loop.{loop}.hook_out" for loop in range(n_sites)]
    x = torch.einsum("rf,sfd->rsd", codes, directions)
    return Gathered(x, pd.DataFrame(), names, Identity("planted", "a:b", {}), Wanted(), n_sites), directions


def likeness(made: Dictionary, directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine of each planted direction with its nearest feature, all sites side by side, and which that is."""
    found, wanted = (F.normalize(x.transpose(0, 1).flatten(1), dim=-1) for x in (made.decoder * 1, directions))
    best = (wanted @ found.T).max(1)
    return best.values, best.indices


@pytest.mark.parametrize(("kind", "activation"), [("sae", "batchtopk"), ("sae", "topk"), ("crosscoder", "relu")])
def test_planted_directions_are_found(kind, activation):
    samples, directions = planted(1 if kind == "sae" else 2)
    made = train_dictionary(samples, Shape(kind, 48, activation, ACTIVE), FAST)
    assert likeness(made, directions)[0].mean() > 0.95
    codes = made.encode(samples.values)
    if activation != "relu":
        assert float((codes > 0).float().sum(-1).mean()) == pytest.approx(ACTIVE, rel=0.1)
    if activation == "topk":
        assert int((codes > 0).sum(-1).max()) <= ACTIVE


def test_a_crosscoder_finds_when_features_are_born_and_die():
    present = torch.ones(3, TRUE)
    present[0, :10], present[2, 10:20] = 0.0, 0.0  # ten are born late, ten die early
    samples, directions = planted(3, present)
    made = train_dictionary(samples, Shape("crosscoder", 48, k=ACTIVE), FAST)
    close, which = likeness(made, directions)
    assert close.mean() > 0.95
    norms = made.decoder.norm(dim=-1)[:, which]
    there = norms > 0.5 * norms.amax(0)
    assert (there == present.bool()).float().mean() > 0.95


def test_the_same_seed_gives_the_same_dictionary_and_its_file_gives_it_back(tmp_path):
    samples, _ = planted(2, rows=600)
    few = Training(steps=8, batch_size=64)
    first, again = (train_dictionary(samples, Shape("crosscoder", 16, k=2), few) for _ in range(2))
    other = train_dictionary(samples, Shape("crosscoder", 16, k=2), Training(steps=8, batch_size=64, seed=1))
    assert torch.equal(first.decoder, again.decoder) and not torch.equal(first.decoder, other.decoder)
    first.save(tmp_path / "exact", torch.float32)
    back = Dictionary.open(tmp_path / "exact")
    assert torch.equal(back(samples.values), first(samples.values)) and back.origin == first.origin
    first.save(tmp_path / "half")
    x = samples.values
    near = Dictionary.open(tmp_path / "half")
    assert (near.encode(x) - first.encode(x)).abs().max() < 0.05
    assert (tmp_path / "half" / "dictionary.safetensors").stat().st_size < 2 * 2 * 2 * D * 16 + 4096


def test_folding_keeps_what_is_given_back():
    samples, _ = planted(2, rows=600)
    made = train_dictionary(samples, Shape("crosscoder", 16, k=2), Training(steps=8, batch_size=64))
    torch.testing.assert_close(made.weights, torch.ones(16))
    with torch.no_grad():
        made.decoder *= 3.0
        before = made(samples.values)
        made.fold()
        torch.testing.assert_close(made(samples.values), before, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(made.weights, torch.ones(16))


def test_of_one_site_a_crosscoder_is_an_sae():
    samples, _ = planted(1, rows=600)
    few = Training(steps=8, batch_size=64)
    one, two = (train_dictionary(samples, Shape(kind, 16, k=2), few) for kind in ("crosscoder", "sae"))
    torch.testing.assert_close(one(samples.values), two(samples.values), atol=1e-5, rtol=1e-5)


def test_what_is_left_over_moves_dead_features_and_no_others():
    samples, _ = planted(1, rows=600)
    made = train_dictionary(samples, Shape("sae", 16, k=2), Training(steps=2, batch_size=64))
    fit = _Fit(made.requires_grad_(True), Training(dead_after=100))
    fit.idle = torch.where(torch.arange(16) < 5, 101.0, 100.0)
    x = samples.values[:64]
    with torch.enable_grad():
        before = made.before(made.normalised(x)).relu()
        fit._helped(before, torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).backward()
    moved = made.decoder.grad.abs().sum((0, 2)) > 0
    assert moved[:5].any() and not moved[5:].any()
    fit.idle.zero_()
    assert float(fit._helped(before, x)) == 0


def test_what_is_kept():
    values = torch.tensor([[1.0, 2.0, 3.0, 0.0], [9.0, 0.5, 0.1, 4.0]])
    assert keep_largest(values, values, 2).tolist() == [[0, 2, 3, 0], [9, 0, 0, 4]]
    assert keep_largest(values, -values, 1).tolist() == [
        [0, 0, 0, 0],
        [0, 0, 0.1, 0][:2] + [values[1, 2].item(), 0],
    ]
    assert float(least_kept(values[:, None], 2)) == 2.0


def test_training_that_diverges_says_so():
    samples, _ = planted(1, rows=600)
    with pytest.raises(NotFiniteError, match="smaller learning_rate"):
        train_dictionary(
            samples, Shape("sae", 16, "relu", 2), Training(steps=50, batch_size=64, learning_rate=1e30)
        )
