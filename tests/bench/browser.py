"""The explorer in a headless browser: how fast a page opens, and how fast a change of loop or head is drawn."""

import shutil
import statistics
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loopmdm.analysis.report import explore
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from tests.bench.common import Row, at_most, shape

if TYPE_CHECKING:
    from playwright.sync_api import Page

LENGTH, N_LOOPS, REPEATS = 128, 12, 7
REDRAW = """(id) => new Promise((done) => {
    const select = document.getElementById(id), start = performance.now();
    select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
    select.dispatchEvent(new Event("change"));
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""
"""Milliseconds from a choice to the frame that shows it."""


def _page() -> str:
    """An explorer at T = 128 and 12 loops, of an untrained model: what is drawn is beside the point."""
    cfg = shape(128, 4, LENGTH, loops=N_LOOPS)
    m = HookedLoopMDM(cfg)
    tokens = torch.randint(0, cfg.d_vocab - 1, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    b = mask_tokens(tokens, cfg.mask_token_id, mask_ratio=0.5)
    return explore(m.run_with_cache(b.tokens, N_LOOPS)[1], clean=b).html


def explorer() -> Iterator[Row]:
    """Opening a page, changing the loop, changing the head."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None or find_spec("playwright") is None:
        yield "explorer", "needs Chromium and loopmdm[dev]", "", "not run"
        return
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder) / "page.html"
        file.write_text(_page(), encoding="utf-8")
        browser = driver.chromium.launch(executable_path=path)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        opened = statistics.median(_opening(page, file.as_uri()) for _ in range(REPEATS))
        yield at_most(f"opening an explorer of T={LENGTH}, S={N_LOOPS}", opened, 2.0, " s")
        for what in ("loop", "head"):
            times = [page.evaluate(REDRAW, f"b-{what}") for _ in range(REPEATS + 1)][1:]
            yield at_most(f"redrawing it at another {what}", statistics.median(times), 100, " ms")
        browser.close()


def _opening(page: "Page", address: str) -> float:
    """Seconds until the page is loaded and drawn."""
    page.goto(address)
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    return page.evaluate("performance.now()") / 1000
