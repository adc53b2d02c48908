"""Which edition of a measure made a number: its version, and the lists it goes by.

A changed measure must not pass off old numbers as its own. Its author raises `version`; where what it gives
depends on a list that others may lengthen, such as the stopping rules that are tried, the list itself counts.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Edition:
    """What all registered measures have: `goes_by()` gives what the outcome depends on beside the code."""

    version: int = 1
    goes_by: Callable[[], Any] | None = None

    @property
    def fingerprint(self) -> str:
        """The version, and a digest of what it goes by: "1", "1:0f3a52c8"."""
        if self.goes_by is None:
            return str(self.version)
        return f"{self.version}:{hashlib.sha256(repr(self.goes_by()).encode()).hexdigest()[:8]}"
