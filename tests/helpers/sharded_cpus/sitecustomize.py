"""Lets accelerate spread weights over processes on CPUs, and kills a run where KILLED_BEFORE_STEP says so.

Without it accelerate looks for FSDP and DeepSpeed on GPUs only. Everything else is its own code, over gloo. Python
imports this by itself in each process that has this folder on its PYTHONPATH.
"""

import os
import signal


def shard_on_cpus() -> None:
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def shard(
        self, mixed_precision=None, cpu=False, dynamo_plugin=None, deepspeed_plugin=None, fsdp_plugin=None, **rest
    ):
        new = not AcceleratorState._shared_state
        original(self, mixed_precision, cpu, dynamo_plugin, deepspeed_plugin, fsdp_plugin, **rest)
        if not new:
            return
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
        elif deepspeed_plugin is not None:
            self.distributed_type, self.deepspeed_plugins = DistributedType.DEEPSPEED, deepspeed_plugin
            deepspeed_plugin.set_mixed_precision(mixed_precision)
            deepspeed_plugin.select(_from_accelerator_state=True)
        PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = shard


def die_before(step: int) -> None:
    from rlaifv.training.dpo import Watch

    def die(self, args, state, control, **kwargs):
        if state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Watch.on_step_begin = die


if "RANK" in os.environ:  # a process that trains, not the one that launches it
    shard_on_cpus()
    if "KILLED_BEFORE_STEP" in os.environ:
        die_before(int(os.environ["KILLED_BEFORE_STEP"]))
