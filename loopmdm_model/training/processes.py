"""The processes of a run: what accelerate makes of the environment, and what of it this trainer can work with."""

import os

from accelerate import Accelerator
from torch import nn

from loopmdm.model.errors import UsageError
from loopmdm.model.network.layers import Attention, Block
from loopmdm.model.network.model import LoopMDM

ENTRIES: dict[type[nn.Module], tuple[str, ...]] = {
    LoopMDM: ("run",),
    Block: ("skip",),
    Attention: ("rows",),
}
"""What is called of a module in place of its forward."""
INSTEAD = "shard with FSDP instead (fsdp_version: 2)"
OTHERS = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}


def accelerator(precision: str) -> Accelerator:
    """Accelerate's object for this process, in `precision` ("": as its configuration says).

    UsageError where the configuration asks for what does not work here, or where the launcher's processes do not
    know of one another: each would take itself for the only one, and all would write the same folder.
    """
    for kind, name in OTHERS.items():
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise UsageError(
                f"accelerate is configured for {name}, which this trainer does not support; {INSTEAD}"
            )
    found = Accelerator(mixed_precision=precision or None)
    _check_number(found.num_processes)
    plugin = getattr(found.state, "fsdp_plugin", None)
    if found.distributed_type.value == "FSDP" and getattr(plugin, "fsdp_version", 2) != 2:
        raise UsageError(
            "accelerate is configured for FSDP version 1, whose flat parameters this trainer does not support; "
            "set fsdp_version: 2"
        )
    return found


def _check_number(here: int) -> None:
    """UsageError if the launcher started another number of processes than work together."""
    told = os.environ.get("WORLD_SIZE", "")
    if told.isdigit() and int(told) != here:
        raise UsageError(
            f"WORLD_SIZE is {told}, but the processes that work together are {here}; on CPUs start them by "
            f"ACCELERATE_USE_CPU=1 torchrun --nproc_per_node {told}, or unset WORLD_SIZE to train in one"
        )


def register_entries(model: nn.Module) -> None:
    """Have FSDP gather a module's parameters before each of its `ENTRIES`, too; nothing where nobody shards."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    for module in model.modules():
        for kind, names in ENTRIES.items():
            for name in names if isinstance(module, kind) else ():
                register_fsdp_forward_method(module, name)
