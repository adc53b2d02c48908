"""Ship a finished run: fp16 weights into the zoo, evaluated as shipped.

python -m loopmdm_model.training.ship runs/sotu-loop
"""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from loopmdm_model import stats
from loopmdm_model.checkpoints import METRICS, RECORD, TOKENIZER, ZOO, need
from loopmdm_model.data.tokenizer import load_tokenizer
from loopmdm_model.errors import UsageError
from loopmdm_model.evaluation import NGrams, load_test_set, task_of
from loopmdm_model.files import write_json
from loopmdm_model.likelihood import nelbo
from loopmdm_model.model import LoopMDM


def ship(run: Path, target: Path | None = None) -> Path:
    """Copy a finished run as fp16 with its record; the record gains `evaluation` on the test split."""
    record = json.loads(need(run, RECORD).read_text())
    model = LoopMDM.from_pretrained(run)
    home = target or ZOO / str(record["spec"]["name"])
    model.save_pretrained(home, dtype=torch.float16)
    for name in (TOKENIZER, METRICS):
        shutil.copyfile(need(run, name), home / name)
    write_json(home / RECORD, record | {"evaluation": evaluate(home, record)})
    return home


def evaluate(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Test NELBO at S_max in nats per token; for text also bits per byte and n-gram references."""
    model = LoopMDM.from_pretrained(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER, model.cfg.d_vocab)
    task = task_of(record)
    test = load_test_set(task, model.cfg.n_ctx, tokenizer)
    reached = nelbo(model, test.tokens, n_samples=4, maskable=test.maskable, clusters=test.clusters)
    result: dict[str, Any] = {"test_nelbo": reached.mean, "test_nelbo_se": reached.standard_error}
    result |= {"sequences": reached.n, "n_loops": model.cfg.max_loops}
    if not math.isnan(test.bytes_per_token):
        result["bits_per_byte"] = reached.mean / math.log(2) / test.bytes_per_token
        ngrams = NGrams.fit(tokenizer, task)
        for name in ("unigram", "bigram"):
            values = getattr(ngrams, f"{name}_nll")(test.tokens.numpy())
            mean, error, _ = stats.mean_and_error(values, test.clusters)
            result |= {f"{name}_nll": float(mean), f"{name}_nll_se": float(error)}
    return result


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m loopmdm_model.training.ship RUN_FOLDER")
    try:
        print(ship(Path(sys.argv[1])))
    except UsageError as error:
        raise SystemExit(f"error: {error}") from error
