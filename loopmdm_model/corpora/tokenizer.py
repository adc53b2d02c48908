"""Tokenizers: byte-level BPE for text, one token a symbol for tasks; [MASK] always has the last id."""

import base64
import zipfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from loopmdm.model.corpora.fetch import cached_archive, source
from loopmdm.model.errors import UsageError

EOS, PAD, MASK = "[EOS]", "[PAD]", "[MASK]"
GPT2_IDS = 50_258


def reading_text(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, told that text is text: special tokens spelled out in it are read as the letters they are.

    A special token goes in by its id (`token_to_id`), never by its name. A text is read whole, and nothing else.
    """
    tokenizer.encode_special_tokens = True
    return whole_text(tokenizer)


def whole_text(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without padding and truncation, which a tokenizer.json may bring along from another use."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def as_texts(given: object) -> list[str] | None:
    """A text or several as a list, empty if there are none; None for what is no text."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return None
    return list(texts)


def encode_texts(tokenizer: Tokenizer, texts: list[str], framed: bool = True) -> list[list[int]]:
    """Ids of each text, with what the tokenizer puts around it; UsageError where its own pattern gives up."""
    return [encoding.ids for encoding in _encoded(tokenizer, texts, framed)]


def encode_offsets(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    """First and one past the last character of each token; (0, 0) for what the tokenizer puts around a text."""
    return _encoded(tokenizer, [text], True)[0].offsets


def _encoded(tokenizer: Tokenizer, texts: list[str], framed: bool) -> list[Encoding]:
    try:
        return whole_text(tokenizer).encode_batch(texts, add_special_tokens=framed)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the library's, of no class that can be imported
            raise
        raise UsageError(f"the tokenizer fails on this text ({error!s:.80}); mend its tokenizer.json") from None


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of [EOS]; UsageError for a tokenizer of a task, which has none."""
    end = tokenizer.token_to_id(EOS)
    if end is None:
        raise UsageError(
            f"this tokenizer has no {EOS}: it is none of a text corpus; use the corpus it was made for"
        )
    return end


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
    return reading_text(tokenizer)


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's byte-level BPE from the fetched rank table: 50,256 ids, then [EOS] and, last, [MASK]."""
    item = source("gpt2-bpe")
    archive = cached_archive(item)
    if archive is None:
        raise UsageError("GPT-2's tokenizer is not here yet; run `loopmdm data fetch gpt2-bpe`")
    with zipfile.ZipFile(archive) as file:
        lines = file.read(item.member).splitlines()
    ranks = {base64.b64decode(word): int(rank) for word, rank in (line.split() for line in lines)}
    return from_ranks(ranks)


def from_ranks(ranks: dict[bytes, int]) -> Tokenizer:
    """A byte-level BPE from tokens and their ranks; each merge is what lower ranks make of its token."""
    letters = _byte_letters()
    vocabulary = {"".join(letters[byte] for byte in word): rank for word, rank in ranks.items()}
    merges = []
    for word, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        if len(word) > 1:
            left, right = _last_merge(word, ranks, rank)
            merges.append(("".join(letters[byte] for byte in left), "".join(letters[byte] for byte in right)))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, MASK])
    return reading_text(tokenizer)


def _byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + number) for number, byte in enumerate(rest)}


def _last_merge(word: bytes, ranks: dict[bytes, int], limit: int) -> tuple[bytes, bytes]:
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        place = min(range(len(pairs)), key=pairs.__getitem__)
        assert pairs[place] < limit, word
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def digit_tokenizer(n_symbols: int) -> Tokenizer:
    """One token a symbol "1".."n" with ids 0..n-1, then [MASK]."""
    return symbol_tokenizer([str(symbol + 1) for symbol in range(n_symbols)])


def symbol_tokenizer(symbols: Sequence[str]) -> Tokenizer:
    """One token a symbol, each a character, in their order, then [MASK]."""
    vocabulary = {symbol: number for number, symbol in enumerate([*symbols, MASK])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=MASK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens([MASK])
    return reading_text(tokenizer)


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
    if max(tokenizer.get_vocab().values()) >= d_vocab:
        raise UsageError(f"{path} has ids beyond the model's {d_vocab}; copy it again from the run folder")
    return reading_text(tokenizer)
