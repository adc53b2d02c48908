import copy
import hashlib
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from loopmdm.model.errors import UsageError
from loopmdm.model.files import read_json, sha256, write_atomic, write_json
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network import checkpoints
from loopmdm.model.network.checkpoints import ZOO, list_models
from loopmdm.model.network.model import LoopMDM
from tests.conftest import toy_model


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_round_trip_is_exact(model, folder, batch):
    loaded = LoopMDM.from_pretrained(folder)
    assert loaded.cfg == model.cfg
    assert torch.equal(loaded(batch.tokens), model(batch.tokens))
    assert HookedLoopMDM.from_pretrained(folder).tokenizer is None


def test_half_precision_is_stored_and_read_as_float32(model, tmp_path):
    model.save_pretrained(tmp_path, dtype=torch.float16)
    loaded = LoopMDM.from_pretrained(tmp_path)
    assert loaded.embed.weight.dtype == torch.float32
    assert torch.equal(loaded.embed.weight, model.embed.weight.half().float())


def test_shipped_models_are_listed_and_open():
    assert {"sudoku-base", "sudoku-loop", "sotu-base", "sotu-loop"} <= set(list_models())
    for name in list_models():
        assert LoopMDM.from_pretrained(name).training is False


def _missing(weights):
    del weights["blocks.1.mlp.up.weight"]


def _extra(weights):
    weights["blocks.9.mlp.up.weight"] = torch.zeros(2)


def _shape(weights):
    weights["embed.weight"] = torch.zeros(3, 16)


@pytest.mark.parametrize(
    ("change", "says"),
    [(_missing, "lacks blocks.1.mlp.up.weight"), (_extra, "unexpected blocks.9"), (_shape, r"\[3, 16\]")],
)
def test_wrong_tensors_are_named(folder, change, says):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UsageError, match=says):
        LoopMDM.from_pretrained(folder)


@pytest.mark.parametrize("kept", list_models())
def test_records_of_shipped_models_hold_the_hash_of_their_weights(kept):
    record = read_json(ZOO / kept / "train.json")
    assert record["weights_sha256"] == hashlib.sha256((ZOO / kept / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_bit_in_shipped_weights_is_refused(tmp_path, seed):
    folder = tmp_path / "copy"
    shutil.copytree(ZOO / "markov-loop", folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1 - seed * (len(data) // 20)] ^= 1 << seed
    path.write_bytes(data)
    for kind in (LoopMDM, HookedLoopMDM):
        with pytest.raises(UsageError, match=r"is not what train\.json beside it was written for"):
            kind.from_pretrained(folder)


def test_what_is_saved_beside_a_record_is_believed_again(tmp_path):
    """Changed weights get a hash of their own, by either door, also over an older record."""
    m = HookedLoopMDM.from_pretrained("markov-loop")
    shipped = m.record["weights_sha256"]
    m.model.embed.weight.mul_(2)
    m.save_pretrained(tmp_path)
    assert HookedLoopMDM.from_pretrained(tmp_path).record["weights_sha256"] != shipped
    m.model.embed.weight.mul_(2)
    m.model.save_pretrained(tmp_path)
    assert torch.equal(LoopMDM.from_pretrained(tmp_path).embed.weight, m.model.embed.weight)


def test_an_evaluation_goes_with_the_weights_that_it_is_of(tmp_path):
    """Other weights beside a record have not been evaluated; the same ones have."""
    m, shipped = HookedLoopMDM.from_pretrained("markov-loop"), ZOO / "markov-loop"
    for name in ("model.safetensors", "config.json", "train.json"):
        shutil.copyfile(shipped / name, tmp_path / name)
    kept = read_json(tmp_path / "train.json")
    m.model.save_pretrained(tmp_path, torch.float16)  # as it is shipped
    assert read_json(tmp_path / "train.json") == kept and "evaluation" in kept
    m.model.embed.weight.mul_(2)
    for save in (m.model.save_pretrained, m.save_pretrained):
        write_json(tmp_path / "train.json", kept)
        save(tmp_path, torch.float16)
        record = read_json(tmp_path / "train.json")
        assert record["weights_sha256"] == sha256(tmp_path / "model.safetensors") != kept["weights_sha256"]
        assert record == {key: value for key, value in kept.items() if key != "evaluation"} | {
            "weights_sha256": record["weights_sha256"]
        }
        assert "test NELBO" not in repr(HookedLoopMDM.from_pretrained(tmp_path))


def test_a_record_without_a_hash_is_of_the_weights_beside_it(tmp_path):
    m = HookedLoopMDM.from_pretrained("markov-loop")
    m.model.save_pretrained(tmp_path)
    write_json(tmp_path / "train.json", {"evaluation": {"test_nelbo": 1.0}})
    m.model.save_pretrained(tmp_path)
    assert read_json(tmp_path / "train.json")["evaluation"] == {"test_nelbo": 1.0}
    write_json(tmp_path / "train.json", {"evaluation": {"test_nelbo": 1.0}})
    m.model.embed.weight.mul_(2)
    m.model.save_pretrained(tmp_path)
    assert read_json(tmp_path / "train.json").keys() == {"weights_sha256"}
    (tmp_path / "train.json").write_text("[1]")
    with pytest.raises(UsageError, match="no record"):
        m.model.save_pretrained(tmp_path)


def test_weights_are_hashed_only_where_their_hash_is_not_known(tmp_path, monkeypatch):
    m = HookedLoopMDM.from_pretrained("markov-loop")
    m.model.save_pretrained(tmp_path)
    write_json(tmp_path / "train.json", {"seed": 1})
    hashed = []
    monkeypatch.setattr(checkpoints, "sha256", lambda path: (hashed.append(path.name), sha256(path))[1])
    m.model.save_pretrained(tmp_path)
    assert hashed == ["model.safetensors"] * 2  # the old ones and the new ones
    m.model.save_pretrained(tmp_path)
    assert hashed == ["model.safetensors"] * 3
    checkpoints.save_weights(tmp_path, m.model.cfg, m.model.state_dict(), record={"seed": 2})
    assert hashed == ["model.safetensors"] * 4
    assert read_json(tmp_path / "train.json") == {
        "seed": 2,
        "weights_sha256": sha256(tmp_path / "model.safetensors"),
    }


def test_truncated_weights_and_damaged_configs_are_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="truncated"):
        LoopMDM.from_pretrained(folder)
    path.unlink()
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        LoopMDM.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        LoopMDM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"d_vocab": 3, "colour": 1}))
    with pytest.raises(UsageError, match="colour"):
        LoopMDM.from_pretrained(folder)


def test_unknown_models_offer_near_names():
    with pytest.raises(UsageError, match="sudoku-loop"):
        LoopMDM.from_pretrained("sudoku-lop")


def test_failed_writes_leave_the_old_file(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_tied_weights_are_saved_and_loaded(tmp_path, batch):
    model = toy_model(n_prelude_layers=2)
    model.unembed.weight, model.blocks[1] = model.embed.weight, model.blocks[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(LoopMDM.from_pretrained(tmp_path)(batch.tokens), model(batch.tokens))


def test_models_and_caches_leave_the_process_and_come_back(hooked, batch, tmp_path):
    logits, (_, cache) = hooked(batch.tokens), hooked.run_with_cache(batch.tokens, n_loops=3)
    for leave in (lambda thing: pickle.loads(pickle.dumps(thing)), copy.deepcopy):
        again, kept = leave(hooked), leave(cache)
        assert torch.equal(again(batch.tokens), logits)
        assert torch.equal(leave(hooked.model)(batch.tokens), logits)
        assert kept.keys() == cache.keys()
        assert torch.equal(kept["pattern", "loop", 2, 1], cache["pattern", "loop", 2, 1])
        again.add_hook("hook_embed", lambda x, hook: x + 1)
        assert not torch.equal(again(batch.tokens), logits) and torch.equal(hooked(batch.tokens), logits)
    torch.save(hooked, tmp_path / "m.pt")
    assert torch.equal(torch.load(tmp_path / "m.pt", weights_only=False)(batch.tokens), logits)
