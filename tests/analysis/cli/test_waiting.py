"""Without a terminal a line now and then says how far long work is, and when it will be done."""

import re
import time

import pytest

from loopmdm.analysis.cli import waiting
from tests.commands import loopmdm


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(waiting, "EVERY", 0.05)


def test_counted_work_tells_what_is_done_and_what_is_left(capsys):
    with waiting.progress_bar() as bar:
        for _ in bar.track(range(4), description="tables"):
            time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("tables: 0 of 4, ") and lines[0].endswith(" so far")
    assert any(re.fullmatch(r"tables: [123] of 4, about \d+ s left", line) for line in lines), lines
    time.sleep(0.15)
    assert capsys.readouterr().err == ""  # what is over says nothing more


def test_work_that_cannot_be_counted_tells_how_long_it_has_run(capsys):
    with pytest.raises(KeyError), waiting.working("nll of a model"):
        time.sleep(0.2)
        raise KeyError
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and set(lines) == {"nll of a model: 0 s so far"}


def test_a_command_tells_it_and_prints_the_same_table(monkeypatch):
    monkeypatch.setattr(waiting, "EVERY", 0.002)
    words = ("measure", "effective-rank", "markov-loop", "--n", 16, "--mask-ratios", 0.5)
    out, err = loopmdm(*words)
    assert err and all(
        re.fullmatch(r"effective-rank of markov-loop: \d+ s so far", line) for line in err.splitlines()
    )
    monkeypatch.setattr(waiting, "EVERY", 60.0)
    assert loopmdm(*words) == (out, "")


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.2, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_times_are_told_as_one_says_them(seconds, told):
    assert waiting.told(seconds) == told
