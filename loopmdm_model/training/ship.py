"""Ship a finished run: fp16 weights into the zoo, evaluated as shipped."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from loopmdm.model import means
from loopmdm.model.corpora.tokenizer import load_tokenizer
from loopmdm.model.diffusion.likelihood import nelbo
from loopmdm.model.files import read_json_lines, write_json
from loopmdm.model.network.checkpoints import (
    EVALUATION,
    METRICS,
    RECORD,
    TOKENIZER,
    WEIGHTS,
    ZOO,
    need,
    read_record,
    with_hash,
)
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.tasks.test_sets import NGrams, load_test_set, task_of
from loopmdm.model.training.spec import RunSpec


def ship(run: Path, target: Path | None = None) -> Path:
    """Copy a finished run as fp16 with its record; the record gains `evaluation` on the test split."""
    record, home = read_record(run), target or ZOO / name_of(run)
    need(run, TOKENIZER)  # before anything is written
    read_json_lines(need(run, METRICS))
    model = LoopMDM.from_pretrained(run)
    model.save_pretrained(home, dtype=torch.float16)
    for name in (TOKENIZER, METRICS):
        shutil.copyfile(need(run, name), home / name)
    write_json(home / RECORD, with_hash(home, record) | {EVALUATION: evaluate(home, record)})
    return home


def name_of(run: Path) -> str:
    """The name that a run's record gives it, a plain word; UsageError if it gives none."""
    record = read_record(run)
    task_of(record)  # there is a spec
    return RunSpec.from_dict(record["spec"], f"{run / RECORD} [spec]").name


def forget_weights(folder: Path) -> None:
    """Keep a shipped run as a record only: its weights go, their hash stays."""
    record = read_record(folder)
    write_json(folder / RECORD, with_hash(folder, record))
    (folder / WEIGHTS).unlink()


def evaluate(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Test NELBO at S_max in nats per token; for text also bits per byte and n-gram references."""
    model = LoopMDM.from_pretrained(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER, model.cfg.d_vocab)
    task = task_of(record)
    test = load_test_set(task, model.cfg.n_ctx, tokenizer)
    reached = nelbo(model, test.sequences, n_samples=4)
    result: dict[str, Any] = {"test_nelbo": reached.mean, "test_nelbo_se": reached.standard_error}
    result |= {"sequences": reached.n, "n_loops": model.cfg.max_loops}
    if not math.isnan(test.bytes_per_token):
        result["bits_per_byte"] = reached.mean / math.log(2) / test.bytes_per_token
        ngrams = NGrams.fit(tokenizer, task)
        for name in ("unigram", "bigram"):
            values = getattr(ngrams, f"{name}_nll")(test.tokens.numpy())
            mean, error, _ = means.mean_and_error(values, test.clusters)
            result |= {f"{name}_nll": float(mean), f"{name}_nll_se": float(error)}
    return result
