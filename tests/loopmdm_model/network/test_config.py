import pytest

from loopmdm.model.errors import UsageError
from loopmdm.model.network.config import LoopMDMConfig
from tests.conftest import toy_config


def test_json_round_trip(tmp_path):
    cfg = toy_config(
        forbid_mask_to_mask=("loop",), forbid_masked_keys=("coda",), normalization_type="RMS", gated_mlp=True
    )
    cfg.save(tmp_path / "config.json")
    assert LoopMDMConfig.load(tmp_path / "config.json") == cfg


def test_defaults_follow_the_shape():
    cfg = toy_config(d_model=48, n_heads=3)
    assert (cfg.d_head, cfg.d_mlp, cfg.mask_token_id, cfg.n_layers) == (16, 192, 22, 4)


def test_segments_and_depths():
    cfg = toy_config()
    assert [cfg.segment(layer) for layer in range(4)] == ["prelude", "loop", "loop", "coda"]
    depths = [
        cfg.depth(0, 0, 3),
        *(cfg.depth(layer, i, 3) for i in range(3) for layer in (1, 2)),
        cfg.depth(3, 0, 3),
    ]
    assert depths == list(range(8))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"d_model": 0}, "d_model"),
        ({"max_loops": 0}, "max_loops"),
        ({"max_loops": 2.5}, "max_loops"),
        ({"d_head": 3}, "even"),
        ({"n_heads": "4"}, "n_heads must be an integer"),
        ({"n_heads": None}, "n_heads must be an integer"),
        ({"d_model": 15}, "divisible"),
        ({"eps": "a"}, "eps must be a number"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"gated_mlp": "no"}, "true or false"),
        ({"mask_token_id": 3}, "last id"),
        ({"normalization_type": "BN"}, '"LN" or "RMS"'),
        ({"forbid_mask_to_mask": ("middle",)}, "segments"),
        ({"forbid_masked_keys": ("middle",)}, "forbid_masked_keys takes segments"),
        ({"init_depth": "some"}, 'init_depth must be "all" or "looped"'),
        ({"n_prelude_layers": 0, "n_loop_layers": 0, "n_coda_layers": 0}, "at least one layer"),
    ],
)
def test_impossible_shapes_are_refused(changes, says):
    with pytest.raises(UsageError, match=says):
        toy_config(**changes)


def test_unknown_keys_name_the_nearest():
    with pytest.raises(UsageError, match="did you mean n_loop_layers"):
        LoopMDMConfig.from_dict(toy_config().to_dict() | {"n_loops_layers": 2})
