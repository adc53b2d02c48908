"""Names parse to sites and back; filters choose what they print."""

import pickle

import pytest

from loopmdm.model.errors import UsageError
from loopmdm.model.sites import Site, all_names, at, resolve
from tests.conftest import toy_config

NAMES = all_names(toy_config(gated_mlp=True), 3)


def chosen(filter_):
    return [name for name in NAMES if filter_(name)]


def test_every_name_is_a_site_and_every_site_a_name():
    for name in NAMES:
        assert str(Site.parse(name)) == name
    assert Site.parse("loop.2.blocks.1.attn.hook_pattern") == Site(2, 1, "pattern")
    assert Site(None, 0, "resid_pre").prefix == "blocks.0."
    assert Site.parse("loop.1.hook_in") == Site(1, None, "hook_in")
    assert Site(2, 1, "pattern").at("v") == Site(2, 1, "v")


@pytest.mark.parametrize("wrong", ["", "loop.x.hook_in", "attn.pattern", "loop.1.loop.2.hook_in", 3])
def test_what_is_no_name_is_refused(wrong):
    with pytest.raises(UsageError, match="no hook name"):
        Site.parse(wrong)


def test_short_leaves_resolve_or_say_what_is_meant():
    with pytest.raises(UsageError, match="ln1 and ln2"):
        Site(0, 1, "scale")
    with pytest.raises(KeyError, match="did you mean pattern"):
        Site(0, 1, "patern")
    with pytest.raises(UsageError, match="at least 0"):
        Site(-1, 1, "pattern")


def test_a_number_behind_the_layer_is_no_place():
    for key in (("pattern", 1, 3), ("pattern", "loop", 0, 1, 2), ("scale", 1, "ln1", "ln2")):
        with pytest.raises(UsageError, match=r'is no key; a looped layer is \("\w+", "loop", i, 1\)'):
            resolve(toy_config(), key, 3)


def test_filters_choose_what_they_say():
    assert chosen(at(leaf="pattern")) == [name for name in NAMES if name.endswith("attn.hook_pattern")]
    assert chosen(at(loop=1)) == [name for name in NAMES if name.startswith("loop.1.")]
    assert chosen(at(loop=slice(1, None), layer=2, leaf=["v", "z"])) == [
        f"loop.{i}.blocks.2.attn.hook_{leaf}" for i in (1, 2) for leaf in "vz"
    ]
    assert chosen(at(loop=None, layer=None)) == [
        "hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized", "hook_logits"
    ]  # fmt: skip
    assert chosen(at(layer=None, leaf="hook_in")) == [f"loop.{i}.hook_in" for i in range(3)]
    assert chosen(at()) == NAMES and chosen(~at()) == []
    assert not at()("no name at all")


def test_filters_combine_like_sets():
    one, other = at(loop=[0, 2]), at(leaf=("pattern", "resid_post"))
    first, second = set(chosen(one)), set(chosen(other))
    assert set(chosen(one | other)) == first | second
    assert set(chosen(one & other)) == first & second
    assert set(chosen(~one)) == set(NAMES) - first


def test_filters_print_as_they_were_written_and_are_values():
    assert repr(at(loop=slice(2, None), leaf="pattern")) == "at(loop=slice(2, None), leaf='attn.hook_pattern')"
    assert repr(at(loop=[2, 0]) | ~at(layer=1) & at(loop=None)) == "at(loop=[0, 2]) | ~at(layer=1) & at(loop=None)"
    assert repr((at(loop=1) | at(loop=2)) & at(layer=1)) == "(at(loop=1) | at(loop=2)) & at(layer=1)"
    assert at(loop=[1, 2]) == at(loop=(2, 1)) and hash(at(layer=1)) == hash(at(layer=[1]))
    again = pickle.loads(pickle.dumps(at(loop=slice(0, 3, 2), leaf="v") | at(layer=1)))
    assert chosen(again) == chosen(at(loop=slice(0, 3, 2), leaf="v") | at(layer=1))
    assert eval(repr(again), {"at": at, "slice": slice}) == again


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loop": -1}, "at least 0"),
        ({"loop": slice(-2, None)}, "from the front"),
        ({"loop": []}, "empty"),
        ({"loop": 1.5}, "a number, several, a slice or None"),
        ({"layer": ["a"]}, "must be an integer"),
        ({"leaf": "patern"}, "did you mean"),
        ({"leaf": []}, "leaf is empty"),
    ],
)
def test_wrong_filters_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        at(**options)


def test_filters_and_sites_go_where_names_go(hooked, batch):
    _, cache = hooked.run_with_cache(batch.tokens, n_loops=3, names_filter=at(loop=slice(1, None), leaf="pattern"))
    assert list(cache) == [f"loop.{i}.blocks.{layer}.attn.hook_pattern" for i in (1, 2) for layer in (1, 2)]
    site = Site(2, 1, "pattern")
    assert cache[site] is cache["pattern", "loop", 2, 1]
    assert site in cache and Site(0, 1, "pattern") not in cache
    seen = []
    hooked.run_with_hooks(batch.tokens, n_loops=3, fwd_hooks=[(site, lambda x, hook: seen.append(hook.name))])
    assert seen == [str(site)]
    with pytest.raises(KeyError, match=r"no hook name.*the filter is at\(layer=77\)"):
        hooked.run_with_cache(batch.tokens, names_filter=at(layer=77))
