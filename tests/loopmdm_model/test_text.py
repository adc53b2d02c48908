"""Special tokens spelled out are text, but where a gap is asked for; prompts, puzzles and hub rows."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch

from loopmdm.model.corpora import hub
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks import text as hooked_text
from loopmdm.model.hooks.hooked import HookedLoopMDM


@pytest.fixture(scope="module")
def sotu():
    return HookedLoopMDM.from_pretrained("sotu-loop")


@pytest.fixture(scope="module")
def sudoku():
    return HookedLoopMDM.from_pretrained("sudoku-loop")


def unpickled(m):
    return pickle.loads(pickle.dumps(m))


def reloaded(m):
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def saved(m, tmp_path):
    m.save_pretrained(tmp_path)
    return HookedLoopMDM.from_pretrained(tmp_path)


@pytest.mark.parametrize("word", ["[MASK]", "[PAD]", "[EOS]"])
def test_special_tokens_spelled_out_are_text_also_in_copies_of_a_model(sotu, tmp_path, word):
    text = f"the {word} state"
    for m in (sotu, unpickled(sotu), copy.deepcopy(sotu), reloaded(sotu), saved(sotu, tmp_path)):
        ids = m.to_tokens(text)
        assert int(ids.max()) < m.cfg.d_vocab - 3
        assert m.to_string(ids[0]) == text and "".join(m.to_str_tokens(text)) == text
        assert m.padding_mask(ids) is None
        assert m.mask(text, 0.5).allowed.all()
        begun = sample(m, prompt=text, steps=1, n_loops=1, length=16).tokens
        assert torch.equal(begun[0, : ids.shape[1]], ids[0])


def test_an_unknown_symbol_is_not_mask():
    m = HookedLoopMDM.from_pretrained("tree-loop")
    assert m.to_tokens("1234").tolist() == [[0, 1, 2, 3]]
    for text, wrong in (("12[MASK]", r"'\['"), ("1x", "'x'"), ("15", "'5'")):
        with pytest.raises(UsageError, match=f"{wrong} is no symbol of this model: 1 2 3 4"):
            m.to_tokens(text)
    assert m.with_gaps("12[MASK]4").tokens.tolist() == [[0, 1, 4, 3]]
    with pytest.raises(UsageError, match="'x' is no symbol of this model: 1 2 3 4"):
        m.with_gaps("1x[MASK]")


def test_symbols_are_read_as_they_are_printed():
    m = HookedLoopMDM.from_pretrained("arithmetic-loop")
    printed, ids = "3 4 * 5 2 6 - 3 + 1", [3, 4, 9, 5, 2, 6, 8, 3, 7, 1]
    assert m.to_tokens(printed).tolist() == m.to_tokens(printed.replace(" ", "")).tolist() == [ids]
    assert m.to_string(m.to_tokens(printed)[0]) == printed
    assert m.to_str_tokens(printed) == printed.split()
    b = m.mask("3 4 * [MASK] 2 6 - 3 + [MASK]")
    assert b.masked.nonzero()[:, 1].tolist() == [3, 9] and b.tokens[0, 0] == 3
    named = m.mask(printed, words=["5", "1"])
    assert named.masked.nonzero()[:, 1].tolist() == [3, 9] and named.clean.tolist() == [ids]
    again = m.mask(printed.replace(" ", ""), words="-")
    assert again.masked.nonzero()[:, 1].tolist() == [6]
    filled = sample(m, infill="3 4 * [MASK] 2 6 - [MASK] + [MASK]", steps=3, temperature=0.0)
    assert m.to_string(filled.tokens[0]) == printed  # evaluated from the leaves up
    with pytest.raises(UsageError, match="'x' is no symbol"):
        m.to_tokens("3 x")


def test_gaps_are_filled_and_the_rest_stays(sotu):
    texts = ["The state of our [MASK][MASK] is strong.", "[MASK] Union"]
    b = sotu.with_gaps(texts)
    assert b.masked.sum(-1).tolist() == [2, 1]
    r = sample(sotu, infill=texts, steps=3, n_loops=1)
    assert torch.equal(r.tokens[~b.masked], b.tokens[~b.masked])
    assert not (r.tokens == sotu.cfg.mask_token_id).any()
    alone = sample(sotu, infill=texts[0], steps=3, n_loops=1)
    assert torch.equal(alone.tokens[0], r.tokens[0, : alone.tokens.shape[1]])
    by_ids = sample(sotu, clues=sotu.with_gaps(texts[0]), steps=3, n_loops=1)
    assert torch.equal(by_ids.tokens, alone.tokens)
    assert torch.equal(sotu.mask(texts).tokens, b.tokens) and torch.equal(sotu.mask(texts).masked, b.masked)
    assert sample(sotu, 3, infill=texts[0], steps=3, n_loops=1).start.tolist() == [alone.start[0].tolist()] * 3
    told = sotu.to_string(alone.tokens[0])
    assert told.startswith("The state of our") and told.endswith(" is strong.")


def test_a_gap_has_the_blank_of_its_word(sotu):
    whole = "My fellow people, our duty"
    hidden = sotu.mask(whole, words="people")
    assert int(hidden.masked.sum()) == 1  # one token, its blank with it
    assert sotu.mask("My fellow [MASK], our duty").tokens.tolist() == hidden.tokens.tolist()


def test_what_to_hide_is_asked_for_by_the_names_that_mask_has(sotu):
    for given in ({}, {"ratio": 0.5, "t": 0.5}):
        with pytest.raises(
            UsageError, match=r"exactly one of ratio= .* and t= .*, or words=, positions=, or \[MASK\]"
        ):
            sotu.mask("My fellow people", **given)


def test_gaps_of_a_framed_tokenizer_stand_inside_the_frame(sotu):
    from tokenizers.processors import TemplateProcessing

    m = copy.deepcopy(sotu)
    ends = [(name, m.tokenizer.token_to_id(name)) for name in ("[EOS]", "[PAD]")]
    m.tokenizer.post_processor = TemplateProcessing(single="[EOS] $A [PAD]", special_tokens=ends)
    tokens, plain = m.with_gaps("the [MASK] state").tokens[0], sotu.with_gaps("the [MASK] state").tokens[0]
    assert tokens.tolist() == [ends[0][1], *plain.tolist(), ends[1][1]]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"infill": "no gap"}, "has no gap"),
        ({"infill": 3}, "a text or a list of texts"),
        ({"infill": []}, "a text or a list of texts"),
        ({"infill": "a [MASK]", "prompt": "x"}, "leave prompt out"),
        ({"infill": "a [MASK]", "length": 9}, "leave length out"),
        ({"infill": "a [MASK]", "clues": {0: 1}}, "leave clues out"),
    ],
)
def test_infill_says_what_it_takes(sotu, given, says):
    with pytest.raises(UsageError, match=says):
        sample(sotu, steps=1, n_loops=1, **given)


def test_infill_needs_a_tokenizer(model):
    with pytest.raises(UsageError, match="infill needs a tokenizer"):
        sample(model, infill="a [MASK]", steps=1)


def test_a_padded_prompt_goes_on_where_its_own_text_ends(sotu):
    ids = sotu.to_tokens(["The state of the union", "The"])
    whole = sample(sotu, prompt=ids, steps=3, n_loops=1, length=16).tokens
    for row, text in enumerate(["The state of the union", "The"]):
        alone = sample(sotu, prompt=text, steps=3, n_loops=1, length=16, first_index=row).tokens
        assert torch.equal(whole[row], alone[0])
    for given in (ids.tolist(), ids.numpy(), ids.int(), list(ids), [np.int64(3), 4], (3, 4)):
        assert sample(sotu, prompt=given, steps=1, n_loops=1, length=16).tokens.shape[1] == 16
    for given in ([True], [1.5], np.array([0.5]), [[-1]], 7):
        with pytest.raises(UsageError, match="a prompt must be a text or token ids"):
            sample(sotu, prompt=given, steps=1, n_loops=1)


PUZZLE = "..3456456123231564564231312645645312"
ROWS = [[0 if sign == "." else int(sign) for sign in PUZZLE[start : start + 6]] for start in range(0, 36, 6)]


@pytest.mark.parametrize(
    "given",
    [
        PUZZLE,
        "\r\n".join(PUZZLE[start : start + 6] for start in range(0, 36, 6)),
        ROWS,
        [cell for row in ROWS for cell in row],
        *(np.array(ROWS, dtype=kind) for kind in ("int8", "uint8", "int16", "uint16", "uint32", "uint64", object)),
        np.where(np.array(ROWS) == 0, -1, ROWS),
    ],
)
def test_a_puzzle_without_solution_is_read_alike_by_all(sudoku, given):
    b = sudoku.mask(given)
    assert b.masked[0].nonzero().flatten().tolist() == [0, 1]
    assert b.clean[0, 2:8].tolist() == [2, 3, 4, 5, 3, 4]
    for clues in (given, b):
        assert torch.equal(sample(sudoku, clues=clues, steps=2, n_loops=1).start, b.tokens)
    assert torch.equal(sudoku(given, n_loops=1), sudoku(b, n_loops=1))
    shown = sudoku.to_string(b.tokens[0])
    assert torch.equal(sudoku.to_tokens(shown), b.tokens) and torch.equal(sudoku.with_gaps(shown).tokens, b.tokens)


def test_hub_rows_are_text_or_refused(sotu, monkeypatch):
    def texts(*rows):
        monkeypatch.setattr(hub, "stream", lambda name: iter(rows))
        return list(hub.texts("hub:a/b"))

    rows = [{"text": text} for text in ("a\r\nb\rc", "", None, " \n", "x\0y", "\ud800z")]
    assert texts(*rows) == ["a\nb\nc", "xy", "z"]
    with pytest.raises(UsageError, match=r"row 1 \(columns content\) holds no text under 'text'"):
        texts({"text": "a"}, {"content": "b"})
    with pytest.raises(UsageError, match="row 0"):
        texts({"text": 3})


@pytest.mark.parametrize("file", ["00000.ids", "00000.npy", "00000.json"])
@pytest.mark.parametrize("damage", [lambda raw: raw[:-3], lambda raw: b"\1" + raw[1:], lambda raw: b"{}"])
def test_a_damaged_preparation_is_made_again_with_a_line(sotu, monkeypatch, tmp_path, file, damage):
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path))
    rows = [{"text": f"document number {number} says something of its own"} for number in range(5000)]
    monkeypatch.setattr(hub, "stream", lambda name: iter(rows))
    whole = hub.prepare("hub:a/b", sotu.tokenizer, 500)
    tokens, (path,) = whole.stream[:], tmp_path.glob(f"prepared/*/{file}")
    held_out = [row.tolist() for row in whole.held_out["test"]]  # before their map is written to
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged; hub:a/b is prepared again"):
        again = hub.prepare("hub:a/b", sotu.tokenizer, 500)
    assert np.array_equal(again.stream[:], tokens) and again.fingerprint == whole.fingerprint
    assert [row.tolist() for row in again.held_out["test"]] == held_out


# --- hiding what is named ---


def test_named_words_are_hidden_wherever_they_stand_and_nothing_else(sotu, monkeypatch):
    text = "My fellow citizens, the economy is strong; the Economy, economy and economic."
    b = sotu.mask([text, "the economy"], words="economy")
    for row, times in zip(range(2), (2, 1), strict=True):
        hidden = [piece for piece, at in zip(sotu.to_str_tokens(b.clean[row]), b.masked[row], strict=True) if at]
        assert "".join(hidden) == " economy" * times
    assert not bool(b.masked[1][b.attention_mask[1] == 0].any())
    split, whole = [], hooked_text.encode_offsets
    monkeypatch.setattr(hooked_text, "encode_offsets", lambda *given: split.append(given) or whole(*given))
    both = sotu.mask(text, words=["economy", "citizens"])
    assert bool((both.masked[0] | ~b.masked[0]).all()) and both.masked.sum() > b.masked[0].sum()
    assert len(split) == 1  # not once a word


def test_named_positions_are_hidden_counted_from_either_end(sotu, sudoku):
    b = sotu.mask(["one two three four", "one"], positions=[0, -1])
    lengths = b.real.sum(1).tolist()
    assert b.masked.nonzero().tolist() == sorted([row, at] for row in range(2) for at in {0, lengths[row] - 1})
    grid = torch.arange(36)[None] % 6
    assert sudoku.mask(grid, positions=7).masked.nonzero().tolist() == [[0, 7]]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"words": "economics"}, "no word 'economics'"),
        ({"words": "econ"}, "no word 'econ'"),
        ({"words": ""}, "no word ''"),
        ({"positions": 99}, "no position 99 in"),
        ({"positions": [True]}, "no position True in"),
        ({"positions": []}, "nothing is named"),
        ({"words": "economy", "ratio": 0.5}, "leave ratio="),
    ],
)
def test_what_cannot_be_named_is_said(sotu, named, said):
    with pytest.raises(UsageError, match=said):
        sotu.mask("the economy is strong", **named)


def test_a_board_has_no_words(sudoku):
    with pytest.raises(UsageError, match="a board has cells"):
        sudoku.mask("123456" * 6, words="1")
