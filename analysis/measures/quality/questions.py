"""Questions with known answers: multiple choice by likelihood, word problems by generation."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.likelihood import continuation_nelbo
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.errors import UsageError
from loopmdm.model.tasks import benchmarks, gsm


def multiple_choice(
    case: Case,
    counts: list[int],
    tasks: Sequence[str] = tuple(benchmarks.CHOICES),
    n: int = 200,
    n_samples: int = 8,
) -> pd.DataFrame:
    """Accuracy of choosing the answer of highest likelihood given its question, for `n` items a benchmark.

    `rule` "total" compares log-likelihoods, "per byte" divides them by the answer's length. `chance` is that of a
    guess, `constant` that of the best fixed place. Contexts lose their beginning where they do not fit n_ctx.
    """
    case.need_text("multiple-choice")
    rows = []
    for task in tasks:
        items = benchmarks.multiple_choice(task)
        items = [items[i] for i in np.linspace(0, len(items) - 1, min(n, len(items))).astype(int)]
        answers = np.array([item.answer for item in items])
        chance = float(np.mean([1 / len(item.choices) for item in items]))
        constant = np.bincount(answers).max() / len(answers)
        for count in counts:
            picks = choose(case, items, count, n_samples)
            for rule, picked in picks.items():
                right = picked == answers
                low, high = stats.wilson(int(right.sum()), len(right))
                rows.append((task, count, rule, right.mean(), low, high, chance, constant, n_samples, len(right)))
    columns = ["task", "n_loops", "rule", "accuracy", "low", "high", "chance", "constant", "n_samples", "n"]
    return pd.DataFrame(rows, columns=columns)


def choose(case: Case, items: Sequence[benchmarks.Choice], n_loops: int, n_samples: int) -> dict[str, np.ndarray]:
    """The place of the likeliest answer of each item [item], by total log-likelihood and per byte."""
    prompts, continuations, owners, sizes = [], [], [], []
    for number, item in enumerate(items):
        for choice in item.choices:
            prompt, continuation = fitted(case, item.context, choice)
            prompts.append(prompt)
            continuations.append(continuation)
            owners.append(number)
            sizes.append(len(choice.encode()))
    r = continuation_nelbo(case.m, prompts, continuations, n_loops, n_samples=n_samples)
    total = -(r.per_sequence * r.lengths).numpy()
    scores = {"total": total, "per byte": total / np.array(sizes)}
    owner = np.array(owners)
    return {
        rule: np.array([int(score[owner == number].argmax()) for number in range(len(items))])
        for rule, score in scores.items()
    }


def fitted(case: Case, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of both, the context cut from its beginning, then the continuation from its end, to fit n_ctx."""
    ids = case.tokenizer.encode(continuation).ids[: case.m.cfg.n_ctx]
    room = case.m.cfg.n_ctx - len(ids)
    before = case.tokenizer.encode(context).ids
    return before[len(before) - min(room, len(before)) :], ids


def word_problems(
    case: Case,
    counts: list[int],
    steps: int = 64,
    order: str = "confidence",
    temperature: float = 0.0,
    n: int = 100,
) -> pd.DataFrame:
    """Share of word problems whose final number, generated after "####", is right.

    Problems of unseen templates and the real GSM8K items (those that match no template). `chance` is always giving
    the commonest answer of the training problems.
    """
    if case.test.task != "gsm-symbolic":
        raise UsageError(f"{case.m.model_name} was not trained on gsm-symbolic; word-problems needs such a model")
    answers = [problem.number for problem in gsm.problems("train", 2000, seed=0)]
    common = max(set(answers), key=answers.count)
    rows = []
    for name, asked in (
        ("gsm-symbolic", gsm.problems("test", n, seed=1)),
        ("gsm8k-100", benchmarks.word_problems("gsm8k-100")[:n]),
    ):
        clues, skipped = _prompts(case, [problem.question for problem in asked])
        kept = [problem for number, problem in enumerate(asked) if number not in skipped]
        chance = float(np.mean([problem.number == common for problem in kept]))
        for count in counts:
            r = sample(case.m, clues=clues, steps=steps, n_loops=count, order=order, temperature=temperature)
            written = [_answer(case, row, clue) for row, clue in zip(r.tokens, clues, strict=True)]
            found = [gsm.final_number(text) for text in written]
            right = [given == problem.number for given, problem in zip(found, kept, strict=True)]
            low, high = stats.wilson(sum(right), len(right))
            rows.append((name, count, steps, order, temperature, r.flops / len(right), float(np.mean(right)), low,
                         high, chance, len(skipped), len(right)))  # fmt: skip
    columns = ["task", "n_loops", "steps", "order", "temperature", "flops", "accuracy", "low", "high", "chance",
               "too_long", "n"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _prompts(case: Case, questions: list[str]) -> tuple[torch.Tensor, set[int]]:
    """Clues [problem, pos], -1 where the answer goes; and which questions leave it less than a quarter."""
    length = case.m.cfg.n_ctx
    rows, skipped = [], set()
    for number, question in enumerate(questions):
        ids = gsm.prompt_ids(case.tokenizer, question)
        if len(ids) > 0.75 * length:
            skipped.add(number)
        else:
            rows.append(ids + [-1] * (length - len(ids)))
    return torch.tensor(rows), skipped


def _answer(case: Case, tokens: torch.Tensor, clue: torch.Tensor) -> str:
    return case.tokenizer.decode(tokens[clue < 0].tolist(), skip_special_tokens=True)


MEASURES = (
    Measure(
        "multiple-choice", "accuracy of the likeliest answer on benchmarks", multiple_choice, "loops", others=False
    ),
    Measure("word-problems", "share of word problems answered right", word_problems, "loops", others=False),
)
