"""See inside looped and masked-diffusion language models.

    import loopmdm as lm
    m = lm.open_model("sudoku-loop")

`loopmdm.model` holds the models and all that makes and runs one, `loopmdm.analysis` the measures, exhibits and
commands. Their public names stand here, too, and are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loopmdm.folders import find_beside

find_beside(__file__)

if TYPE_CHECKING:
    from loopmdm.analysis import *  # noqa: F403
    from loopmdm.model import *  # noqa: F403

__version__ = "0.2.0"

PARTS = ("model", "analysis")


def __getattr__(name: str) -> Any:
    if name in PARTS:
        return import_module(f"loopmdm.{name}")
    for part in () if name.startswith("__") else PARTS:
        home = import_module(f"loopmdm.{part}")
        if name in home.__all__:
            return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    names = {name for part in PARTS for name in import_module(f"loopmdm.{part}").__all__}
    return sorted({*globals(), *PARTS, *names} - {"Any", "TYPE_CHECKING", "find_beside", "import_module", "PARTS"})
