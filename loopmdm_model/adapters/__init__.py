"""Other people's models as cores: their own blocks, driven by our loop, heard through our taps.

`hook_model` takes a module that is loaded already, `open_model` a name. Nothing is imported before it is asked
for; transformers only where a model of its kind is met. `to_loopmdm` converts what a LoopMDM computes, too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopmdm.model.adapters.convert import to_loopmdm
    from loopmdm.model.adapters.families import FAMILIES, Family
    from loopmdm.model.adapters.open import hook_model, open_model

__all__ = ["FAMILIES", "Family", "hook_model", "open_model", "to_loopmdm"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file = {"hook_model": "open", "open_model": "open", "to_loopmdm": "convert"}.get(name, "families")
    return getattr(import_module(f"loopmdm.model.adapters.{file}"), name)
