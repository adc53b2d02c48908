"""Where things lie: the study that comes with the code, and what is fetched or measured."""

import os
from pathlib import Path

import platformdirs

IN_CHECKOUT = Path(__file__).parent.name == "loopmdm_model"
"""Whether this code lies in a checkout; in a wheel it is inside `loopmdm`."""


def figures_folder() -> Path:
    """Claims, roster, specs and tables: figures/ of a checkout, or the copy that a wheel brings."""
    return Path(__file__).parents[1] / "figures"


def cache_folder() -> Path:
    """Where archives, models and evaluations are kept: $LOOPMDM_CACHE, else the user's cache folder."""
    return Path(os.environ.get("LOOPMDM_CACHE") or platformdirs.user_cache_dir("loopmdm")).expanduser()
