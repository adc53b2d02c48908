"""The tables behind the figures: name -> models, columns, and how to measure it.

Everything is measured on the shipped models and on the test split; masks and puzzles are drawn
by seed. Committed tables lie in figures/tables; a missing one is measured again.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from analysis import frames, provenance
from loopmdm_model import stats
from loopmdm_model.checkpoints import METRICS, RECORD, ZOO, resolve
from loopmdm_model.data.batches import spread
from loopmdm_model.data.puzzles import puzzles
from loopmdm_model.data.sudoku import BOARDS
from loopmdm_model.errors import unknown_name
from loopmdm_model.evaluation import load_test_set, solve_one_shot, task_of
from loopmdm_model.flops import flops_per_token
from loopmdm_model.likelihood import nelbo_by_loop
from loopmdm_model.masking import mask_tokens

LOOPED, BASE = ("sotu-loop", "sudoku-loop"), ("sotu-base", "sudoku-base")
MODELS = ("sotu-base", "sotu-loop", "sudoku-base", "sudoku-loop")
RATIOS = (0.25, 0.5, 0.75)
N_SEQUENCES, READ_TO, CLUES = 256, 3, 20


@dataclass(frozen=True)
class Table:
    """One table: `compute` gives a tidy frame with at least `columns`, from `models`."""

    name: str
    models: tuple[str, ...]
    columns: tuple[str, ...]
    compute: Callable[[], pd.DataFrame]

    def measure(self, folder: Path) -> pd.DataFrame:
        """Compute and write it, then read it back as everyone else will."""
        path = folder / f"{self.name}.parquet"
        frames.write_table(self.compute(), path, provenance.of_table(self.name, self.models))
        return self.read(folder)

    def read(self, folder: Path) -> pd.DataFrame:
        """The stored table."""
        return frames.read_table(folder / f"{self.name}.parquet", self.columns)


def figures_folder() -> Path:
    """The repository's figures folder, or ./figures outside a checkout."""
    beside = Path(__file__).parents[1] / "figures"
    return beside if beside.is_dir() else Path("figures")


def tables_folder() -> Path:
    """Where tables are kept."""
    return figures_folder() / "tables"


def table(name: str) -> Table:
    """A table of the registry."""
    if name not in TABLES:
        raise unknown_name("table", name, TABLES)
    return TABLES[name]


def load(name: str) -> pd.DataFrame:
    """The committed table, measured from the shipped models if it is missing."""
    item, folder = table(name), tables_folder()
    if not (folder / f"{name}.parquet").exists():
        return item.measure(folder)
    frame = item.read(folder)
    if frame.attrs["models"] != provenance.model_hashes(item.models):
        warnings.warn(
            f"table {name} is of other weights than those shipped; run `loopmdm table {name}`", stacklevel=2
        )
    return frame


# --- what is measured ---


def _open(name: str):
    """The hooked model, its test set, and n_loops up to which it is read."""
    from loopmdm_model.hooked import HookedLoopMDM

    m = HookedLoopMDM.from_pretrained(name)
    return m, load_test_set(task_of(m.record), m.cfg.n_ctx, m.tokenizer)


def s_max(name: str) -> int:
    """S_max of the model's looped twin: the loop axis a pair of models shares."""
    twin = name.replace("-base", "-loop")
    return json.loads((resolve(twin) / RECORD).read_text())["spec"]["model"]["max_loops"]


def _looped_batches() -> Iterator[tuple]:
    """(model name, model, mask ratio, masked test batch, clusters) for each looped model and ratio."""
    for name in LOOPED:
        m, test = _open(name)
        tokens, clusters = spread(test.tokens, N_SEQUENCES), None
        if test.clusters is not None:
            clusters = spread(torch.from_numpy(test.clusters), N_SEQUENCES).numpy()
        for ratio in RATIOS:
            b = mask_tokens(tokens, m.cfg.mask_token_id, mask_ratio=ratio, seed=0)
            yield name, m, ratio, b, clusters


def mask_attention_table() -> pd.DataFrame:
    """Group masses of the looped models to 3 x S_max, pooled over heads and by head."""
    from analysis.attention import mask_attention

    rows = []
    for name, m, ratio, b, clusters in _looped_batches():
        for n_loops, by_head in ((s_max(name), False), (READ_TO * s_max(name), False), (s_max(name), True)):
            frame = mask_attention(m, b, n_loops, by_head=by_head, clusters=clusters)
            rows.append(frame.assign(model=name, nominal_mask_ratio=ratio))
    return pd.concat(rows, ignore_index=True)


def representation_table() -> pd.DataFrame:
    """Loop-wise change of the looped models to 3 x S_max."""
    from analysis.representation import representation_change

    rows = []
    for name, m, ratio, b, clusters in _looped_batches():
        frame = representation_change(m, b, READ_TO * s_max(name), clusters=clusters)
        rows.append(frame.assign(model=name, nominal_mask_ratio=ratio))
    return pd.concat(rows, ignore_index=True)


def nll_table() -> pd.DataFrame:
    """Test NELBO at every S to 3 x S_max for all four models.

    Differences are paired by sequence and mask: `change_from_s1` from the model's own S = 1,
    `change_from_base` from its non-looped twin at S = 1 (same tokenizer, seed and masks).
    """
    rows, base = [], {}
    for name in MODELS:
        m, test = _open(name)
        results = nelbo_by_loop(m.model, test.tokens, READ_TO * s_max(name), n_samples=2)
        values = np.stack([result.per_sequence.numpy() for result in results], axis=1)
        nll, error, n = stats.mean_and_error(values, test.clusters)
        change, change_error, _ = stats.mean_and_error(values - values[:, :1], test.clusters)
        frame = pd.DataFrame({"n_loops": np.arange(1, len(results) + 1), "nll": nll, "standard_error": error})
        frame["change_from_s1"], frame["change_standard_error"] = change, change_error
        twin = base.setdefault(test.task, values[:, :1])
        against, against_error, _ = stats.mean_and_error(values - twin, test.clusters)
        frame["change_from_base"], frame["change_from_base_se"] = against, against_error
        frame["n"] = n
        frame["n_clusters"] = n if test.clusters is None else len(np.unique(test.clusters))
        frame["flops_per_token"] = [flops_per_token(m.cfg, m.cfg.n_ctx, s) for s in frame["n_loops"]]
        rows.append(frame.assign(model=name, task=test.task, max_loops=m.cfg.max_loops, s_max=s_max(name)))
    return pd.concat(rows, ignore_index=True)


def solve_rate_table() -> pd.DataFrame:
    """One-shot solve rate of 6x6 Sudoku with 16 of 36 cells hidden, at every S to 3 x S_max."""
    rows = []
    for name in ("sudoku-base", "sudoku-loop"):
        m, test = _open(name)
        board = BOARDS[test.task]
        b = puzzles(board, test.tokens, CLUES)
        solved = solve_one_shot(m.model, board, b, READ_TO * s_max(name))
        for n_loops, outcome in enumerate(solved, start=1):
            low, high = stats.wilson(int(outcome.sum()), len(outcome))
            rows.append((name, n_loops, s_max(name), float(outcome.float().mean()), low, high, len(outcome)))
    return pd.DataFrame(rows, columns=["model", "n_loops", "s_max", "solve_rate", "low", "high", "n"])


def attention_maps_table() -> pd.DataFrame:
    """Maps of one test block of sotu-loop, drawn by seed, at its first, middle and last trained loop.

    All heads of the looped layer are kept; the figure shows the one that changes most.
    """
    from analysis.maps import attention_across_loops

    name = "sotu-loop"
    m, test = _open(name)
    row = int(torch.randint(len(test.tokens), (1,), generator=torch.Generator().manual_seed(0)))
    tokens = test.tokens[row : row + 1, :32]
    b = mask_tokens(tokens, m.cfg.mask_token_id, mask_ratio=0.5, seed=0)
    with torch.no_grad():
        _, cache = m.run_with_cache(
            b.tokens, n_loops=s_max(name), names_filter=lambda hook: hook.endswith("hook_pattern")
        )
    layer, loops = m.cfg.layers("loop")[0], (0, s_max(name) // 2 - 1, s_max(name) - 1)
    parts = [attention_across_loops(cache, layer, head, loops).frame() for head in range(m.cfg.n_heads)]
    truth = m.to_str_tokens(b.clean)
    frame = pd.concat(parts, ignore_index=True).assign(model=name)
    return frame.assign(query_true=np.array(truth, dtype=object)[frame["query"]])


def learning_curves_table() -> pd.DataFrame:
    """Validation NELBO of EMA weights against training FLOPs, at S = 1 and S_max."""
    rows = []
    for name in MODELS:
        metrics = [json.loads(line) for line in (ZOO / name / METRICS).read_text().splitlines()]
        for row in metrics:
            for s in (1, s_max(name)):
                if f"validation_nelbo_{s}" in row:
                    value, error = row[f"validation_nelbo_{s}"], row[f"validation_nelbo_{s}_se"]
                    rows.append((name, row["step"], row["flops"], row["tokens"], s, value, error))
    columns = ["model", "step", "flops", "tokens", "n_loops", "nelbo", "standard_error"]
    return pd.DataFrame(rows, columns=columns)


def references_table() -> pd.DataFrame:
    """Unigram and bigram test NLL (nats per token) on the blocks that the text models are tested on."""
    records = {name: json.loads((resolve(name) / RECORD).read_text()) for name in ("sotu-base", "sotu-loop")}
    rows = [
        (task_of(record), kind, record["evaluation"][f"{kind}_nll"], record["evaluation"][f"{kind}_nll_se"])
        for record in records.values()
        for kind in ("unigram", "bigram")
    ]
    return pd.DataFrame(rows, columns=["task", "reference", "nll", "standard_error"]).drop_duplicates()


TABLES = {
    item.name: item
    for item in (
        Table("mask-attention", LOOPED, ("model", "loop", "mass", "log_odds"), mask_attention_table),
        Table("representation-change", LOOPED, ("model", "loop", "metric", "value"), representation_table),
        Table("nll-by-loops", MODELS, ("model", "n_loops", "nll", "standard_error"), nll_table),
        Table("sudoku-solve-rate", MODELS[2:], ("model", "n_loops", "solve_rate"), solve_rate_table),
        Table("attention-maps", ("sotu-loop",), ("loop", "head", "query", "key"), attention_maps_table),
        Table("learning-curves", MODELS, ("model", "flops", "nelbo"), learning_curves_table),
        Table("references", MODELS[:2], ("task", "reference", "nll"), references_table),
    )
}
