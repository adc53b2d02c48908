"""A measure in shards is the measure: masks, documents that span shards, and the table."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis.cli.science import _shard
from loopmdm.analysis.measures import MEASURES, measure, merge
from loopmdm.analysis.measures.access import Access
from loopmdm.analysis.measures.shards import in_shards
from loopmdm.analysis.numbers import frames, kept
from loopmdm.model.adapters import open_model
from loopmdm.model.batching import at_a_time
from loopmdm.model.diffusion.likelihood import draw_times, masked_draw
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.sequences import MaskedBatch, Sequences, Share
from loopmdm.model.tasks.test_sets import TestSet, load_test_set
from loopmdm.model.tasks.trees import TREE_TASKS
from loopmdm.model.work import keeping
from tests.commands import loopmdm as run
from tests.commands import one_line
from tests.conftest import toy_model

ASKED = {
    "convergence": {"n_loops": 6, "least_loops": 6},
    "excess-kl": {"n_loops": [1, 2]},
    "excess-kl-cut": {"n_loops": [1, 2]},
    "nll": {"n_loops": [1, 2]},
    "noise-level": {"n_loops": [1, 2]},
    "stopping-frontier": {"n_thresholds": 3},
    "stopping-verdicts": {"n_thresholds": 3},
}


def toy(**changes) -> HookedLoopMDM:
    m = HookedLoopMDM(toy_model(**changes))
    m.record = {"spec": {"data": {"corpus": "toy"}}}
    return m


@pytest.fixture
def documents(monkeypatch):
    """A test set of 13 sequences in 5 documents, none of which fits into one shard; another one for validation."""

    def planted(self, m, split="test", n=None):
        tokens = torch.randint(0, 22, (13, 10), generator=torch.Generator().manual_seed(len(split)))
        return TestSet("toy", Sequences.of(tokens, clusters=np.arange(13) % 5))

    monkeypatch.setattr(Access, "test_set", planted)


def asked(name: str) -> dict:
    return {"n_loops": 3} | ({"mask_ratios": (0.3,)} if MEASURES[name].on == "masks" else {}) | ASKED.get(name, {})


ON_TREES = ("excess-kl", "excess-kl-cut")


@pytest.mark.parametrize("name", [name for name in in_shards() if name not in ON_TREES])
def test_the_merged_table_is_the_whole_one(name, documents, monkeypatch):
    m = toy()
    whole = measure(name, m, **asked(name))
    parts = [measure(name, m, shard=(number, 3), **asked(name)) for number in (1, 2, 3)]
    for entry in ("run", "states", "forward"):
        monkeypatch.setattr(m, entry, lambda *_, **__: pytest.fail("merging ran the model"))
    table = merge([parts[2], parts[0], parts[1]], m)
    assert list(table.columns) == list(whole.columns) and len(table) > 0
    pd.testing.assert_frame_equal(table, whole, rtol=2e-4, atol=2e-6)  # batches of another size round otherwise
    assert {len(part) for part in parts} == {len(parts[0])}  # each did its own, not the whole


@pytest.mark.parametrize("name", ON_TREES)
def test_a_known_posterior_comes_in_shards(name, monkeypatch):
    found = TestSet("tree", Sequences.of(TREE_TASKS["tree"].sample(80, 1)))
    monkeypatch.setattr(Access, "test_set", lambda *_, **__: found)
    m = HookedLoopMDM.from_pretrained("tree-loop")
    whole = measure(name, m, [2], n_samples=1)
    parts = [measure(name, m, [2], n_samples=1, shard=(number, 2)) for number in (1, 2)]
    assert frames.value_hash(merge(parts, m)) == frames.value_hash(whole)


def test_whole_batches_give_the_same_bits(monkeypatch):
    tokens = torch.randint(0, 22, (160, 10), generator=torch.Generator().manual_seed(1))
    found = TestSet("toy", Sequences.of(tokens, clusters=np.arange(160) // 3))
    monkeypatch.setattr(Access, "test_set", lambda *_, **__: found)
    m = toy()
    for name in ("mask-attention", "representation-change", "nll"):
        whole = measure(name, m, **asked(name))
        parts = [measure(name, m, shard=(number, 3), **asked(name)) for number in (1, 2, 3)]
        assert frames.value_hash(merge(parts, m)) == frames.value_hash(whole), name


def test_parts_are_merged_in_the_batches_they_were_made_in(documents):
    m = toy()
    parts = [measure("settled", m, 2, shard=(number, 2), batch_size=2) for number in (1, 2)]
    whole = measure("settled", m, 2)
    assert {len(part) for part in parts} == {9, 12}  # 6 and 7 sequences, two at a time, at three mask ratios
    pd.testing.assert_frame_equal(merge(parts, m), whole)
    with at_a_time(2):  # however the size is asked for
        inside = [measure("settled", m, 2, shard=(number, 2)) for number in (1, 2)]
    pd.testing.assert_frame_equal(merge([inside[0], parts[1]], m), whole)
    with pytest.raises(UsageError, match="differ in batch_size: 2 and None"):
        merge([parts[0], measure("settled", m, 2, shard=(2, 2))], m)


def test_parts_of_other_machines_are_merged(tmp_path, monkeypatch):
    """One on a GPU, the model's folder and the texts under other paths: hashes say that they are the same."""
    lines = [" ".join(str((row + at) % 6) for at in range(8)) for row in range(3)]
    for place in ("here", "there"):
        (tmp_path / f"{place}.txt").write_text("\n".join(lines))
        HookedLoopMDM.from_pretrained("sudoku-loop-s4").model.save_pretrained(tmp_path / place)
    how = {"n_loops": 2, "mask_ratios": (0.5,)}
    here, there = Access(text=tmp_path / "here.txt"), Access("cuda", text=tmp_path / "there.txt")
    whole = measure("settled", str(tmp_path / "here"), access=here, **how)
    one = measure("settled", str(tmp_path / "here"), access=here, shard=(1, 2), **how)
    monkeypatch.setattr(Access, "open", lambda self, name: open_model(name))  # as if there were a GPU
    other = measure("settled", str(tmp_path / "there"), access=there, shard=(2, 2), **how)
    assert frames.value_hash(merge([one, other])) == frames.value_hash(whole)


def test_sequences_of_a_shard_are_masked_as_in_the_whole():
    tokens = torch.randint(0, 22, (11, 9), generator=torch.Generator().manual_seed(1))
    whole = Sequences.of(tokens, tokens > 2, clusters=np.arange(11) // 2)
    shards = [Share(number, 3).take(whole) for number in (1, 2, 3)]
    assert torch.equal(torch.cat([shard.tokens for shard in shards]), tokens)
    for mask in (
        lambda s: mask_tokens(s, 22, mask_ratio=0.5, seed=3),
        lambda s: masked_draw(s, 22, 3, 1, 2),
    ):
        together = [mask(shard) for shard in shards]
        assert torch.equal(torch.cat([b.tokens for b in together]), mask(whole).tokens)
        assert [b.first for b in together] == [0, 3, 7] and [b.sequences.first for b in together] == [0, 3, 7]
    times = [draw_times(len(s), 1, 0, first_index=s.first, whole=11) for s in shards]
    assert torch.equal(torch.cat(times), draw_times(11, 1, 0))


def test_shards_begin_at_whole_batches_where_they_can():
    assert Share(1, 4).edges(256) == (0, 64, 128, 192, 256)
    assert Share(1, 8).edges(256) == tuple(range(0, 257, 32))
    assert Share(1, 3).edges(1000) == (0, 320, 640, 1000)
    assert Share(1, 3).edges(7) == (0, 2, 4, 7)


def test_what_was_asked_of_other_rows_is_not_found():
    class Refusing:
        def __init__(self):
            self.keys = []

        def result(self, key, work):
            assert key not in self.keys
            self.keys.append(key)
            return work()

    b = mask_tokens(torch.zeros(4, 6, dtype=torch.long), 22, mask_ratio=0.5, seed=0)
    alike = MaskedBatch(b.tokens[:1].repeat(4, 1), b.clean[:1].repeat(4, 1), b.masked[:1].repeat(4, 1))
    ledger = Refusing()
    with keeping(ledger):
        for batch in (b, b, dataclasses.replace(b, clusters=np.arange(4)), alike):
            assert [n for _, _, n in batch.each(2, len)] == [2, 2]
    assert len(ledger.keys) == 8


def test_results_are_kept_as_they_were():
    given = {"a": (torch.arange(3), [1.5, None, "word"], {(0, "k"): np.float64(2.0)}), "b": np.array(["x", "yz"])}
    ((key, found),) = kept.results(kept.table({"key": given}))
    assert key == "key" and torch.equal(found["a"][0], torch.arange(3)) and found["a"][1] == [1.5, None, "word"]
    assert (
        list(found["a"][2]) == [(0, "k")] and found["a"][2][0, "k"] == 2.0 and found["b"].tolist() == ["x", "yz"]
    )
    with pytest.raises(TypeError, match="object cannot be kept"):
        kept.table({"key": object()})


@pytest.fixture
def parts(documents):
    return [measure("settled", toy(), shard=(number, 2), n_loops=2, mask_ratios=(0.5,)) for number in (1, 2)]


def test_what_is_not_all_parts_of_one_whole_is_refused(parts, documents):
    one, two = parts
    m, n = toy(), {"n_loops": 2, "mask_ratios": (0.5,)}
    others = {
        "differ in options": measure("settled", m, shard=(2, 2), n_loops=3, mask_ratios=(0.5,)),
        "differ in weights": measure("settled", toy(seed=1), shard=(2, 2), **n),
        "differ in measure": measure("mask-attention", m, shard=(2, 2), **n),
        "differ in shards": measure("settled", m, shard=(2, 3), **n),
    }
    older = two.copy()
    older.attrs = {"part": two.attrs["part"] | {"versions": {"torch": "1.0"}}}
    for says, other in (others | {"differ in versions": older}).items():
        with pytest.raises(UsageError, match=says):
            merge([one, other], m)
    for given, says in (
        ([one], "shard 2/2 is missing"),
        ([one, two, one], "shard 1/2 is there twice: part 1 and part 3"),
        ([], "nothing to merge"),
        ([one, pd.DataFrame({"mass": [1.0]})], "part 2 is no part"),
    ):
        with pytest.raises(UsageError, match=says):
            merge(given, m)
    with pytest.raises(UsageError, match="other weights"):
        merge([one, two], toy(seed=1))
    lacking = two.iloc[:0]
    lacking.attrs = two.attrs
    with pytest.raises(UsageError, match="the parts lack something"):
        merge([one, lacking], m)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("settled", {"shard": (3, 2)}, "no shard 3/2; shards count from 1/2 on"),
        ("settled", {"shard": (0, 2)}, "no shard 0/2"),
        ("settled", {"shard": "1/2"}, "takes a pair"),
        ("settled", {"shard": (1, 14)}, "13 sequences make 13 shards at most"),
        ("similarity", {"shard": (1, 2)}, "similarity does not come in shards; these do: .*mask-attention"),
        ("settled", {"shard": (1, 2), "along_sampling": 4}, "leave along_sampling out"),
    ],
)
def test_misuse_of_shards_is_named(name, options, says, documents):
    with pytest.raises(UsageError, match=says):
        measure(name, toy(), **options)


def test_on_the_command_line_a_lost_shard_is_measured_again_alone(tmp_path):
    how = ("settled", "sudoku-loop", "--n", 8, "--n-loops", 1, "--mask-ratios", 0.5)
    first, second = (tmp_path / f"part-{number}.parquet" for number in (1, 2))
    options = {"n": 8, "mask_ratios": (0.5,)}
    part = measure("settled", "sudoku-loop", 1, shard=(1, 2), **options)
    frames.write_table(part, first, {str(name): told for name, told in part.attrs.items()})
    _, err = run("merge", first, second, code=2)
    assert one_line(err) and "part-2.parquet cannot be read (No such file or directory); measure that" in err
    second.write_bytes(first.read_bytes()[:100])  # killed while it was copied
    _, err = run("merge", first, second, "--out", tmp_path / "table.parquet", code=2)
    assert one_line(err) and "part-2.parquet is" in err and "measure that shard again" in err
    assert not (tmp_path / "table.parquet").exists()
    out, _ = run("measure", *how, "--shard", "2/2", "--out", second)
    assert out.splitlines() == ["shard\tbatches\tout", f"2/2\t1\t{second}"]
    out, _ = run("merge", first, second, "--out", tmp_path / "table.parquet")
    whole = measure("settled", "sudoku-loop", 1, **options)
    assert frames.value_hash(frames.read_table(tmp_path / "table.parquet")) == frames.value_hash(whole)
    assert out.count("\n") == 1 + len(whole)


def test_a_shard_on_the_command_line_is_one_of_some(tmp_path):
    for shard in ("2", "a/b"):
        with pytest.raises(UsageError, match="--shard takes"):
            _shard(shard)
    _, err = run("measure", "settled", "sudoku-loop", "--shard", "3/2", "--out", tmp_path / "x.parquet", code=2)
    assert one_line(err) and not list(tmp_path.iterdir())


def test_more_than_there_is_is_said(documents):
    with pytest.warns(UserWarning, match="its test set has 13 sequences, not 14; all of them are taken"):
        frame = measure("settled", toy(), 1, n=14, mask_ratios=(0.5,))
    assert set(frame["n_units"]) == {5}


@pytest.mark.parametrize("task", ["sudoku6", "tree", "markov", "arithmetic"])
def test_generated_tasks_make_as_many_as_asked_for_and_the_first_ones_stay(task):
    usual, more = load_test_set(task, 36, None), load_test_set(task, 36, None, n=1500)
    assert len(usual.tokens) == 1000 == len(load_test_set(task, 36, None, n=5).tokens) and len(more.tokens) == 1500
    assert torch.equal(more.tokens[:1000], usual.tokens)
