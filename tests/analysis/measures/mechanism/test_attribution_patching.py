"""AtP is exact where the model is linear, AtP* where only the softmax is not; what they miss is told."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from loopmdm.analysis.measures import measure
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.mechanism.attribution_patching import agreement, attribution_patching
from loopmdm.analysis.measures.mechanism.contrast import any_wrong, contrast
from loopmdm.analysis.measures.mechanism.corruption import corrupted, places
from loopmdm.analysis.measures.mechanism.nodes import Node
from loopmdm.analysis.measures.mechanism.patching import Effects, activation_patching
from loopmdm.analysis.measures.options import OnTests
from loopmdm.analysis.plots.mechanism import plot_patching
from loopmdm.model.adapters import hook_model
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.planted import naked_singles
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from loopmdm.model.tasks.test_sets import TestSet
from tests.conftest import toy_config, toy_model
from tests.loopmdm_model.adapters import natives, standins

SIX, STILL = BOARDS["sudoku6"], 1e6


class Straight(LoopMDM):
    """Linear in all it writes: norms stand still, MLPs add nothing, patterns are uniform but in `bent` layers."""

    def __init__(self, bent: tuple[int, ...] = ()):
        torch.manual_seed(0)
        super().__init__(toy_config(normalization_type="RMS", mlp_bias=False))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.data.fill_(STILL / self.cfg.d_model**0.5)  # what every norm divides by
            elif name.endswith("attn.qkv.weight"):
                parameter.data[:, 0] = 0  # nobody reads the constant
                if int(name.split(".")[1]) not in bent:
                    parameter.data[: 2 * self.cfg.n_heads * self.cfg.d_head] = 0
            elif name.endswith("mlp.out.weight"):
                parameter.data.zero_()
            elif name.endswith("attn.out.weight"):
                parameter.data[0] = 0
            elif name in ("embed.weight", "unembed.weight"):
                parameter.data[:, 0] = STILL if name == "embed.weight" else 0


@pytest.fixture
def straight() -> HookedLoopMDM:
    return HookedLoopMDM(Straight().double().eval())


def of(effects: Effects, *components: str) -> dict[Node, np.ndarray]:
    return {
        node: v for (place, node), v in effects.values.items() if place == "all" and node.component in components
    }


# --- identities ---


def test_atp_is_activation_patching_in_a_linear_model_at_every_node_and_loop(straight, batch):
    other = corrupted(straight, batch)
    found, none = attribution_patching(straight, batch, other)
    assert none is None
    exact = activation_patching(straight, batch, other)
    assert found.values.keys() == exact.values.keys() and len(exact.values) == 8 * 4
    for key, values in exact.values.items():
        np.testing.assert_allclose(found.values[key], values, atol=1e-8)
    np.testing.assert_allclose(found.total, exact.total, atol=1e-8)
    told = agreement(exact, found).set_index("component")
    assert told.loc["any", "pearson"] > 1 - 1e-9 and told.loc["any", "sign"] == 1
    assert np.isnan(told.loc["mlp_out", "pearson"])  # there is nothing to agree on


def test_heads_sum_to_what_attention_adds_and_places_to_all(hooked, batch):
    other = corrupted(hooked, batch)
    found, _ = attribution_patching(hooked, batch, other, places=places(hooked, batch, other), batch_size=3)
    for (place, node), values in found.values.items():
        if node.component == "attn_out":
            heads = [found.values[place, Node("z", node.loop, node.layer, head)] for head in range(2)]
            np.testing.assert_allclose(sum(heads), values, atol=1e-5)
        parts = [found.values[name, node] for name in ("changed", "masked", "clean")]
        np.testing.assert_allclose(sum(parts), found.values["all", node], atol=1e-5)


def test_atp_is_the_derivative_of_patching(batch):
    """A small step from the clean to the corrupted activation has the effect that AtP says, in every layer."""
    m = HookedLoopMDM(toy_model().double())
    other, step = corrupted(m, batch), 1e-5
    found, _ = attribution_patching(m, batch, other)
    _, own = m.run_with_cache(batch.tokens)
    _, theirs = m.run_with_cache(other.tokens)
    asked_metric = _metric(m, batch)
    for node in (Node("z", 0, 1, 1), Node("mlp_out", 1, 2), Node("attn_out", None, 0), Node("z", None, 3, 0)):
        name = str(node.site)

        def nudge(x, hook, node=node, name=name):
            moved = x + step * (theirs[name] - own[name])
            return moved if node.head is None else torch.cat(
                [moved[:, :, h : h + 1] if h == node.head else x[:, :, h : h + 1] for h in range(2)], 2
            )  # fmt: skip

        with m.hooks([(name, nudge)]):
            after = asked_metric(m(batch.tokens))
        slope = (after - asked_metric(m(batch.tokens))) / step
        np.testing.assert_allclose(found.values["all", node], slope.numpy(), atol=1e-3)


def _metric(m, b):
    asked = contrast(m, b)
    return lambda logits: asked.by_sequence(asked.difference(logits[b.masked]))


def test_with_the_softmax_recomputed_queries_and_keys_are_exact_where_all_else_is_linear(batch):
    """In the coda nothing after the pattern bends; one key at a time, since a key's node is at one position."""
    m = HookedLoopMDM(Straight(bent=(3,)).double().eval())
    m.model.blocks[3].attn.qkv.weight.data[: 2 * 16] *= 6  # patterns all but saturated
    other = corrupted(m, batch)
    at = {str(p): torch.arange(10).expand(4, -1) == p for p in range(10)}
    found, sizes = attribution_patching(m, batch, other, star=True, places=at)
    for component in ("q", "k"):
        for position in range(10):
            node = Node(component, None, 3, 1, position)
            exact = activation_patching(m, batch, other, [node]).values["all", node]
            ours = found.values[str(position), Node(component, None, 3, 1)]
            np.testing.assert_allclose(ours, exact, atol=1e-7)
    pattern = m.run_with_cache(batch.tokens)[1]["pattern", 3]
    assert pattern.amax(-1).mean() > 0.6
    assert any(np.abs(found.values[str(p), Node("k", None, 3, 1)]).max() > 1e-3 for p in range(10))
    assert sizes is not None


def test_graddrop_is_the_mean_over_runs_whose_layers_writes_are_cut_off_the_backward_pass(hooked, batch):
    other = corrupted(hooked, batch)
    found, sizes = attribution_patching(hooked, batch, other, star=True)
    last = Node("z", None, 3, 0)  # only its own application can cut it off
    np.testing.assert_allclose(sizes.values["all", last], np.abs(found.values["all", last]), rtol=1e-4, atol=1e-7)
    node = Node("z", None, 0, 1)
    prefixes = ["blocks.0.", *(f"loop.{i}.blocks.{layer}." for i in range(3) for layer in (1, 2)), "blocks.3."]
    total = 0.0
    for prefix in prefixes:
        cut = [(f"{prefix}{leaf}", lambda x, hook: x.detach()) for leaf in ("hook_attn_out", "hook_mlp_out")]
        with hooked.hooks(cut) if prefix != "blocks.0." else hooked.hooks([]):
            alone, _ = attribution_patching(hooked, batch, other)
        total = total + (np.abs(alone.values["all", node]) if prefix != "blocks.0." else 0.0)
    np.testing.assert_allclose(sizes.values["all", node], total / (len(prefixes) - 1), rtol=1e-4, atol=1e-6)


def test_against_the_exact_effect_on_random_models():
    """Half of a random model's tokens hidden, weights of a trained model's size: signs and ranks agree."""
    seen = []
    for seed in range(4):
        m = HookedLoopMDM(toy_model(seed, d_model=32, initializer_range=0.15))
        clean = torch.randint(0, 22, (16, 12), generator=torch.Generator().manual_seed(seed))
        b = mask_tokens(clean, 22, mask_ratio=0.5, seed=seed)
        other = corrupted(m, b, seed)
        exact = activation_patching(m, b, other)
        seen.append(agreement(exact, attribution_patching(m, b, other)[0]).iloc[0])
    assert min(one["spearman"] for one in seen) > 0.6 and np.mean([one["sign"] for one in seen]) > 0.8


# --- planted, and null ---


def test_a_gradient_misses_what_the_planted_models_steps_hide():
    """Its MLPs are steps, flat where it stands: AtP of heads is 0, the exact effect is not; fills are linear."""
    m = naked_singles(max_loops=4)
    clean = puzzles(SIX, SIX.sample_grids("test", 12), 16, unique=True)
    other = corrupted(m, clean)
    found, _ = attribution_patching(m, clean, other)
    exact = activation_patching(m, clean, other, [Node("z", 0, 0, 0), Node("mlp_out", 3, 1)])
    head, last = Node("z", 0, 0, 0), Node("mlp_out", 3, 1)
    assert np.abs(found.values["all", head]).max() < 1e-4 and np.abs(exact.values["all", head]).max() > 1
    np.testing.assert_allclose(found.values["all", last], exact.values["all", last], atol=1e-2)


def test_against_any_wrong_token_an_untrained_model_has_no_drift():
    means = []
    for seed in range(12):
        m = HookedLoopMDM(toy_model(seed))
        clean = torch.randint(0, 22, (16, 10), generator=torch.Generator().manual_seed(seed))
        b = mask_tokens(clean, 22, mask_ratio=0.5, seed=seed)
        found, _ = attribution_patching(m, b, corrupted(m, b, seed), asked=any_wrong(m, b, seed))
        means.append([v.mean() for v in of(found, "z", "mlp_out").values()])
    t = np.mean(means, 0) / (np.std(means, 0, ddof=1) / len(means) ** 0.5)
    assert (np.abs(t) > 2.2).mean() <= 0.2  # 5% expected


# --- other people's models, refusals ---


@pytest.mark.parametrize("name", ["Bert", "Llama", "Dream"])
@pytest.mark.parametrize("star", [False, True])
def test_models_of_others(name, star):
    if name == "Dream":
        m = hook_model(standins.prepared(standins.DreamModel()), loop=(1, 1), max_loops=2)
        tokens = torch.randint(4, 20, (3, 8), generator=torch.Generator().manual_seed(3))
    else:
        extra = {"mask_token_id": 103} if name == "Bert" else {}
        m, tokens = hook_model(natives.native(name), loop=(1, 2), max_loops=2, **extra), natives.tokens()
    b = MaskedBatch(tokens, tokens, torch.zeros_like(tokens).bool())
    b = b if name == "Llama" else mask_tokens(tokens, m.cfg.mask_token_id, mask_ratio=0.5, seed=0)
    found, sizes = attribution_patching(m, b, corrupted(m, b), star=star)
    frame = found.frame()
    assert frame["value"].notna().all() and (frame["size"] > 0).any()
    assert (sizes is not None) == star
    if star:
        assert {"q", "k", "v"} <= set(frame["component"])


def test_bad_input_is_refused_in_a_line(hooked, batch):
    other = corrupted(hooked, batch)
    alone = HookedLoopMDM(toy_model(n_prelude_layers=0, n_loop_layers=1, n_coda_layers=0))
    case = Case(hooked, TestSet("own", Sequences.of(batch.clean)), OnTests(3, 4))
    for call, says in (
        (lambda: attribution_patching(hooked, batch, batch), "no effect to attribute"),
        (lambda: attribution_patching(hooked, batch, other.rows(slice(0, 1))), "a pair has one shape"),
        (lambda: attribution_patching(hooked, batch, other, n_loops=0), "n_loops must be at least 1"),
        (lambda: attribution_patching(alone, batch, other, n_loops=1, star=True), "GradDrop needs two"),
        (lambda: measure("attribution-patching", hooked, batch=batch, n_exact=0), "n_exact must be at least 1"),
        (lambda: measure("attribution-patching", hooked, batch=batch, wrong="worst"), "wrong must be"),
        (lambda: agreement(*(Effects(hooked, {("all", Node(c, 0, 1)): np.ones(2)}, np.ones(2)) for c in
                             ("mlp_out", "attn_out"))), "no node in common"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=says) as said:
            call()
        assert "\n" not in str(said.value)
    assert case.n_loops == 3


# --- the measure and its plot ---


def test_the_measure_is_the_functions_and_its_plot_shows_every_node(hooked, batch):
    frame = measure("attribution-patching", hooked, batch=batch, n_exact=3, star=True)
    found, sizes = attribution_patching(hooked, batch, corrupted(hooked, batch), star=True)
    rows = frame[frame["place"] == "all"].reset_index(drop=True)
    np.testing.assert_allclose(rows["value"], found.frame()["value"], atol=1e-6)
    np.testing.assert_allclose(rows["graddrop"], sizes.frame()["value"], atol=1e-6)
    assert rows["exact"].notna().sum() == 8 * 4 and (rows["n_exact"].dropna() == 3).all()
    assert set(frame["place"]) == {"all", "changed", "masked", "clean"}
    both = rows.dropna(subset=["exact"])
    looped = both[both["segment"] == "loop"]
    assert looped["pearson"].iloc[0] == pytest.approx(np.corrcoef(looped["exact"], looped["approximate"])[0, 1])
    ax = plot_patching(both, value="exact", ax=plt.subplots()[1])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["head 0", "head 1", "attention", "MLP"]
    assert len(ax.texts) == 4 * 8
    plt.close(ax.figure)
    with pytest.raises(ValueError, match="no rows"):
        plot_patching(both[:0])


def test_a_batch_without_clean_tokens_has_no_rows(hooked, clean):
    with pytest.warns(UserWarning, match="mask less"):
        frame = measure("attribution-patching", hooked, batch=mask_tokens(clean, 22, mask_ratio=1.0, seed=0))
    assert not len(frame)
