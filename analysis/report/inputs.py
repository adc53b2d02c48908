"""What the report's explorer looks at: text and unseen grids, by shipped looped models and their base twins."""

import warnings

import torch

from loopmdm.analysis.numbers import place
from loopmdm.analysis.report.data import Run, run_of
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.network.checkpoints import list_models
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from loopmdm.model.tasks.test_sets import test_set_of
from loopmdm.model.zoo.runs import Zoo, select

TEXT = select(task="sotu", arm="loop", seed=0) | select(task="sotu", arm="base", seed=0)
SUDOKU = select(task="sudoku", arm="loop", seed=(0, 3)) | select(task="sudoku", arm="base", seed=0)
MODELS = TEXT | SUDOKU
SENTENCE = "The state of our union is strong, and the people of the United States are at peace."
LONGER = 2
"""Looped models are read to this many times their S_max."""


@torch.no_grad()
def run_model(m: HookedLoopMDM, b: MaskedBatch) -> Run:
    """One run for the explorer; a model that was trained at S = 1 is run at S = 1."""
    n_loops = LONGER * m.cfg.max_loops if m.cfg.max_loops > 1 else 1
    return run_of(m.run_with_cache(b.tokens, n_loops, names_filter=_needed)[1], b)


@torch.no_grad()
def inputs_of(m: HookedLoopMDM, sequences: Sequences, n: int = 3) -> list[tuple[str, list[Run]]]:
    """Titles and runs of a model on `n` of these sequences, half masked."""
    found = []
    for number, (_, row) in enumerate(sequences.spread(n).batches(1)):
        if row.real is not None:  # without what only fills up
            row = row.columns(row.real[0])
        b = mask_tokens(row, m.cfg.mask_token_id, mask_ratio=0.5)
        title = f"sequence {number}: {int(b.masked.sum())} of {b.tokens.shape[1]} tokens masked"
        found.append((title, [run_model(m, b)]))
    return found


def _needed(name: str) -> bool:
    return name.endswith(("hook_pattern", ".hook_out"))


def models_here() -> list[str]:
    """Those of `MODELS` whose weights are here; a warning names the others."""
    here, wanted = list_models(), MODELS.names(Zoo.shipped())
    for name in wanted:
        if name not in here:
            warnings.warn(f"the explorer lacks {name}; `loopmdm models fetch {name}` brings it", stacklevel=2)
    return [name for name in wanted if name in here]


def inputs() -> list[tuple[str, list[Run]]]:
    """Titles, and on each input the run of every model of its task."""
    zoo = Zoo.shipped()
    models = {name: HookedLoopMDM.from_pretrained(name, place.device()) for name in models_here()}
    text = models[zoo.first("sotu").name]
    block = test_set_of(text.record, text.cfg.n_ctx, text.tokenizer).tokens[:1]
    board = BOARDS["sudoku6"]
    grids = board.sample_grids("test", 1)
    shown = (
        ("text: a sentence, 11 of 22 tokens masked", TEXT, text.mask(SENTENCE, 0.5)),
        ("text: unseen speech, 32 of 64 tokens masked", TEXT, text.mask(block, 0.5)),
        ("Sudoku: unseen grid, 16 of 36 cells hidden", SUDOKU, puzzles(board, grids, 20)),
        ("Sudoku: unseen grid, 26 of 36 cells hidden", SUDOKU, puzzles(board, grids, 10)),
    )
    return [
        (title, [run_model(models[name], b) for name in those.names(zoo) if name in models])
        for title, those, b in shown
    ]
