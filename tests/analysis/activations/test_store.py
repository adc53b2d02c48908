"""A store gives back what the run showed, goes on after a kill, and refuses what is not what was asked."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from loopmdm.analysis.activations import ActivationStore, Wanted, estimate_store, gather, identity, record, writing
from loopmdm.analysis.activations.index import INDEX, Index
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.options import OnMasks
from loopmdm.model import HookedLoopMDM, UsageError
from loopmdm.model.adapters import hook_model
from loopmdm.model.errors import NotFiniteError
from loopmdm.model.planted import naked_singles
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.sites import at
from loopmdm.model.tasks.test_sets import TestSet
from tests.conftest import toy_model
from tests.loopmdm_model.adapters import natives

EVERYTHING = Wanted([f"loop.*.{leaf}" for leaf in ("hook_in", "hook_out")], "all", batch_size=3)


@pytest.fixture
def case(hooked, clean) -> Case:
    return Case(hooked, TestSet("toy", Sequences.of(clean)), OnMasks(n_loops=3, mask_ratios=(0.3, 0.6)))


def test_every_stored_vector_is_the_runs(case, tmp_path):
    wanted = Wanted(["loop.*.hook_out", "*pattern", "hook_embed", "hook_logits"], "all")
    store = record(case, tmp_path / "s", wanted, dtype="float32")
    rows = 0
    for _, ratio, b in case.batches():
        _, cache = case.m.run_with_cache(b.tokens, n_loops=3, names_filter=store.sites)
        here = store.frame["nominal_mask_ratio"].to_numpy() == ratio
        rows += here.sum()
        for name in store.sites:
            wanted = cache[name].transpose(1, 2) if name.endswith("pattern") else cache[name]
            torch.testing.assert_close(store.array(name)[here], wanted.flatten(0, 1), rtol=0, atol=1e-6)
        part = store.frame[here]
        assert (part["token"].to_numpy().reshape(b.tokens.shape) == b.tokens.numpy()).all()
        assert (part["true"].to_numpy().reshape(b.tokens.shape) == b.clean.numpy()).all()
        assert (part["masked"].to_numpy().reshape(b.tokens.shape) == b.masked.numpy()).all()
    assert rows == len(store) == 2 * 40


def test_what_is_read_is_what_is_asked_for(case, tmp_path):
    store = record(case, tmp_path / "s", EVERYTHING, dtype="float32")
    whole = store.select()
    assert whole.shape == (80, 6, 16) and store.array(loop=1, leaf="hook_out").shape == (80, 16)
    picked = store.select(loop=2, leaf="hook_out", masked=True, nominal_mask_ratio=0.6)
    keep = (store.frame["masked"] & (store.frame["nominal_mask_ratio"] == 0.6)).to_numpy()
    assert torch.equal(picked, whole[torch.tensor(keep), store.sites.index("loop.2.hook_out")])
    array, order = store.array("loop.0.hook_in"), torch.tensor([70, 3, 3, -1])
    assert torch.equal(array[order], whole[order, 0]) and torch.equal(array[5], whole[5, 0])
    first, again = (torch.cat(list(store.batches(16, seed=4))) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, torch.cat(list(store.batches(16, seed=5))))
    rows = {tuple(row) for row in whole.flatten(1).tolist()}
    assert len({tuple(row) for row in first.flatten(1).tolist()} & rows) == len(rows)
    kept = gather(case, EVERYTHING)
    assert torch.equal(kept.values, whole) and kept.frame.equals(store.frame) and kept.sites == store.sites


def test_the_estimate_is_the_size_and_what_does_not_fit_is_refused(case, tmp_path, monkeypatch):
    for dtype in ("float16", "float32"):
        told = estimate_store(case, EVERYTHING, dtype=dtype)
        store = record(case, tmp_path / dtype, EVERYTHING, dtype=dtype)
        headers = sum(2048 for _ in store.index.done)
        assert told <= store.n_bytes <= told + headers
    full = shutil._ntuple_diskusage(100, 100, writing.SPARE + told - 1)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: full)
    with pytest.raises(UsageError, match=r"^the store would take .* free; choose fewer") as said:
        record(case, tmp_path / "none", EVERYTHING, dtype="float32")
    assert "\n" not in str(said.value) and not (tmp_path / "none").exists()
    assert len(record(case, tmp_path / "tried", EVERYTHING, dtype="float32", whatever_fits=True)) == 80


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(case, tmp_path, monkeypatch):
    whole = record(case, tmp_path / "whole", EVERYTHING)
    real, written = writing.write_tensors, []

    def dies(path, *rest):
        if len(written) == 2:
            path.with_name(".partial-half").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, *rest)

    monkeypatch.setattr(writing, "write_tensors", dies)
    with pytest.raises(KeyboardInterrupt):
        record(case, tmp_path / "s", EVERYTHING)
    with pytest.raises(UsageError, match=r"half-written: 2 of 4 shards; go on with record\(.., resume=True\)"):
        ActivationStore.open(tmp_path / "s")
    part = ActivationStore.open(tmp_path / "s", partial=True)
    assert torch.equal(part.select(), whole.select()[: len(part)]) and "2 of 4 shards" in repr(part)
    with pytest.raises(UsageError, match="half-written; go on with"):
        record(case, tmp_path / "s", EVERYTHING)
    with pytest.raises(UsageError, match="begun with another asked; resume with the same"):
        record(case, tmp_path / "s", replace(EVERYTHING, positions="masked"), resume=True)
    monkeypatch.setattr(
        writing, "write_tensors", lambda path, *rest: (written.append(path.name), real(path, *rest))
    )
    done = record(case, tmp_path / "s", EVERYTHING, resume=True)
    assert len(written) == len(set(written)) == 4
    assert torch.equal(done.select(), whole.select()) and done.frame.equals(whole.frame)


def test_a_store_is_of_one_model(case, tmp_path):
    store = record(case, tmp_path / "s")
    assert store.positions == "masked" and store.frame["masked"].all()
    store.check(case.m)
    other = HookedLoopMDM(toy_model(seed=1))
    for wrong in (other, HookedLoopMDM(toy_model().double())):
        with pytest.raises(UsageError, match="open that model"):
            store.check(wrong)
    assert identity(other).hash.split(":")[1] == store.model.hash.split(":")[1]
    with pytest.raises(UsageError, match="begun with another model"):
        record(replace(case, m=other), tmp_path / "s", resume=True)


def test_what_is_wrong_is_said_in_a_line(case, tmp_path, batch):
    store = record(case, tmp_path / "s")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("x")
    shutil.copytree(tmp_path / "s", tmp_path / "lost")
    (tmp_path / "lost" / "shard-00000.safetensors").unlink()
    shutil.copytree(tmp_path / "s", tmp_path / "cut")
    (tmp_path / "cut" / "shard-00000.safetensors").write_bytes(b"half")
    replace(Index.load(tmp_path / "s"), edition=0).save(tmp_path / "s")
    calls = {
        "holds a store already, which is whole": lambda: record(case, tmp_path / "lost"),
        "mine exists and is no activation store": lambda: record(case, tmp_path / "mine"),
        f"no activation store .it has no {INDEX}": lambda: ActivationStore.open(tmp_path / "mine"),
        "lacks shard-00000": lambda: ActivationStore.open(tmp_path / "lost"),
        "is damaged": lambda: ActivationStore.open(tmp_path / "cut").select(),
        "not of edition": lambda: ActivationStore.open(tmp_path / "s"),
        "unknown site 'loop.9.hook_out'": lambda: record(case, tmp_path / "n", Wanted("loop.9.hook_out")),
        "means no site": lambda: record(case, tmp_path / "n", Wanted(at(loop=9))),
        "unknown column 'word'": lambda: store.select(word=1),
        "no stored site is": lambda: store.select(loop=9),
        "3 stored sites are meant": lambda: store.array(leaf="hook_out"),
        "positions must be": lambda: Wanted(positions="some"),
        "dtype must be": lambda: record(case, tmp_path / "n", dtype="int8"),
        "a model needs batch=": lambda: record(case.m, tmp_path / "n"),
        "a case brings its own": lambda: record(case, tmp_path / "n", batch=batch),
        "so there is nothing": lambda: record(
            case.m, tmp_path / "n", batch=MaskedBatch(batch.clean, batch.clean, batch.masked & False)
        ),
    }
    for said, call in calls.items():
        with pytest.raises(UsageError, match=said) as error:
            call()
        assert "\n" not in str(error.value)
    huge = naked_singles("sudoku4")
    huge.model.positions.mul_(100)
    grids = torch.zeros(1, 16, dtype=torch.long)
    b = MaskedBatch(grids + 4, grids, grids == 0)
    with pytest.raises(NotFiniteError, match='dtype="float32"'):
        record(huge, tmp_path / "n", batch=b, n_loops=1)


@pytest.mark.parametrize(("name", "positions"), [("Bert", "masked"), ("Llama", "all"), ("Qwen3", "clean")])
def test_other_peoples_models(tmp_path, name, positions):
    m = hook_model(
        natives.native(name), loop=(1, 2), max_loops=2, **({"mask_token_id": 103} if name == "Bert" else {})
    )
    clean = natives.tokens()
    hidden = torch.zeros_like(clean, dtype=torch.bool)
    hidden[:, ::2] = name == "Bert"
    b = MaskedBatch(clean.masked_fill(hidden, 103), clean, hidden)
    if not bool(hidden.any()):
        with pytest.raises(UsageError, match=r"needs a model with a \[MASK\]"):
            record(m, tmp_path / "n", batch=b)
    store = record(m, tmp_path / "s", Wanted(positions=positions), batch=b, dtype="float32")
    keep = hidden if positions == "masked" else torch.ones_like(hidden)
    for loop, (state, _) in enumerate(m.states(b.tokens, 2)):
        torch.testing.assert_close(store.array(loop=loop)[:], state[keep], rtol=0, atol=1e-6)
    store.check(m)


def test_along_its_own_samples(hooked, clean, tmp_path):
    options = OnMasks(n_loops=2, along_sampling=4)
    case = Case(hooked, TestSet("toy", Sequences.of(clean)), options)
    store = record(case, tmp_path / "s", Wanted(positions="all"))
    steps = [step for _, step, _ in case.batches()]
    assert sorted(store.frame["step"].unique()) == steps
    share = store.frame.groupby("step")["masked"].mean().to_numpy()
    assert (np.diff(share) < 0).all() and share[0] == 1
