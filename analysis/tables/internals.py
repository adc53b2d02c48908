"""Tables of what happens inside: attention between groups, change of the state, maps of one sequence."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from analysis import zoo
from loopmdm_model.data.batches import spread
from loopmdm_model.masking import mask_tokens

LOOPED = ("sotu-loop", "sudoku-loop")
RATIOS = (0.25, 0.5, 0.75)
N_SEQUENCES, READ_TO = 256, 3


def _looped_batches() -> Iterator[tuple]:
    """(model name, model, mask ratio, masked test batch, clusters) for each looped model and ratio."""
    for name in LOOPED:
        m, test = zoo.opened(name)
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
        for n_loops, by_head in (
            (zoo.s_max(name), False),
            (READ_TO * zoo.s_max(name), False),
            (zoo.s_max(name), True),
        ):
            frame = mask_attention(m, b, n_loops, by_head=by_head, clusters=clusters)
            rows.append(frame.assign(model=name, nominal_mask_ratio=ratio))
    return pd.concat(rows, ignore_index=True)


def representation_table() -> pd.DataFrame:
    """Loop-wise change of the looped models to 3 x S_max."""
    from analysis.representation import representation_change

    rows = []
    for name, m, ratio, b, clusters in _looped_batches():
        frame = representation_change(m, b, READ_TO * zoo.s_max(name), clusters=clusters)
        rows.append(frame.assign(model=name, nominal_mask_ratio=ratio))
    return pd.concat(rows, ignore_index=True)


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
