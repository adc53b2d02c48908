"""Usage adds up to what a naive count says; whole sampling runs are what `sample` gives."""

import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from loopmdm.analysis.measures.stopping.quality import Quality, sample_quality
from loopmdm.analysis.measures.stopping.sampling import stopping_in_sampling, usage_by_step
from loopmdm.analysis.measures.stopping.usage import (
    TokenClasses,
    frequency_classes,
    loop_usage,
    peer_classes,
    piece_classes,
)
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.errors import UsageError
from loopmdm.model.masking import mask_tokens
from loopmdm.model.stopping.rules import FixedLoops, KLDelta, NoiseSchedule, StateDelta
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.conftest import toy_model

RULE = KLDelta(max_loops=3, threshold=0.1)


def cell(frame, **chosen):
    for name, value in chosen.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1
    return frame.iloc[0]


@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_usage_is_a_naive_count(model, batch, scope):
    frame = loop_usage(model, batch, RULE, [scope], batch_size=3)
    run = model.run(batch.tokens, stop=dataclasses.replace(RULE, scope=scope))
    classes = frequency_classes(batch.clean, 23)
    label, found, everything = classes.of(batch), {}, []
    for row in range(4):
        for position in range(10):
            if batch.masked[row, position]:
                own = run.loops_used[row] if run.token_loops is None else run.token_loops[row, position]
                found.setdefault(classes.names[label[row, position]], []).append((row, int(own)))
                everything.append(int(own))
    assert len(set(everything)) > 1  # the rule does tell them apart
    assert cell(frame, by="all")["value"] == pytest.approx(np.mean(everything))
    for name, members in found.items():
        got = cell(frame, by="token_class", group=name)
        assert got["value"] == pytest.approx(np.mean([loops for _, loops in members]))
        assert (got["n"], got["n_tokens"]) == (len({row for row, _ in members}), len(members))
    half = cell(frame, by="mask_ratio", group="0.5")
    assert half["value"] == pytest.approx(np.mean(everything)) and half["n"] == 4
    empty = cell(frame, by="mask_ratio", group="0.9")
    assert np.isnan(empty["value"]) and np.isnan(empty["standard_error"]) and empty["n"] == empty["n_tokens"] == 0


def test_groups_partition_the_tokens(model, clean):
    frame = loop_usage(model, clean, RULE, n_samples=3)
    for (_, by), part in frame.groupby(["scope", "by"]):
        whole = cell(frame, scope=part["scope"].iloc[0], by="all")
        assert part["n_tokens"].sum() == whole["n_tokens"], by
        assert (part["value"] * part["n_tokens"]).sum() == pytest.approx(whole["value"] * whole["n_tokens"])
    assert cell(frame, scope="sequence", by="all")["n"] == 12
    assert set(frame["rule"]) == {"kl-delta"} and (frame["value"].dropna().between(1, 3)).all()
    doubled = loop_usage(model, clean, RULE, n_samples=3, clusters=np.array([0, 0, 1, 1]))
    assert doubled["value"].equals(frame["value"]) and not doubled["standard_error"].equals(
        frame["standard_error"]
    )


def test_a_rule_that_spends_by_noise_is_seen_to(model, clean):
    plan = NoiseSchedule(loops=(1, 2, 3), max_loops=3)
    frame = loop_usage(model, clean, plan, ["sequence"], n_bins=3, n_samples=6)
    by_ratio = frame[frame["by"] == "mask_ratio"]
    assert by_ratio["value"].tolist() == [1, 2, 3] and (by_ratio["standard_error"] < 1e-9).all()
    with pytest.raises(UsageError, match="plans whole sequences"):
        loop_usage(model, clean, plan)


def test_difficulty_is_the_loss_at_the_last_loop(model, batch):
    """With a class that names the tercile independently, both groupings agree."""
    logits = model(batch.tokens, 3).log_softmax(-1)
    loss = -logits.gather(-1, batch.clean[..., None])[..., 0]
    edges = np.quantile(loss[batch.masked].numpy(), [1 / 3, 2 / 3])
    own = TokenClasses(("low", "middle", "high"), lambda b: torch.from_numpy(np.searchsorted(edges, loss.numpy())))
    frame = loop_usage(model, batch, RULE, ["token"], own)
    for name in own.names:
        two = [cell(frame, by=by, group=name) for by in ("difficulty", "token_class")]
        assert two[0]["value"] == pytest.approx(two[1]["value"]) and two[0]["n_tokens"] == two[1]["n_tokens"]


def test_classes_by_hand():
    tokens = torch.tensor([[0, 0, 0, 0], [1, 1, 2, 3]])  # 0: half of all; 1: a quarter; 2 and 3: an eighth
    b = mask_tokens(tokens, 9, mask_ratio=0.5)
    assert frequency_classes(tokens, 10).of(b).tolist() == [[2, 2, 2, 2], [1, 1, 0, 0]]
    tokenizer = Tokenizer(models.WordLevel({"Ġthe": 0, "ing": 1, ".": 2, "Ġa": 3}, unk_token="."))
    tokenizer.decoder = decoders.ByteLevel()
    pieces = piece_classes(tokens, tokenizer)
    named = [pieces.names[number] for number in pieces.of(b)[1]]
    assert named == ["middle frequency, inside a word"] * 2 + ["low frequency, word start"] * 2
    board = BOARDS["sudoku4"]
    hidden = torch.zeros(1, 16, dtype=torch.long)
    hidden = dataclasses.replace(mask_tokens(hidden, 4, mask_ratio=0.0), masked=torch.zeros(1, 16).bool())
    masked = hidden.masked.clone()
    masked[0, [0, 1, 15]] = True  # cells (0, 0), (0, 1) share row and box; (3, 3) is alone
    b = dataclasses.replace(hidden, masked=masked, tokens=hidden.clean.masked_fill(masked, 4))
    peers = peer_classes(board, width=1)
    assert len(peers.names) == 8 and peers.of(b)[0, [0, 1, 15, 3, 2]].tolist() == [1, 1, 0, 3, 2]
    assert peer_classes(BOARDS["sudoku6"]).names[-1] == "10-14 hidden peers"


def test_misuse_is_named(model, clean):
    with pytest.raises(UsageError, match="scopes must be"):
        loop_usage(model, clean, RULE, ["word"])
    with pytest.raises(UsageError, match="4 expected, got 2"):
        loop_usage(model, clean, RULE, clusters=np.arange(2))
    with pytest.raises(UsageError, match="no masked position"):
        loop_usage(model, mask_tokens(clean, 22, mask_ratio=0.0), RULE)
    with pytest.raises(UsageError, match="as clues"):
        stopping_in_sampling(model, [RULE], board=BOARDS["sudoku4"])
    alone = loop_usage(model, clean[:1], RULE, n_samples=1)
    assert alone["standard_error"].isna().all() and cell(alone, scope="token", by="all")["n"] == 1
    once = loop_usage(model, clean, KLDelta(max_loops=1))
    assert (once["value"].dropna() == 1).all()


def test_quality_by_hand():
    tokens = torch.tensor([[1, 1, 1], [1, 1, 2], [3, 4, 5]])  # pairs: 11 11 | 11 12 | 34 45
    entropy, distinct = sample_quality(tokens)
    assert entropy.values == pytest.approx([0, np.log(3) - 2 / 3 * np.log(2), np.log(3)])
    assert distinct.mean()[0] == pytest.approx(4 / 6)
    without = np.array([4 / 4, 3 / 4, 2 / 4])  # leaving one sequence out
    assert distinct.mean()[1] == pytest.approx(np.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum()))
    board = BOARDS["sudoku4"]
    grids = board.sample_grids("test", 2)
    wrong = grids.clone()
    wrong[0, 0] = (wrong[0, 0] + 1) % 4
    assert sample_quality(wrong, board)[0].values.tolist() == [0, 1]
    judged = sample_quality(tokens, judge=lambda t: (np.array([2.0, 6.0, 0.0]), np.array([1, 3, 0])))[2]
    assert judged.mean()[0] == pytest.approx(2.0) and judged.mean()[2] == 2  # nothing to judge does not count
    with pytest.raises(UsageError, match="a judge gives"):
        sample_quality(tokens, judge=lambda t: (np.zeros(2), np.zeros(2)))
    with pytest.raises(UsageError, match="16 cells"):
        sample_quality(tokens, board)


def test_pairing_takes_out_what_two_samplers_share():
    generator = np.random.default_rng(0)
    shared, weights = generator.normal(size=50), generator.integers(1, 5, 50).astype(float)
    one, two = Quality("x", shared + 1, weights), Quality("x", shared, weights)
    assert one.against(two) == pytest.approx((1.0, 0.0), abs=1e-12)
    apart = Quality("x", generator.normal(size=50), weights)
    assert one.against(apart)[1] == pytest.approx(np.hypot(one.mean()[1], apart.mean()[1]), rel=0.3)


def test_sampling_with_a_rule_is_sampling(model):
    token = StateDelta(max_loops=3, threshold=0.5, scope="token")
    rules = [RULE, token, FixedLoops(max_loops=3), FixedLoops(max_loops=1)]
    frame = stopping_in_sampling(model, rules, n=5, steps=4, repeats=1, seed=3, batch_size=2)
    for rule, name in zip(rules, ("kl-delta", "state-delta token", "fixed", "fixed"), strict=True):
        r = sample(model, 5, steps=4, stop=rule, seed=3)
        part = frame[(frame["rule"] == name) & (frame["max_loops"] == rule.max_loops)]
        entropy = part[part["measure"] == "unigram-entropy"].iloc[0]
        assert entropy["quality"] == pytest.approx(sample_quality(r.tokens)[0].values.mean())
        assert entropy["flops"] == pytest.approx(r.flops / 5) and entropy["n"] == 5
        assert entropy["mean_loops"] == pytest.approx(float(r.loops_used[r.loops_used > 0].double().mean()))
    same = frame[(frame["rule"] == "fixed") & (frame["max_loops"] == 3)]
    assert (same["against_full"] == 0).all() and (same["against_full_se"] == 0).all() and len(same) == 4
    assert frame["time_ratio"].iloc[0] == 1 and (frame["time_ratio"] > 0).all()
    alone = stopping_in_sampling(model, [RULE], n=1, steps=2, repeats=1)
    assert alone["quality_se"].isna().all() and (alone["n"] == 1).all()


def test_sudoku_is_judged_by_its_boards():
    board = BOARDS["sudoku4"]
    model = toy_model(d_vocab=5)
    b = puzzles(board, board.sample_grids("test", 6), 12)
    frame = stopping_in_sampling(model, [FixedLoops(max_loops=1)], clues=b, board=board, steps=4, repeats=1)
    r = sample(model, clues=b, steps=4, n_loops=1, order="confidence", temperature=0)
    assert frame["measure"].tolist() == ["solve-rate"] * 2 and set(frame["order"]) == {"confidence"}
    assert frame["quality"][1] == pytest.approx(float(board.is_valid(r.tokens).double().mean()))


@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_usage_by_step_is_that_of_the_run(model, scope):
    rule = StateDelta(max_loops=3, threshold=0.6, scope=scope)
    frame = usage_by_step(model, rule, 5, steps=6, seed=2, batch_size=2)
    r = sample(model, 5, steps=6, stop=rule, seed=2)
    hidden = (r.history == 22).double().mean(-1)  # a run by history, not by events
    for step, row in frame.iterrows():
        ran = r.loops_used[step] > 0
        assert row["n"] == int(ran.sum())
        if not ran.any():
            assert np.isnan(row["value"])
            continue
        assert row["mask_ratio"] == pytest.approx(float(hidden[step][ran].mean()))
        if scope == "sequence":
            assert row["value"] == pytest.approx(float(r.loops_used[step][ran].double().mean()))
            continue
        alone = [r.history[step, i : i + 1] for i in ran.nonzero()[:, 0].tolist()]
        means = [model.run(ids, stop=rule).token_loops[ids == 22].double().mean() for ids in alone]
        assert row["value"] == pytest.approx(float(torch.stack(means).mean()))
    assert frame["value"].nunique() > 1
