"""The SmolLM2-135M judge: a small causal language model that scores what our models write.

Generative perplexity is exp of the judge's nats per token of its own. A judge likes repetition, so the number
means something only beside a measure of diversity. It is a 4-bit file (Apache-2.0) and not GPT-2: numbers do not
compare with published ones.
"""

import contextlib
import io
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopmdm.model.batching import size_of_batches
from loopmdm.model.corpora.fetch import cached_archive, source
from loopmdm.model.errors import UsageError
from loopmdm.model.files import write_atomic
from loopmdm.model.places import cache_folder

NAME = "SmolLM2-135M judge"
START = "<|endoftext|>"


@cache
def load_judge() -> tuple[Any, Any]:
    """(model, tokenizer) out of the fetched archive; the weights are unpacked to 32 bits."""
    item = source("judge")
    archive = cached_archive(item)
    if archive is None:
        raise UsageError("the judge is not here yet; run `loopmdm data fetch judge`")
    try:
        import gguf  # noqa: F401 - transformers reads the file with it
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise UsageError("the judge needs gguf; run pip install 'loopmdm[judge]'") from error
    path = cache_folder() / f"judge-{item.sha256[:16]}" / Path(item.member).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(archive) as file:
            write_atomic(path, lambda temporary: temporary.write_bytes(file.read(item.member)))
    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar of its own
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    return model.eval(), tokenizer


@torch.no_grad()
def judge_nats(
    texts: list[str], model: Any = None, tokenizer: Any = None, batch_size: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Nats of each text under the judge and its number of judge tokens, both [text].

    The first token is predicted from the judge's end-of-text token. Any causal model and tokenizer of
    transformers can take the judge's place.
    """
    if model is None:
        model, tokenizer = load_judge()
    start = tokenizer.convert_tokens_to_ids(START)
    rows = [[start, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    nats, lengths = np.zeros(len(rows)), np.array([len(row) - 1 for row in rows])
    order = np.argsort(lengths)
    size = size_of_batches(batch_size)
    for first in range(0, len(rows), size):
        picked = order[first : first + size]
        longest = max(len(rows[i]) for i in picked)
        place = next(model.parameters()).device
        ids = torch.tensor([rows[i] + [start] * (longest - len(rows[i])) for i in picked], device=place)
        lots = torch.tensor([len(rows[i]) for i in picked], device=place)
        real = torch.arange(longest, device=place)[None] < lots[:, None]
        log_probs = model(ids, attention_mask=real.long()).logits[:, :-1].float().log_softmax(-1)
        taken = log_probs.gather(-1, ids[:, 1:, None])[..., 0] * real[:, 1:]
        nats[picked] = -taken.sum(-1).double().cpu().numpy()
    return nats, lengths
