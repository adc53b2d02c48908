"""Trees written out: read back by the language's own arithmetic, and by a second way of counting steps."""

import pytest
import torch

from loopmdm.model.tasks import batches
from loopmdm.model.tasks.arithmetic import ARITHMETIC_TASKS, Arithmetic
from loopmdm.model.tasks.test_sets import load_test_set

TASK = ARITHMETIC_TASKS["arithmetic"]
SHAPES = [TASK, Arithmetic(5, 3, 4), Arithmetic(1, 2, 0), Arithmetic(8, 5, 0)]


def read(task: Arithmetic, row: list[int]) -> list[tuple[int, str, int, int]]:
    """Every operation as (position of its value, expression, and where its operands stand), by rewriting."""
    stack, found, pos = [], [], 0
    words = [task.symbols[token] for token in row]
    while pos < len(words):
        if words[pos].isdigit():
            stack.append((pos, words[pos]))
            pos += 1
            continue
        (right, b), (left, a) = stack.pop(), stack.pop()
        found.append((pos + 1, f"({a} {words[pos]} {b})", left, right))
        stack.append((pos + 1, found[-1][1]))
        pos += 2
    assert len(stack) == 1
    return found


@pytest.mark.parametrize("task", SHAPES)
def test_every_value_is_that_of_its_expression(task):
    tokens = task.sample(60, seed=1)
    assert tokens.shape == (60, task.n_nodes)
    maskable = task.predicted(tokens)
    assert torch.equal(maskable.sum(-1), torch.full((60,), task.n_operators))
    for row, may in zip(tokens.tolist(), maskable.tolist(), strict=True):
        operations = read(task, row)
        assert [pos for pos, *_ in operations] == [pos for pos, hidden in enumerate(may) if hidden]
        for pos, expression, *_ in operations:
            assert row[pos] == eval(expression) % task.n_states


@pytest.mark.parametrize("task", SHAPES)
def test_steps_are_those_of_the_deepest_hidden_operand(task):
    tokens = task.sample(40, seed=2)
    masked = task.predicted(tokens) & (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.7)
    hidden = tokens.masked_fill(masked, len(task.symbols))
    steps, posterior = task.hops(masked, hidden), task.posterior(hidden, masked)
    assert torch.equal(steps > 0, masked)
    assert torch.equal(posterior.argmax(-1)[masked], tokens[masked])
    assert torch.equal(posterior.sum(-1)[masked], torch.ones(int(masked.sum())).double())
    for row in range(len(tokens)):
        operands = {pos: (left, right) for pos, _, left, right in read(task, tokens[row].tolist())}
        known = {pos for pos in range(task.n_nodes) if not masked[row, pos]}
        rounds = 0
        while len(known) < task.n_nodes:
            rounds += 1
            told = {pos for pos, below in operands.items() if pos not in known and known.issuperset(below)}
            assert {int(steps[row, pos]) for pos in told} == {rounds}
            known |= told


def test_spines_are_deep_and_sequences_a_function_of_their_number():
    tokens = TASK.sample(200, seed=0)
    steps = TASK.hops(TASK.predicted(tokens), tokens).amax(-1).double()
    assert 7.5 < float(steps.mean()) < 9 and int(steps.min()) >= 6
    assert torch.equal(TASK.sample(3, 0, first_index=5), TASK.sample(8, 0)[5:])
    assert not torch.equal(TASK.sample(3, 0), TASK.sample(3, 1))


def test_the_data_set_hides_values_alone():
    data = batches.dataset("arithmetic", 0, 0, seed=3)
    assert batches.TASK_SIZES["arithmetic"] == (37, 11) and data.tokenizer.token_to_id("[MASK]") == 10
    batch = data.batch(4, 6)
    assert torch.equal(data.batch(3, 8)[-4:], data.batch(7, 4)[:4]) and not torch.equal(batch, data.batch(5, 6))
    assert data.tokenizer.decode(batch[0].tolist()).replace(" ", "") == "".join(TASK.symbols[i] for i in batch[0])
    test = load_test_set("arithmetic", 0, None)
    assert torch.equal(test.tokens, data.evaluation("test")) and torch.equal(
        test.n_maskable, torch.full((1000,), 12)
    )
    assert not set(map(tuple, test.tokens.tolist())) & set(map(tuple, data.evaluation("validation").tolist()))
