"""Examples in docstrings run, and every public name has one line that says what it is."""

import doctest
import importlib
import inspect
import pkgutil
from dataclasses import dataclass

import matplotlib
import pytest
import torch

import loopmdm as lm

PUBLIC = sorted({*lm.model.__all__, *lm.analysis.__all__})
FINDER = doctest.DocTestFinder(exclude_empty=True, recurse=False)
WITH_EXAMPLES = [name for name in PUBLIC if ">>>" in (inspect.getdoc(getattr(lm, name)) or "")]


def modules():
    for part in (lm.model, lm.analysis):
        yield part
        for _, name, _ in pkgutil.walk_packages(part.__path__, f"{part.__name__}."):
            if not name.endswith("__main__"):
                yield importlib.import_module(name)


def test_there_are_examples_of_what_people_call_first():
    assert len(WITH_EXAMPLES) >= 20


@pytest.mark.weights
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_an_example_gives_what_it_says(name, tmp_path, monkeypatch):
    """`m` is a Sudoku model, `b` two of its test boards with half of the cells hidden."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    with torch.no_grad():
        m = lm.open_model("sudoku-loop-s4", device="cpu")
        space = {"lm": lm, "torch": torch, "m": m, "b": lm.Case.of(m, n=2).masked(0.5)}
        for test in FINDER.find(getattr(lm, name), name, globs=space):
            said: list[str] = []
            doctest.DocTestRunner().run(test, out=said.append, clear_globs=False)
            assert not said, "".join(said)


def said_of(found):
    """Its own docstring: not a base's, and not the signature that a dataclass without one is given."""
    said = vars(found).get("__doc__") if inspect.isclass(found) else found.__doc__
    return "" if (said or "").startswith(f"{found.__name__}(") else said


def test_a_base_or_a_signature_says_nothing_of_a_class():
    class Base:
        """What it is."""

    class Under(Base):
        pass

    @dataclass
    class Held:
        n: int

    assert said_of(Base) and not said_of(Under) and not said_of(Held)


def test_every_public_name_says_what_it_is():
    bare = []
    for module in modules():
        for name in vars(module):
            found = vars(module)[name]
            own = getattr(found, "__module__", None) == module.__name__ and not name.startswith("_")
            if own and (inspect.isfunction(found) or inspect.isclass(found)) and not said_of(found):
                bare.append(f"{module.__name__}.{name}")
    assert bare == []
