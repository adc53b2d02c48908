"""Two tasks whose exact posterior is known: `tree` and, as its negative control, `markov`.

Variables with K states hang on a tree: the root is uniform, a child equals its parent with probability
`stay` and is any other state otherwise. In `tree` (a complete binary tree, breadth first) the leaves are
always observed, so a hidden node needs rounds of belief propagation to hear of them; in `markov` the tree is
a chain and everything can be hidden: the posterior needs only the nearest clean neighbours. Sum-product gives
the exact posterior of every hidden node.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.model.randomness import row_uniforms


@dataclass(frozen=True)
class TreeModel:
    """`parents[i] < i` is the parent of node i, -1 for the root (node 0)."""

    parents: tuple[int, ...]
    n_states: int
    stay: float
    observed: frozenset[int] = frozenset()

    def __post_init__(self):
        """Parents come before their children."""
        assert self.parents[0] == -1
        assert all(0 <= parent < node for node, parent in enumerate(self.parents) if node)

    @property
    def n_nodes(self) -> int:
        """Positions of a sequence."""
        return len(self.parents)

    @property
    def maskable(self) -> Bool[Tensor, " pos"]:
        """Nodes that are not always observed."""
        return torch.tensor([node not in self.observed for node in range(self.n_nodes)])

    def predicted(self, tokens: Int[Tensor, "n pos"]) -> Bool[Tensor, "n pos"]:
        """The nodes that are not always observed, of each sequence."""
        return self.maskable.to(tokens.device).expand_as(tokens)

    @property
    def symbols(self) -> list[str]:
        """What ids stand for, [MASK] aside."""
        return [str(state + 1) for state in range(self.n_states)]

    @property
    def transition(self) -> Float[np.ndarray, "parent child"]:
        """p(child's state | parent's state); symmetric."""
        off = (1 - self.stay) / (self.n_states - 1)
        return np.full((self.n_states, self.n_states), off) + (self.stay - off) * np.eye(self.n_states)

    def sample(self, n: int, seed: int, first_index: int = 0) -> Int[Tensor, "n pos"]:
        """Independent sequences; sequence i depends on (seed, first_index + i) alone."""
        uniforms = row_uniforms(seed, "relabel", n, self.n_nodes, first_index=first_index).numpy()
        states = np.zeros((n, self.n_nodes), dtype=np.int64)
        for node, parent in enumerate(self.parents):
            u = uniforms[:, node]
            if parent < 0:
                states[:, node] = u * self.n_states
                continue
            other = ((u - self.stay) / (1 - self.stay) * (self.n_states - 1)).astype(np.int64)
            other = np.clip(other, 0, self.n_states - 2)
            before = states[:, parent]
            states[:, node] = np.where(u < self.stay, before, other + (other >= before))
        return torch.from_numpy(states)

    def posterior(self, tokens: Int[Tensor, "n pos"], masked: Bool[Tensor, "n pos"]) -> Float[Tensor, "n pos k"]:
        """Exact p(state | all clean nodes) of every node, float64, by one sweep up and one down."""
        k, n = self.n_states, len(tokens)
        ids, hidden = tokens.cpu().numpy(), masked.cpu().numpy()
        evidence = np.where(hidden[..., None], 1.0, np.eye(k)[np.where(hidden, 0, ids)])
        below, upward = evidence.copy(), np.ones((n, self.n_nodes, k))
        for node in range(self.n_nodes - 1, 0, -1):
            upward[:, node] = _normalised(below[:, node] @ self.transition.T)
            below[:, self.parents[node]] *= upward[:, node]
        belief = np.ones_like(below)
        belief[:, 0] = _normalised(below[:, 0])
        for node in range(1, self.n_nodes):
            outside = belief[:, self.parents[node]] / upward[:, node]
            belief[:, node] = _normalised(below[:, node] * (outside @ self.transition))
        return torch.from_numpy(belief)

    def hops(
        self, masked: Bool[Tensor, "n pos"], tokens: Tensor | None = None  # noqa: ARG002 - as other tasks
    ) -> Int[Tensor, "n pos"]:  # fmt: skip
        """Rounds of belief propagation after which a hidden node's belief is exact; 0 for clean nodes.

        It is the distance to the farthest clean node that a path of hidden nodes leads to; 0 also where
        there is none, as the prior is exact from the start.
        """
        hidden = masked.cpu().numpy()
        near: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                near[node].append(parent)
                near[parent].append(node)
        reach = np.zeros(hidden.shape, dtype=np.int64)
        for start in range(self.n_nodes):
            fronts = [(start, -1, 0, hidden[:, start])]
            while fronts:
                node, origin, distance, alive = fronts.pop()
                heard = alive & ~hidden[:, node]
                reach[heard, start] = np.maximum(reach[heard, start], distance)
                onward = alive & hidden[:, node]
                fronts += [(other, node, distance + 1, onward) for other in near[node] if other != origin]
        return torch.from_numpy(np.where(hidden, reach, 0))


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum(-1, keepdims=True)


def binary_tree(levels: int) -> tuple[int, ...]:
    """Parents of a complete binary tree, breadth first."""
    return tuple((node - 1) // 2 if node else -1 for node in range(2**levels - 1))


TREE_TASKS = {
    "tree": TreeModel(binary_tree(6), 4, 0.85, frozenset(range(31, 63))),
    "markov": TreeModel(tuple(range(-1, 31)), 6, 0.8),
}
