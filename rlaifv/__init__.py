"""RLAIF-V: align a vision-language model against hallucination with open AI feedback (arXiv 2405.17220)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository. Papermill runs in the repository, JupyterLab in the notebook's folder: every path starts here."""
