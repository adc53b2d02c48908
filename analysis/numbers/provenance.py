"""Where a number came from: models by hash, commit, versions, command."""

from typing import Any

from loopmdm.model.network.checkpoints import model_hash, resolve
from loopmdm.model.training.record import commit, versions

PACKAGES = ("torch", "numpy", "pandas", "transformer-lens")
DRAWING = ("matplotlib", "seaborn", "pandas", "numpy")


def model_hashes(models: tuple[str, ...]) -> dict[str, str]:
    """Hash of each model's weights and config."""
    return {name: model_hash(resolve(name)) for name in models}


def of_table(name: str, models: tuple[str, ...], **made_from: Any) -> dict[str, Any]:
    """Provenance kept with a table; `made_from` is what it was made from beside the models."""
    return {
        "table": name,
        "models": model_hashes(models),
        **made_from,
        "commit": commit(),
        "versions": versions(PACKAGES),
        "command": f"loopmdm table {name}",
    }
