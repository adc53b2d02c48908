"""The explorer in a real browser: what is chosen is what is drawn, and the numbers shown are the model's."""

import os
import re
import shutil

import pytest
from tokenizers import Tokenizer, models

from loopmdm.analysis import explore, read_loops
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.report.inputs import MODELS
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.zoo.runs import Zoo
from tests.conftest import toy_config

HOSTILE = {0: "<script>", 1: "</script>", 2: "<img src=x onerror=alert(1)>", 3: "&amp;", 4: '"', 5: "<!--"}
SHOWN = 5e-5 + 8e-6
"""Four decimals of a weight stored in 16 bits."""
NUMBERS = re.compile(r"^Query (\d+) .* → key (\d+) .*: A ([\d.]+), B ([\d.]+), B − A ([+−]?[\d.]+)$")


def find_chromium() -> str | None:
    """The system's Chromium or Chrome."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    path = find_chromium()
    if path is None:
        missing = "no Chromium on this machine; `apt-get install chromium` runs these tests"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path)
        yield running
        running.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Open a document offline; at the end nothing was asked of the network and the console is silent."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    asked, said = [], []

    def go(document: str, width: int = 1280):
        path = tmp_path / "page.html"
        path.write_text(document, encoding="utf-8")
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append("a dialog opened"))
        page.goto(path.as_uri())
        return page

    yield go
    context.close()
    assert [url for url in asked if not url.startswith(("file:", "data:", "about:"))] == []
    assert said == []


@pytest.fixture(scope="module")
def named() -> HookedLoopMDM:
    """A toy whose tokens are hostile to HTML."""
    import torch

    torch.manual_seed(0)
    words = {HOSTILE.get(i, f" w{i}"): i for i in range(22)} | {"[MASK]": 22}
    m = HookedLoopMDM(LoopMDM(toy_config()).eval(), Tokenizer(models.WordLevel(words, unk_token="[MASK]")))
    m.model_name = "toy <b>"
    return m


def check_accessible(page) -> None:
    """What axe-core finds is at most minor, with everything unfolded."""
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    found = Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"][:120]) for one in found if one["impact"] != "minor"] == []


@pytest.fixture
def run(named, batch):
    tokens = batch.rows(slice(0, 1))
    return tokens, named.run_with_cache(tokens.tokens, n_loops=4)[1]


@pytest.fixture
def page(visit, run):
    tokens, cache = run
    return visit(explore(cache, clean=tokens).html)


def numbers(page) -> tuple[int, int, float, float, float]:
    """Query, key, A, B, B − A, as they are announced."""
    found = NUMBERS.match(page.inner_text("#numbers").replace("\u00a0", " "))
    query, key, a, b, change = (word.replace("−", "-") for word in found.groups())
    return int(query), int(key), float(a), float(b), float(change)


def choose(page, side, **setting):
    for name, value in setting.items():
        page.select_option(f"#{side}-{name}", str(value))


def pattern(named, tokens, layer, loop, n_loops, head):
    cache = named.run_with_cache(tokens.tokens, n_loops=n_loops)[1]
    looped = layer in named.cfg.layers("loop")
    found = cache["pattern", "loop", loop, layer] if looped else cache["pattern", layer]
    return found[0].mean(0) if head == "mean" else found[0, head]


@pytest.mark.parametrize("order", ["position", "masked-first"])
def test_the_numbers_under_the_pointer_are_the_patterns(page, named, run, order):
    page.select_option("#order", order)
    settings = ((1, 0, 4, 0, 2, 2, 4, 1), (0, 0, 4, 1, 3, 0, 2, "mean"), (3, 0, 1, 0, 3, 0, 3, 0))
    for a_layer, a_loop, a_loops, a_head, b_layer, b_loop, b_loops, b_head in settings:
        for side, layer, loop, n_loops, head in (
            ("a", a_layer, a_loop, a_loops, a_head),
            ("b", b_layer, b_loop, b_loops, b_head),
        ):
            choose(page, side, layer=layer, n_loops=n_loops, head=head)
            assert page.is_disabled(f"#{side}-loop") == (layer in (0, 3))
            if layer in (1, 2):
                choose(page, side, loop=loop)
        left = pattern(named, run[0], a_layer, a_loop, a_loops, a_head)
        right = pattern(named, run[0], b_layer, b_loop, b_loops, b_head)
        seen = set()
        for side, x, y in (("a", 80, 90), ("b", 150, 120), ("d", 250, 200), ("a", 120, 220)):
            page.hover(f"#{side}-map", position={"x": x, "y": y})
            query, key, a, b, change = numbers(page)
            seen.add((query, key))
            assert a == pytest.approx(float(left[query, key]), abs=SHOWN)
            assert b == pytest.approx(float(right[query, key]), abs=SHOWN)
            assert change == pytest.approx(float(right[query, key] - left[query, key]), abs=2 * SHOWN)
        assert len(seen) == 4
    masses = [float(cell) for cell in page.locator("#a-row td").all_inner_texts()]
    assert sum(masses[1:]) == pytest.approx(1, abs=2e-4)


def test_the_black_cell_is_the_largest_weight(page, named, run):
    for side in ("a", "b"):
        choose(page, side, layer=1, head=0, loop=0)
    weights = pattern(named, run[0], 1, 0, 4, 0)
    black = page.evaluate(
        """() => {
            const canvas = document.getElementById("a-map"), found = [];
            const all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            const above = canvas.height - 60; // the colour bar is black at its end
            for (let at = 0; at < 4 * canvas.width * above; at += 4) {
                const dark = all[at] + all[at + 1] + all[at + 2] === 0;
                if (dark) found.push([(at / 4) % canvas.width, Math.floor(at / 4 / canvas.width)]);
            }
            return found;
        }"""
    )
    x, y = (sum(values) / len(black) for values in zip(*black, strict=True))
    page.hover("#a-map", position={"x": x, "y": y})
    assert numbers(page)[:2] == divmod(int(weights.argmax()), weights.shape[1])


def test_the_keyboard_reaches_everything(page):
    page.focus("#input")
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    for wanted in (
        "order",
        "shade",
        "a-model",
        "a-n_loops",
        "a-layer",
        "a-loop",
        "a-head",
        "a-map",
        "b-map",
        "d-map",
    ):
        assert wanted in reached
    page.focus("#b-map")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Home")
    page.keyboard.press("PageUp")
    assert numbers(page)[:2] == (0, 0)
    for key, cell in (("ArrowRight", (0, 1)), ("ArrowDown", (1, 1)), ("ArrowLeft", (1, 0)), ("End", (1, 9)),
                      ("ArrowRight", (1, 9)), ("PageDown", (9, 9)), ("ArrowUp", (8, 9))):  # fmt: skip
        page.keyboard.press(key)
        assert numbers(page)[:2] == cell
    before = page.inner_text("#b-note")
    page.focus("#b-loop")
    page.keyboard.press("ArrowUp")
    assert page.inner_text("#b-note") != before and "blocks." in before
    assert page.get_attribute("#numbers", "aria-live") == "polite"
    unnamed = "[...document.querySelectorAll('select')].filter((s) => !s.labels.length).length"
    assert page.evaluate(unnamed) == 0


def test_n_loops_bounds_the_loops_and_changes_the_coda_only(page):
    choose(page, "a", layer=1, head=0)
    choose(page, "a", n_loops=4)
    choose(page, "a", loop=0)
    first = numbers(page)
    choose(page, "a", n_loops=2)
    assert numbers(page) == first
    assert page.locator("#a-loop option").all_inner_texts() == ["0", "1"]
    choose(page, "a", layer=3)
    answers = set()
    for n_loops in (1, 2, 3, 4):
        choose(page, "a", n_loops=n_loops)
        answers.add(
            tuple(page.locator("#a-tokens .chip").evaluate_all("all => all.map((c) => c.style.backgroundColor)"))
        )
    assert len(answers) > 1


def test_axe_finds_no_fault_in_an_explorer(page):
    check_accessible(page)


def test_swapping_turns_the_difference_around(page):
    choose(page, "a", layer=1, head=0)
    choose(page, "b", layer=2, head=1)
    *_, a, b, change = numbers(page)
    page.click("#swap")
    *_, a_after, b_after, change_after = numbers(page)
    assert (a_after, b_after, change_after) == (b, a, -change) and a != b


def test_hostile_tokens_stay_text(visit, named, batch):
    import torch

    from loopmdm.model.masking import mask_tokens

    tokens = mask_tokens(torch.arange(10)[None], 22, mask_ratio=0.4, seed=2)
    page = visit(explore(named.run_with_cache(tokens.tokens)[1], clean=tokens).html)
    expected = named.to_str_tokens(tokens.clean)
    hidden = tokens.masked[0].tolist()
    chips = page.locator("#a-tokens .chip").evaluate_all("all => all.map((c) => c.textContent)")
    assert chips == ["■" if masked else text for text, masked in zip(expected, hidden, strict=True)]
    assert page.locator("#explorer img, #explorer b, #explorer script").count() == 0
    assert page.locator("#a-model option").all_inner_texts() == ["toy <b>"]
    rows = page.locator("#readout tbody th").evaluate_all("all => all.map((c) => c.textContent)")
    for row, text in zip(rows, (t for t, masked in zip(expected, hidden, strict=True) if masked), strict=True):
        assert text.replace('"', '\\"') in row


def test_the_read_out_is_that_of_read_loops(page, named, run):
    frame = read_loops(named, run[0], n_loops=4)
    frame = frame[frame["masked"]].sort_values(["position", "loop"])
    cells = page.locator("#readout td")
    assert page.locator("#readout td small").all_inner_texts() == [f"{p:.2f}" for p in frame["p_true"]]
    words = cells.evaluate_all("all => all.map((c) => c.firstChild.textContent)")
    assert [word.replace('\\"', '"') for word in words] == [word.strip() for word in frame["top1"]]
    flips = cells.evaluate_all('all => all.map((c) => c.classList.contains("flipped"))')
    assert flips == frame["flipped"].tolist()
    correct = cells.evaluate_all('all => all.map((c) => c.firstChild.className === "correct")')
    assert correct == frame["correct"].tolist()


@pytest.mark.parametrize("width", [1280, 800, 400])
@pytest.mark.parametrize("model", ["sudoku-loop", "sotu-loop"])
def test_nothing_overlaps_or_leaves_the_page(visit, width, model):
    m = HookedLoopMDM.from_pretrained(model)
    b = m.mask(Case.of(model).test.tokens[:1], ratio=0.5)
    page = visit(explore(m.run_with_cache(b.tokens, n_loops=12)[1], clean=b).html, width)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    boxes = page.evaluate(
        """() => ["numbers", "a-row", "a-map", "a-tokens", "b-map", "b-tokens", "d-map", "d-tokens",
                "readout"].map((id) => {
            const box = document.getElementById(id).getBoundingClientRect();
            return [box.left, box.top, box.right, box.bottom, id];
        })"""
    )
    for i, (left, top, right, bottom, name) in enumerate(boxes):
        assert left >= 0 and right > left and bottom > top, name
        for other in boxes[:i]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart, (name, other[4])
    assert page.locator("#a-tokens.board").count() == (model == "sudoku-loop")


def test_it_runs_in_the_frame_of_a_notebook(visit, named, run):
    tokens, cache = run
    page = visit(f"<!doctype html><html><body>{explore(cache, clean=tokens)._repr_html_()}</body></html>")
    frame = page.frame_locator("iframe")
    frame.locator("#a-head").select_option("1")
    frame.locator("#a-map").focus()
    before = frame.locator("#numbers").inner_text()
    page.keyboard.press("ArrowDown")
    assert frame.locator("#numbers").inner_text() != before


@pytest.mark.slow
def test_the_report_opens_and_every_model_can_be_chosen(visit, monkeypatch):
    from loopmdm.analysis.report import page as report

    few = ("sudoku-solve-rate", "mask-to-mask-by-loop")
    monkeypatch.setattr(report, "by_theme", lambda: {"few": [report.EXHIBITS[name] for name in few]})
    page = visit(report.report(), 800)
    check_accessible(page)
    assert page.locator(".thumbs a").count() == page.locator("figure").count() == len(few)
    whole = "all => all.every((i) => i.complete && i.naturalWidth > 200)"
    assert page.locator("figure img, .thumbs img").evaluate_all(whole)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 800
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 718, "height": 1040})  # an A4 sheet between Chromium's margins
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 718
    assert page.locator("details.feature table").first.is_visible() and not page.locator("nav").first.is_visible()
    page.emulate_media(media="screen")
    seen = set()
    for index in range(page.locator("#input option").count()):
        page.select_option("#input", index=index)
        for model in page.locator("#b-model option").all_inner_texts():
            page.select_option("#b-model", label=model)
            seen.add(model)
            assert model in page.inner_text("#readout-model") and page.locator("#readout td").count() > 0
            masses = [float(cell) for cell in page.locator("#b-row td").all_inner_texts()[1:]]
            assert sum(masses) == pytest.approx(1, abs=2e-4)
    assert seen == set(MODELS.names(Zoo.shipped()))


def test_masked_and_clean_have_one_colour_key_with_the_plots():
    from loopmdm.analysis.plots.style import CLEAN, MASKED
    from loopmdm.analysis.report.explorer import asset

    assert f"--masked: {MASKED}; --clean: {CLEAN};" in asset("page.css")
    for name in ("explorer.css", "draw.js"):
        assert "--masked" in asset(name) and "--clean" in asset(name)
        assert CLEAN not in asset(name) and "#e9a55c" not in asset(name)


def test_an_explorer_outside_a_notebook_says_how_it_is_seen(run):
    assert ".write(path)" in repr(explore(run[1]))
