"""The word problems: their split, soundness and sequences; a small pool stands in for the training pool."""

import builtins
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch

from loopmdm.model.corpora import documents as corpora
from loopmdm.model.corpora.tokenizer import EOS, digit_tokenizer, train_bpe
from loopmdm.model.diffusion.likelihood import nelbo
from loopmdm.model.errors import UsageError
from loopmdm.model.tasks import batches, gsm
from loopmdm.model.tasks.test_sets import load_test_set
from tests.conftest import toy_model

LENGTH, D_VOCAB = 256, 600


@pytest.fixture(scope="module")
def pool() -> tuple[gsm.Problem, ...]:
    return tuple(gsm.problems("train", 400))


@pytest.fixture(scope="module")
def tokenizer(pool):
    return train_bpe((f"{p.question}\n{p.answer}" for p in pool), D_VOCAB)


@pytest.fixture
def small(monkeypatch, pool):
    monkeypatch.setattr(gsm, "_pool", lambda: pool)
    monkeypatch.setattr(gsm, "HELD_OUT_SIZE", 60)


def test_templates_are_those_that_reasoning_gym_draws_from():
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

    assert tuple(tasks_ok) == gsm.TEMPLATES and len(gsm.TEMPLATES) == 85


def test_the_split_is_by_template_and_fixed_for_ever():
    parts = {split: gsm.templates(split) for split in corpora.SPLITS}
    assert parts["test"] == (5, 39, 40, 41, 42, 56, 57, 58, 62, 64, 66, 89)
    assert parts["validation"] == (29, 33, 60, 85, 88, 93)
    assert sorted(sum(parts.values(), ())) == list(gsm.TEMPLATES)
    with pytest.raises(UsageError, match="unknown split"):
        gsm.templates("dev")  # pyright: ignore[reportArgumentType]
    for split in corpora.SPLITS:
        assert {p.template for p in gsm.problems(split, 200)} == set(parts[split])


def test_problems_are_distinct_and_a_function_of_the_seed():
    many = gsm.problems("test", 150, seed=3)
    assert gsm.problems("test", 40, seed=3) == many[:40]
    assert gsm.problems("test", 40, seed=4) != many[:40]
    assert len({p.question for p in many}) == 150
    # Neighbouring seeds of reasoning_gym share their random numbers; ours share nothing but chance.
    assert len({p.question for p in many} & {p.question for p in gsm.problems("test", 150, seed=4)}) < 5
    with pytest.raises(UsageError, match="n must be at least 1"):
        gsm.problems("test", 0)


def test_running_out_of_distinct_problems_is_an_error(monkeypatch):
    one = gsm.draw(5, 0, 0)
    monkeypatch.setattr(gsm, "draw", lambda template, seed, index: one)
    with pytest.raises(UsageError, match="no more than 1 distinct"):
        gsm.problems("test", 2)


def test_every_problem_is_a_plain_question_with_a_sound_answer(pool):
    for problem in pool:
        assert "Give the result" not in problem.question and "####" not in problem.question
        assert gsm.final_number(problem.answer) == problem.number and float(problem.number) >= 0
        assert gsm.false_step(problem.answer) is None
        assert "0.666" not in problem.question + problem.answer


def test_unsound_draws_are_left_out():
    rounded = [p for p in (gsm.draw(2, 0, index) for index in range(40)) if not gsm.is_sound(p)]
    assert rounded and all(gsm.false_step(p.answer) for p in rounded)
    sound = gsm.Problem(0, "How many are 3 and 4?", "3 + 4 = 7\n#### 7", "7")
    assert gsm.is_sound(sound)
    assert not gsm.is_sound(gsm.Problem(0, "What is 0.6666666666666666 of 3?", sound.answer, "7"))
    assert not gsm.is_sound(gsm.Problem(0, sound.question, "3 - 4 = 7\n#### 7", "7"))
    assert not gsm.is_sound(gsm.Problem(0, sound.question, "How old?\n#### -1", "-1"))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("so 0.66*80 = 52 students", "0.66*80 = 52"),
        ("They cost £2 + £2.50 = £5.", "£2 + £2.50 = £5"),
        ("2 jars * 3 muffins/jar - 1 = 6 muffins", "2 jars * 3 muffins/jar - 1 = 6"),
        ("18 / 24 = 0 pans", "18 / 24 = 0"),
        ("half is 5/0 = 1", "5/0 = 1"),
        ("so 50% * 50% = 25%, and 350 puppies / 1400 puppies * 100% = 25%", None),
        ("10÷1/2=20 minutes; 252 pages x 2/3 = 168 pages", None),
        ("$720,000 x 1/100 = $7,200 for the fees", None),
        ("13/52 = 1/4 miles per minute", None),
        ("2(13+8) = 42 and 1+2(22)=45.0", None),
    ],
)
def test_a_step_that_does_not_hold_is_found(text, wrong):
    assert gsm.false_step(text) == wrong


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 12", "12"),
        ("1 + 1 = 2\n#### $1,200.0", "1200"),
        ("#### 12.", "12"),
        ("#### 3.50 dollars", "3.5"),
        ("#### 1\n#### 2", "2"),
        ("####-4", "-4"),
        ("#### -$4", "-4"),
        ("#### 0", "0"),
        ("#### 400", "400"),
        ("no mark 12", None),
        ("#### about 12", None),
        ("#### 1\n####", None),
        ("", None),
    ],
)
def test_final_numbers_are_normalised(text, number):
    assert gsm.final_number(text) == number


def test_a_sequence_is_question_end_answer_and_ends(pool, tokenizer):
    end = tokenizer.token_to_id(EOS)
    tokens, kept = gsm.fit(tokenizer, pool, LENGTH)
    assert tokens.shape == (len(kept), LENGTH) and 0 < len(kept) < len(pool)
    for row, problem in zip(tokens.tolist(), kept, strict=True):
        prompt = gsm.prompt_ids(tokenizer, problem.question)
        assert row[: len(prompt)] == prompt and prompt.index(end) == len(prompt) - 1
        answer, ends = row[len(prompt) : row.index(end, len(prompt))], row[row.index(end, len(prompt)) :]
        assert tokenizer.decode(answer) == problem.answer
        assert ends and set(ends) == {end}


def test_only_problems_that_fit_with_their_end_are_kept(pool, tokenizer):
    sizes = {
        p.question: len(tokenizer.encode(p.question).ids) + len(tokenizer.encode(p.answer).ids) + 2 for p in pool
    }
    for length in (min(sizes.values()), LENGTH):
        _, kept = gsm.fit(tokenizer, pool, length)
        assert [p for p in pool if sizes[p.question] <= length] == kept
    with pytest.raises(UsageError, match="fits into"):
        gsm.fit(tokenizer, pool, min(sizes.values()) - 1)
    with pytest.raises(UsageError, match=r"tokenizer has no \[EOS\]"):
        gsm.fit(digit_tokenizer(6), pool, LENGTH)


def test_the_answer_and_the_ends_are_predicted_the_question_is_condition(tokenizer):
    end = tokenizer.token_to_id(EOS)
    tokens = torch.tensor([[1, 2, end, 3, end, end], [1, end, end, end, end, end]])
    expected = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()
    assert torch.equal(gsm.after_question(tokens, tokenizer), expected)


def test_gsm_is_a_data_set(small, tokenizer):
    one, two, other = (batches.dataset(gsm.NAME, LENGTH, D_VOCAB, seed, tokenizer) for seed in (3, 3, 4))
    assert isinstance(one, batches.Dataset) and isinstance(one, gsm.GSMData) and one.length == LENGTH
    assert torch.equal(one.batch(7, 4), two.batch(7, 4)) and one.batch(7, 4).shape == (4, LENGTH)
    assert not torch.equal(one.batch(7, 4), one.batch(8, 4))
    assert not torch.equal(one.batch(7, 4), other.batch(7, 4))
    assert one.fingerprint == other.fingerprint and "(29, 33, 60, 85, 88, 93)" in one.fingerprint
    assert one.n_skipped == 400 - len(one.train) > 0
    rows = {tuple(row) for row in one.train.tolist()}
    assert all(tuple(row) in rows for row in one.batch(0, 20).tolist())
    assert torch.equal(one.maskable(one.train), gsm.after_question(one.train, tokenizer))


def test_the_fingerprint_names_version_and_texts(small, tokenizer, pool, monkeypatch):
    before = gsm.GSMData(0, tokenizer).fingerprint
    assert f"reasoning-gym {version('reasoning-gym')};" in before
    monkeypatch.setattr(gsm, "_pool", lambda: pool[:-1])
    assert gsm.GSMData(0, tokenizer).fingerprint != before


def test_evaluation_problems_are_fixed_and_of_their_split(small, tokenizer):
    data = gsm.GSMData(0, tokenizer, LENGTH)
    for split in ("validation", "test"):
        whole = data.evaluation(split)
        assert torch.equal(gsm.GSMData(9, tokenizer, LENGTH).evaluation(split, 10), whole[:10])
        questions = {p.question for p in gsm.problems(split, 60)}
        end = tokenizer.token_to_id(EOS)
        assert all(tokenizer.decode(row[: row.index(end)]) in questions for row in whole.tolist())
    assert not torch.equal(data.evaluation("validation", 4), data.evaluation("test", 4))


def test_the_pool_is_of_training_templates(monkeypatch):
    monkeypatch.setattr(gsm, "POOL_SIZE", 100)
    drawn = gsm._pool.__wrapped__()
    assert len(drawn) == 100 and {p.template for p in drawn} <= set(gsm.templates("train"))


def test_a_tokenizer_is_trained_on_the_pool_unless_given(small, tokenizer):
    data = batches.dataset(gsm.NAME, LENGTH, D_VOCAB, 0)
    assert data.tokenizer.to_str() == tokenizer.to_str()


def test_the_test_set_has_its_own_maskable_positions_and_templates(small, tokenizer):
    test = load_test_set(gsm.NAME, LENGTH, tokenizer)
    assert torch.equal(test.tokens, gsm.GSMData(0, tokenizer, LENGTH).evaluation("test"))
    assert test.maskable is not None and test.clusters is not None and np.isnan(test.bytes_per_token)
    assert torch.equal(test.maskable, gsm.after_question(test.tokens, tokenizer))
    assert set(test.clusters) <= set(gsm.templates("test")) and len(test.clusters) == len(test.tokens)
    model = toy_model(d_vocab=D_VOCAB, n_ctx=LENGTH)
    result = nelbo(model, test.tokens[:8], 1, n_samples=1, maskable=test.maskable[:8], clusters=test.clusters[:8])
    assert torch.equal(torch.as_tensor(result.lengths).long(), test.maskable[:8].sum(-1))


def test_near_misses_of_the_name_are_offered():
    assert batches.check_name(gsm.NAME) == gsm.NAME
    with pytest.raises(UsageError, match="gsm-symbolic"):
        batches.check_name("gsm-symbol")


def test_without_reasoning_gym_the_remedy_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name == "reasoning_gym":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    gsm._generators.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"pip install 'loopmdm\[math\]'"):
        gsm.problems("test", 1)


def test_importing_the_corpus_does_not_import_the_generator():
    code = "import sys, loopmdm.model.tasks.batches; assert 'reasoning_gym' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
