"""A bounded, seeded part of the fuzz in every run of the tests; `make soak` takes far more of it."""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests import commands, fuzz, fuzz_calls

BOUNDED = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)  # fmt: skip
TESTS, SOAK = {"words": 150, "files": 50, "calls": 100}, {"words": 2500, "files": 1000, "calls": 1500}
"""Inputs of each kind."""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder, no hub, no cache of anybody's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    (tmp_path / "made" / "folder").mkdir(parents=True)
    os.mkfifo(tmp_path / "made" / "fifo")
    return tmp_path


def wrong_words(place, tally):
    """A command with one wrong word: exit code 2, one line, nothing written."""

    def check(arguments):
        before = fuzz.contents(place)
        outcome = commands.run(arguments)
        tally.note(outcome.code)
        assert outcome.code == 2, (arguments, outcome.trace or outcome)
        assert outcome.clear and outcome.out == "", (arguments, outcome)
        assert fuzz.contents(place) == before, arguments

    return fuzz.COMMANDS, check


def damaged_files(place, tally):
    """A model or a spec with anything in it: it runs, or exit code 2, one line, nothing written."""

    def check(case):
        for folder in place.glob("case*"):
            fuzz.shutil.rmtree(folder)
        folder = place / f"case{tally.inputs}"
        folder.mkdir()
        arguments = fuzz.write_case(folder, *case)
        before = fuzz.contents(place)
        outcome = commands.run(arguments)
        tally.note(outcome.code)
        assert outcome.code in (0, 2), (case, outcome.trace or outcome)
        assert outcome.code == 0 or (outcome.clear and outcome.out == ""), (case, outcome)
        assert "nan" not in outcome.out and fuzz.contents(place) == before, case

    return fuzz.FILES, check


def wrong_calls(place, tally):
    """A call of the Python API with one wrong argument: a UsageError. With right ones: no NaN beside n > 0."""

    def check(call):
        end = fuzz_calls.end_of(*call)
        tally.note(end)
        assert end in ("UsageError", "fine"), (call, end)

    return fuzz_calls.CALLS, check


KINDS = {"words": wrong_words, "files": damaged_files, "calls": wrong_calls}
EACH = pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=pytest.mark.weights) for k in ("words", "files")), "calls"]
)


def fuzzed(kind, n, place):
    tally = fuzz.Tally()
    inputs, check = KINDS[kind](place, tally)
    settings(BOUNDED, max_examples=n)(given(inputs)(check))()
    assert tally.inputs >= 0.9 * n  # a small space of inputs may end earlier
    return tally


@EACH
def test_bad_inputs_end_in_one_line(kind, place):
    tally = fuzzed(kind, TESTS[kind], place)
    assert tally.ends["2"] + tally.ends["UsageError"] > 0.5 * tally.inputs


@pytest.mark.parametrize("name", fuzz_calls.WRONG)
def test_each_argument_of_a_call_is_given_wrongly(name):
    def check(value):
        assert fuzz_calls.end_of(name, value) == "UsageError", value

    settings(BOUNDED, max_examples=2)(given(fuzz_calls.WRONG[name][1])(check))()


@pytest.mark.soak
@EACH
def test_thousands_of_bad_inputs(kind, place):
    print(f"\nfuzz of {KINDS[kind].__name__.replace('_', ' ')}, {fuzzed(kind, SOAK[kind], place)}; 0 tracebacks")
