"""The commands on other people's models: folders, the hub, specimens; and one line for what is wrong."""

import json
import re

import pandas as pd
import pytest
import torch

from loopmdm.analysis import mask_attention
from loopmdm.analysis.numbers import frames
from loopmdm.model import mask_tokens, open_model
from loopmdm.model.adapters import specimens
from loopmdm.model.adapters.specimens import SPECIMENS
from tests.commands import loopmdm, one_line
from tests.loopmdm_model.adapters import archives, natives

pytestmark = pytest.mark.filterwarnings("ignore:.*extrapolation")
SET = ["--set", "mask_token_id=103"]
ROWS = [[40 + (7 * row + 3 * at) % 60 for at in range(9)] for row in range(8)]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    natives.native("Bert").save_pretrained(root / "bert")
    natives.native("Llama").save_pretrained(root / "llama")
    (root / "own.txt").write_text("\n".join(" ".join(map(str, row)) for row in ROWS))
    return root


def run(*arguments) -> list[dict[str, str]]:
    """The records that a command prints."""
    head, *rows = [line.split("\t") for line in loopmdm(*arguments)[0].splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_measure_prints_and_keeps_what_the_function_gives(places, tmp_path):
    out = tmp_path / "kept.parquet"
    how = [*SET, "--set", "loop=[1, 2]", "--set", "max_loops=2", "--dtype", "float64"]
    where = ["--text", places / "own.txt", "--mask-ratios", "0.5", "--out", out]
    rows = run("measure", "mask-attention", places / "bert", *how, *where)
    m = open_model(places / "bert", dtype=torch.float64, mask_token_id=103, loop=(1, 2), max_loops=2)
    test = torch.tensor([row for index, row in enumerate(ROWS) if index % 4 != 3])
    expected = mask_attention(m, mask_tokens(test, 103, mask_ratio=0.5), 2)
    assert [row["mass"] for row in rows] == ["nan" if pd.isna(v) else f"{v:.6g}" for v in expected["mass"]]
    pd.testing.assert_series_equal(pd.read_parquet(out)["mass"], expected["mass"], rtol=1e-12)
    assert "trained with 15% of tokens masked" in frames.read_table(out, ()).attrs["remarks"][0]


def test_evaluate_sample_and_report(places, tmp_path):
    (row,) = run("evaluate", places / "bert", *SET, "--text", places / "own.txt", "--n-samples", 1)
    assert float(row["nelbo"]) > 0 and row["n"] == "6"
    (sampled,) = run("sample", places / "bert", *SET, "--length", 6, "--steps", 3, "--clues", "0:50")
    ids = [int(word) for word in sampled["text"].split()]
    assert len(ids) == 6 and ids[0] == 50 and 103 not in ids
    out = tmp_path / "page.html"
    run("report", places / "bert", *SET, "--text", places / "own.txt", "--out", out)
    page = out.read_text()
    assert page.count('"tokens":') == 3 and "Attention explorer: bert" in page
    assert "No head cards of bert: head-cards needs an additive residual stream" in page and "<article" not in page


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--length", 4], "<s>....</s>"),
        (["--prompt", "QV", "--length", 4], "<s>QV..</s>"),
        (["--infill", "QV[MASK]L"], "<s>QV.L</s>"),
        (["--infill", "Q*L"], "<s>Q.L</s>"),
        (["--clues", "2:21,3:13", "--length", 4], "<s>.VL.</s>"),
        (["--prompt", "Q", "--clues", "3:13", "--length", 4], "<s>Q.L.</s>"),
        (["--prompt", "QVQ"], "<s>QVQ" + "." * 33 + "</s>"),
    ],
)
def test_sample_stands_between_the_tokens_around_a_text(given, text, tmp_path, monkeypatch):
    _, path = archives.sapiens(tmp_path)
    monkeypatch.setattr(specimens, "cached_archive", lambda item: path)
    rows = run("sample", "sapiens-heavy", *given, "--steps", 2, "--n", 2)
    assert len(rows) == 2
    for row in rows:
        assert re.fullmatch(text.replace(".", f"[{archives.RESIDUES}]"), row["text"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--infill", "Q*L", "--length", 4], "infill is a whole text; leave length out"),
        (["--infill", "Q*L", "--prompt", "Q"], "infill is a whole text; leave prompt out"),
        (["--infill", "Q*L", "--clues", "2:21"], "infill is a whole text; leave clues out"),
        (["--infill", "QVL"], "has no gap; write"),
        (["--clues", "0:21", "--length", 4], "position 0, which holds 0 already"),
        (["--prompt", "QVQL", "--length", 3], "exceeds the length of 4"),
    ],
)
def test_sample_says_what_does_not_go_together(given, says, tmp_path, monkeypatch):
    _, path = archives.sapiens(tmp_path)
    monkeypatch.setattr(specimens, "cached_archive", lambda item: path)
    assert says in loopmdm("sample", "sapiens-heavy", *given, "--steps", 2, code=2)[1]


def test_training_free_at_its_blocks_and_counts(places):
    rows = run("training-free", places / "bert", *SET, "--text", places / "own.txt", "--blocks", "1:1,1:2",
               "--n-loops", "1,2", "--n-samples", 1)  # fmt: skip
    found = [(row["first_layer"], row["n_layers"], row["damping"], row["n_loops"]) for row in rows]
    assert found == [("1", n, d, s) for n in "12" for d in ("none", "1/n_loops") for s in "12"]
    assert all(row["change"] == "0" for row in rows if row["n_loops"] == "1")


def test_specimens_are_listed_with_source_and_licence():
    listed = {row["model"]: row for row in run("models")}
    assert listed["sapiens-heavy"]["source"].startswith("sapiens==1.0.5")
    assert {listed[name]["licence"] for name in SPECIMENS} == {"MIT"}
    assert listed["sotu-loop"]["source"] == "this package"


BERT, LLAMA, OWN = "{places}/bert", "{places}/llama", "{places}/own.txt"
WRONG = {
    "no test set": (["measure", "mask-attention", BERT, *SET], 2, "give --text FILE, a sequence a line"),
    "no mask": (["measure", "mask-attention", BERT, "--text", OWN], 2, "give mask_token_id="),
    "mask outside": (["measure", "mask-attention", BERT, "--set", "mask_token_id=999"], 2, "0..119"),
    "causal sampling": (["sample", LLAMA], 2, "sample needs a model with a [MASK]"),
    "causal likelihood": (["evaluate", LLAMA, "--text", OWN], 2, "nll needs a model"),
    "causal looping": (["training-free", LLAMA, "--text", OWN], 2, "needs a model with a"),
    "no device": (["sample", BERT, "--device", "moon"], 2, "device 'moon' cannot be used here"),
    "no dtype": (["report", BERT, "--dtype", "float3"], 2, 'as "bfloat16"'),
    "bad set": (["sample", BERT, "--set", "mask_token_id"], 2, "KEY=VALUE such as mask_token"),
    "unknown key": (["sample", BERT, "--set", "maks_token_id=3"], 2, "did you mean mask_token_id"),
    "ours with a key": (["sample", "sotu-loop", "--set", "loop=[1, 2]"], 2, "takes device and dtype"),
    "a near name": (["measure", "settled", "sapiens-hevy"], 2, "did you mean sapiens-heavy"),
    "not fetched": (["measure", "settled", "antiberty"], 2, "run `loopmdm data fetch antiberty`"),
    "blocks": (["training-free", BERT, "--blocks", "1"], 2, "--blocks takes integers such as 1:2"),
    "no hub": (["measure", "settled", "hf:nobody/nothing"], 1, "check the name and the network"),
    "own code": (["sample", "{places}/own-code"], 2, "read it, then pass trust_remote_code=True"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(places, case, monkeypatch, tmp_path):
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (places / "own-code").mkdir(exist_ok=True)
    config = {"model_type": "llada", "architectures": ["LLaDAModelLM"], "auto_map": {"AutoModel": "m.LLaDA"}}
    (places / "own-code/config.json").write_text(json.dumps(config))
    words, code, says = WRONG[case]
    _, said = loopmdm(*[word.format(places=places) for word in words], code=code)
    assert says in said and one_line(said)
