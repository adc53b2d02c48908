import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopmdm.model.errors import UsageError
from loopmdm.model.masking import mask_tokens
from loopmdm.model.randomness import row_uniforms


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 16), st.floats(0, 1), st.integers(0, 2**63 - 1))
def test_exact_share_is_exact(length, ratio, seed):
    tokens = torch.arange(length).expand(3, length) % 9
    b = mask_tokens(tokens, 9, mask_ratio=ratio, seed=seed)
    expected = max(round(ratio * length), 1 if ratio else 0)
    assert b.masked.sum(-1).tolist() == [expected] * 3


def test_clues_and_padding_are_never_masked(clean):
    maskable = torch.rand(clean.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    real = torch.ones_like(clean)
    real[:, 8:] = 0
    b = mask_tokens(clean, 22, mask_ratio=1.0, maskable=maskable, attention_mask=real)
    assert torch.equal(b.masked, maskable & (real == 1))
    assert not mask_tokens(clean, 22, t=1.0, maskable=torch.zeros_like(clean)).masked.any()


def test_a_sequence_is_masked_the_same_alone_and_in_a_batch(clean):
    for arguments in ({"mask_ratio": 0.4}, {"t": 0.4}):
        together = mask_tokens(clean, 22, seed=5, **arguments)
        for row in range(len(clean)):
            alone = mask_tokens(clean[row : row + 1], 22, seed=5, first_index=row, **arguments)
            assert torch.equal(alone.tokens[0], together.tokens[row])
    longer = row_uniforms(5, "positions", 4, 50)[:, :10]
    assert torch.equal(longer, row_uniforms(5, "positions", 4, 10))


def test_uniforms_are_uniform_and_differ_by_seed_stream_step_and_row():
    u = row_uniforms(0, "positions", 2000, 8)
    assert abs(float(u.mean()) - 0.5) < 0.01 and abs(float(u.var()) - 1 / 12) < 0.003
    others = [row_uniforms(1, "positions", 1, 8), row_uniforms(0, "counts", 1, 8)]
    others += [row_uniforms(0, "positions", 1, 8, step=1), u[1:2]]
    for other in others:
        assert not torch.equal(u[:1], other)


def test_share_of_independent_masking_follows_t():
    tokens = torch.zeros(4000, 10, dtype=torch.long)
    t = torch.linspace(0, 1, 4000)
    masked = mask_tokens(tokens, 9, t=t).masked.double().mean(-1)
    assert abs(float((masked - t).mean())) < 0.01
    assert masked[0] == 0 and masked[-1] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "exactly one"),
        ({"mask_ratio": 0.5, "t": 0.5}, "exactly one"),
        ({"mask_ratio": 1.5}, "0..1"),
        ({"t": -0.1}, "0..1"),
        ({"mask_ratio": 0.5, "maskable": torch.ones(4, 3, dtype=torch.bool)}, "10 positions"),
        ({"mask_ratio": 0.5, "seed": -1}, "at least 0"),
        ({"mask_ratio": 0.5, "maskable": [True] * 10}, "boolean tensor"),
        ({"mask_ratio": 0.5, "maskable": torch.ones(2, 10, dtype=torch.bool)}, "one a sequence"),
        ({"mask_ratio": "half"}, "must be a number"),
        ({"t": torch.ones(3)}, "one a sequence"),
    ],
)
def test_misuse_is_refused(clean, arguments, says):
    with pytest.raises(UsageError, match=says):
        mask_tokens(clean, 22, **arguments)


def test_masked_input_is_refused(clean):
    with pytest.raises(UsageError, match="already hold"):
        mask_tokens(clean.masked_fill(clean == clean[0, 0], 22), 22, mask_ratio=0.5)


def test_mask_may_have_any_id_but_tokens_are_ids_from_zero_on(clean):
    b = mask_tokens(clean + 5, 3, mask_ratio=0.5)  # other models have [MASK] anywhere
    assert torch.equal(b.tokens == 3, b.masked) and torch.equal(b.clean, clean + 5)
    wrong = ((clean - 100, "negative id -"), (clean > 3, "integer tensor"), (clean.double(), "integer tensor"))
    for tokens, says in wrong:
        with pytest.raises(UsageError, match=says) as caught:
            mask_tokens(tokens, 22, mask_ratio=0.5)
        assert "\n" not in str(caught.value)
