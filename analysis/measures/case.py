"""What a measure looks at: a model with held-out sequences, masked at a ratio or as a sampler left them.

One measure, three ways in: a batch of one's own in a notebook, the test set at several mask ratios, or the
denoising steps of the model's own samples, where "clean" is what the sampler ended on.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopmdm.analysis.measures.access import Access
from loopmdm.analysis.measures.options import ByLoops, OnMasks, OnTests, Options
from loopmdm.model.corpora.tokenizer import MASK
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.sequences import MaskedBatch, Sequences, Share
from loopmdm.model.tasks.test_sets import TestSet


@dataclass(frozen=True)
class Case:
    """A model and sequences of its test set, evenly spread, read and masked as the `options` of a measure say.

    With a `shard` it holds that part of the sequences only.
    """

    m: HookedLoopMDM
    test: TestSet
    options: Options = field(default_factory=OnTests)
    access: Access = field(default_factory=Access)
    shard: Share | None = None

    @classmethod
    def of(
        cls,
        model: str | HookedLoopMDM,
        n_loops: int | None = None,
        n: int = 256,
        seed: int = 0,
        options: Options | None = None,
        access: Access | None = None,
        shard: Share | None = None,
    ) -> "Case":
        """Any model that `open_model` knows, or a loaded one, with its test set or the texts of `access`."""
        access = access or Access()
        m = access.open(model) if isinstance(model, str | Path) else model
        options = options or OnTests(n_loops, n, seed)
        wanted = getattr(options, "n", None)
        case = cls(m, access.test_set(m, n=wanted), options, access, shard)
        if wanted != getattr(type(options), "n", None):
            case._warn_of_few(wanted)
        return case

    def _warn_of_few(self, wanted: int) -> None:
        """Where more is asked for than there is."""
        found = len(self.test.tokens)
        if found < wanted:
            what = f"{self.m.model_name}: its test set has {found} sequences, not {wanted}; all of them are taken"
            warnings.warn(what, stacklevel=4)

    def share(self, sequences: Sequences) -> Sequences:
        """What a shard has of some sequences; all of them in a case of its own."""
        return sequences if self.shard is None else self.shard.take(sequences)

    @property
    def ours(self) -> bool:
        """Whether it is a LoopMDM on its own test set."""
        return isinstance(self.m.model, LoopMDM) and self.access.text is None

    @property
    def n_loops(self) -> int:
        """How far the model is read: as the options say, by default to S_max."""
        return max(self.counts)

    @property
    def counts(self) -> list[int]:
        """The loop counts at which it is read."""
        given, most = getattr(self.options, "n_loops", None), self.m.cfg.max_loops
        if isinstance(self.options, ByLoops):
            return list(given or sorted({1, most}))
        return [given or most]

    @property
    def n(self) -> int:
        """How many test sequences there are at most."""
        return getattr(self.options, "n", len(self.test.tokens))

    @property
    def seed(self) -> int:
        """Of masks and samples."""
        return getattr(self.options, "seed", 0)

    @classmethod
    def given(cls, m: HookedLoopMDM, b: MaskedBatch, options: Options) -> "Case":
        """A model and a batch of one's own."""
        return cls(m, TestSet("batch", b.sequences), options)

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.m.tokenizer

    def need_text(self, by: str) -> None:
        """UsageError, said by the measure `by`, unless the model reads text."""
        known = self.tokenizer
        if known is None or known.get_vocab_size() < 256 or known.token_to_id(MASK) is None:
            raise UsageError(f"the model of {self.test.task} is no text model; {by} needs one")

    @cached_property
    def sequences(self) -> Sequences:
        """Clean test sequences."""
        return self.share(self.test.sequences.spread(self.n))

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
        return self.access.test_set(self.m, "validation")

    def masked(self, mask_ratio: float) -> MaskedBatch:
        """The test sequences with an exact share of what may be masked hidden."""
        return mask_tokens(self.sequences, self.m.cfg.mask_token_id, mask_ratio=mask_ratio, seed=self.seed)

    @property
    def most_masked(self) -> float:
        """The largest share of masked positions that it is read at."""
        asked = self.options if isinstance(self.options, OnMasks) else OnMasks()
        return 1.0 if asked.along_sampling else max(asked.mask_ratios)

    def batches(self) -> Iterator[tuple[str, float, MaskedBatch]]:
        """What `OnMasks` asks for: column and value that tell the batches apart, and each batch."""
        asked = self.options if isinstance(self.options, OnMasks) else OnMasks()
        if asked.along_sampling:
            yield from (("step", step, b) for step, b in self.along_sampling(asked.along_sampling))
        else:
            yield from (("nominal_mask_ratio", ratio, self.masked(ratio)) for ratio in asked.mask_ratios)

    def unmasked(self, sequences: Sequences | None = None) -> MaskedBatch:
        """The test sequences, or others, as they are."""
        s = self.sequences if sequences is None else sequences
        return MaskedBatch(
            s.tokens, s.tokens, torch.zeros_like(s.allowed), s.maskable, s.real, s.clusters, s.place
        )

    def asked(self, mask_ratio: float, sequences: Sequences | None = None) -> MaskedBatch:
        """Sequences (default: the test's) as a read-out is asked of them: masked as by `masked`.

        Of a model without masked positions, as they are.
        """
        if not self.m.facts.grouped:
            return self.unmasked(sequences)
        s = self.sequences if sequences is None else sequences
        return mask_tokens(s, self.m.cfg.mask_token_id, mask_ratio=mask_ratio, seed=self.seed)

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
