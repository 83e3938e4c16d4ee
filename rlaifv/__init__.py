"""RLAIF-V: align a vision-language model against hallucination with open AI feedback (arXiv 2405.17220).

What people want in three lines each (docs/api.md); nothing heavy is imported before one of them is called:

    import rlaifv

    claims = rlaifv.divide("Qwen/Qwen2.5-7B-Instruct", "Describe the image.", "A dog lies on a red sofa.")
    rlaifv.judge("Qwen/Qwen3-VL-8B-Instruct", "photo.jpg", [question for _, question in claims])
    rlaifv.score("answers.jsonl", ["instances_val2014.json", "captions_val2014.json"]).metrics["chair_s"]
    rlaifv.best_of_n("aligned", "base", "photo.jpg", "What is in the picture?", n=8)
    rlaifv.train("models/base", "pairs.parquet", "aligned", lora_r=64, learning_rate=1e-5)
"""

import marshal
import os
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # here, for huggingface_hub reads it when it is imported

# where a disk fills up, Python before 3.14 leaves half a .pyc behind, and its module cannot be imported any more
for _file in Path(__file__).parent.rglob(f"*.{sys.implementation.cache_tag}.pyc"):
    with suppress(OSError):  # of somebody else, or gone meanwhile
        try:
            marshal.loads(_file.read_bytes()[16:])  # after the header
        except (EOFError, ValueError, TypeError):
            _file.unlink()

ROOT = Path(__file__).resolve().parent.parent
"""The repository. Papermill runs in the repository, JupyterLab in the notebook's folder: every path starts here."""

OFFERED = ("load", "divide", "judge", "score", "best_of_n", "train")


def __getattr__(name: str) -> Any:
    if name in OFFERED:
        return getattr(import_module("rlaifv.chat.api"), name)
    raise AttributeError(f"module 'rlaifv' has no attribute {name!r}; it offers {', '.join(OFFERED)}")
