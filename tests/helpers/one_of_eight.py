"""What one of eight processes needs of main memory until its first step, in bytes, and in which dtypes it would train.

    accelerate launch --config_file params/accelerate/fsdp2.yaml --num_processes 1 one_of_eight.py FOLDER

FOLDER holds `model` and `pairs.parquet`. The other seven do not exist: what they would send is made up.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from rlaifv.params import TrainParams
from rlaifv.training import dpo, job


def memory(name: str) -> int:
    """Bytes of main memory of this process: `VmRSS` now, `VmHWM` at most until now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def report(trainer, args, state, control, model, **kwargs) -> None:
    weights = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    policy = model._get_fsdp_state()._fsdp_param_group.mp_policy
    dtypes = {"kept": next(model.parameters()).dtype, "computed": policy.param_dtype, "summed": policy.reduce_dtype}
    names = {key: str(dtype).removeprefix("torch.") for key, dtype in dtypes.items()}
    print(json.dumps({"most": memory("VmHWM") - before, "weights": weights, **names}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    os.environ["WORLD_SIZE"] = "8"
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    dpo.Watch.on_step_begin = report
    params = TrainParams(dtype="bfloat16", processes=8, gradient_checkpointing=True)
    (folder / "run").mkdir()
    paths = {"policy": str(folder / "model"), "pairs": str(folder / "pairs.parquet"), "run": str(folder / "run")}
    before = memory("VmRSS")
    job.run_job({**paths, "params": dataclasses.asdict(params), "seed": 0, "made_of": {}, "dev": None})
