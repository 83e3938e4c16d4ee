"""A stage is what dvc.yaml says: it reads what is declared there, and its unfinished work is known by the same list."""

import json
import shutil

import pytest
import torch

import rlaifv.fingerprint
import rlaifv.stage
from rlaifv import ROOT
from rlaifv.evaluation.outcome import describe_inputs
from rlaifv.fingerprint import stage_sources, stages
from rlaifv.records import ModelRecord, to_json, write_atomic
from rlaifv.stage import Stage, UndeclaredParameter
from rlaifv.vlm.loading import load_model


def test_an_iteration_that_starts_from_another_than_the_profile_says_is_refused():
    with pytest.raises(ValueError, match=r"iteration 2 of params\.yaml starts from prev=1, not '0'"):
        Stage("generate", "params.yaml", 2, 0)
    assert Stage("generate", "params.yaml", "2", "1").prev_paths.iteration == "1"


def test_a_policy_that_the_iteration_before_has_not_selected_yet_is_named_with_the_way_out():
    record = ModelRecord("models/tiny/policy", None, "float32", "cpu", "0")
    absent = Stage("generate", "params.yaml", "2", "1").paths.folder.with_name("absent") / "policy"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint data/iterations/absent/policy yet: .*dvc repro"):
        load_model(record, absent)


def test_a_checkpoint_that_changed_since_the_stage_models_looked_at_it_is_not_used():
    with pytest.raises(ValueError, match=r"models/tiny/policy has changed .* run `dvc repro -f models`"):
        load_model(ModelRecord("models/tiny/policy", None, "float32", "cpu", "0123456789abcdef"))


def test_a_parameter_that_dvc_yaml_does_not_declare_for_the_stage_cannot_be_read():
    params = Stage("generate", "params.yaml", "1", "0").params
    assert params.generate.samples == 10 and params.prepare.per_iteration > 0 and params.seed > 0
    with pytest.raises(UndeclaredParameter, match=r"stage generate reads select: add it to .* dvc\.yaml"):
        _ = params.select
    with pytest.raises(UndeclaredParameter, match=r"stage generate reads prepare\.dev"):
        _ = params.prepare.dev
    with pytest.raises(AttributeError, match="nonsense"):
        _ = params.generate.nonsense


def test_the_report_declares_the_settings_that_it_shows():
    settings = describe_inputs(Stage("report", "params.yaml").params, {})["settings"]
    assert settings["train.beta"] > 0 and settings["world.test"] > 0


def test_a_stage_that_no_dvc_yaml_has_is_named():
    with pytest.raises(KeyError, match=r"no stage 'generat' in dvc\.yaml"):
        Stage("generat", "params.yaml")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the code and the pipeline that keys are read from."""
    shutil.copytree(ROOT / "rlaifv", tmp_path / "rlaifv", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for module in (rlaifv.fingerprint, rlaifv.stage):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(rlaifv.stage, "SCRATCH", tmp_path / "scratch")
    stages.cache_clear()
    yield tmp_path
    stages.cache_clear()


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("vlm/chat_format.py", {"generate", "divide", "feedback", "train", "evaluate", "test", "benchmarks"}),
        ("inference/sampling.py", {"generate", "divide", "feedback", "train", "evaluate", "test", "benchmarks"}),
        ("training/dpo.py", {"train"}),
        ("steps/divide.py", {"divide", "evaluate", "test"}),
    ],
)
def test_a_changed_file_changes_the_keys_of_the_stages_that_use_its_room_and_no_others(checkout, file, changed):
    names = ("generate", "divide", "feedback", "pairs", "train", "evaluate", "select", "test", "benchmarks")
    before = {name: stage_sources(name) for name in names}
    path = checkout / "rlaifv" / file
    path.write_text(path.read_text() + "\n# another line\n")
    assert {name for name in names if stage_sources(name) != before[name]} == changed


def test_what_python_leaves_in_a_room_changes_no_key(checkout):
    before = stage_sources("generate")
    cache = checkout / "rlaifv" / "vlm" / "__pycache__"
    cache.mkdir()
    (cache / "images.pyc").write_bytes(b"x")
    assert stage_sources("generate") == before


def test_unfinished_work_is_known_by_the_models_dtype_by_the_data_and_by_the_declared_parameters(checkout):
    record = ModelRecord("models/tiny/labeler", None, "float32", "auto", "0")
    labeler, claims = checkout / "data/models/labeler.json", checkout / "data/iterations/1/claims/claims.jsonl"
    write_atomic(labeler, to_json(record))
    write_atomic(claims, "{}\n")
    (checkout / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    stage = Stage("feedback", str(checkout / "params.yaml"), "1", "0")
    keys = [stage.key()]
    write_atomic(labeler, to_json(record).replace("float32", "bfloat16"))
    keys.append(stage.key())
    write_atomic(claims, '{"a": 1}\n')
    keys.append(stage.key())
    changed = (ROOT / "params.yaml").read_text().replace("yes or no.", "yes or no!")
    (checkout / "params.yaml").write_text(changed)
    keys.append(Stage("feedback", str(checkout / "params.yaml"), "1", "0").key())
    assert len({str(key) for key in keys}) == 4
    (checkout / "params.yaml").write_text(changed.replace("concurrency: 16", "concurrency: 3"))
    assert Stage("feedback", str(checkout / "params.yaml"), "1", "0").server.concurrency == 3
    keys.append(keys[-1])  # how a server is asked changes no answer
    assert Stage("feedback", str(checkout / "params.yaml"), "1", "0").key() == keys[-1]


def test_a_stage_notes_the_most_that_it_or_a_process_of_its_own_held_of_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rlaifv.stage, "RUNS", tmp_path)
    stage = Stage("train", "params.yaml", "1", "0")

    def noted(**of_others) -> dict:
        stage.finish(**of_others)
        return json.loads((tmp_path / "timings" / "train@1.json").read_text())

    assert "peak_gpu_gb" not in noted()
    assert noted(peak_gpu_gb=31.25)["peak_gpu_gb"] == 31.25 and "31.25 GB on a GPU" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: (60 + device) * 2**30)
    assert noted(peak_gpu_gb=31.25)["peak_gpu_gb"] == 61.0
