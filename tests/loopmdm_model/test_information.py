"""Entropy and divergence against closed forms, scipy and torch; tokens without probability count nothing."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats as distributions

from loopmdm.model.information import entropy, kl

ROOT = Path(__file__).parents[2]
CLOSED = float("-inf")


def log_probs(closed: tuple[int, ...] = (), seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Of 40 rows over 23 tokens, of which some have no probability."""
    logits = 3 * torch.randn(40, 23, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return logits.index_fill(-1, torch.tensor(closed, dtype=torch.long), CLOSED).log_softmax(-1)


def test_uniform_entropy_is_the_log_of_how_many_there_are():
    for n in (1, 2, 36, 1025):
        rows = torch.zeros(3, n + 2, dtype=torch.float64)
        rows[:, -2:] = CLOSED
        torch.testing.assert_close(entropy(rows.log_softmax(-1)), torch.full((3,), n).double().log())


@pytest.mark.parametrize("closed", [(), (22,), (0, 7, 22)])
def test_both_are_scipys(closed):
    left, right = log_probs(closed, 0), log_probs(closed, 1)
    p, q = left.exp().numpy(), right.exp().numpy()
    np.testing.assert_allclose(entropy(left).numpy(), distributions.entropy(p, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(kl(left, right).numpy(), distributions.entropy(p, q, axis=-1), rtol=1e-12)
    assert (kl(left, right) > 0).all()


def test_kl_is_torchs_where_both_are_finite():
    left, right = log_probs(seed=2), log_probs(seed=3)
    wanted = F.kl_div(right, left, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl(left, right), wanted)


def test_kl_is_never_below_zero_beyond_rounding_and_zero_only_of_the_same():
    left = log_probs((22,), 4)
    assert torch.equal(kl(left, left), torch.zeros(40, dtype=torch.float64))
    near = log_probs((22,), 4, torch.float32)
    assert kl(near, (near + 1e-4 * torch.randn(near.shape)).log_softmax(-1)).min() > -1e-6


def test_kl_is_infinite_where_the_right_side_rules_out_what_the_left_allows():
    left, right = log_probs(), log_probs((7,), 1)
    assert torch.equal(kl(left, right), torch.full((40,), float("inf"), dtype=torch.float64))
    assert kl(right, left).isfinite().all()  # not the other way round


def test_probabilities_that_are_at_hand_give_the_same():
    left, right = log_probs((22,), 5), log_probs((22,), 6)
    p = left.exp()
    torch.testing.assert_close(entropy(p.log(), p), entropy(left))
    torch.testing.assert_close(kl(p.log(), right, p), kl(left, right))
    counts = torch.tensor([3.0, 0.0, 1.0, 0.0]).double() / 4
    assert float(entropy(counts.log(), counts)) == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))


def test_no_other_file_computes_an_entropy_or_a_divergence():
    """Of p and log p there is one sum, whatever it is called."""
    for folder in ("loopmdm_model", "analysis"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name == "information.py":
                continue
            tree = ast.parse(path.read_text())
            made = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert not made & {"kl", "_kl", "entropy", "_entropy", "_divergence"}, path
            called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not called & {"entr", "xlogy", "kl_div", "vecdot", "rel_entr"}, path
            assert not [line for line in map(ast.unparse, products(tree)) if ".exp()" in line], path


def products(tree: ast.AST) -> list[ast.BinOp]:
    """Products of exponentials with something: p times what is to be averaged under it."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Mult)
        and isinstance(node.left, ast.Call)
        and isinstance(node.left.func, ast.Attribute)
        and node.left.func.attr == "exp"
        and not node.left.args
    ]
