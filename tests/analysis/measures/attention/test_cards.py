"""Head cards: planted heads carry their names, what they take is found, and untrained heads get no label."""

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from loopmdm.analysis.measures import measure
from loopmdm.analysis.measures.attention.cards import Looks, head_card, head_cards, label_rates
from loopmdm.analysis.measures.attention.head_effects import (
    Seen,
    by_gradient,
    direct,
    gradients,
    other_than,
    removed,
)
from loopmdm.analysis.measures.mechanism.contrast import questions
from loopmdm.analysis.measures.relations import Relations
from loopmdm.analysis.measures.twins import untrained
from loopmdm.analysis.plots.cards import plot_card
from loopmdm.model.adapters import hook_model
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.planted import CANDIDATE_LOGIT, HEADS, KNOWN_LOGIT, naked_singles
from loopmdm.model.tasks.propagation import units
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.analysis.measures.representation.test_gain import foreign
from tests.conftest import toy_model
from tests.loopmdm_model.adapters import standins

SIX = BOARDS["sudoku6"]


@pytest.fixture(scope="module")
def boards():
    return puzzles(SIX, SIX.sample_grids("test", 24), 16, unique=True)


@pytest.fixture(scope="module")
def planted_cards(boards):
    with torch.no_grad():
        return head_cards(naked_singles(SIX), boards, 3, Looks(n_effects=24))


def value(frame, metric, of="", **where):
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    return frame[(frame["metric"] == metric) & (frame["of"] == of)]["value"].to_numpy()


# --- identities ---


def test_relations_part_what_a_query_sees(boards, hooked, batch):
    for m, b in ((naked_singles(SIX), boards), (hooked, batch), foreign("causal")):
        b = questions("test", m, b)
        found = Relations.of(m, b)
        seen = b.real[:, None, :] & b.real[:, :, None]
        seen = seen & torch.ones_like(seen[0]).tril() if m.facts.causal else seen
        assert torch.equal(found.member.sum(1), seen.expand_as(found.member[:, 0]).long())
        torch.testing.assert_close(found.shares(b.masked).sum(-1), torch.ones(len(b)))
        even = (seen / seen.sum(-1, keepdim=True))[:, None]
        torch.testing.assert_close(found.masses(even, b.masked)[:, 0], found.shares(b.masked))


def test_what_heads_write_adds_up_to_what_attention_writes(hooked, batch):
    seen = Seen(hooked, batch, 2, 0, 0)
    _, cache = hooked.run_with_cache(batch.tokens, 2)
    for (loop, layer), application in seen.places.items():
        whole = cache["attn_out", "loop", loop, layer][seen.rows, seen.query]
        parts = application.written(seen.weight(layer)).sum(1) + hooked.model.output_bias(layer)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)
    assert len(seen.places) == 4


def test_the_direct_read_is_the_logits_of_the_write_with_the_norm_frozen():
    m = HookedLoopMDM(toy_model(n_coda_layers=0))
    clean = torch.randint(0, 22, (3, 10), generator=torch.Generator().manual_seed(1))
    seen = Seen(m, mask_tokens(clean, 22, mask_ratio=0.5), 2, 0, 0)
    place = (1, 2)
    symbols = seen.symbols(1)
    found = direct(seen, place, symbols)
    scale = []
    with m.hooks([("ln_final.hook_scale", lambda x, hook: scale.append(x))]):
        before = m.readout(seen.states[-1], seen.context)
    for key, head in ((2, 0), (7, 1)):
        write = torch.einsum("be,de->bd", seen.places[place].value[:, key, head], seen.weight(2)[:, head])
        state = seen.states[-1].clone()
        state[seen.rows, seen.query] += write
        with m.hooks([("ln_final.hook_scale", lambda x, hook: scale[0])]):
            change = m.readout(state, seen.context) - before
        change = change[seen.rows, seen.query].masked_fill(torch.arange(23) == 22, float("-inf"))
        wanted = other_than(change).gather(-1, symbols[:, key, None])[:, 0]
        torch.testing.assert_close(found[:, head, key], wanted, atol=1e-4, rtol=1e-3)


def test_the_gradient_read_is_a_small_step_along_the_write(hooked, batch):
    m = hooked.to(torch.float64)
    seen, place, size = Seen(m, batch, 2, 0, 0), (0, 1), 1e-5
    symbols = seen.symbols(0)
    found = by_gradient(seen, place, symbols, gradients(seen)[place].double())
    key, head = 3, 1
    write = torch.einsum("be,de->bd", seen.places[place].value[:, key, head].double(), seen.weight(1)[:, head])

    def add(x, hook):
        x = x.clone()
        x[seen.rows, seen.query] += size * write
        return x

    with m.hooks([("loop.0.blocks.1.hook_attn_out", add)]):
        *_, (state, _) = m.states(batch.tokens, 2)
    change = (seen.read(state) - seen.logits).masked_fill(torch.arange(23) == 22, float("-inf")) / size
    wanted = other_than(change).gather(-1, symbols[:, key, None])[:, 0]
    torch.testing.assert_close(found[:, head, key], wanted, atol=1e-3, rtol=1e-2)


def test_masses_sum_to_one_and_lifts_are_masses_over_chance(planted_cards):
    mass = planted_cards[planted_cards["metric"] == "attention"].groupby(["loop", "layer", "head"])["value"].sum()
    np.testing.assert_allclose(mass, 1.0, atol=1e-5)
    row = {"layer": 0, "head": 0, "loop": 0}
    assert value(planted_cards, "attention", "row", **row) == pytest.approx(3 / 6, abs=1e-4)
    assert value(planted_cards, "lift", "row", **row) == pytest.approx((3 / 6) / (3 / 36), abs=1e-3)


# --- the planted mechanism ---


def test_planted_heads_are_labelled_as_they_were_planted(planted_cards):
    heads = planted_cards[planted_cards["layer"] == 0].drop_duplicates(["loop", "head"])
    labels = heads.pivot(index="loop", columns="head", values="label")
    for head, name in enumerate(HEADS):
        assert labels[head].tolist() == [name if name != "renew" else "self", name, name]  # nothing old in loop 0
    np.testing.assert_allclose(value(planted_cards, "erasure", layer=0, head=3)[1:], 1.0, atol=1e-4)
    idle = planted_cards[planted_cards["layer"] == 1]
    assert set(idle["label"]) == {"broad"} and set(idle["effect"]) == {"neither"}


def test_taken_is_what_no_logit_reads_and_what_removing_a_head_gives_back(planted_cards, boards):
    """Direct and gradient are 0: heads write counts that only thresholds read, which are flat at whole numbers."""
    for read in ("direct", "gradient"):
        found = value(planted_cards, read, "clean", layer=0)
        assert len(found) and np.nanmax(np.abs(found)) < 1e-4
    first = planted_cards[
        (planted_cards["layer"] == 0) & (planted_cards["loop"] == 0) & (planted_cards["head"] < 3)
    ]
    assert set(first["effect"]) == {"suppresses"}
    m = naked_singles(SIX)
    seen = Seen(m, boards, 1, 0, 0)
    found = removed(seen, (0, 0))["now"][:, :3, :6]
    clues = one_hot(boards.tokens, 7)[..., :-1].float()
    member = units(SIX).float().view(3, 6, 36)
    holds = torch.einsum("kuc,kud,bdv->bkcv", member, member, clues)[seen.rows, :, seen.query] > 0

    def answer(taken):
        candidates = ~taken
        filled = candidates & (candidates.sum(-1, keepdim=True) == 1)
        return CANDIDATE_LOGIT * candidates + KNOWN_LOGIT * filled

    for head in range(3):
        others = holds[:, [kind for kind in range(3) if kind != head]].any(1)
        torch.testing.assert_close(found[:, head], answer(holds.any(1)) - answer(others), atol=1e-3, rtol=0)


# --- nulls and other people's models ---


def test_untrained_heads_get_no_label(boards):
    twin = untrained(HookedLoopMDM.from_pretrained("sudoku-loop-s4"))
    rates = label_rates(head_cards(twin, boards, 2, Looks(n_effects=12)))
    assert set(rates["name"]) == {"broad", "neither"} and (rates["share"] == 1).all()


@pytest.mark.parametrize("name", ["bidirectional", "causal"])
def test_other_peoples_heads_have_cards(name):
    m, b = foreign("causal")
    if name == "bidirectional":
        m = hook_model(standins.prepared(standins.LLaDAModelLM()), loop=(1, 1), max_loops=2)
        b = mask_tokens(b.clean, m.cfg.mask_token_id, mask_ratio=0.5)
    frame = head_cards(m, b, 2, Looks(n_effects=4))
    assert set(frame["head"]) == set(range(m.cfg.n_heads)) and set(frame["layer"]) == set(m.cfg.layers("loop"))
    assert value(frame, "now", "clean").size and np.isfinite(value(frame, "now", "clean")).any()
    if name == "causal":
        assert (value(frame, "attention", "next") == 0).all() and np.isnan(value(frame, "lift", "next")).all()


def test_the_measure_has_its_twin_and_cards_show_themselves():
    frame = measure("head-cards", "sudoku-loop-s4", 2, n_sequences=8, n_effects=6)
    assert set(frame["weights"]) == {"trained", "untrained 0"} and "sink" in set(frame["metric"])
    own = frame[frame["weights"] == "trained"]
    card = head_card(own, 1, 3)
    assert len(card.labels) == 2 and "layer 1, head 3" in card._repr_html_() and "loop 1:" in card._repr_html_()
    axes = card.plot(np.eye(36)).axes
    assert len(axes) == 4 and {line.get_label() for line in axes[0].lines} >= {"row", "column", "box"}
    with pytest.raises(ValueError, match="plot_card: the frame has no rows"):
        plot_card(own[:0])
    with pytest.raises(UsageError, match="no head 9 of layer 1 is among the cards"):
        head_card(own, 1, 9)
    with pytest.raises(UsageError, match="a card is of one model at one mask ratio"):
        head_card(frame, 1, 3)


def test_what_has_no_cards_is_refused_in_a_line(hooked, batch):
    m, b = foreign("shifted")
    flat = HookedLoopMDM(toy_model(n_loop_layers=0))
    for call, says in (
        (lambda: head_cards(m, b), r"head-cards needs logits at their own position.*facts\.shifted = True"),
        (lambda: head_cards(*foreign("bidirectional")), r"head-cards needs an additive residual stream"),
        (lambda: head_cards(flat, batch, 1), "are of looped heads; this model loops no layer"),
        (lambda: head_cards(hooked, batch, 2, Looks(n_effects=0)), "n_effects must be at least 1"),
    ):
        with pytest.raises(UsageError, match=says) as said:
            call()
        assert "\n" not in str(said.value)
