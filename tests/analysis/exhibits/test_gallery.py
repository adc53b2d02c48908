"""The committed gallery and the generated pages are what registry and tables give; `--check` says where not."""

import json
import shutil
from pathlib import Path

import pytest

from loopmdm.analysis import exhibits as figures
from loopmdm.analysis.exhibits import gallery, known, pages, tables
from loopmdm.analysis.exhibits import verdicts as claims
from loopmdm.model.errors import UsageError
from loopmdm.model.zoo.runs import Zoo

ROOT = Path(__file__).parents[3]
ONE = "sudoku-solve-rate"


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "figures" / "gallery", tmp_path / "gallery")
    return tmp_path / "gallery"


def test_committed_pages_are_not_stale():
    assert pages.stale_pages(ROOT) == []
    page = (ROOT / "figures" / "README.md").read_text()
    for name in figures.FIGURES:
        assert f"gallery/{name}.png" in page and f"loopmdm figures {name}`" in page
    table = claims.claims_table()
    results = (ROOT / "docs" / "results.md").read_text()
    assert all(f"`{name}`" in results for name in table["claim"])
    models = (ROOT / "docs" / "models.md").read_text()
    assert all(f"| `{run.file}` |" in models for run in Zoo.shipped())


def test_the_part_of_a_caption_that_is_always_shown_is_short():
    long = {
        name: len(figure.lead.split()) for name, figure in figures.FIGURES.items() if len(figure.lead.split()) > 40
    }
    assert not long
    for figure in figures.FIGURES.values():
        assert f"{figure.lead} {figure.rest}".strip() == figure.text


FOUNDED = {
    "flops-to-target": {"fewer-training-flops": {"sudoku": "undecided", "sotu": "not testable here"}},
    "arms": {"solves-what-shallow-cannot": {"sudoku": "supported"}},
    "learning-curves": {"better-at-equal-flops": {"sudoku": "undecided", "sotu": "not testable here"}},
    "when-looping-pays": {"better-at-equal-flops": {"sudoku": "undecided"}},
    "placement": {"placement": {"sudoku": "undecided"}},
    "amount-of-looping": {"larger-s-max-is-better": {"sudoku": "not supported"}},
    "nll-by-loops": {
        "more-loops-are-better": {"sudoku": "supported", "sotu": "supported"},
        "better-beyond-s-max": {"sotu": "not supported"},
    },
    "gain-by-noise": {"intermediate-noise": {"sudoku": "supported", "sotu": "undecided"}},
    "word-problems": {"reasoning": {"gsm": "not testable here"}},
    "generative": {"generative-perplexity-falls": {"sotu": "equivalent"}},
    "loops-or-steps": {"loops-for-steps": {"sudoku": "not supported"}},
    "stopping-frontier": {
        "schedule-over-noise": {"sudoku": "supported", "sotu": "supported"},
        "stopping-knows-where": {"sudoku": "equivalent", "sotu": "equivalent"},
    },
    "mask-to-mask-by-loop": {"mask-to-mask-rises": {"sudoku": "undecided", "sotu": "supported"}},
    "saturation": {"saturation-follows-s-max": {"sudoku": "not supported"}},
    "attention-content": {"content-rises": {"sudoku": "supported", "sotu": "undecided"}},
    "far-out": {"loops-converge": {"sudoku": "not supported", "sotu": "not supported"}},
    "causal-edges": {"gain-needs-mask-to-mask": {"sudoku": "not supported", "sotu": "not supported"}},
    "trained-two-by-two": {"trained-without-mask-to-mask": {"sudoku": "supported"}},
    "training-free": {"training-free": {"sudoku": "not supported", "sotu": "not supported"}},
    "sudoku-boards": {"later-loops-repair": {"sudoku": "supported"}},
    "sudoku-orders": {"restricted-orders-need-loops": {"sudoku": "not testable here"}},
    "excess-kl": {"loop-is-a-round-of-belief-propagation": {"tree": "not testable here"}},
    "arithmetic-steps": {"one-step-a-loop": {"arithmetic": "supported"}},
    "arithmetic-edges": {"later-steps-come-by-masked": {"arithmetic": "undecided"}},
    "candidates": {"loops-exclude-as-propagation": {"sudoku": "not testable here"}},
    "head-cards": {"heads-say-what-is-taken": {"sudoku": "undecided"}},
    "attribution-patching": {"later-loops-carry-a-change": {"sudoku": "supported"}},
}
"""The verdicts on which a figure's title stands: where one changes, the title has to be written anew."""


def test_titles_say_what_the_verdicts_they_stand_on_say():
    now = claims.claims_table().set_index(["claim", "task"])["verdict"]
    for figure, stands in FOUNDED.items():
        for claim, verdicts in stands.items():
            for task, word in verdicts.items():
                assert now[claim, task] == word, f"{figure}: {figures.FIGURES[figure].finding!r}, {claim}"


def test_titles_are_short_and_none_is_a_question():
    findings = [figure.finding for figure in figures.FIGURES.values()]
    assert max(len(finding.split()) for finding in findings) <= 12
    assert all(finding and finding[-1] not in ".?" for finding in findings) and len(set(findings)) == len(findings)


def test_titles_without_a_claim_are_borne_out_by_their_tables():
    """Those that a table decides by a sign or a count."""
    curves = tables.load("learning-curves")
    ends = curves[curves["n_loops"] == curves["max_loops"]].sort_values("flops").groupby("model").tail(1)
    means = ends.pivot_table(index="task", columns="arm", values="nelbo")
    others = means.drop(["sudoku", "sotu"])
    above = others["loop"] > others["base"] - 0.01  # learning-curves-elsewhere
    assert set(above.index[~above]) == {"arithmetic"}
    gaps = tables.load("looping-gap").query("at == 'flops' and share == 1").set_index("task")["gap"]
    assert set(gaps.index[gaps < 0]) == {"sudoku", "arithmetic"}  # when-looping-pays
    excess = tables.load("excess-kl")
    reached = known.steps_in_reach(excess[excess["task"] == "arithmetic"]).query("arm == 'loop'")
    for _, own in reached.groupby("model"):  # arithmetic-steps
        steps = own.set_index("n_loops")["steps"]
        assert steps[4] - steps[1] > 2.5 and steps[6] - steps[4] > 1
    cuts = tables.load("excess-kl-cut").query("4 <= hops <= 7")  # arithmetic-edges
    for _, own in cuts.groupby("model"):
        missing = own.assign(total=own["excess_kl"] * own["n_nodes"]).groupby(["edges", "n_loops"])["total"].sum()
        assert missing["masked->masked", 4] > missing["none", 1] > missing["none", 4]
    assert means.loc["sotu", "loop"] > means.loc["sotu", "base"]
    corpora = tables.load("zero-shot").query("model in ('sotu-base', 'sotu-loop')")
    seen = corpora.pivot_table(index="corpus", columns=["model", "n_loops"], values="nelbo")
    assert (seen["sotu-loop", 6] < seen["sotu-base", 1]).sum() == 1 and len(seen) == 7
    shares = tables.load("mediated-share").query("edges == 'masked->masked'")
    shares = shares.pivot(index="model", columns="matched", values="share").dropna()
    assert (shares[False] > shares[True]).all()
    found = tables.load("attention-specifications")
    assert all(
        (found[found["model"] == name]["verdict"] == "falls").any() for name in ("sudoku-loop", "sotu-loop")
    )
    assert (found["verdict"] == "rises").mean() > 0.5
    others = tables.load("attention-of-others")
    rows = others[
        (others["query_group"] == "masked") & (others["key_group"] == "masked") & others["head"].isna()
        & (others["nominal_mask_ratio"] == 0.5)
    ]  # fmt: skip
    theirs = rows[~rows["model"].str.startswith("sotu")]
    ours = rows[(rows["model"] == "sotu-loop") & (rows["segment"] == "loop")]
    assert (theirs["log_odds"] < 0).mean() > 0.8 and (ours["log_odds"] > 0).mean() > 0.8
    repeated = tables.load("training-free-of-others").query("damping == 'none' and n_loops == 4")
    assert (repeated["change"] > 2 * repeated["change_se"]).all()
    amounts = tables.load("nll-by-loops").query("n_loops == max_loops and arm in ('loop', 'loop-s8', 'loop-s12')")
    amounts = amounts[amounts["task"] == "sudoku"].groupby("max_loops")["nll"]
    assert amounts.mean().is_monotonic_increasing and amounts.median().is_monotonic_increasing


def test_gallery_holds_every_figure_and_no_other():
    pictures = {path.stem: path.stat().st_size for path in (ROOT / "figures" / "gallery").glob("*.png")}
    assert set(pictures) == set(figures.FIGURES)
    assert max(pictures.values()) < 200_000


@pytest.mark.slow
def test_an_unchanged_figure_passes_and_a_changed_one_is_named(copy, tmp_path):
    out = tmp_path / "out"
    figures.FIGURES[ONE].draw(out=out)
    assert gallery.changed([ONE], out, copy) == []
    assert gallery.changed([ONE], tmp_path / "nothing", copy) == []

    picture = out / f"{ONE}.svg"
    picture.write_text(picture.read_text() + " ")
    assert gallery.changed([ONE], out, copy) == [f"{picture} differs"]
    picture.unlink()

    shutil.copy(copy / "arms.png", copy / f"{ONE}.png")
    assert "not what its tables give" in gallery.changed([ONE], out, copy)[0]


@pytest.mark.slow
def test_other_values_and_missing_pictures_are_named(copy, tmp_path):
    path = copy / gallery.HASHES
    hashes = json.loads(path.read_text())
    hashes["tables"][ONE]["sudoku-solve-rate"] = "0"
    path.write_text(json.dumps(hashes))
    assert "other values of sudoku-solve-rate" in gallery.changed([ONE], tmp_path, copy)[0]
    (copy / f"{ONE}.png").unlink()
    assert "is missing; run `make gallery`" in gallery.changed([ONE], tmp_path, copy)[0]
    path.unlink()
    with pytest.raises(UsageError, match=r"hashes\.json is missing"):
        gallery.changed([ONE], tmp_path, copy)


def test_a_readme_without_its_marks_is_named(tmp_path):
    (tmp_path / "README.md").write_text("# nothing\n")
    with pytest.raises(UsageError, match="generated: headline"):
        pages.stale_pages(tmp_path)
