"""Ship a finished run: fp16 weights into the zoo, evaluated as shipped."""

import math
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loopmdm.model import means
from loopmdm.model.corpora.tokenizer import load_tokenizer
from loopmdm.model.diffusion.likelihood import nelbo
from loopmdm.model.files import check_target, read_json_lines, write_atomic, write_json
from loopmdm.model.network.checkpoints import (
    CONFIG,
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
from loopmdm.model.tasks.test_sets import NGrams, task_of, test_set_of
from loopmdm.model.training.spec import RunSpec


def ship(run: Path, target: Path | None = None) -> Path:
    """Copy a finished run as fp16 with its record; the record gains `evaluation` on the test split.

    It is evaluated before anything is copied: no weights lie beside the record of others while it is. A break
    between the copies leaves weights that the record beside them refuses.
    """
    record, home = read_record(run), target or ZOO / name_of(run)
    check_target(home / RECORD)
    read_json_lines(need(run, METRICS))
    with tempfile.TemporaryDirectory(prefix="loopmdm-") as folder:
        made = Path(folder)
        LoopMDM.from_pretrained(run).save_pretrained(made, dtype=torch.float16)
        shutil.copyfile(need(run, TOKENIZER), made / TOKENIZER)
        shutil.copyfile(run / METRICS, made / METRICS)
        write_json(made / RECORD, with_hash(made, record) | {EVALUATION: evaluate(made, record)})
        for name in (WEIGHTS, CONFIG, TOKENIZER, METRICS, RECORD):
            write_atomic(home / name, partial(shutil.copyfile, made / name))
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
    test = test_set_of(record, model.cfg.n_ctx, tokenizer)
    reached = nelbo(model, test.sequences, n_samples=4)
    result: dict[str, Any] = {"test_nelbo": reached.mean, "test_nelbo_se": reached.standard_error}
    result |= {"sequences": reached.n, "n_loops": model.cfg.max_loops}
    if not math.isnan(test.bytes_per_token):
        result["bits_per_byte"] = reached.mean / math.log(2) / test.bytes_per_token
        ngrams = NGrams.fit(tokenizer, test.task)
        for name in ("unigram", "bigram"):
            values = getattr(ngrams, f"{name}_nll")(test.tokens.numpy())
            mean, error, _ = means.mean_and_error(values, test.clusters)
            result |= {f"{name}_nll": float(mean), f"{name}_nll_se": float(error)}
    return result
