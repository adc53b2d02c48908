"""The README and the pages of docs/: short where they should be, links that lead somewhere, examples that run."""

import re
from pathlib import Path

import matplotlib
import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "docs" / "guides").glob("*.md"))]  # fmt: skip
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
SITE = {"reference/index", "figures", "changelog", "contributing", "guides/pipeline"}
"""Pages that docs/build.py writes or borrows."""
NOT_RUN = {"foreign.md"}
"""Pages whose examples need a network."""


def blocks(page: Path) -> list[str]:
    text = page.read_text("utf-8")
    if page.suffix == ".py":  # a chapter: the folded solutions of its exercises
        text = re.sub(r"^# ?", "", text, flags=re.M) if "<details>" in text else ""
    return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


def test_the_readme_is_short_and_no_table_is_wider_than_a_screen():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 150
    for line in lines:
        assert len(line) <= 160 or line.startswith(("![", "*")), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for role in re.findall(r"\{doc\}`(?:[^`<]*<)?/?([^`>]+)>?`", text):
        assert role in SITE or (ROOT / "docs" / f"{role}.md").exists(), role


@pytest.mark.weights
@pytest.mark.parametrize(
    "page", [page for page in (*PAGES, *CHAPTERS) if blocks(page)], ids=lambda page: page.name
)
def test_examples_run(page, tmp_path, monkeypatch):
    if page.name in NOT_RUN:
        pytest.skip("its examples need a network")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    space: dict = {}
    with torch.no_grad():
        for block in blocks(page):
            exec(compile(block, str(page), "exec"), space)
        if page.name == "README.md":  # the output that stands below is that of the last line
            shown = eval(blocks(page)[0].splitlines()[-1], space).round(3).to_string()
            assert shown in page.read_text("utf-8"), shown
