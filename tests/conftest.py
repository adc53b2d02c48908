"""Toys that all tests share."""

import inspect
import os
import re
from functools import cache
from typing import Any

import pytest
import torch

from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.zoo.runs import Zoo

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: two workers share the cores
torch.set_num_threads(1)


def toy_config(**changes) -> LoopMDMConfig:
    """1 + 2 x S + 1 layers, small enough for milliseconds."""
    shape = {"d_vocab": 23, "n_ctx": 16, "d_model": 16, "n_heads": 2, "n_prelude_layers": 1}
    shape |= {"n_loop_layers": 2, "n_coda_layers": 1, "max_loops": 3, "initializer_range": 0.4}
    return LoopMDMConfig(**(shape | changes))


def toy_model(seed: int = 0, **changes) -> LoopMDM:
    """A toy with weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    return LoopMDM(toy_config(**changes)).eval()


def toy_spec(budget: str, points: int, more: str = "", name: str = "tiny") -> str:
    """TOML of a training run of seconds: a `budget` such as "steps = 6", and what else it asks of training."""
    return f"""
name = "{name}"
seed = 1
[data]
corpus = "sudoku6"
[model]
d_model = 32
n_heads = 2
max_loops = 3
[training]
{budget}
batch_size = 8
warmup_steps = 5
curve_points = {points}
curve_sequences = 16
{more}
"""


@pytest.fixture
def model() -> LoopMDM:
    return toy_model()


@pytest.fixture
def hooked(model) -> HookedLoopMDM:
    return HookedLoopMDM(model)


@pytest.fixture
def clean() -> torch.Tensor:
    return torch.randint(0, 22, (4, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def batch(clean) -> MaskedBatch:
    return mask_tokens(clean, 22, mask_ratio=0.5, seed=0)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def shipped() -> re.Pattern:
    """Names of shipped models, by the roster: a clone whose weights are away marks the same tests."""
    return re.compile(rf"\b({'|'.join(re.escape(run.name) for run in Zoo.roster() if run.weights)})\b")


SHIPPED = shipped()


@cache
def _own(code: Any) -> tuple[bool, tuple[Any, ...]]:
    """Whether a function's source, or a constant that it names, has a shipped name; and the functions it names."""
    source = inspect.getsource(code)
    texts, called = [source], []
    for value in map(code.__globals__.get, sorted(set(re.findall(r"\w+", source)))):
        if isinstance(value, str | tuple | list | dict | set):
            texts.append(repr(value))
        elif inspect.isfunction(value) and value.__module__ == code.__module__:
            called.append(value)
    return any(SHIPPED.search(text) for text in texts), tuple(called)


def _names_shipped(codes: list[Any]) -> bool:
    """Whether functions, or what they name in their modules, name a shipped model."""
    seen: set[Any] = set()
    while codes:
        seen.add(code := codes.pop())
        found, called = _own(code)
        if found:
            return True
        codes += [value for value in called if value not in seen]
    return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as "weights" what names a shipped model: in itself, in what it uses, or as a parameter."""
    for item in items:
        fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
        words = map(str, item.callspec.params.values()) if hasattr(item, "callspec") else ()
        codes = [code for code in (item.function, *fixtures) if inspect.isfunction(code)]
        if any(SHIPPED.search(text) for text in words) or _names_shipped(codes):
            item.add_marker(pytest.mark.weights)
