"""`arithmetic`: trees of + - * over residues, written as text with every value; the answer is as deep as the tree.

A random tree is written from its leaves up, each operator followed by the value of what it closes, modulo 7:

    3 4 * 5 2 6 - 3 + 1        3 * 4 = 5, 2 - 6 = 3, and 5 + 3 = 1

Digits of the leaves and operators are condition; values are what is predicted. All of them follow from the
condition, so every nat of a likelihood is the model's own; a value whose operands are hidden, too, takes as many
steps as the longest chain of hidden operands below it. Every sequence is new.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.model.randomness import row_uniforms

OPERATORS = "+-*"


@dataclass(frozen=True)
class Arithmetic:
    """Trees of `n_operators` nodes over residues modulo `n_states`; ids are the residues, then + - *, then [MASK].

    A tree's shape is drawn from the top: the right operand gets 0 to `right` of the operators that are left, each
    number alike, and the left one the others. With a small `right` a tree is a long spine of short branches: deep,
    and easy to read, as an operand stands no further away than a branch is long.
    """

    n_operators: int
    n_states: int
    right: int

    @property
    def n_nodes(self) -> int:
        """Positions of a sequence: leaves, operators and their values."""
        return 3 * self.n_operators + 1

    @property
    def symbols(self) -> list[str]:
        """What ids stand for, [MASK] aside."""
        return [*map(str, range(self.n_states)), *OPERATORS]

    def sample(self, n: int, seed: int, first_index: int = 0) -> Int[Tensor, "n pos"]:
        """Independent sequences; sequence i depends on (seed, first_index + i) alone."""
        uniforms = row_uniforms(seed, "relabel", n, 3 * self.n_operators + 1, first_index=first_index).tolist()
        return torch.tensor([self._written(iter(row)) for row in uniforms])

    def _written(self, uniforms) -> list[int]:
        """One sequence; a stack in place of recursion, as trees may be as deep as they have operators."""
        out: list[int] = []
        values: list[int] = []
        todo: list[tuple[str, int]] = [("tree", self.n_operators)]
        while todo:
            what, number = todo.pop()
            if what == "tree" and number:
                right = int(next(uniforms) * (min(self.right, number - 1) + 1))
                operator = int(next(uniforms) * len(OPERATORS))
                todo += [("close", operator), ("tree", right), ("tree", number - 1 - right)]
                continue
            if what == "tree":
                values.append(int(next(uniforms) * self.n_states))
            else:
                right, left = values.pop(), values.pop()
                values.append(self.value(left, right, number))
                out.append(self.n_states + number)
            out.append(values[-1])
        return out

    def value(self, left: int, right: int, operator: int) -> int:
        """What an operator makes of two residues."""
        return (left + right, left - right, left * right)[operator] % self.n_states

    def predicted(self, tokens: Int[Tensor, "n pos"]) -> Bool[Tensor, "n pos"]:
        """The values: what follows an operator."""
        after = torch.zeros_like(tokens, dtype=torch.bool)
        after[:, 1:] = tokens[:, :-1] >= self.n_states
        return after

    def posterior(
        self, tokens: Int[Tensor, "n pos"], masked: Bool[Tensor, "n pos"]  # noqa: ARG002
    ) -> Float[Tensor, "n pos k"]:  # fmt: skip
        """p(residue | the condition): 1 at the value that follows from it, at leaves at the digit; float64.

        `tokens` may hold [MASK] where `masked`; operators have no residue: 0 everywhere.
        """
        known = np.zeros((*tokens.shape, self.n_states))
        for row, values in enumerate(self._evaluated(tokens)):
            for pos, (value, _) in values.items():
                known[row, pos, value] = 1.0
        return torch.from_numpy(known)

    def hops(self, masked: Bool[Tensor, "n pos"], tokens: Int[Tensor, "n pos"]) -> Int[Tensor, "n pos"]:
        """Steps of evaluation after which a hidden value is known; 0 for clean positions.

        1 where both operands can be read, else 1 more than the deeper hidden one takes.
        """
        hidden, reach = masked.tolist(), torch.zeros(masked.shape, dtype=torch.long)
        for row, values in enumerate(self._evaluated(tokens)):
            steps: dict[int, int] = {}
            for pos, (_, operands) in values.items():  # operands stand before their operator
                below = max((steps[operand] for operand in operands), default=-1)
                steps[pos] = below + 1 if hidden[row][pos] else 0
                reach[row, pos] = steps[pos]
        return reach

    def _evaluated(self, tokens: Int[Tensor, "n pos"]) -> list[dict[int, tuple[int, tuple[int, ...]]]]:
        """Of each sequence: by position of a residue, its value and where its operands stand."""
        return [self._read(row) for row in tokens.tolist()]

    def _read(self, row: list[int]) -> dict[int, tuple[int, tuple[int, ...]]]:
        found: dict[int, tuple[int, tuple[int, ...]]] = {}
        stack: list[int] = []
        for pos, token in enumerate(row):
            if pos and self.n_states <= row[pos - 1] < self.n_states + len(OPERATORS):
                right, left = stack.pop(), stack.pop()
                value = self.value(found[left][0], found[right][0], row[pos - 1] - self.n_states)
                found[pos] = (value, (left, right))
                stack.append(pos)
            elif token < self.n_states:
                found[pos] = (token, ())
                stack.append(pos)
        return found


ARITHMETIC_TASKS = {"arithmetic": Arithmetic(12, 7, 1)}
