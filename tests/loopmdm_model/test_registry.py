"""Names are given once; other packages join by entry points; what does not load is left out with a line."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from loopmdm.model.errors import UsageError
from loopmdm.model.registry import Registry

ROOT = Path(__file__).parents[2]


@dataclass
class Thing:
    name: str
    size: int = 0


def made(*items):
    return Registry("thing", Thing, "loopmdm.things-of-a-test", items)


def test_a_name_is_given_once_and_may_be_replaced_on_purpose():
    registry = made(Thing("one"))
    with pytest.raises(UsageError, match="the thing 'one' is registered already"):
        registry.add(Thing("one"))
    with pytest.raises(UsageError, match="must be a Thing, got int"):
        registry.add(3)
    registry["one"] = Thing("one", 2)
    assert registry["one"].size == 2 and list(registry) == ["one"] and len(registry) == 1
    for name, item in (("one", 3), ("two", Thing("one"))):
        with pytest.raises(UsageError, match="takes a Thing of that name"):
            registry[name] = item
    with pytest.raises(KeyError, match="did you mean one"):
        _ = registry["won"]


PLUGIN = """
from dataclasses import replace
from loopmdm.analysis.measures.attention import mask_attention
from loopmdm.analysis.measures import Measure
from loopmdm.model.adapters.families import RECORDS


def count(case, b):
    return mask_attention(case.m, b, 1)[["loop", "n"]].head(1)


measure = Measure("count-of-a-plugin", "how many sequences", count)
twice = [Measure("mask-attention", "a name that is taken", count)]
family = replace(RECORDS["bert"], name="bert-of-a-plugin", classes=("BertOfAPlugin",))
"""
POINTS = """
[loopmdm.measures]
broken = plugin_of_a_test_that_is_not_there
count = plugin_of_a_test:measure
twice = plugin_of_a_test:twice

[loopmdm.models]
bert = plugin_of_a_test:family
"""
ASKED = """
import warnings
from pathlib import Path
import torch
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    {first}
    from loopmdm.analysis.measures import MEASURES, measure
    from loopmdm.model.adapters.families import FAMILIES, name_of_class
    frame = measure("count-of-a-plugin", "markov-loop", n=4, mask_ratios=(0.5,))
    assert frame["n"].tolist() == [4], frame
    assert name_of_class("BertOfAPlugin") == "bert-of-a-plugin" and "bert" in FAMILIES
    assert "masses" in MEASURES["mask-attention"].what
for warning in said:
    print(warning.message)
"""


@pytest.fixture
def package(tmp_path):
    """A package as an installer leaves it: a module, and a folder of metadata with its entry points."""
    (tmp_path / "plugin_of_a_test.py").write_text(PLUGIN)
    about = tmp_path / "plugin_of_a_test-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-a-test\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    return tmp_path


@pytest.mark.parametrize("first", ["import loopmdm.analysis.measures", "import plugin_of_a_test"])
@pytest.mark.slow
def test_another_package_joins_whatever_is_imported_first(package, first):
    environment = os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", ASKED.format(first=first, folder=package)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "plugin-of-a-test" in line]
    taken = "the measure 'mask-attention' (of plugin-of-a-test) is registered already; give it another name"
    absent = "No module named 'plugin_of_a_test_that_is_not_there'"
    assert lines == [
        f"{name} of plugin-of-a-test is left out of the measures: {text}"
        for name, text in (("broken", absent), ("twice", taken))
    ]
