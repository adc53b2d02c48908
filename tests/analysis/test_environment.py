"""What a user's settings, threads and texts may not change: figures, hashes of tables, TSV that pandas reads."""

import io
import json
import os
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from loopmdm.analysis import attention_across_loops, read_loops
from loopmdm.analysis.cli.printing import show, tsv
from loopmdm.analysis.exhibits import FIGURES
from loopmdm.analysis.measures import measure
from loopmdm.analysis.numbers.frames import value_hash
from loopmdm.analysis.plots.style import plainly
from loopmdm.model.corpora.tokenizer import train_bpe
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.config import LoopMDMConfig

HOSTILE = {
    "savefig.bbox": "tight",
    "savefig.transparent": True,
    "savefig.facecolor": "red",
    "savefig.pad_inches": 2.0,
    "mathtext.fontset": "cm",
    "axes.titlelocation": "left",
    "axes.prop_cycle": mpl.cycler(color=["k"]),
    "axes.unicode_minus": False,
    "pdf.compression": 0,
    "path.simplify": False,
    "figure.constrained_layout.w_pad": 0.9,
    "figure.subplot.left": 0.4,
    "image.interpolation": "bicubic",
    "legend.frameon": True,
    "lines.antialiased": False,
}


@pytest.mark.slow
def test_figures_are_the_same_under_any_settings_and_leave_them(tmp_path):
    figure = FIGURES["mask-to-mask-by-loop"]
    figure.draw(tmp_path / "plain")
    with mpl.rc_context(HOSTILE):
        figure.draw(tmp_path / "hostile")
        assert all(mpl.rcParams[name] == value for name, value in HOSTILE.items())
    for kind in ("pdf", "png", "svg"):
        plain, hostile = ((tmp_path / at / f"{figure.name}.{kind}").read_bytes() for at in ("plain", "hostile"))
        assert plain == hostile, kind


@pytest.mark.slow
def test_a_backend_that_is_none_does_not_stop_the_drawing(tmp_path):
    command = [
        sys.executable,
        "-m",
        "loopmdm.analysis.cli",
        "figures",
        "mask-to-mask-by-loop",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, env=os.environ | {"MPLBACKEND": "none"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) == 4


def test_a_measure_has_one_hash_whatever_the_number_of_threads():
    before, hashes = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            frame = measure("effective-rank", "sudoku-loop", n_loops=3, mask_ratios=[0.5], n=64)
            hashes.add(value_hash(frame))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(hashes) == 1


ODD = [
    *('"Hello', 'a "quoted" word', "a\tb", "a\r\nb", "$$x$$", "a\x00b\x1bc\x7f", "'", '"'),
    *("line\u2028two", "a\x85b"),
]


def test_tsv_is_read_back_by_pandas_whatever_the_text_holds():
    text = tsv([("n", "text"), *enumerate(ODD)])
    assert len(text.splitlines()) == len(ODD) + 1
    read = pd.read_csv(io.StringIO(text), sep="\t", keep_default_na=False)
    assert read["n"].tolist() == list(range(len(ODD)))
    assert read["text"].tolist() == [
        '"Hello', 'a "quoted" word', "a b", "a  b", "$$x$$", "a b c ", "'", '"', "line two", "a b",
    ]  # fmt: skip


def test_what_is_printed_into_a_pipe_is_that_tsv(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    show(["n", "text"], enumerate(ODD))
    assert capsys.readouterr().out == tsv([("n", "text"), *enumerate(ODD)])


WORDS = ["$$x^2$$", "a$", r"\$", r"$\foo$", "$", "<b>&", "\x07", "\t", "%d", "{x}", "_^", "é", "\u202e"]


def test_plots_draw_any_token():
    tokenizer = train_bpe(["$$x^2$$ and $$y$$ $\\foo$ \t\x07 % {x} " * 200] * 3, 264)
    m = HookedLoopMDM(LoopMDMConfig(d_vocab=264, n_ctx=64, d_model=16, n_heads=2, max_loops=3), tokenizer)
    b = m.mask("$$x^2$$ and $$y$$ $\\foo$ \t\x07 {x}", 0.5)
    read_loops(m, b, n_loops=3).plot()
    plt.gcf().canvas.draw()
    _, cache = m.run_with_cache(b.tokens, n_loops=3)
    attention_across_loops(cache, layer=1, head=0, loops=(0, 2)).plot()
    plt.gcf().canvas.draw()
    plt.close("all")


@pytest.mark.parametrize("word", WORDS)
def test_every_sign_is_drawn_as_itself(word):
    figure, ax = plt.subplots()
    shown = ax.text(0, 0, plainly(word))
    figure.canvas.draw()
    seen, is_math = shown._preprocess_math(shown.get_text())
    assert not is_math
    assert seen == "".join(c if c.isprintable() else json.dumps(c)[1:-1].replace("u00", "x") for c in word)
    plt.close(figure)
