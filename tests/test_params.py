"""Parameters are checked in the first second, and an error says key, value and way out."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from trl import DPOTrainer

from rlaifv import ROOT
from rlaifv.params import DEFAULT, LOSSES, ParamsError, load_params


def profile(tmp_path: Path, change) -> Path:
    content = YAML(typ="safe", pure=True).load(DEFAULT)
    change(content)
    path = tmp_path / "params.yaml"
    with path.open("w") as stream:
        YAML().dump(content, stream)
    return path


@pytest.mark.parametrize("path", [DEFAULT, *sorted((ROOT / "params").glob("*.yaml"))], ids=lambda p: p.stem)
def test_every_shipped_profile_is_complete_and_valid(path):
    assert load_params(path).seed >= 0


def test_a_small_number_without_a_dot_is_a_number(tmp_path):
    path = tmp_path / "params.yaml"
    written, changed = re.subn(r"(learning_rate:) \S+", r"\1 7e-5", DEFAULT.read_text())
    path.write_text(written)
    assert changed == 1 and load_params(path).train.learning_rate == 7e-5


def test_a_number_read_as_text_is_refused_with_key_value_and_hint(tmp_path):
    path = profile(tmp_path, lambda c: c["train"].update(learning_rate="5e-7"))
    with pytest.raises(ParamsError, match=r"train\.learning_rate: expected a number, got '5e-7'.*quotes"):
        load_params(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["generate"].update(temprature=1.0),
            r"unknown key generate\.temprature; known here: .*temperature",
        ),
        (lambda c: c["generate"].pop("top_k"), r"missing key generate\.top_k"),
        (lambda c: c["generate"].update(temperature=0), r"generate\.temperature: expected a value above 0, got 0"),
        (lambda c: c["generate"].update(samples=True), r"generate\.samples: expected a whole number, got True"),
        (lambda c: c["pairs"].update(balance_length="true"), r"pairs\.balance_length: expected true or false"),
        (lambda c: c["policy"].update(dtype="fp16"), r"policy\.dtype: expected one of float32, .*got 'fp16'"),
        (lambda c: c["iterations"].update({3: {"prev": "2"}}), "names are text"),
        (lambda c: c["iterations"].update({"3": {"prev": "7"}}), r"iterations\.3\.prev: no iteration '7'"),
        (lambda c: c["iterations"].update({"1": {"prev": "2"}}), r"iterations\.1\.prev: '2' is not before '1'"),
        (lambda c: c["train"].update(learning_rate=1.0), r"train\.learning_rate: .* below 1, got 1"),
        (
            lambda c: c["generate"].update(top_p=0.0),
            r"generate\.top_p: .* above 0 and not above 1, got 0",
        ),
        (
            lambda c: c["train"].update(dtype="float16"),
            r"train\.dtype: expected one of float32, bfloat16,",
        ),
        (lambda c: c["train"].update(loss_type=["sigmiod"]), r"train\.loss_type: expected some of sigmoid, .*sigmiod"),
        (lambda c: c["train"].update(loss_type=[]), r"train\.loss_type: expected some of sigmoid"),
        (lambda c: c["train"].update(scheduler="cosin"), r"train\.scheduler: expected one of cosine, .*'cosin'"),
        (lambda c: c["train"].update(warmup_ratio=1.0), r"train\.warmup_ratio: expected a value from 0 to below 1"),
        (lambda c: c["train"].update(micro_batch_size=3), r"params\.yaml: train\.batch_size 8 is not a multiple"),
        (lambda c: c.update(train=None), r"train: expected a section, got None"),
    ],
)
def test_a_wrong_profile_is_refused_with_the_key(tmp_path, change, message):
    with pytest.raises(ParamsError, match=message):
        load_params(profile(tmp_path, change))


def test_the_losses_that_are_accepted_are_those_of_trl():
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(LOSSES) == set(re.findall(r'loss_type == "(\w+)"', source))


def test_broken_yaml_is_one_line(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("seed: [1\n")
    with pytest.raises(ParamsError) as error:
        load_params(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_profiles_there_are():
    with pytest.raises(ParamsError, match=r"params/\*\.yaml"):
        load_params("params/nothing.yaml")


def test_a_stage_with_a_wrong_profile_stops_before_a_kernel_starts_and_without_a_traceback(tmp_path):
    path = profile(tmp_path, lambda c: c["train"].update(beta=-1))
    command = [sys.executable, "-m", "rlaifv.run", "10_prepare", f"params_file={path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.strip() == "params.yaml: train.beta: expected a value above 0, got -1"


def test_reading_parameters_imports_nothing_heavy():
    code = "import sys, rlaifv.params; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
