"""Tokenizers: byte-level BPE for text, one token a digit for Sudoku; [MASK] always has the last id."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from loopmdm_model.errors import UsageError

EOS, PAD, MASK = "[EOS]", "[PAD]", "[MASK]"


def train_bpe(texts: Iterable[str], d_vocab: int) -> Tokenizer:
    """Byte-level BPE with `d_vocab` ids in all: merges first, then [EOS], [PAD] and, last, [MASK]."""
    specials = [EOS, PAD, MASK]
    least = 256 + len(specials)
    if d_vocab < least:
        raise UsageError(
            f"d_vocab must be at least {least} (256 bytes and {len(specials)} specials), got {d_vocab}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab - len(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(specials)
    if tokenizer.get_vocab_size() != d_vocab:
        raise UsageError(
            f"the corpus supports only {tokenizer.get_vocab_size()} tokens; lower d_vocab from {d_vocab}"
        )
    return tokenizer


def digit_tokenizer(n_symbols: int) -> Tokenizer:
    """One token a symbol "1".."n" with ids 0..n-1, then [MASK]."""
    vocabulary = {str(symbol + 1): symbol for symbol in range(n_symbols)} | {MASK: n_symbols}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=MASK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens([MASK])
    return tokenizer


def load_tokenizer(path: Path, d_vocab: int) -> Tokenizer:
    """Read `tokenizer.json` and check that it fits a model with `d_vocab` ids."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"{path} is damaged ({error}); copy it again from the run folder") from error
    if tokenizer.get_vocab_size() != d_vocab or tokenizer.token_to_id(MASK) != d_vocab - 1:
        raise UsageError(
            f"{path} has {tokenizer.get_vocab_size()} tokens with {MASK} at {tokenizer.token_to_id(MASK)}; "
            f"the model needs {d_vocab} with {MASK} last"
        )
    return tokenizer
