"""RLAIF-V: align a vision-language model against hallucination with open AI feedback (arXiv 2405.17220)."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # here, for huggingface_hub reads it when it is imported

ROOT = Path(__file__).resolve().parent.parent
"""The repository. Papermill runs in the repository, JupyterLab in the notebook's folder: every path starts here."""
