"""What a measure looks at: a model with held-out sequences, masked at a ratio or as a sampler left them.

One measure, three ways in: a batch of one's own in a notebook, the test set at several mask ratios, or the
denoising steps of the model's own samples, where "clean" is what the sampler ended on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.tasks.test_sets import TestSet, load_test_set, task_of


@dataclass(frozen=True)
class Case:
    """A model and `n` test sequences, evenly spread over the test set; `n_loops` is how far it is read."""

    m: HookedLoopMDM
    test: TestSet
    n_loops: int
    n: int
    seed: int = 0

    @classmethod
    def of(cls, name: str, n_loops: int | None = None, n: int = 256, seed: int = 0) -> "Case":
        """A shipped name, run folder or hub id with a train.json."""
        m = HookedLoopMDM.from_pretrained(name)
        test = load_test_set(task_of(m.record), m.cfg.n_ctx, m.tokenizer)
        loops = check_count("n_loops", m.cfg.max_loops if n_loops is None else n_loops)
        return cls(m, test, loops, check_count("n", n), check_count("seed", seed, least=0))

    @cached_property
    def sequences(self) -> Sequences:
        """Clean test sequences."""
        return self.test.sequences.spread(self.n)

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """Their ids."""
        return self.sequences.tokens

    @property
    def maskable(self) -> Bool[Tensor, "batch pos"] | None:
        """What may be masked, if not everything."""
        return self.sequences.maskable

    @property
    def clusters(self) -> np.ndarray | None:
        """Which of them share a document."""
        return self.sequences.clusters

    @property
    def n_units(self) -> int:
        """How many of them are independent: documents or templates where sequences share one."""
        return self.sequences.n_units

    @cached_property
    def validation(self) -> TestSet:
        """Sequences to choose thresholds and fit predictors on."""
        return load_test_set(self.test.task, self.m.cfg.n_ctx, self.m.tokenizer, "validation")

    def masked(self, mask_ratio: float) -> MaskedBatch:
        """The test sequences with an exact share of what may be masked hidden."""
        return mask_tokens(self.sequences, self.m.cfg.mask_token_id, mask_ratio=mask_ratio, seed=self.seed)

    def along_sampling(
        self, steps: int, at: Sequence[int] | None = None, order: str = "random"
    ) -> Iterator[tuple[int, MaskedBatch]]:
        """What the model saw before chosen denoising steps (default: five, evenly spread) of its own samples.

        Positions that are never masked keep the test sequences' tokens. `clean` is what the sampler ended on.
        """
        check_count("steps", steps)
        start = self.masked(1.0)
        result = sample(self.m, clues=start, steps=steps, n_loops=self.n_loops, order=order, seed=self.seed)
        history, last = result.history, result.tokens
        chosen = sorted({int(step) for step in np.linspace(0, len(history) - 2, 5)}) if at is None else at
        for step in chosen:
            if not 0 <= step < len(history) - 1:
                raise UsageError(f"denoising steps run from 0 to {len(history) - 2}, got {step}")
            masked = history[step] == self.m.cfg.mask_token_id
            yield step, MaskedBatch(history[step], last, masked, start.maskable, clusters=start.clusters)
