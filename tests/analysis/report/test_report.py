"""What the report holds: numbers as the model made them, text that stays text, files whole or not at all."""

import base64
import html
import json
import os
import re
import signal
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis import exhibits as figures
from loopmdm.analysis import explore, read_loops
from loopmdm.analysis.report import data
from loopmdm.analysis.report.explorer import as_json
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.stopping.rules import StateDelta
from tests.commands import loopmdm, one_line
from tests.conftest import toy_model

STEP = 1 / 65535
"""Between two codes: a decoded weight is within half of it."""


def decoded(document: str, run: int = 0) -> tuple[dict, dict]:
    """The page's data, and its maps by place [head, query, key], read without our own code."""
    text = re.search(r'<script type="application/json" id="explorer-data">(.*?)</script>', document, re.S)[1]
    shown = json.loads(text)["inputs"][0]
    held, n = shown["runs"][run], len(shown["tokens"])
    codes = np.frombuffer(base64.b64decode(held["weights"]), dtype="<u2").astype(np.float64)
    maps = (held["low"] + codes / 65535 * (held["high"] - held["low"])).reshape(-1, held["n_heads"], n, n)
    return shown | held, {tuple(place): values for place, values in zip(held["places"], maps, strict=True)}


def close(values, pattern, step=STEP):
    np.testing.assert_allclose(values, pattern.float().numpy(), rtol=0, atol=step / 2 + 1e-6)


def test_decoded_numbers_are_the_patterns_and_rows_sum_to_one(hooked, batch):
    cache = hooked.run_with_cache(batch.tokens, n_loops=5)[1]
    shown, maps = decoded(explore(cache, clean=batch, sequence=2).html)
    assert len(maps) == 1 + 2 * 5 + 5  # prelude once, looped layers once a loop, the coda once a number of loops
    for (layer, loop, n_loops), values in maps.items():
        if n_loops is None:
            key = ("pattern", layer) if loop is None else ("pattern", "loop", loop, layer)
            close(values, cache[key][2])
        else:
            close(values, hooked.run_with_cache(batch.tokens, n_loops=n_loops)[1]["pattern", layer][2])
        np.testing.assert_allclose(values.sum(-1), 1, rtol=0, atol=len(shown["tokens"]) * STEP / 2 + 1e-6)
    assert shown["masked"] == batch.masked[2].tolist()


def test_read_outs_are_those_of_read_loops(hooked, batch):
    cache = hooked.run_with_cache(batch.tokens, n_loops=4)[1]
    answers = data.run_of(cache, batch, 1).answers
    frame = read_loops(hooked, batch, n_loops=4)
    frame = frame[(frame["sequence"] == 1) & frame["masked"]].sort_values(["loop", "position"])
    for name in ("p_true", "p_top1", "entropy"):
        np.testing.assert_allclose(np.ravel(answers[name]), frame[name], atol=2e-5)
    assert np.ravel(answers["top1"]).tolist() == frame["top1"].tolist()
    assert np.ravel(answers["correct"]).astype(bool).tolist() == frame["correct"].tolist()


def test_hooked_patterns_are_shown_as_they_were_and_no_coda_is_invented(hooked, batch):
    def change(pattern, hook):
        return pattern * 3 - 1

    with hooked.hooks([("loop.1.blocks.1.attn.hook_pattern", change), ("blocks.3.attn.hook_pattern", change)]):
        cache = hooked.run_with_cache(batch.tokens, n_loops=3)[1]
    _, maps = decoded(explore(cache).html)
    span = max(1, float(max(v.max() for v in maps.values()))) - min(0, float(min(v.min() for v in maps.values())))
    close(maps[1, 1, None], cache["pattern", "loop", 1, 1][0], STEP * span * 1.01)
    assert [place for place in maps if place[0] == 3] == [(3, None, 3)]
    close(maps[3, None, 3], cache["pattern", 3][0], STEP * span * 1.01)


def test_a_sequence_that_stopped_earlier_is_shown_as_if_alone(hooked, batch):
    criterion = hooked.run(batch.tokens, stop=StateDelta(0.0, max_loops=6)).criterion
    rule = StateDelta(float(criterion[2].median()), max_loops=6)
    cache = hooked.run_with_cache(batch.tokens, stop=rule)[1]
    assert len(set(cache.loops_used.tolist())) > 1
    for sequence, used in enumerate(cache.loops_used.tolist()):
        run = data.run_of(cache, batch, sequence)
        alone = data.run_of(hooked.run_with_cache(batch.tokens[[sequence]], n_loops=used)[1])
        assert run.places == alone.places
        np.testing.assert_allclose(run.maps, alone.maps, atol=1e-5)


def test_padding_is_left_out():
    m = HookedLoopMDM.from_pretrained("sotu-loop")
    b = m.mask(["The state of our union", "peace"], ratio=0.5)
    short = int((b.attention_mask[1] != 0).sum())
    run = data.run_of(m.run_with_cache(b.tokens, n_loops=2)[1], b, 1)
    assert len(run.tokens) == short < b.tokens.shape[1]
    np.testing.assert_allclose(run.maps.sum(-1), 1, atol=1e-5)


def test_without_states_or_truth_there_are_maps_alone(hooked, batch):
    patterns = lambda name: name.endswith("hook_pattern")  # noqa: E731
    cache = hooked.run_with_cache(batch.tokens, n_loops=3, names_filter=patterns, remove_batch_dim=False)[1]
    run = data.run_of(cache)
    assert run.answers is None and run.truth is None
    assert [place for place in run.places if place[0] == 3] == [(3, None, 3)]
    one = hooked.run_with_cache(batch.tokens[:1], n_loops=3, remove_batch_dim=True)[1]
    whole = data.run_of(one)
    assert "p_true" not in whole.answers and len(whole.places) == 1 + 2 * 3 + 3


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, b: explore(), "run_with_cache"),
        (lambda m, b: explore(b.tokens), "got Tensor"),
        (lambda m, b: explore(m.run_with_cache(b.tokens)[1], sequence=9), "0..3"),
        (lambda m, b: explore(m.run_with_cache(b.tokens)[1], clean=b.clean[:2]), "shape"),
        (lambda m, b: explore(m.run_with_cache(b.tokens)[1], clean=b.clean + 1), "nothing is masked"),
        (lambda m, b: explore(m.run_with_cache(b.tokens, names_filter="hook_embed")[1]), "names_filter"),
        (lambda m, b: explore(m.run_with_cache(b.tokens, pos_slice=slice(3))[1]), "pos_slice"),
        (lambda m, b: explore(*[m.run_with_cache(b.tokens)[1]] * 2), "labels="),
        (lambda m, b: explore(m.run_with_cache(b.tokens)[1], labels=["a", "b"]), "name each once"),
        (lambda m, b: explore(*(m.run_with_cache(t)[1] for t in (b.tokens, b.clean))), "same masked sequence"),
    ],
)
def test_misuse_names_its_remedy(hooked, batch, call, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        call(hooked, batch)


def test_more_than_a_page_can_hold_is_refused_before_it_is_made(monkeypatch, hooked, batch):
    monkeypatch.setattr(data, "LARGEST_PAGE", 1000)
    with pytest.raises(UsageError, match="run fewer loops"):
        explore(hooked.run_with_cache(batch.tokens)[1])


def test_json_cannot_leave_its_script_element():
    hostile = ["</script><script>alert(1)</script>", "<!--", "]]>", "&lt;", "\u2028"]
    text = as_json(hostile)
    assert not set("<>&\u2028") & set(text) and json.loads(text) == hostile


def test_a_notebook_shows_a_frame_that_loads_nothing(hooked, batch):
    shown = explore(hooked.run_with_cache(batch.tokens)[1], clean=batch)
    frame = shown._repr_html_()
    assert html.unescape(re.search(r'srcdoc="(.*)"></iframe>', frame, re.S)[1]) == shown.html
    assert "default-src 'none'" in shown.html and not re.search(r'(src|href)="(?!data:)', shown.html)


def test_any_model_without_tokenizer_or_record_can_be_explored(tmp_path):
    m = HookedLoopMDM(toy_model(n_prelude_layers=0, n_coda_layers=0))
    b = mask_tokens(torch.arange(8)[None], 22, mask_ratio=0.5)
    explore(m.run_with_cache(b.tokens, n_loops=1)[1], clean=b).write(tmp_path / "new" / "page.html")
    assert decoded((tmp_path / "new" / "page.html").read_text())[0]["tokens"].count("22") == 4


def report(*arguments, code=0):
    """What the command line says, on one line where it fails."""
    out, err = loopmdm("report", *arguments, code=code)
    assert code == 0 or (err.count("\n") == 1 and one_line(err))
    return out + err


def test_what_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a folder" in report("--out", tmp_path, code=2)
    assert ".html file" in report("--out", tmp_path / "report.pdf", code=2)
    assert "another --out" in report("--out", tmp_path / "file" / "report.html", code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "asked", [("--text", __file__), ("--dtype", "float64"), ("--set", "n_ctx=8"), ("--revision", "v1")]
)
def test_what_concerns_one_model_is_refused_where_none_is_named(tmp_path, asked):
    said = report("--out", tmp_path / "report.html", *asked, code=2)
    assert "name a model to --text" in said and list(tmp_path.iterdir()) == []


def test_a_missing_table_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(figures.tables, "tables_folder", lambda: tmp_path)
    said = report("--out", tmp_path / "report.html", code=2)
    assert "loopmdm table" in said and list(tmp_path.iterdir()) == []


def test_an_interrupted_report_leaves_the_old_file(tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    out.write_text("old")
    monkeypatch.setattr("loopmdm.analysis.report.page.claim_rows", lambda: signal.raise_signal(signal.SIGINT))
    assert "as it was" in report("--out", out, code=130)
    assert out.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]  # noqa: PTH208


@pytest.mark.slow
def test_a_claim_shows_its_number_and_why_it_has_no_verdict(monkeypatch):
    from loopmdm.analysis.report import page

    few = pd.DataFrame(
        [
            ("supported", 1.5, 1.0, 2.0, 5, "above in 9 of 9 pairs"),
            ("undecided", 1.5, 0.5, 2.0, 5, "what would decide it: <b>ten</b> more"),
            ("not testable here", 1.5, np.nan, np.nan, 1, "deep less base & so on"),
            ("not testable here", np.nan, np.nan, np.nan, 0, ""),
            ("not run", np.nan, np.nan, np.nan, 0, ""),
        ],
        columns=["verdict", "estimate", "low", "high", "n_seeds", "why"],
    )
    same = {"claim": "mask-to-mask-rises", "task": "sotu", "unit": "nats", "margin": 1.0, "direction": "above"}
    few = few.assign(**same, figure="mask-to-mask-by-loop", text="It rises.")
    monkeypatch.setattr(page.claims, "claims_table", lambda: few)
    shown = page.claim_rows()
    assert [row["interval"] for row in shown] == ["(1 to 2) nats", "(0.5 to 2) nats", "nats", "", ""]
    assert [row["seeds"] for row in shown] == ["5", "5", "1", "–", "–"]
    assert [row["why"] for row in shown] == ["", few["why"][1], few["why"][2], "", ""]
    monkeypatch.setattr(page, "by_theme", dict)
    monkeypatch.setattr(page, "inputs", list)
    cells = re.findall(r'<span class="why">(.*?)</span>', page.report())
    assert cells == [html.escape(few["why"][1], quote=False), html.escape(few["why"][2])]


@pytest.mark.parametrize("most", [2, pytest.param(1000, marks=pytest.mark.soak)])
@pytest.mark.slow
def test_the_report_holds_every_claim_and_figure_in_one_small_file(tmp_path, monkeypatch, most):
    """Figures are drawn in their own tests: here two of two themes, in `make soak` all."""
    from loopmdm.analysis.exhibits.verdicts import claims_table

    drawn = {theme: shown[:most] for theme, shown in list(figures.by_theme().items())[-most:]}
    monkeypatch.setattr("loopmdm.analysis.report.page.by_theme", lambda: drawn)
    out = tmp_path / "report.html"
    assert report("--out", out).startswith(str(out))
    page = out.read_text(encoding="utf-8")
    assert out.stat().st_size < 15e6
    said = html.unescape(page)
    for figure in chain(*drawn.values()):
        assert f'<figure id="{figure.name}">' in page and figure.text in said, figure.name
    table = claims_table()
    assert page.count('<span class="verdict ') == len(table)
    for why in table["why"][table["verdict"].isin(["undecided", "not testable here"])]:
        assert why in said
    pictures = re.findall(r'<img src="data:image/webp[^"]+" width="\d+" height="\d+" alt="([^"]+)"', page)
    for alt, figure in zip(pictures, chain(*drawn.values()), strict=True):
        assert html.unescape(alt).startswith(f"{figure.finding}. "), figure.name
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    check_heads_and_features(page)
    shown, maps = decoded(page)
    assert shown["model"] == "sotu-loop" and len(maps) == 1 + 12 + 2 * 12
    assert Path(out).parent == tmp_path and len(list(tmp_path.iterdir())) == 1


class Outline(HTMLParser):
    """Ids and links of a page; fails on a tag that is closed wrongly."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"][1:]] if found.get("href", "").startswith("#") else []
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open, self.getpos())


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    assert found.open == [] and len(set(found.ids)) == len(found.ids)
    assert set(found.links) <= set(found.ids)
    return found


def check_heads_and_features(page: str) -> None:
    """A card for each looped head of a text and a Sudoku model, a page for each of the strongest features."""
    found = outline(page)
    assert [name for name in found.ids if "-head-" in name and not name.endswith("title")] == [
        f"{model}-head-1-{head}" for model in ("sotu-loop", "sudoku-loop") for head in range(4)
    ]
    for model in ("sotu-loop", "sudoku-loop"):
        pages = [name for name in found.ids if name.startswith(f"{model}-feature-")]
        assert len(pages) == 24 and set(pages) <= set(found.links)
    assert page.count('<details class="feature"') == 48 and page.count('<article class="card"') == 8
    frame = figures.tables.load("head-cards")
    own = frame.query("model == 'sudoku-loop' and weights == 'trained' and head == 2 and metric == 'attention'")
    (row,) = own.query("loop == 3 and of == 'box'").itertuples()
    card = page[page.index('id="sudoku-loop-head-1-2"') :]
    assert f"<td>{row.value:.3g} ± {row.standard_error:.1g}</td>" in card[: card.index("</article>")]


def test_a_models_own_report_has_cards_of_its_heads(tmp_path, monkeypatch):
    from loopmdm.analysis.measures import Case
    from loopmdm.analysis.report import heads
    from loopmdm.analysis.report.page import write_model_report

    monkeypatch.setattr(heads, "SEQUENCES", 8)
    monkeypatch.setattr(heads, "EFFECT_SEQUENCES", 4)
    case = Case.of("sudoku-loop-s4", n=8)
    write_model_report(tmp_path / "page.html", case.m, case.test)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len([name for name in outline(page).ids if name.endswith("-title")]) == 4
    assert "untrained twin of sudoku-loop-s4" in page and "n = 8 sequences" in page


def test_cards_say_why_there_are_none():
    from loopmdm.analysis.measures import Case
    from loopmdm.analysis.report.heads import measured_cards
    from loopmdm.model.adapters import hook_model
    from loopmdm.model.sequences import Sequences
    from loopmdm.model.tasks.test_sets import TestSet
    from tests.loopmdm_model.adapters import natives

    test = TestSet("own", Sequences(natives.tokens(4)))
    unlooped = HookedLoopMDM(toy_model(n_loop_layers=0, max_loops=1))
    assert "loops no layer" in measured_cards(Case(unlooped, test)).why
    normed = hook_model(natives.native("Bert"), mask_token_id=103)
    assert "additive residual stream" in measured_cards(Case(normed, test)).why
    alone = hook_model(natives.native("Llama"), loop=(1, 2), max_loops=2)
    assert "has no test set of its own; give --text" in measured_cards(Case(alone, test)).why


def test_text_stays_text_in_pages_and_curves_leave_gaps():
    from loopmdm.analysis.measures.mechanism.dictionaries import FeaturePage
    from loopmdm.analysis.report.curves import Curves, Line
    from loopmdm.analysis.report.features import Example, Feature, Pages

    evil = "<script>alert(1)</script>"
    curve = Curves(evil, [0, 1, 2, 3], [Line(evil, [0.1, np.nan, 0.5, 2.0], [0.0] * 4, [0.2, 1, 1, 3])], 0.0, 1.0)
    svg = str(curve.svg())
    assert "<script" not in svg and svg.count("<circle") == 3 and svg.count("<polyline") == 1  # a gap, then a line
    heights = [float(y) for y in re.findall(r'<circle cx="[^"]+" cy="([^"]+)"', svg)]
    assert heights[0] > heights[1] > heights[2] == 8  # what is beyond the axis stops at its end
    empty = Curves("none", [0], [Line("x", [float("nan")])])
    assert empty.bounds == (0.0, 1.0) and "<circle" not in str(empty.svg())
    profile = pd.DataFrame({"loop": [0, 1], "profile": [1.0, 0.2], "active": [0.4, 0.1]})
    follows = pd.DataFrame({"variable": [evil], "kind": ["true"], "auc": [0.9], "f1": [0.5], "n": [10]})
    effects = pd.DataFrame({"token": [evil], "effect": [-0.5], "standard_error": [0.1], "n": [3]})
    page = FeaturePage(evil, 7, 0, 0.2, 10, 5, profile, pd.DataFrame(), follows, effects)
    words = [(evil, False, False), (evil, True, False), (evil, False, True)]
    item = Feature("m-feature-7", page, evil, curve, [Example(1.0, [words])])
    shown = page_of(features=[Pages("m", evil, [("model", evil)], [0], [(evil, evil, [evil])], [item])])
    assert "<script>alert" not in shown and shown.count("&lt;script&gt;alert(1)") > 8
    assert f"<mark>{html.escape(evil)}</mark>" in shown and "−0.50 ± 0.1" in shown
    outline(shown)
    assert "No feature pages of m: because" in page_of(features=[Pages("m", why="because")])


def page_of(**parts) -> str:
    from loopmdm.analysis.report.explorer import render

    rest = {"claims": [], "counts": "", "names": [], "data": "{}", "models": "", "heads": [], "features": []}
    rest |= {"figures": [], "themes": {}, "notes": [], "commit": "", "versions": "", "hashes": {}}
    return render("page.html", **(rest | parts))
