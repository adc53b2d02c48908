"""The estimator against the enumeration of all masks."""

import math

import numpy as np
import pytest
import torch

from loopmdm.model.corpora.windows import sliding_windows
from loopmdm.model.diffusion.likelihood import (
    continuation_nelbo,
    corpus_nelbo,
    draw_counts,
    draw_masks,
    draw_times,
    masked_draw,
    nelbo,
    nelbo_by_loop,
)
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import Sequences
from loopmdm.model.stopping.rules import KLDelta, StateDelta
from tests.conftest import toy_model
from tests.textbook import enumerated_nelbo


def same(left, right):
    # float32 sums differ in the last bits with the batch's shape
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("length", [2, 4, 8, 12])
def test_estimate_equals_enumeration(length):
    model = toy_model(seed=length)
    sequence = torch.randint(0, 22, (length,), generator=torch.Generator().manual_seed(length))
    exact = enumerated_nelbo(model, sequence, 2)
    draws = 600
    repeats = [nelbo(model, sequence.expand(8, -1), n_loops=2, n_samples=draws // 20, seed=s) for s in range(20)]
    values = torch.tensor([r.mean for r in repeats])
    error = float(values.std() / len(values) ** 0.5)
    assert abs(float(values.mean()) - exact) < 4 * error
    assert error < 0.02 * exact  # tight enough to see a 7% bias


@pytest.mark.parametrize("estimator", ["stratified-t", "independent-t"])
def test_estimators_in_t_agree_with_the_enumeration(estimator):
    model = toy_model(seed=4)
    sequence = torch.randint(0, 22, (4,), generator=torch.Generator().manual_seed(4))
    exact = enumerated_nelbo(model, sequence, 2)
    clean = sequence.expand(64, -1)
    values = torch.tensor(
        [nelbo(model, clean, 2, n_samples=30, seed=s, estimator=estimator).mean for s in range(20)]
    )
    error = float(values.std() / len(values) ** 0.5)
    assert abs(float(values.mean()) - exact) < 4 * error + 2e-3 * exact  # t starts at 1e-3
    assert error < 0.04 * exact


@pytest.mark.parametrize("length", [2, 4, 12])
@pytest.mark.parametrize("n_draws", [1, 3])
def test_counts_are_uniform_on_one_to_l(length, n_draws):
    lengths = torch.full((24,), length)
    counts = torch.cat([draw_counts(lengths, seed, d, n_draws) for seed in range(60) for d in range(n_draws)])
    share = torch.bincount(counts, minlength=length + 1)[1:] / len(counts)
    assert counts.min() >= 1 and counts.max() <= length
    torch.testing.assert_close(share, torch.full((length,), 1 / length), atol=0.02, rtol=0)


def test_each_sequence_visits_every_count_not_its_own_stratum():
    lengths = torch.full((12,), 12)
    seen = torch.stack([draw_counts(lengths, 0, draw) for draw in range(300)])
    assert all(len(set(column.tolist())) == 12 for column in seen.T)
    assert abs(float(seen.double().mean()) - 6.5) < 0.1


def test_batch_counts_are_stratified():
    counts = draw_counts(torch.full((16,), 16), seed=3, draw=0)
    assert sorted(counts.tolist()) == list(range(1, 17))


def test_all_loops_off_one_trajectory_equal_separate_runs(model, clean):
    together = nelbo_by_loop(model, clean, 4, n_samples=3, seed=1)
    for n_loops, result in enumerate(together, start=1):
        alone = nelbo(model, clean, n_loops=n_loops, n_samples=3, seed=1)
        same(result.per_sequence, alone.per_sequence)
    some = nelbo_by_loop(model, clean, [4, 2, 4], n_samples=3, seed=1)
    assert [(r.mean, r.flops) for r in some] == [(together[s - 1].mean, together[s - 1].flops) for s in (2, 4)]
    for wrong in ([], [0, 2], 0, "2"):
        with pytest.raises(UsageError, match="n_loops"):
            nelbo_by_loop(model, clean, wrong)


def test_only_maskable_positions_count(model, clean):
    maskable = torch.zeros_like(clean, dtype=torch.bool)
    maskable[:3, 4:7] = True
    r = nelbo(model, clean, n_loops=1, n_samples=4, maskable=maskable)
    assert r.n == 3 and r.per_sequence[3].isnan() and math.isfinite(r.mean) and math.isfinite(r.standard_error)
    nothing = nelbo(model, clean, n_loops=1, maskable=torch.zeros_like(maskable))
    assert nothing.n == 0 and math.isnan(nothing.mean)


def test_padding_changes_no_value(model, clean):
    padded = torch.nn.functional.pad(clean, (0, 4), value=3)
    mask = torch.nn.functional.pad(torch.ones_like(clean), (0, 4))
    ours = nelbo(model, padded, n_loops=2, n_samples=3, attention_mask=mask)
    same(ours.per_sequence, nelbo(model, clean, n_loops=2, n_samples=3).per_sequence)


def test_padding_and_end_of_text(model, clean):
    """What padding holds is no matter; an end-of-text id is scored like any other token."""
    padded = torch.nn.functional.pad(clean, (0, 4), value=3)
    mask = torch.nn.functional.pad(torch.ones_like(clean), (0, 4))
    other = torch.where(mask == 1, padded, 21)
    ours = nelbo(model, padded, n_loops=2, n_samples=2, attention_mask=mask)
    same(ours.per_sequence, nelbo(model, other, n_loops=2, n_samples=2, attention_mask=mask).per_sequence)
    assert ours.lengths.tolist() == [10] * 4
    assert nelbo(model, padded, n_loops=2, n_samples=2).lengths.tolist() == [14] * 4


def test_a_hooked_model_leaves_its_padding_out():
    hooked = HookedLoopMDM.from_pretrained("sotu-loop")
    tokens = hooked.to_tokens(
        ["The state of our union is strong.", "We the people of the United States are at peace with all."]
    )
    real = tokens != hooked.tokenizer.token_to_id("[PAD]")
    assert not bool(real.all())
    plain = nelbo(hooked.model, tokens, 3, n_samples=4, attention_mask=real)
    ours = nelbo(hooked, tokens, 3, n_samples=4)
    same(ours.per_sequence, plain.per_sequence)
    assert ours.lengths.tolist() == real.sum(-1).tolist()
    same(nelbo_by_loop(hooked, tokens, 3, n_samples=4)[2].per_sequence, plain.per_sequence)
    # an end-of-text id is a token like any other
    ended = torch.cat([tokens[:1], torch.full((1, 1), hooked.tokenizer.token_to_id("[EOS]"))], dim=1)
    assert nelbo(hooked, ended, 1, n_samples=1).lengths.tolist() == [int(real[0].sum()) + 1]


def test_errors_are_the_scatter_that_is_seen(model):
    """Each sequence's own error over seeds, and the error of the mean over draws of the sequences."""
    tokens = torch.randint(0, 22, (40, 6), generator=torch.Generator().manual_seed(2))
    runs = [nelbo(model, tokens, 1, n_samples=8, seed=seed) for seed in range(60)]
    seen = torch.stack([r.per_sequence for r in runs]).std(0)
    said = torch.stack([r.per_sequence_error for r in runs]).square().mean(0).sqrt()
    assert 1.0 < float((said / seen).median()) < 2.5  # on the safe side: masks are stratified
    parts = [nelbo(model, tokens[i : i + 10], 1, n_samples=40) for i in range(0, 40, 10)]
    across = torch.tensor([r.mean for r in parts]).std()
    assert 0.3 < float(across / np.mean([r.standard_error for r in parts])) < 2.5
    assert nelbo(model, tokens, 1, n_samples=1).per_sequence_error.isnan().all()


def test_one_attention_mask_serves_all_rows(model, clean):
    row = torch.ones(10, dtype=torch.long)
    row[7:] = 0
    whole = nelbo(model, clean, 1, n_samples=2, attention_mask=row.expand(4, -1))
    same(nelbo(model, clean, 1, n_samples=2, attention_mask=row).per_sequence, whole.per_sequence)


def test_strata_in_t_are_filled_once():
    times = draw_times(50, seed=0, draw=3)
    assert sorted(((times - 1e-3) / (1 - 1e-3) * 50).floor().long().tolist()) == list(range(50))
    loose = draw_times(50, seed=0, draw=3, stratified=False)
    assert len(set((loose * 50).floor().long().tolist())) < 50


def test_flops_add_up(model, clean):
    kept = []

    class Counting:
        cfg = model.cfg

        def run(self, *arguments, **keywords):
            kept.append(model.run(*arguments, **keywords))
            return kept[-1]

    for stop in (None, StateDelta(0.5, max_loops=4), KLDelta(0.05, max_loops=4, scope="token")):
        kept.clear()
        r = nelbo(Counting(), clean, stop=stop, n_samples=3, batch_size=3)
        assert len(kept) == 6 and r.flops == sum(float(run.flops.sum()) for run in kept)
    by_loop = nelbo_by_loop(model, clean, 3, n_samples=2)
    assert by_loop[2].flops == nelbo(model, clean, 3, n_samples=2).flops


def test_a_continuation_is_scored_given_its_prompt(model, clean):
    prompts = [clean[0, :4].tolist(), clean[1, :2].tolist()]
    endings = [clean[0, 4:7].tolist(), clean[1, 2:10].tolist()]
    r = continuation_nelbo(model, prompts, endings, n_loops=2, n_samples=4)
    assert r.lengths.tolist() == [3, 8]
    maskable = torch.zeros(1, 7, dtype=torch.bool)
    maskable[:, 4:] = True
    alone = nelbo(model, clean[:1, :7], 2, n_samples=400, maskable=maskable).per_sequence
    many = continuation_nelbo(model, prompts[:1], endings[:1], n_loops=2, n_samples=400).per_sequence
    same(alone, many)
    with pytest.raises(UsageError, match="empty"):
        continuation_nelbo(model, prompts, [[1], []])
    with pytest.raises(UsageError, match="n_ctx"):
        continuation_nelbo(model, [[1] * 16], [[2]])


@pytest.mark.parametrize("stride", [1, 3, 5])
def test_windows_score_every_token_once_with_the_context_before_it(stride):
    documents = [list(range(12)), [7], list(range(5)), [], list(range(100, 106))]
    windows = sliding_windows(documents, 5, stride)
    for owner, ids in enumerate(documents):
        rows = windows.owners == owner
        scored = windows.tokens[rows][windows.scored[rows]].tolist()
        assert scored == ids
    assert bool((windows.real | ~windows.scored).all())
    assert int((~windows.real).sum()) == 4  # only the short document is padded
    with pytest.raises(UsageError, match="stride 6"):
        sliding_windows(documents, 5, 6)


def test_corpus_perplexity_over_disjoint_windows_is_the_nelbo_of_the_blocks(model, clean):
    blocks = torch.cat([clean, clean.flip(0)], dim=1)[:, :16]
    r = corpus_nelbo(model, blocks.tolist(), n_loops=2, n_samples=2)
    plain = nelbo(model, blocks, 2, n_samples=2)
    same(r.per_sequence, plain.per_sequence)
    assert r.perplexity == pytest.approx(math.exp(plain.mean))
    assert r.bits_per_byte(2.0) == pytest.approx(plain.mean / math.log(2) / 2)
    walking = corpus_nelbo(model, [blocks.flatten().tolist()], stride=4, n_loops=2)
    assert int(walking.lengths.sum()) == 64 and math.isnan(walking.standard_error)  # one document


def test_chunks_change_no_value(model, clean):
    whole = nelbo(model, clean, n_loops=2, n_samples=2)
    parts = nelbo(model, clean, n_loops=2, n_samples=2, batch_size=3)
    same(whole.per_sequence, parts.per_sequence)


def test_a_stopping_rule_reports_its_loops(model, clean):
    r = nelbo(model, clean, stop=StateDelta(float("inf"), max_loops=6), n_samples=2)
    same(r.per_sequence, nelbo(model, clean, n_loops=2, n_samples=2).per_sequence)
    assert r.mean_loops == 2


def test_misuse_is_refused(model, clean):
    with pytest.raises(UsageError, match="not both"):
        nelbo(model, clean, n_loops=2, stop=StateDelta(0.1, max_loops=3))
    with pytest.raises(UsageError, match=r"\[MASK\]"):
        nelbo(model, torch.full_like(clean, 22))
    for tokens in (clean[0], clean[:0]):
        with pytest.raises(UsageError, match="non-empty"):
            nelbo(model, tokens)
    with pytest.raises(UsageError, match="clusters"):
        nelbo(model, clean, n_samples=1, clusters=np.zeros(2))
    with pytest.raises(UsageError, match="n_samples"):
        nelbo(model, clean, n_samples=0)
    for wrong in (-100, 40):
        with pytest.raises(UsageError, match="outside"):
            nelbo(model, torch.full((1, 1), wrong))
    with pytest.raises(UsageError, match="integer tensor"):
        nelbo(model, [[1, 2]])
    with pytest.raises(UsageError, match="non-empty"):
        nelbo_by_loop(model, clean[0], 2)
    with pytest.raises(UsageError, match="estimator"):
        nelbo(model, clean, estimator="exact")


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple, lambda ids: [np.int32(token) for token in ids]])
def test_ids_come_as_lists_arrays_or_tensors(model, clean, kind):
    lists = clean[:2].tolist()
    rows = [kind(ids) for ids in lists]
    same(corpus_nelbo(model, rows, 4, 2).per_sequence, corpus_nelbo(model, lists, 4, 2).per_sequence)
    ends = [ids[:3] for ids in rows]
    found = continuation_nelbo(model, rows, ends, 2).per_sequence
    same(found, continuation_nelbo(model, lists, [ids[:3] for ids in lists], 2).per_sequence)
    same(continuation_nelbo(model, clean[:2], clean[:2, :3].numpy(), 2).per_sequence, found)


WRONG = {
    "texts": ["a"],
    "a text": "ab",
    "bytes": [b"ab"],
    "no rows": [1, 2],
    "one row": torch.arange(3),
    "a number": 3,
    "nothing": None,
    "bools": [[True, False]],
    "floats": [[1.0]],
    "an array of bools": [np.array([True])],
    "a tensor of bools": [torch.tensor([True])],
    "bools in tensors": [[torch.tensor(True)]],
    "an array of floats": np.ones((1, 3)),
    "a tensor of floats": [torch.ones(3)],
    "rows of rows": [[[1]]],
    "a box": torch.ones(1, 2, 2, dtype=torch.long),
    "a scalar": torch.tensor(1),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_no_list_of_ids_is_refused(model, wrong):
    for read, name in (
        (lambda: corpus_nelbo(model, wrong), "documents"),
        (lambda: continuation_nelbo(model, wrong, [[1]]), "prompts"),
        (lambda: continuation_nelbo(model, [[1]], wrong), "continuations"),
    ):
        with pytest.raises(UsageError, match=f"give {name} as lists of token ids, got ") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_masks_are_drawn_where_they_may_be(clean):
    maskable, real = torch.ones_like(clean, dtype=torch.bool), torch.ones_like(clean)
    maskable[:, 0], real[:2, -1] = False, 0
    one = masked_draw(Sequences.of(clean, maskable, real), 22, 3, 1, 2)
    torch.testing.assert_close(draw_masks(clean, 22, maskable, 3, 1, 2, real).tokens, one.tokens, rtol=0, atol=0)
    assert not one.masked[:, 0].any() and not one.masked[:2, -1].any() and one.masked.any(-1).all()
