"""`train.json`: everything needed to tell how a model was made."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import loopmdm
from loopmdm.model.flops import flops_per_token
from loopmdm.model.places import IN_CHECKOUT
from loopmdm.model.tasks.batches import Dataset, TextData
from loopmdm.model.training import budget
from loopmdm.model.training.spec import RunSpec
from loopmdm.model.training.state import Progress

PACKAGES = ("torch", "numpy", "accelerate", "tokenizers", "safetensors")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions, and Python's."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def commit() -> str:
    """The repository's commit, with "+" if code differs from it; outside a checkout the version."""
    if not IN_CHECKOUT:
        return f"version {loopmdm.__version__}"
    folder = Path(__file__).parent
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "-uno", "--", ":/*.py"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision + ("+" if changes.stdout else "")


def _tokenizer_sample(spec: RunSpec, data: Dataset) -> dict[str, str]:
    """What a BPE of a large corpus was trained on."""
    if spec.data.tokenizer != "bpe" or not isinstance(data, TextData) or data.prepared is None:
        return {}
    return {"tokenizer_sample": data.prepared.tokenizer_sample}


def run_record(spec: RunSpec, progress: Progress, data: Dataset) -> dict[str, Any]:
    """Spec, counts and versions of a finished run; E[S] and FLOPs planned beside realised."""
    planned, cfg = budget.plan(spec), spec.config
    return {
        "spec": spec.to_dict(),
        "seed": spec.seed,
        "corpus_sha256": data.fingerprint,
        **_tokenizer_sample(spec, data),
        "commit": commit(),
        "versions": versions(),
        "steps": {"planned": planned.steps, "realised": progress.step},
        "mean_loops": {"planned": planned.e_s, "realised": progress.loops / max(1, progress.step)},
        "training_flops": {"planned": planned.flops, "realised": progress.flops},
        "tokens": progress.tokens,
        "epoch_tokens": data.epoch_tokens,
        "flops_per_token_s1": flops_per_token(cfg, spec.data.length, 1),
        "flops_per_token_s_max": flops_per_token(cfg, spec.data.length, cfg.max_loops),
        "seconds": round(progress.seconds, 1),
        "threads": spec.training.threads,
    }
