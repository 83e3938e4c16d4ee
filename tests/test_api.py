"""The examples of docs/api.md run, in order, as they stand there."""

import json
import re
import subprocess
import sys

import pytest
from tiny_llava import save_pairs

import rlaifv
from rlaifv import ROOT
from rlaifv.tinyworld.scenes import make_scene, render

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)


def test_importing_the_package_imports_nothing_heavy():
    program = "import sys, rlaifv; print([m for m in ('torch', 'numpy', 'pydantic', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_examples_of_the_page_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    render(make_scene(7, 0), 7).save("photo.png")
    (tmp_path / "objects.json").write_text(json.dumps({"photo": ["cat"]}))
    save_pairs(tmp_path / "pairs.parquet", 8)
    names, said = {}, []
    for example in EXAMPLES:
        exec(example, names)
        said.append(capsys.readouterr().out)
    assert len(EXAMPLES) == 5 and all(said)
    assert all(question.endswith("?") for _, question in names["claims"])
    cat, dog = ([line.split()[0] for line in said[1].splitlines() if name in line] for name in ("cat", "dog"))
    assert set(cat) == {"accepted"} and "rejected" in dog, "the scene has the cat alone"
    assert said[2].startswith("1.0 1.0 []"), "a dog that is not there, the cat that is"
    assert names["result"].pairs == 8 and names["answer"] == said[4].strip() != ""


def test_what_cannot_be_done_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a parquet file, a folder of them, or owner/name of the hub"):
        rlaifv.train("models/tiny/policy", tmp_path / "none.parquet", tmp_path)
    with pytest.raises(ValueError, match=r"train: unknown key beat; known here: .*beta"):
        rlaifv.train("models/tiny/policy", tmp_path / "none.parquet", tmp_path, beat=0.1)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        rlaifv.divide("no/such/model", "Describe.", "A dog.")
