"""What JupyterLab does when it saves: a stage notebook keeps its cells alone, so that saving it reruns nothing.

DVC runs a stage again when its notebook has other bytes. `make lab` reads this file, as does `jupyter lab` that is
started in this folder. The executed notebooks of a run, outputs and all, are in runs/; those of explore/ keep theirs.
"""

from pathlib import Path

import nbformat

FOLDER = Path(__file__).parent


def keep_cells_alone(model, path, contents_manager, **_):
    """Takes out what running leaves in a stage notebook (outputs, counts, times), before it is written."""
    file = Path(contents_manager.root_dir, path)
    if model["type"] != "notebook" or file.resolve().parent != FOLDER.resolve():
        return
    notebook = model["content"]
    if file.is_file():
        before = nbformat.read(file, nbformat.NO_CONVERT)
        notebook["metadata"], notebook["nbformat_minor"] = before.metadata, before.nbformat_minor
    for cell in notebook["cells"]:
        cell["metadata"] = {"tags": tags} if (tags := cell["metadata"].get("tags")) else {}
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None


c = get_config()  # noqa: F821  Jupyter's
c.FileContentsManager.pre_save_hook = keep_cells_alone
