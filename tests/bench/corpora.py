"""Corpora: tokenising a user's own files into the cache, against the tokenizers library itself."""

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from loopmdm.model.corpora import documents
from loopmdm.model.corpora.own_files import prepare
from loopmdm.model.corpora.tokenizer import train_bpe
from tests.bench.common import Row, at_least, ratio


def tokenising() -> Iterator[Row]:
    """Tokens a second through `files:` (read, hashed, encoded, written, sealed), / those of one `encode_batch`."""
    slice_ = [document.text for document in documents.load("sotu-slice")]
    tokenizer = train_bpe(slice_, 4096)
    lines, draw = [line for text in slice_ for line in text.splitlines() if line], random.Random(0)
    texts = ["\n".join(draw.choices(lines, k=200)) for _ in range(60)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, text in enumerate(texts):
            (folder / f"{number}.txt").write_text(text, "utf-8")

        def ours() -> None:
            with (
                tempfile.TemporaryDirectory() as cache,
                mock.patch.dict(os.environ, {"LOOPMDM_CACHE": cache}),
            ):
                prepare(f"files:{folder}", tokenizer)

        rate = ratio(lambda: tokenizer.encode_batch(texts), ours, 7)
    yield at_least("tokens a second through files:, / the tokenizers library's encode_batch", rate, 0.8)
