"""Workarounds of libraries: one function a quirk, with the version it was seen in and what goes wrong without it."""

import contextlib
import os
from collections.abc import Iterator

import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, Trainer
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config


def classes_to_shard(model: PreTrainedModel) -> list[str]:
    """transformers 5.23 also lists classes of parts that this model has not (CLIP's text side) in `_no_split_modules`;
    accelerate 1.15 stops at one that it does not find in an FSDP run."""
    return sorted({type(module).__name__ for module in model.modules()} & set(model._no_split_modules or ()))


def gather_in_bfloat16(trainer: Trainer) -> None:
    """accelerate 1.15's FSDP policy for bfloat16 also rounds log-probs (-120 to 0.5 nats) and sums gradients in
    bfloat16. Here weights alone are in bfloat16 while they compute; `policy.computing` sees to the rest, as it does for
    the reference."""
    trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def adapters_in_float32() -> bool:
    """PEFT 0.21 makes adapters of a bfloat16 base float32, which small steps need. DeepSpeed's ZeRO-3 gathers weights
    of one dtype only and fails in the first step (DeepSpeed issue 8072): there they stay in the base's dtype, and
    DeepSpeed keeps its own float32 copy."""
    return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") != "3"


def checkpoint_activations(model: PreTrainedModel, lora: bool) -> None:
    """transformers 5.23's Trainer turns this on for a PreTrainedModel only, and does not let the inputs of a frozen
    base require gradients (transformers issue 42489). DeepSpeed's ZeRO-3 with LoRA needs the reentrant kind
    (TRL issue 2514), and the other one everywhere else is what PyTorch recommends."""
    if lora:
        model.enable_input_require_grads()
    reentrant = lora and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def keep_4bit_kernels_with_gradients(model: PreTrainedModel) -> None:
    """bitsandbytes (0.49) repacks 4-bit weights on a CPU in the first forward pass without gradients (our check of the
    layout) for a kernel that has none, and training would go on with that kernel."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def whole_models(trainer: Trainer) -> Iterator[None]:
    """transformers 5.23 loads a part of a model in each process once ZeRO-3 is configured, and waits for the others to
    load theirs; they wait for this one to write a checkpoint. Within the block it loads whole models."""
    config = getattr(trainer.args, "hf_deepspeed_config", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)


def one_gpu_a_process(args) -> None:
    """transformers 5.23 trains with `nn.DataParallel` where one process sees several GPUs; a process is one GPU here,
    and more of them are `train.processes`."""
    args._n_gpu = min(args.n_gpu, 1)


def be_quiet() -> None:
    """huggingface_hub 2.4 sends usage statistics and libraries draw progress bars between our log lines."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    transformers.utils.logging.disable_progress_bar()


def shard_on_cpus() -> None:
    """accelerate 1.15 looks for FSDP and DeepSpeed on GPUs only, and trains whole copies on CPUs without a word. This
    makes it spread weights over processes on CPUs too, by gloo: a rehearsal of what GPUs will do."""
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
