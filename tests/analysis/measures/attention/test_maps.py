import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from loopmdm.analysis.measures.attention.maps import attention_across_loops
from loopmdm.analysis.plots.style import CLEAN, MASKED
from loopmdm.model.errors import UsageError


@pytest.fixture
def cache(hooked, batch):
    return hooked.run_with_cache(batch.tokens, n_loops=4)[1]


def test_maps_are_the_cached_patterns(cache, hooked, batch):
    maps = attention_across_loops(cache, layer=1, head=1, loops=(0, 2), sequence=3)
    for index, loop in enumerate((0, 2)):
        np.testing.assert_allclose(maps.maps[index], cache["pattern", "loop", loop, 1][3, 1], rtol=1e-6)
        _, shorter = hooked.run_with_cache(batch.tokens, n_loops=loop + 1)
        np.testing.assert_allclose(maps.maps[index], shorter["pattern", "loop", -1, 1][3, 1], atol=1e-6)
    np.testing.assert_allclose(maps.difference.sum(-1), 0, atol=1e-6)
    assert len(maps.frame()) == 2 * 10 * 10


def test_loops_may_be_an_iterator(cache):
    given = attention_across_loops(cache, layer=1, head=1, loops=iter((0, 2)))
    assert given.loops == (0, 2) and given.maps.shape == (2, 10, 10)
    with pytest.raises(UsageError, match="loops must be integers"):
        attention_across_loops(cache, layer=1, loops=iter(("a", 2)))


def test_masked_first_reorders_both_axes(cache, batch):
    plain = attention_across_loops(cache, layer=2, head=0, loops=(1,))
    sorted_maps = attention_across_loops(cache, layer=2, head=0, loops=(1,), order="masked-first")
    count = int(batch.masked[0].sum())
    assert sorted_maps.masked.tolist() == [True] * count + [False] * (10 - count)
    order = sorted_maps.positions
    np.testing.assert_array_equal(sorted_maps.maps[0], plain.maps[0][np.ix_(order, order)])


def test_auto_takes_the_head_that_changes_most(cache):
    change = (cache["pattern", "loop", 3, 1] - cache["pattern", "loop", 0, 1])[0].abs().mean((-2, -1))
    assert attention_across_loops(cache, layer=1, loops=(0, 3)).head == int(change.argmax())


def test_heads_from_a_frame_and_changed_patterns_are_shown(cache, hooked, batch):
    assert attention_across_loops(cache, layer=1, head=np.int64(1)).head == 1
    place = "loop.0.blocks.1.attn.hook_pattern"
    with hooked.hooks([(place, lambda x, hook: torch.zeros_like(x))]):
        _, silenced = hooked.run_with_cache(batch.tokens, n_loops=2)
    assert attention_across_loops(silenced, layer=1, head=0, loops=(0, 1)).maps[0].sum() == 0


def test_plot_has_a_panel_a_loop_and_the_difference(cache):
    figure = attention_across_loops(cache, layer=1, loops=(0, 1, 3)).plot()
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["loop 0 (first)", "loop 1", "loop 3", "loop 3 − loop 0"]
    bars = [ax.get_ylabel() for ax in figure.axes if ax.get_label() == "<colorbar>"]
    assert len(bars) == 2 and all("share" in label for label in bars)
    assert plt.gcf() is figure  # what savefig writes is what was just drawn
    plt.close(figure)


def test_a_single_loop_is_drawn_into_given_axes_with_given_style(cache, batch):
    figure, axes = plt.subplots(1, 2)
    maps = attention_across_loops(cache, layer=1, head=0, loops=(2,))
    assert maps.plot(ax=axes[1], cmap="Blues") is axes[1] and plt.gcf() is figure
    image = axes[1].images[0]
    assert image.get_cmap().name == "Blues" and not axes[0].images
    np.testing.assert_array_equal(image.get_array(), maps.maps[0])
    assert image.norm(0.25 * image.norm.vmax) == pytest.approx(0.5)  # square root
    colours = [tick.get_color() for tick in axes[1].get_yticklabels()]
    assert colours == [MASKED if hidden else CLEAN for hidden in batch.masked[0].tolist()]
    plt.close(figure)


def test_several_loops_take_as_many_axes_and_one_for_the_change(cache):
    maps = attention_across_loops(cache, layer=1, head=0, loops=(0, 2))
    figure, axes = plt.subplots(1, 3)
    assert maps.plot(axes=axes) is figure
    np.testing.assert_allclose(axes[2].images[0].get_array(), maps.difference)
    for wrong in ({"ax": axes[0]}, {"axes": axes[:2]}):
        with pytest.raises(UsageError, match=r"one as in|choose one|axes needs 3"):
            maps.plot(**wrong)
    with pytest.raises(UsageError, match="of one loop there is no change to draw"):
        attention_across_loops(cache, layer=1, head=0, loops=(0,)).plot(axes=axes[:2])
    plt.close(figure)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"layer": 0}, "layer 0 is not looped"),
        ({"layer": 1, "head": 5}, "head must be"),
        ({"layer": 1, "loops": (0, 9)}, "there are 4"),
        ({"layer": 1, "loops": ()}, "empty"),
        ({"layer": 1, "order": "random"}, "masked-first"),
        ({"layer": 1, "sequence": 7}, "sequence must be"),
    ],
)
def test_misuse_is_refused(cache, arguments, says):
    with pytest.raises((UsageError, KeyError), match=says):
        attention_across_loops(cache, **arguments)


def test_adaptive_caches_are_indexed_by_sequence(hooked, batch):
    from loopmdm.model.stopping.rules import StateDelta

    full = hooked.run(batch.tokens, stop=StateDelta(0.0, max_loops=8))
    rule = StateDelta(float(full.criterion[3].median()) + 1e-5, max_loops=8)
    _, cache = hooked.run_with_cache(batch.tokens, stop=rule)
    longest = int(cache.loops_used.argmax())
    maps = attention_across_loops(cache, layer=1, head=0, loops=(-1,), sequence=longest)
    alone = hooked.run_with_cache(batch.tokens[longest : longest + 1], n_loops=cache.n_loops)[1]
    torch.testing.assert_close(
        torch.tensor(maps.maps[0]).float(), alone["pattern", "loop", -1, 1][0, 0], atol=1e-5, rtol=1e-4
    )
    shortest = int(cache.loops_used.argmin())
    with pytest.raises(UsageError, match="stopped after"):
        attention_across_loops(cache, layer=1, loops=(-1,), sequence=shortest)
