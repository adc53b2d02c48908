"""Benchmarks read out of fetched archives: `multiple_choice` to be scored by likelihood, `word_problems` to solve.

Items whose answer the data leave open are left out: with choices that repeat (5 of siqa's 1,954), or asked
twice with different answers (5 pairs of siqa); of those asked twice alike (19 pairs of siqa) one is kept. That
leaves 1,920 of siqa; boolq (3,270), piqa (1,500), openbookqa (500) and hellaswag-100 (100) are whole. A row that
cannot be read is an error. Answers are balanced but for boolq (yes: 62%).
"""

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from loopmdm.model.corpora.fetch import cached_archive, source
from loopmdm.model.corpora.readers import records
from loopmdm.model.errors import UsageError, unknown_name
from loopmdm.model.tasks.gsm import TEMPLATES, Problem, draw, final_number

WORD_PROBLEMS = ("gsm8k-100",)
# Templates of gsm-symbolic were made from these items. By `overlap_with_templates` they reach 0.38 to 1,
# and read alike; all others stay below 0.13.
IN_GSM_SYMBOLIC = (
    "gsm8k-test-0432",  # template 93, princes who slay dragons
    "gsm8k-test-0440",  # 85, the perimeter of a room
    "gsm8k-test-0469",  # 4, jars of sprinkles
    "gsm8k-test-0546",  # 52, writing the alphabet
    "gsm8k-test-0740",  # 30, hobbies of a class
    "gsm8k-test-1247",  # 70, a bag of marbles
)
OVERLAP_LIMIT = 0.25
OVERLAP_DRAWS = 60
Item = TypeVar("Item")


@dataclass(frozen=True)
class Choice:
    """A context and its possible continuations, each with its leading space; `answer` indexes them."""

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int


def multiple_choice(name: str) -> list[Choice]:
    """The items of a benchmark, in the order of its file."""
    if name not in CHOICES:
        raise unknown_name("multiple-choice benchmark", name, CHOICES)
    return _unambiguous(_read(name, CHOICES[name]))


def word_problems(name: str) -> list[Problem]:
    """Real GSM8K items with their rationales, calculator notes removed, without those in `IN_GSM_SYMBOLIC`."""
    if name not in WORD_PROBLEMS:
        raise unknown_name("word-problem benchmark", name, WORD_PROBLEMS)
    return [problem for identifier, problem in _read(name, _gsm8k) if identifier not in IN_GSM_SYMBOLIC]


def _read(name: str, parse: Callable[[str, dict[str, Any]], Item]) -> list[Item]:
    archive = cached_archive(source(name))
    if archive is None:
        raise UsageError(f"benchmark {name} is not here yet; run `loopmdm data fetch {name}`")
    try:
        rows = records(archive, source(name).member)
    except ValueError as error:
        raise UsageError(f"benchmark {name} has a line that is not JSON: {error}") from error
    items = []
    for number, row in enumerate(rows):
        try:
            items.append(parse(f"{name}-{number:04}", row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"row {number} of benchmark {name} is malformed ({error!r}): {row!r}") from error
    return items


def _unambiguous(items: list[Choice]) -> list[Choice]:
    answers: dict[Hashable, set[int]] = {}
    for item in items:
        answers.setdefault((item.context, item.choices), set()).add(item.answer)
    kept: dict[Hashable, Choice] = {}
    for item in items:
        key = (item.context, item.choices)
        if len(answers[key]) == 1 and len(set(item.choices)) == len(item.choices):
            kept.setdefault(key, item)
    return list(kept.values())


def _spaced(choices: Iterable[str]) -> tuple[str, ...]:
    return tuple(f" {_filled(choice)}" for choice in choices)


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("empty text")
    return text.strip()


def _options(row: dict[str, Any], n: int) -> tuple[tuple[str, ...], int]:
    """The `n` choices of lines "A. .." without their letters, and which is the answer."""
    lines = row["options"].split("\n")
    if len(lines) != n:
        raise ValueError(f"{len(lines)} options, not {n}")
    for letter, line in zip("ABCD", lines, strict=False):
        if not line.startswith(f"{letter}. "):
            raise ValueError(f"option {letter} reads {line!r}")
    return _spaced(line[3:] for line in lines), lines.index(row["answer"])


def _boolq(identifier: str, row: dict[str, Any]) -> Choice:
    answer = ["False", "True"].index(row["answer"])
    context = f"{_filled(row['passage'])}\nQuestion: {_filled(row['question'])}?\nAnswer:"
    return Choice(identifier, context, (" no", " yes"), answer)


def _piqa(identifier: str, row: dict[str, Any]) -> Choice:
    return Choice(identifier, f"Question: {_filled(row['question'])}\nAnswer:", *_options(row, 2))


def _openbookqa(identifier: str, row: dict[str, Any]) -> Choice:
    return Choice(identifier, _filled(row["question"]), *_options(row, 4))


def _siqa(identifier: str, row: dict[str, Any]) -> Choice:
    context = f"{_filled(row['passage'])}\nQuestion: {_filled(row['question'])}\nAnswer:"
    return Choice(identifier, context, *_options(row, 3))


def _hellaswag(_: str, row: dict[str, Any]) -> Choice:
    choices, answer = _spaced(_without_marks(ending) for ending in row["endings"]), row["expected_index"]
    if len(choices) != 4 or answer not in range(4):
        raise ValueError(f"answer {answer!r} of {len(choices)} endings")
    return Choice(row["id"], _filled(_without_marks(row["ctx"])), choices, answer)


def _without_marks(text: str) -> str:
    """WikiHow's "[title]", "[step]" .. removed, as HellaSwag's usual harness does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _gsm8k(_: str, row: dict[str, Any]) -> tuple[str, Problem]:
    answer = re.sub(r"<<[^>]*>>", "", _filled(row["upstream_answer"]))
    number = final_number(answer)
    if number is None or number != final_number(f"#### {row['expected']}"):
        raise ValueError(f"the rationale ends with {number}, expected {row['expected']}")
    return row["id"], Problem(None, _filled(row["prompt"]), answer, number)


CHOICES: dict[str, Callable[[str, dict[str, Any]], Choice]] = {
    "boolq": _boolq,
    "hellaswag-100": _hellaswag,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "siqa": _siqa,
}


def _four_grams(text: str) -> set[tuple[str, ...]]:
    """Of words in lower case; numbers are all one word, capitalised words (names) another."""
    words = ["0" if word[0].isdigit() else "N" if word[0].isupper() else word
             for word in re.findall(r"[A-Za-z]+|\d[\d,./]*", text)]  # fmt: skip
    return set(zip(words, words[1:], words[2:], words[3:], strict=False))


@lru_cache(maxsize=1)
def _template_grams() -> dict[int, set[tuple[str, ...]]]:
    return {
        template: set().union(*(_four_grams(draw(template, 0, index).question) for index in range(OVERLAP_DRAWS)))
        for template in TEMPLATES
    }


def overlap_with_templates(question: str) -> float:
    """The largest share of a question's 4-grams of words that draws of one gsm-symbolic template have, 0..1."""
    grams = _four_grams(question)
    return max(len(grams & known) for known in _template_grams().values()) / max(1, len(grams))
