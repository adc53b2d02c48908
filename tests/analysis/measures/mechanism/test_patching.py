"""Patching does what it says, bit for bit where nothing changes, and finds the heads of a planted model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from loopmdm.analysis.measures.interventions.selections import relation_of
from loopmdm.analysis.measures.mechanism.contrast import any_wrong, contrast
from loopmdm.analysis.measures.mechanism.corruption import corrupted, places
from loopmdm.analysis.measures.mechanism.nodes import Node, standard_nodes
from loopmdm.analysis.measures.mechanism.patching import activation_patching, patched, record_nodes
from loopmdm.model.adapters import hook_model
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.planted import HEADS, naked_singles
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.propagation import units
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.conftest import toy_model
from tests.loopmdm_model.adapters import natives, standins

SIX = BOARDS["sudoku6"]


@pytest.fixture
def pair(hooked, batch) -> tuple[MaskedBatch, MaskedBatch]:
    return batch, corrupted(hooked, batch)


def differences(m, b, logits):
    asked = contrast(m, b)
    return asked.by_sequence(asked.difference(logits[b.masked])).numpy()


# --- pairs ---


def test_a_pair_differs_in_one_clean_token_and_is_the_same_each_time(hooked, pair):
    clean, other = pair
    differs = clean.tokens != other.tokens
    assert (differs.sum(-1) == 1).all() and not (differs & clean.masked).any()
    assert torch.equal(other.tokens, corrupted(hooked, clean).tokens)
    assert not torch.equal(other.tokens, corrupted(hooked, clean, seed=1).tokens)
    beside = torch.nn.functional.max_pool1d(clean.masked.float(), 3, 1, 1).bool()
    assert beside[differs].all()  # next to what is hidden
    for row in range(len(clean)):
        others = clean.clean[torch.arange(len(clean)) != row]
        assert (others == other.tokens[row][differs[row]]).any()


def test_a_clue_becomes_a_symbol_that_no_other_clue_forbids(unique_puzzles, sudoku_toy):
    m = HookedLoopMDM(sudoku_toy)
    other = corrupted(m, unique_puzzles)
    differs = unique_puzzles.tokens != other.tokens
    assert (differs.sum(-1) == 1).all()
    member = units(SIX).float()
    clues = torch.nn.functional.one_hot(other.tokens, 7)[..., :6] * (~other.masked)[..., None]
    assert torch.einsum("uc,bcs->bus", member, clues.float()).max() == 1
    where = places(m, unique_puzzles, other)
    parts = torch.stack([where[name] for name in ("changed", "box", "row", "column", "none")])
    assert (parts.sum(0) == 1).all() and where["box"].sum(-1).eq(5).all() and where["row"].sum(-1).eq(3).all()
    for name in ("row", "column"):
        related = relation_of(SIX, name)[differs.nonzero()[:, 1]]
        assert torch.equal(where[name], related)


# --- identities ---


def test_patching_what_is_there_changes_nothing_bit_for_bit(hooked, pair):
    clean, other = pair
    nodes = [*standard_nodes(hooked, 3, ("z", "q", "k", "v", "attn_out", "mlp_out")), Node("state", -1),
             *(Node("state", loop) for loop in range(3))]  # fmt: skip
    own = record_nodes(hooked, clean, nodes, 3)
    before = hooked(clean.tokens, 3)
    for node in nodes:
        with patched(hooked, [node], own):
            assert torch.equal(hooked(clean.tokens, 3), before), node
    same = replace(other, tokens=other.tokens.clone(), clean=other.clean.clone())
    same.tokens[0], same.clean[0] = clean.tokens[0], clean.clean[0]
    found = activation_patching(hooked, clean, same, n_loops=3)
    assert found.total[0] == 0 and (found.total[1:] != 0).all()
    assert all(values[0] == 0 for values in found.values.values())


def test_patching_everything_gives_the_corrupted_run(hooked, pair):
    clean, other = pair
    wanted = hooked(other.tokens, 3)
    start = [Node("state", -1)]
    with patched(hooked, start, record_nodes(hooked, other, start, 3)):
        assert torch.equal(hooked(clean.tokens, 3), wanted)
    every = standard_nodes(hooked, 3, ("attn_out", "mlp_out"))
    with patched(hooked, every, record_nodes(hooked, other, every, 3)):
        shifted = hooked(clean.tokens, 3)
    torch.testing.assert_close(shifted[:, :, :-1], _embedded(hooked, clean, other, wanted)[:, :, :-1])
    for node in (Node("state", -1), Node("state", 1), Node("state", 2)):
        found = activation_patching(hooked, clean, other, [node], n_loops=3)
        np.testing.assert_allclose(found.values["all", node], found.total, atol=1e-5)
        back = activation_patching(hooked, clean, other, [node], n_loops=3, direction="denoising")
        np.testing.assert_allclose(back.values["all", node], -back.total, atol=1e-5)


def _embedded(m, clean, other, logits):
    """The corrupted run with the clean embeddings in the stream: what patching all writes but them gives."""
    _, cache = m.run_with_cache(other.tokens, 3)
    _, own = m.run_with_cache(clean.tokens, 3)
    state = cache["blocks.3.hook_resid_post"] - cache["hook_embed"] + own["hook_embed"]
    return m.model.unembedding(state)


def test_a_heads_effect_is_that_of_the_run_with_its_z(hooked, pair):
    clean, other = pair
    node = Node("z", 1, 2, 1, 4)
    values = record_nodes(hooked, other, [node], 3)

    def put(z, hook):
        z[:, 4, 1] = values[str(node.site)][:, 4, 1]
        return z

    with hooked.hooks([(str(node.site), put)]):
        logits = hooked(clean.tokens, 3)
    found = activation_patching(hooked, clean, other, [node], n_loops=3)
    before = differences(hooked, clean, hooked(clean.tokens, 3))
    np.testing.assert_allclose(found.values["all", node], differences(hooked, clean, logits) - before, atol=1e-6)
    total = differences(hooked, clean, hooked(other.tokens, 3)) - before
    np.testing.assert_allclose(found.total, total, atol=1e-6)
    here = torch.zeros_like(clean.masked)
    here[:, 4] = True
    whole = replace(node, position=None)
    part = activation_patching(hooked, clean, other, [whole], n_loops=3, places={"here": here}, batch_size=3)
    np.testing.assert_allclose(part.values["here", whole], found.values["all", node], atol=1e-6)


# --- the planted mechanism ---


@pytest.fixture(scope="module")
def planted():
    m = naked_singles(max_loops=5)
    clean = puzzles(SIX, SIX.sample_grids("test", 24), 16, unique=True)
    with torch.no_grad():
        return m, clean, corrupted(m, clean)


def test_a_changed_clue_goes_through_row_column_and_box_of_its_own_units_in_loop_0(planted):
    m, clean, other = planted
    cell = (clean.tokens != other.tokens).nonzero()[:, 1]
    member = units(SIX).view(3, SIX.size, SIX.n_cells)
    for number, head in enumerate(HEADS):
        node = Node("z", 0, 0, number)
        if head == "renew":  # there are no counts yet that it could take away
            found = activation_patching(m, clean, other, [node])
            assert (found.values["all", node] == 0).all()
            continue
        own = (member[number].T.float() @ member[number].float() > 0)[cell]
        where = {"unit": own, "elsewhere": ~own, "all": own | ~own}
        found = activation_patching(m, clean, other, [node], places=where)
        np.testing.assert_allclose(found.values["elsewhere", node], 0.0, atol=1e-4)
        np.testing.assert_allclose(found.values["unit", node], found.values["all", node], atol=1e-4)
        assert (np.abs(found.values["unit", node]) > 0.05).mean() > 0.3
    for layer_1 in (Node("attn_out", 0, 1), Node("z", 0, 1, 0)):  # no attention there
        found = activation_patching(m, clean, other, [layer_1])
        assert (found.values["all", layer_1] == 0).all()


def test_later_rounds_are_carried_by_the_filling_of_later_loops_at_the_cells_they_fill(planted):
    m, clean, other = planted
    caches = [m.run_with_cache(b.tokens)[1] for b in (clean, other)]
    reached = []
    for loop in range(5):
        node = Node("mlp_out", loop, 1)
        fills = [cache["mlp_out", "loop", loop, 1] for cache in caches]
        differs = (fills[0] - fills[1]).abs().amax(-1) > 0.5
        told = activation_patching(m, clean, other, [node], places={"there": differs, "not": ~differs})
        np.testing.assert_allclose(told.values["not", node], 0.0, atol=1e-3)
        reached.append(float(np.abs(told.values["there", node]).mean()))
        assert (differs.any(-1).numpy() >= (np.abs(told.values["there", node]) > 1e-3)).all()
    assert reached[1] > 0.5 and reached[2] > 0.1  # a chain of cells, round by round


def test_an_untrained_models_heads_do_nothing_on_average_but_undo_the_luck_of_the_best_wrong_token():
    """Over random models the mean effect is 0 within its error against any wrong token, above against the best."""
    means = {"any": [], "best": []}
    for seed in range(10):
        m = HookedLoopMDM(toy_model(seed))
        clean = torch.randint(0, 22, (16, 10), generator=torch.Generator().manual_seed(seed))
        b = mask_tokens(clean, 22, mask_ratio=0.5, seed=seed)
        nodes = standard_nodes(m, 1, ("z",))
        for wrong, asked in (("any", any_wrong(m, b, seed)), ("best", None)):
            found = activation_patching(m, b, corrupted(m, b, seed), nodes, n_loops=1, asked=asked)
            means[wrong].append([found.values["all", node].mean() for node in nodes])
    t = {wrong: np.mean(v, 0) / (np.std(v, 0, ddof=1) / len(v) ** 0.5) for wrong, v in means.items()}
    assert (np.abs(t["any"]) > 2.26).sum() <= 2  # of eight, 5% of which are expected
    assert (t["best"] > 0).all() and t["best"].mean() > 2.26


# --- other people's models ---


@pytest.mark.parametrize("name", ["Bert", "Llama", "Dream"])
def test_models_of_others(name):
    if name == "Dream":
        m = hook_model(standins.prepared(standins.DreamModel()), loop=(1, 1), max_loops=2)
        tokens = torch.randint(4, 20, (3, 8), generator=torch.Generator().manual_seed(3))
    else:
        extra = {"mask_token_id": 103} if name == "Bert" else {}
        m, tokens = hook_model(natives.native(name), loop=(1, 2), max_loops=2, **extra), natives.tokens()
    b = MaskedBatch(tokens, tokens, torch.zeros_like(tokens).bool())
    b = b if name == "Llama" else mask_tokens(tokens, m.cfg.mask_token_id, mask_ratio=0.5, seed=0)
    other = corrupted(m, b)
    assert ((b.tokens != other.tokens).sum(-1) == 1).all()
    nodes = [Node("state", 0), Node("z", 0, 1, 0)]
    found = activation_patching(m, b, other, nodes)
    np.testing.assert_allclose(found.values["all", nodes[0]], found.total, atol=1e-4)
    assert np.abs(found.values["all", nodes[1]]).max() > 0


# --- refusals ---


def test_bad_input_is_refused_in_a_line(hooked, pair):
    clean, other = pair
    fewer = other.rows(slice(0, 2))
    elsewhere = mask_tokens(clean.clean, 22, mask_ratio=0.5, seed=5)
    unmasked = MaskedBatch(clean.tokens, clean.tokens, torch.zeros_like(clean.masked))
    full = mask_tokens(clean.clean, 22, mask_ratio=1.0, seed=0)

    def patch(*nodes, given=other, **how):
        return lambda: activation_patching(hooked, clean, given, list(nodes), n_loops=3, **how)

    for call, says in (
        (patch(Node("z", 3, 1, 0)), r"loop 3 does not exist; there are 3 \(0..2\)"),
        (patch(Node("z", 0, 1, 2)), r"head 2 does not exist; there are 2 \(0..1\)"),
        (patch(Node("z", 0, 9, 0)), r"layer 9 does not exist; there are 4"),
        (patch(Node("mlp_out", 0, 1, None, 10)), r"position 10 does not exist; there are 10"),
        (patch(Node("mlp_out", 0, 1, None, -1)), r"position -1 does not exist"),
        (patch(Node("z", None, 1)), "layer 1 loops: say in which loop"),
        (patch(Node("z", 0, 0)), "layer 0 does not loop"),
        (patch(Node("state", -2)), "loop must be at least -1"),
        (lambda: activation_patching(hooked, clean, other, []), r"nodes are several such as Node\('z', loop=0"),
        (lambda: activation_patching(hooked, clean, other, ["z"]), "got 'z'"),
        (lambda: record_nodes(hooked, clean, ["z"]), "got 'z'"),
        (lambda: patched(hooked, ["z"], {}).__enter__(), "got 'z'"),
        (lambda: Node("zz", 0, 1), "unknown component 'zz'; did you mean z"),
        (lambda: Node("mlp_out", 0, 1, 0), "is of no head"),
        (lambda: Node("state", 0, 1), "needs loop, not layer"),
        (lambda: Node("z", 0), "needs layer="),
        (patch(given=fewer), r"clean is \[4, 10\] tokens, corrupted \[2, 10\]"),
        (patch(given=elsewhere), "hide other positions"),
        (patch(given=clean), "no effect to attribute"),
        (patch(direction="there"), 'direction must be "noising" or "denoising"'),
        (lambda: activation_patching(hooked, unmasked, corrupted(hooked, unmasked)), "no position is masked"),
        (lambda: corrupted(hooked, full), "no sequence has a clean token"),
        (lambda: activation_patching(hooked, clean, "other"), "takes a MaskedBatch"),
    ):
        with pytest.raises(UsageError, match=says) as said:
            call()
        assert "\n" not in str(said.value)
    with pytest.raises(UsageError, match="was not recorded"), patched(hooked, [Node("z", 0, 1, 0)], {}):
        pass


def test_a_first_state_that_is_drawn_is_refused():
    m = hook_model(standins.prepared(standins.RavenForCausalLM()))
    tokens = torch.randint(4, 20, (2, 8), generator=torch.Generator().manual_seed(0))
    b = MaskedBatch(tokens, tokens, torch.zeros_like(tokens).bool())
    with pytest.raises(UsageError, match=r"facts\.random_start = True"):
        activation_patching(m, b, corrupted(m, b))
