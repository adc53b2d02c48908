"""Pretrained models out of package archives: how they are read, and what their authors print of them."""

import io
import json
import os
import pickle

import pytest
import torch

from loopmdm.model import UsageError, mask_tokens, nelbo, open_model, sample
from loopmdm.model.adapters import specimens
from loopmdm.model.adapters.specimens import SPECIMENS
from loopmdm.model.corpora import antibodies
from loopmdm.model.tasks.test_sets import text_set
from tests.loopmdm_model.adapters import archives, natives
from tests.loopmdm_model.adapters.archives import RESIDUES, SIZES, zipped

README = (
    "**QLV*SGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFKNRVTLTTDSSTTTAYMELKSLQFDDTAVYYC"
    "ARRDYRFDMGFDYWGQGTTVTVSS"
)
SCORES = [
    [0.003272, 0.004147, 0.004011, 0.004590],
    [0.012038, 0.003854, 0.006803, 0.008174],
    [0.003384, 0.003895, 0.003726, 0.004068],
    [0.004612, 0.005325, 0.004443, 0.004641],
    [0.005519, 0.003664, 0.003555, 0.005269],
]
"""What sapiens' own page prints for A, C, D, E at the first five positions of that chain."""


@pytest.fixture
def sapiens(tmp_path, monkeypatch):
    native, path = archives.sapiens(tmp_path)
    monkeypatch.setattr(specimens, "cached_archive", lambda item: path)
    return native


def test_fairseqs_weights_are_the_same_model_under_other_names(sapiens):
    m = open_model("sapiens-heavy")
    tokens = torch.randint(4, 24, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted = sapiens(tokens).logits
    wanted[..., 24] = float("-inf")
    assert torch.equal(m(tokens), wanted)
    assert (m.model_name, m.pad, m.cfg.mask_token_id, m.cfg.n_ctx) == ("sapiens-heavy", "<pad>", 24, 38)
    assert m.record["source"] == "sapiens==1.0.5" and m.record["licence"] == "MIT"
    assert len(m.record["revision"]) == 64 and m.facts.trained_to == 0.15


def test_a_specimen_takes_names_of_dtypes_and_no_revision(sapiens):
    assert open_model("sapiens-heavy", dtype="bfloat16").model.dtype == torch.bfloat16
    for given, says in (
        ({"dtype": "float3"}, "float3"),
        ({"dtype": "int32"}, "int32"),
        ({"revision": "main"}, "pinned by its hash and brings no code; leave revision and trust out"),
        ({"trust_remote_code": True}, "leave revision and trust out"),
    ):
        with pytest.raises(UsageError, match=says):
            open_model("sapiens-heavy", **given)


def test_a_bert_beside_its_config(tmp_path, monkeypatch):
    native = natives.native("Bert", **SIZES)
    out, words = io.BytesIO(), ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *RESIDUES]
    torch.save(native.state_dict() | {"cls.species.weight": torch.zeros(6, 32)}, out)
    above = "antiberty/trained_models/"
    folder = above + "AntiBERTy_md_smooth/"
    config = native.config.to_dict() | {"architectures": ["AntiBERTy"]}
    files = {folder + "pytorch_model.bin": out.getvalue(), folder + "config.json": json.dumps(config).encode()}
    path = zipped(tmp_path / "archive.whl", files | {above + "vocab.txt": "\n".join(words).encode()})
    monkeypatch.setattr(specimens, "cached_archive", lambda item: path)
    m = open_model("antiberty", dtype=torch.float64)
    assert m.model.dtype == torch.float64 and m.cfg.mask_token_id == 4
    b = m.with_gaps(["QV_L", "A[MASK]"])
    tokens = b.tokens
    assert tokens.tolist() == [[2, 18, 22, 4, 14, 3], [2, 5, 4, 3, 0, 0]]
    assert b.masked.sum() == 2 and b.maskable.sum() == 6  # neither what is around a text nor padding
    assert m.to_tokens("A[MASK]_").tolist() == [[2, 5, 1, 15, 5, 20, 13, 1, 1, 3]]  # as text
    wanted = native.double()(tokens, attention_mask=(tokens != 0).long()).logits
    wanted[..., 4] = float("-inf")
    torch.testing.assert_close(m(tokens), wanted, rtol=0.0, atol=1e-12)


class Payload:
    def __reduce__(self):
        return os.system, ("true",)


def test_code_in_the_weights_is_refused(tmp_path, monkeypatch):
    folder, out = "sapiens/models/v1/", io.BytesIO()
    torch.save(Payload(), out)
    files = {folder + "checkpoint_vh.pt": out.getvalue(), folder + "dict.txt": b"A 1"}
    path = zipped(tmp_path / "evil.whl", files)
    monkeypatch.setattr(specimens, "cached_archive", lambda item: path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        open_model("sapiens-heavy")


def test_what_is_not_fetched_says_how(monkeypatch, tmp_path):
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"^antiberty is not here yet; run `loopmdm data fetch antiberty`$"):
        open_model("antiberty")
    assert not SPECIMENS["antiberty"].fetched


# --- texts that begin and end with tokens of their own ---


def test_special_tokens_are_neither_hidden_nor_scored_nor_drawn(sapiens):
    m = open_model("sapiens-heavy")
    assert m.special == {0, 1, 2, 3}
    tokens = m.to_tokens(["QVQLVQSG", "QVQ"])
    b = m.mask(["QVQLVQSG", "QVQ"], 1.0)
    assert torch.equal(b.masked, tokens > 3) and m.to_string(b.tokens[1]).startswith("<s><mask><mask><mask></s>")
    found = nelbo(m, tokens, n_samples=2)
    assert found.lengths.tolist() == [8, 3]
    inner = nelbo(m, tokens, n_samples=2, maskable=tokens > 3, attention_mask=tokens != 1)
    assert torch.equal(found.per_sequence, inner.per_sequence)
    drawn = sample(m, 4, 30, steps=5, seed=1).tokens
    assert drawn.shape == (4, 32) and bool((drawn[:, 1:-1] > 3).all()) and bool((drawn[:, 1:-1] < 24).all())
    assert drawn[:, 0].tolist() == [0] * 4 and drawn[:, -1].tolist() == [2] * 4
    ended = sample(m, 4, 30, steps=30, order="left-to-right", seed=1, end=2).tokens[:, 1:-1]
    assert bool((ended == 2).any()) and set(ended.unique().tolist()) <= {2, *range(4, 24)}
    assert sample(m, steps=1).tokens.shape == (1, m.cfg.n_ctx)


def test_gaps_in_a_text_are_filled(sapiens):
    m = open_model("sapiens-heavy")
    for text in ("QV*L", "QVXL", "QV[MASK]L", "QV<mask>L"):
        for b in (m.with_gaps(text), m.mask(text)):
            assert b.tokens.tolist() == [[0, 17, 21, 24, 13, 2]] and b.masked.sum() == 1
    assert sample(m, 2, infill="QV*L", steps=1).start.tolist() == [[0, 17, 21, 24, 13, 2]] * 2
    with pytest.raises(UsageError, match=r"'QVQL' has no gap; write \[MASK\]"):
        m.with_gaps("QVQL")
    assert 24 not in m.to_tokens(["QV*L", "QV<mask>L", "[MASK]"])
    lines = text_set("own.txt", ["QV*L", "QV<mask>L", "Q</s>[MASK]"], m)
    assert not bool((lines.tokens == 24).any()) and (lines.tokens == 2).sum(-1).tolist() == [1, 1, 1]


def test_each_way_in_stands_between_what_the_tokenizer_puts_around_texts(sapiens):
    m = open_model("sapiens-heavy")
    arguments = {"steps": 2, "seed": 1}

    def start(n=None, length=None, **given):
        return sample(m, n, length, **arguments, **given).start.tolist()

    assert start(2, 3) == [[0, 24, 24, 24, 2]] * 2
    assert start(length=4, prompt="QV") == [[0, 17, 21, 24, 24, 2]]
    assert start(length=4, prompt=["QV", "Q"]) == [[0, 17, 21, 24, 24, 2], [0, 17, 24, 24, 24, 2]]
    assert start(length=4, clues={2: 21}) == [[0, 24, 21, 24, 24, 2]]
    assert start(length=4, prompt="QV", clues={4: 7}) == [[0, 17, 21, 24, 7, 2]]
    assert start(infill="QV[MASK]L") == [[0, 17, 21, 24, 13, 2]]
    assert start(length=3, prompt=[0, 17]) == [[0, 17, 24]]  # ids are what they are
    assert start(clues=[[17, -1]]) == [[17, 24]]
    for given, says in (
        ({"length": 37}, "length 37 exceeds n_ctx = 38 less 2 around a text"),
        ({"length": 3, "prompt": "QVQL"}, "prompt of 5 tokens exceeds the length of 4"),
        ({"length": 3, "clues": {0: 5}}, "the clue 5 stands at position 0, which holds 0 already"),
        ({"length": 3, "clues": {4: 5}}, "the clue 5 stands at position 4, which holds 2 already"),
    ):
        with pytest.raises(UsageError, match=says):
            sample(m, **arguments, **given)


def test_guidance_is_towards_what_was_said_not_what_is_around_it(sapiens):
    m = open_model("sapiens-heavy")
    plain, guided = (sample(m, 2, 6, steps=3, guidance=w) for w in (0.0, 2.0))
    assert guided.flops == plain.flops and torch.equal(guided.tokens, plain.tokens)
    told = sample(m, 2, 6, prompt="QV", steps=3, guidance=2.0)
    assert told.flops == 2 * sample(m, 2, 6, prompt="QV", steps=3).flops


# --- the real ones ---


def real(name: str):
    if not SPECIMENS[name].fetched:
        pytest.skip(f"`loopmdm data fetch {SPECIMENS[name].archive}` was not run on this machine")
    return open_model(name)


def test_sapiens_gives_the_scores_that_its_authors_print():
    m = real("sapiens-heavy")
    tokens = m.with_gaps(README).tokens
    others = 1 - m.model.native_logits(tokens).softmax(-1)[..., 24:]  # theirs count [MASK] as a token
    scores = (m(tokens).softmax(-1) * others)[0, 1:6, 4:8]
    assert [[round(float(value), 6) for value in row] for row in scores] == SCORES
    best = torch.where(tokens == 24, m(tokens)[..., 4:24].argmax(-1) + 4, tokens)
    assert m.tokenizer.decode(best[0].tolist()) == README.replace("**QLV*SG", "QVQLVQSG")


@pytest.mark.parametrize("name", SPECIMENS)
def test_each_specimen_knows_chains_of_its_kind(name):
    """Against 20 residues drawn evenly: ln 20 nats; at few masks, as in training."""
    m = real(name)
    tokens = m.to_tokens(antibodies.chains(SPECIMENS[name].corpus)[:4])
    b = mask_tokens(tokens, m.cfg.mask_token_id, mask_ratio=0.15, maskable=m.words(tokens))
    truth = b.clean[b.masked]
    nats = -m(b.tokens)[b.masked].log_softmax(-1)[torch.arange(len(truth)), truth]
    assert float(nats.mean()) < 2.0


@pytest.mark.slow
def test_the_chains_are_what_antiberty_samples():
    m = real("antiberty")
    length = antibodies.LENGTHS["antibody-light"]
    (row,) = sample(m, 1, length, steps=length, order="confidence", seed=0, first_index=3).tokens.tolist()
    assert m.tokenizer.decode(row) == antibodies.chains("antibody-light")[3]


def test_chains_are_residues_of_their_length():
    for task, length in antibodies.LENGTHS.items():
        found = antibodies.chains(task)
        assert len(set(found)) == len(found) >= 16
        assert {len(chain) for chain in found} == {length} and set("".join(found)) <= set(RESIDUES)
