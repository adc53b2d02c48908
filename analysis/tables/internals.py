"""Tables of what happens inside: attention between groups, change of the state, maps of one sequence."""

import numpy as np
import pandas as pd
import torch

from analysis import zoo
from analysis.tables.science import LOOPED, READ_TO, main_tasks, measured
from loopmdm_model.masking import mask_tokens

RATIOS = (0.25, 0.5, 0.75)


def mask_attention_table() -> pd.DataFrame:
    """Group masses to S_max and 3 x S_max, heads pooled, of the two main tasks; by head of seed 0 to S_max.

    Every seed, those beyond the first at half masked only.
    """
    rows = []
    for name in main_tasks("loop"):
        ratios = RATIOS if name in LOOPED else RATIOS[1:2]
        for read_to in (1, READ_TO):
            rows.append(measured("mask-attention-pooled", (name,), ratios, read_to=read_to))
        if name in LOOPED:
            rows.append(measured("mask-attention", (name,), ratios))
    return pd.concat(rows, ignore_index=True)


def representation_table() -> pd.DataFrame:
    """Loop-wise change of the looped models to 3 x S_max."""
    return measured("representation-change", LOOPED, RATIOS, read_to=READ_TO)


def attention_maps_table() -> pd.DataFrame:
    """Maps of one test block of sotu-loop, drawn by seed, at its first, middle and last trained loop.

    All heads of the looped layer are kept; the figure shows the one that changes most.
    """
    from analysis.attention.maps import attention_across_loops

    name = "sotu-loop"
    m, test = zoo.opened(name)
    row = int(torch.randint(len(test.tokens), (1,), generator=torch.Generator().manual_seed(0)))
    tokens = test.tokens[row : row + 1, :32]
    b = mask_tokens(tokens, m.cfg.mask_token_id, mask_ratio=0.5, seed=0)
    with torch.no_grad():
        _, cache = m.run_with_cache(
            b.tokens, n_loops=zoo.s_max(name), names_filter=lambda hook: hook.endswith("hook_pattern")
        )
    layer, loops = m.cfg.layers("loop")[0], (0, zoo.s_max(name) // 2 - 1, zoo.s_max(name) - 1)
    parts = [attention_across_loops(cache, layer, head, loops).frame() for head in range(m.cfg.n_heads)]
    truth = m.to_str_tokens(b.clean)
    frame = pd.concat(parts, ignore_index=True).assign(model=name)
    return frame.assign(query_true=np.array(truth, dtype=object)[frame["query"]])
