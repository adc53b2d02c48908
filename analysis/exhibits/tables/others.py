"""Other people's pretrained models beside ours: attention by layer and loop, and looping what never looped.

Ours are measured on their own test sets, specimens on antibody chains that antiberty sampled: what is compared is
where attention goes, not how well anybody does.
"""

import pandas as pd

from loopmdm.analysis.exhibits.tables.science import HALF, POOLED, asked
from loopmdm.model.zoo.runs import Zoo, select

BESIDE = select(task="sotu", arm=("base", "loop"), seed=0)
"""Our text models, one with and one without loops."""
ASKED = {"mask_ratios": (0.15, 0.5)}
"""As in their training, and half masked."""
BLOCKS = {
    "sapiens-heavy": [(1, 1), (2, 1), (1, 2)],
    "sapiens-light": [(1, 1), (2, 1), (1, 2)],
    "antiberty": [(3, 1), (3, 2)],
}
"""Middle layers to loop, (first, number): of the small ones every block, of the larger one its middle."""
COUNTS = (1, 2, 4)


def attention_table(zoo: Zoo) -> pd.DataFrame:
    """Masked-to-masked and masked-to-clean by layer and loop, half masked; specimens also as in training."""
    from loopmdm.analysis.measures import measure

    ours = [
        asked(POOLED, run, zoo.s_max(run) if run.arm == "loop" else 1, **HALF).answer() for run in BESIDE.of(zoo)
    ]
    theirs = [measure(POOLED, name, **ASKED) for name in BLOCKS]
    return pd.concat([*ours, *theirs], ignore_index=True)


def training_free_table(ours: pd.DataFrame, zoo: Zoo) -> pd.DataFrame:
    """Specimens with middle layers repeated up to four times, one mask a sequence; ours from its table."""
    from loopmdm.analysis.measures import measure

    frames = [ours[ours["model"].isin(BESIDE.names(zoo)) & ours["n_loops"].isin(COUNTS)]]
    for name, blocks in BLOCKS.items():
        frames.append(measure("training-free", name, 1, blocks=blocks, n_samples=1, counts=COUNTS))
    return pd.concat(frames, ignore_index=True)
