"""Tables of what happens inside: attention between groups, change of the state, maps of one sequence."""

import numpy as np
import pandas as pd
import torch

from loopmdm.analysis.exhibits.tables.science import FIRST, HALF, READ_TO, THREE, asked, main_tasks, measured
from loopmdm.model.masking import mask_tokens
from loopmdm.model.tasks.propagation import propagate
from loopmdm.model.zoo.runs import Zoo, select

MAPPED = select(task="sotu", arm="loop", seed=0)


def mask_attention_table(zoo: Zoo) -> pd.DataFrame:
    """Group masses to S_max and 3 x S_max, heads pooled, of the two main tasks; by head of seed 0 to S_max.

    Every seed, those beyond the first at half masked only.
    """
    rows, first = [], FIRST.of(zoo)
    for run in main_tasks("loop").of(zoo):
        ratios = THREE if run in first else HALF
        for read_to in (1, READ_TO):
            rows.append(asked("mask-attention-pooled", run, read_to * run.s_max, **ratios).answer())
        if run in first:
            rows.append(asked("mask-attention", run, run.s_max, **ratios).answer())
    return pd.concat(rows, ignore_index=True)


def representation_table(zoo: Zoo) -> pd.DataFrame:
    """Loop-wise change of the looped models to 3 x S_max."""
    return measured("representation-change", FIRST, zoo, READ_TO, **THREE)


SOLVER = select(task="sudoku", arm="loop-s4", seed=0)


def example_board_table(zoo: Zoo) -> pd.DataFrame:
    """One board after every loop of the Sudoku model that is taken apart, chosen by rule (`example_board`).

    Of the puzzles with 16 clues that naked singles alone solve.
    """
    from loopmdm.analysis.measures.case import Case
    from loopmdm.analysis.measures.known.boards import board_of, puzzles_of
    from loopmdm.analysis.measures.known.example_board import example_board

    (run,) = SOLVER.of(zoo)
    case = Case.of(run.name)
    b = puzzles_of(case, 16, True)
    b = b.rows(propagate(board_of(b), b.tokens, hidden_singles=False).solved)
    with torch.no_grad():
        return example_board(case.m, b, run.s_max).assign(model=run.name)


def attention_maps_table(zoo: Zoo) -> pd.DataFrame:
    """Maps of one test block of the looped text model, drawn by seed, at its first, middle and last trained loop.

    All heads of the looped layer are kept; the figure shows the one that changes most.
    """
    from loopmdm.analysis.measures.attention.maps import attention_across_loops
    from loopmdm.analysis.measures.case import Case

    (run,) = MAPPED.of(zoo)
    case = Case.of(run.name)
    m, test, most = case.m, case.test, run.s_max
    row = int(torch.randint(len(test.tokens), (1,), generator=torch.Generator().manual_seed(0)))
    tokens = test.tokens[row : row + 1, :32]
    b = mask_tokens(tokens, m.cfg.mask_token_id, mask_ratio=0.5, seed=0)
    with torch.no_grad():
        _, cache = m.run_with_cache(
            b.tokens, n_loops=most, names_filter=lambda hook: hook.endswith("hook_pattern")
        )
    layer, loops = m.cfg.layers("loop")[0], (0, most // 2 - 1, most - 1)
    parts = [attention_across_loops(cache, layer, head, loops).frame() for head in range(m.cfg.n_heads)]
    truth = m.to_str_tokens(b.clean)
    frame = pd.concat(parts, ignore_index=True).assign(model=run.name)
    return frame.assign(query_true=np.array(truth, dtype=object)[frame["query"]])
