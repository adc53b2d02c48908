"""Where a measure's model and sequences come from: ours or somebody else's, a test set or one's own texts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopmdm.analysis.numbers import place
from loopmdm.model.adapters import open_model
from loopmdm.model.corpora import antibodies
from loopmdm.model.corpora.documents import Split
from loopmdm.model.corpora.texts import read_text
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.doors import floating
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.tasks.test_sets import TestSet, task_of, test_set_of, text_set


@dataclass(frozen=True)
class Access:
    """Where and how a model is opened and run; `text`: a file with a sequence a line, for want of a test set.

    `device` is the CPU unless tables are made on another (`place`). How many sequences run at a time is no part of
    it: `batching.at_a_time`.

    `revision` and `trust_remote_code` concern models of the hub, `changes` the record of somebody else's model
    (`hook_model`), such as mask_token_id=103 or loop=(1, 2).
    """

    device: str = field(default_factory=place.device)
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    text: Path | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    def open(self, name: Path | str) -> HookedLoopMDM:
        """The model; UsageError for a device or dtype that does not exist."""
        dtype = None if self.dtype is None else floating(self.dtype)
        return open_model(name, self.device, dtype, self.revision, self.trust_remote_code, **dict(self.changes))

    def test_set(self, m: HookedLoopMDM, split: Split = "test", n: int | None = None) -> TestSet:
        """One's own texts if there are any, else what the model's record names; `n` as of `load_test_set`."""
        if m.model.device.type == "meta":
            raise UsageError(f"{m.model_name} has no weights on the meta device; take another --device")
        if self.text is not None:
            if not self.text.is_file():
                raise UsageError(f"{self.text} is no file; --text takes a UTF-8 file with a sequence a line")
            lines = [line.strip() for line in read_text(self.text).splitlines()]
            found = text_set(self.text.name, [line for line in lines if line], m, split)
        elif "spec" not in m.record:
            raise UsageError(f"{m.model_name} has no test set of its own; give --text FILE, a sequence a line")
        elif task_of(m.record) in antibodies.LENGTHS:
            task = task_of(m.record)
            found = text_set(task, antibodies.chains(task), m, split)
        else:
            found = test_set_of(m.record, m.cfg.n_ctx, m.tokenizer, split, n)
        return found.to(m.model.device)
