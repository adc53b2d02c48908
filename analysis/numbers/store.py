"""What was measured, kept by what was asked: the model, the question, and the edition of the measure.

Models of which only the record is kept have no weights to measure again: what was measured before they went lies
beside the record, and is found there first.
"""

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from loopmdm.analysis.numbers import frames, place
from loopmdm.analysis.numbers.parallel import one_thread
from loopmdm.model.errors import UsageError
from loopmdm.model.network.checkpoints import model_hash, resolve
from loopmdm.model.places import cache_folder

EVALUATIONS = "evaluations"
"""The folder of this name in the cache, and beside the record of a run."""


@dataclass(frozen=True)
class Key:
    """Asked of a `model` (hash of weights and config): `question` (plain JSON) to a `measure` with its edition."""

    model: str
    question: list[Any]
    measure: str

    @classmethod
    def of(cls, model: str, measure: str, question: list[Any]) -> "Key":
        """A question to a measure (name and edition) about a shipped name, run folder or hub id."""
        return cls(model_hash(resolve(model)), question, measure)

    def __str__(self) -> str:
        """Equal for equal questions: tuples are lists, keys are in order."""
        return json.dumps([self.model, self.question, self.measure], sort_keys=True)

    @property
    def file(self) -> str:
        """Name of the entry."""
        return f"{hashlib.sha256(str(self).encode()).hexdigest()[:24]}.parquet"


@dataclass(frozen=True)
class Store:
    """Frames by key in the folder `root`; what is not there is taken over from `others` before it is computed."""

    root: Path
    others: tuple[Path, ...] = ()

    @classmethod
    def of(cls, model: str) -> "Store":
        """The cache, and what is kept beside the model."""
        return cls(cache_folder() / EVALUATIONS, (resolve(model) / EVALUATIONS,))

    @classmethod
    def beside(cls, model: str) -> "Store":
        """What is kept beside the model, taken over from the cache."""
        return cls(resolve(model) / EVALUATIONS, (cache_folder() / EVALUATIONS,))

    def get(self, key: Key, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The frame of a key, computed if there is none; afterwards it is in `root`."""
        path = self.root / key.file
        if _believed(path, key) is None:
            found = (_believed(folder / key.file, key) for folder in self.others)
            frame = next((frame for frame in found if frame is not None), None)
            if frame is None:
                with one_thread():
                    frame = compute()
            frames.write_table(frame, path, {"asked": str(key)})
        return frames.read_table(path)

    def __contains__(self, key: Key) -> bool:
        return (self.root / key.file).is_file()


def _believed(path: Path, key: Key) -> pd.DataFrame | None:
    """The entry if it is whole and answers `key`; None if it is missing, or, with a warning, if it is neither."""
    if not path.is_file():
        return None
    try:
        frame = frames.read_table(path)
    except UsageError:
        warnings.warn(f"{path} is damaged; it is measured again", stacklevel=3)
        return None
    if frame.attrs.get("asked") != str(key):
        warnings.warn(f"{path} answers another question than its name says; it is measured again", stacklevel=3)
        return None
    return frame


@dataclass(frozen=True)
class Question:
    """What a `measure` (name and edition) is `asked` (plain JSON) about a model, and how that is answered."""

    model: str
    measure: str
    asked: list[Any]
    compute: Callable[[], pd.DataFrame]

    @property
    def key(self) -> Key:
        """Of the model and the measure as they are now, and of the device that models run on."""
        return Key.of(self.model, self.measure, [*self.asked, *filter(None, [place.told()])])

    def answer(self, store: Store | None = None) -> pd.DataFrame:
        """From the store (default: the model's) if nothing changed."""
        return (store or Store.of(self.model)).get(self.key, self.compute)
