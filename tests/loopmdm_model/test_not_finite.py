"""NaN and overflow end in an error wherever a number is asked for; weights and caches are of floating kinds."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from loopmdm.analysis import representation_change
from loopmdm.analysis.cli import main
from loopmdm.model.diffusion.likelihood import nelbo, nelbo_by_loop
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.errors import NotFiniteError, UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.stopping.rules import ArgmaxStable, EntropyDelta, KLDelta, SecondDifference, StateDelta
from loopmdm.model.tasks.test_sets import solve_one_shot
from tests.conftest import toy_model

RULES = (StateDelta, SecondDifference, KLDelta, EntropyDelta, ArgmaxStable)


@pytest.fixture(params=["NaN in a weight", "overflow", "no edge left"])
def broken(request):
    """A model that answers NaN: by its weights, by their size, or by a hook that forbids every edge."""
    m = HookedLoopMDM(toy_model())
    if request.param == "NaN in a weight":
        m.model.blocks[1].mlp.up.weight[0, 0] = float("nan")
    elif request.param == "overflow":
        for parameter in m.model.parameters():
            parameter.mul_(1e20)
    else:
        m.add_hook(lambda name: name.endswith("attn_scores"), lambda x, hook: torch.full_like(x, -torch.inf))
    return m


@pytest.mark.parametrize("settings", [{}, {"temperature": 0, "order": "confidence"}, {"top_p": 0.9}])
def test_a_sampler_refuses_logits_that_say_nothing(broken, settings):
    with pytest.raises(NotFiniteError, match="not finite"):
        sample(broken, n=2, length=8, steps=3, n_loops=2, **settings)


def test_likelihoods_measures_and_rules_refuse_them(broken, clean, batch):
    for ask in (
        lambda: nelbo(broken, clean, n_loops=2, n_samples=1),
        lambda: nelbo_by_loop(broken, clean, 2, n_samples=1),
        lambda: representation_change(broken, batch, n_loops=2),
        lambda: list(broken.states(batch.tokens, 2)),
        *(lambda rule=rule: broken.run(batch.tokens, stop=rule(max_loops=3)) for rule in RULES),
    ):
        with pytest.raises(NotFiniteError, match="not finite at"):
            ask()


def test_padding_may_be_what_it_likes(model, clean):
    """A NaN that nobody attends to is no fault."""
    m, real = HookedLoopMDM(model), torch.ones_like(clean)
    real[:, -2:] = 0

    def spoil(x, hook):
        x[:, -2:] = float("nan")

    with m.hooks([("loop.1.hook_out", spoil)]):
        assert len(list(m.states(clean, 2, real))) == 2


def test_a_sampler_never_draws_mask_of_its_own(model):
    m = HookedLoopMDM(model)

    def tempt(logits, hook):
        logits[..., 22] = 1e3

    for settings in ({}, {"temperature": 0}, {"order": "confidence"}):
        with m.hooks([("hook_logits", tempt)]):
            drawn = sample(m, n=4, length=8, steps=4, n_loops=1, **settings).tokens
        assert torch.equal(drawn, sample(m, n=4, length=8, steps=4, n_loops=1, **settings).tokens)
        assert int(drawn.max()) < 22


def changed(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["blocks.1.mlp.up.weight"] = change(tensors["blocks.1.mlp.up.weight"])
    save_file(tensors, path)


def test_weights_are_floating_and_finite(model, tmp_path):
    nan = float("nan")
    for name, change, error, words in (
        ("int", lambda w: (w * 10).long(), UsageError, "torch.int64, not a floating dtype"),
        ("bool", lambda w: w > 0, UsageError, "torch.bool, not a floating dtype"),
        ("nan", lambda w: w.clone().index_fill_(0, torch.tensor([1]), nan), NotFiniteError, "NaN or infinite"),
        ("inf", lambda w: w / 0, NotFiniteError, "NaN or infinite"),
    ):
        model.save_pretrained(tmp_path / name)
        changed(tmp_path / name, change)
        with pytest.raises(error, match=words):
            LoopMDM.from_pretrained(tmp_path / name)


def test_saving_in_a_narrow_dtype_loses_no_weight(model, tmp_path):
    model.embed.weight.mul_(1e6)
    with pytest.raises(NotFiniteError, match=r"embed\.weight is beyond the range of torch\.float16"):
        model.save_pretrained(tmp_path, dtype=torch.float16)
    assert not (tmp_path / "model.safetensors").exists()
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)


def test_the_command_line_exits_with_1_in_one_line(tmp_path, monkeypatch, capsys):
    model = LoopMDM.from_pretrained("sudoku-loop")
    for parameter in model.parameters():
        parameter.mul_(1e20)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["loopmdm", "sample", str(tmp_path), "--steps", "2"])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert end.value.code == 1 and said.out == ""
    assert said.err.startswith("error: logits are not finite at") and said.err.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, "float16"])
def test_a_cache_is_kept_in_no_dtype_that_truncates(hooked, batch, dtype):
    for ask in (
        lambda: hooked.run_with_cache(batch.tokens, 2, dtype=dtype),
        lambda: hooked.estimate_cache(1, 4, dtype=dtype),
        lambda: hooked.get_caching_hooks(dtype=dtype),
        lambda: hooked.run_with_cache(batch.tokens, 2)[1].to(dtype=dtype),
    ):
        with pytest.raises(UsageError, match="floating dtype of 16 bits or more"):
            ask()


@pytest.mark.parametrize("rule", RULES)
def test_double_models_record_doubles(batch, rule):
    """The criterion of a float64 run has float64's digits, and decides as its record does."""
    m = HookedLoopMDM(toy_model().double())
    ran = m.run(batch.tokens, stop=rule(threshold=0.0, max_loops=3))
    assert ran.logits.dtype == ran.criterion.dtype == torch.float64
    narrow = HookedLoopMDM(toy_model()).run(batch.tokens, stop=rule(threshold=0.0, max_loops=3))
    assert narrow.criterion.dtype == torch.float32
    torch.testing.assert_close(ran.criterion.float(), narrow.criterion, atol=1e-3, rtol=1e-3, equal_nan=True)


def test_double_models_are_measured_in_double(batch):
    wide, narrow = (representation_change(HookedLoopMDM(m), batch, 3) for m in (toy_model().double(), toy_model()))
    joined = (wide["value"] - narrow["value"]).abs()
    assert 0 < joined.max() < 1e-3


def test_what_a_callback_does_to_its_view_stays_there(model):
    def erase(seen):
        seen.view.state.zero_()
        seen.view.previous.zero_()

    plain, watched = (sample(model, n=2, length=8, steps=3, n_loops=2, callback=c) for c in (None, erase))
    assert torch.equal(plain.tokens, watched.tokens)


def test_a_cache_shares_nothing_with_what_goes_on(hooked, batch):
    tokens = batch.tokens.clone()
    _, cache = hooked.run_with_cache(tokens, 2)
    kept, moved = cache["loop.0.hook_out"].clone(), cache.to(dtype=torch.float32)
    tokens.zero_()
    moved["loop.0.hook_out"].zero_()
    assert torch.equal(cache.tokens, batch.tokens) and torch.equal(cache["loop.0.hook_out"], kept)


def test_boards_are_not_solved_from_nothing():
    from loopmdm.model.tasks.sudoku import BOARDS

    m = HookedLoopMDM.from_pretrained("sudoku-loop")
    b = m.mask(BOARDS["sudoku6"].sample_grids("test", 2), 0.5)
    m.add_hook("hook_logits", lambda x, hook: x * float("nan"))
    with pytest.raises(NotFiniteError):
        solve_one_shot(m, BOARDS["sudoku6"], b, 2)
