"""One process of a training run in tests: `python worker.py SPEC OUT [fsdp] [die=STEP]`.

Accelerate makes no FSDP of a run on CPUs; with `fsdp` its state is told that this is one, before the trainer asks,
and its own path for FSDP version 2 does the rest. With `die` the last process kills itself after that step.
"""

import os
import signal
import sys
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from loopmdm.model.training import processes
from loopmdm.model.training.spec import RunSpec
from loopmdm.model.training.trainer import Trainer


class Sharded(Accelerator):
    """Accelerate's object, told that the run is sharded by block."""

    def __init__(self, **options):
        super().__init__(**options)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
        )
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        self.state.distributed_type, self.state.fsdp_plugin = DistributedType.FSDP, plugin
        PartialState._shared_state["distributed_type"] = (
            DistributedType.FSDP
        )  # each new state object reads it again


def main() -> None:
    spec, out, *words = sys.argv[1:]
    if "fsdp" in words:
        processes.Accelerator = Sharded
    run = Trainer(RunSpec.load(spec), Path(out), resume=True)
    if "fsdp" in words:
        assert isinstance(run.model, FSDPModule) and all(isinstance(b, FSDPModule) for b in run.model.blocks)
    last = int(next((word.partition("=")[2] for word in words if word.startswith("die=")), 0))

    def on_step(progress) -> None:
        if progress.step == last and run.accelerator.process_index == run.accelerator.num_processes - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    run.train(on_step)
    if run.accelerator.is_main_process:
        print(run.accelerator.distributed_type.value, run.accelerator.num_processes)
    if run.accelerator.num_processes > 1:
        run.accelerator.end_training()


if __name__ == "__main__":
    main()
