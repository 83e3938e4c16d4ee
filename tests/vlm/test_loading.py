"""One model is in memory at a time: where a second one is loaded, the first is gone."""

import gc
import weakref
from functools import partial

import pytest
from PIL import Image
from tiny_llava import save_tiny_llava

from rlaifv.evaluation.claims import judged_claims
from rlaifv.evaluation.hallucination import evaluate_checkpoints
from rlaifv.params import ServerParams, load_params
from rlaifv.records import ModelRecord
from rlaifv.store import Store
from rlaifv.vlm import loading
from rlaifv.vlm.checkpoint import fingerprint_checkpoint
from rlaifv.vlm.loading import load_model, loaded


@pytest.fixture
def alive(monkeypatch) -> list[int]:
    """Filled with how many models are in memory already whenever one is loaded."""
    models, found, load = [], [], loading.load_vlm

    def counted(*args, **kwargs):
        found.append(sum(model() is not None for model in models))
        vlm = load(*args, **kwargs)
        models.append(weakref.ref(vlm.model))
        return vlm

    monkeypatch.setattr(loading, "load_vlm", counted)
    return found


def record(folder) -> ModelRecord:
    return ModelRecord(str(folder), None, "float32", "cpu", fingerprint_checkpoint(str(folder)))


def test_a_model_is_loaded_when_it_is_first_asked_for_and_gone_afterwards(tmp_path, alive):
    model = record(save_tiny_llava(tmp_path))
    with loaded(partial(load_model, model)) as policy:
        assert alive == []
        policy().model.itself = policy().model  # a cycle, as hooks of accelerate and PEFT make them
        assert policy() is policy() and alive == [0]
    with loaded(partial(load_model, model)) as policy:
        assert policy().name == model.path and alive == [0, 0]


def test_a_failure_in_between_leaves_nothing_behind(tmp_path, alive):
    model = record(save_tiny_llava(tmp_path))
    with pytest.raises(ZeroDivisionError), loaded(partial(load_model, model)) as policy:
        _ = 1 / len(policy().name[:0])
    gc.collect()
    with loaded(partial(load_model, model)) as policy:
        policy()
    assert alive == [0, 0]


def test_policy_divider_and_labeler_of_the_stage_test_follow_one_another(tmp_path, alive):
    params, roles = load_params(), [record(save_tiny_llava(tmp_path / name, seed=k)) for k, name in enumerate("pdl")]
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    policy, divider, labeler = roles
    with loaded(partial(load_model, policy)) as model:
        model()
    row = {"image": "a.png", "question": "What is it?", "answer": "A dog."}
    (judged,) = judged_claims(
        divider, labeler, [row], params.divide, 1, tmp_path, "Please answer yes or no.", ServerParams()
    )
    assert judged["answer"] == "A dog." and alive == [0, 0, 0]


def test_checkpoints_are_evaluated_one_after_the_other(tmp_path, alive, monkeypatch):
    monkeypatch.setattr("rlaifv.evaluation.hallucination.ask", lambda policy, *_: ([policy.name], []))
    monkeypatch.setattr("rlaifv.evaluation.hallucination.score", lambda answers, *_: {"name": answers[0]})
    folders = [save_tiny_llava(tmp_path / f"checkpoint-{k}", seed=k) for k in (1, 2)]
    store, out = Store("evaluate", {}, tmp_path / "scratch"), tmp_path / "dev.jsonl"
    rows = evaluate_checkpoints(folders, None, None, "", store, lambda folder: load_model(record(folder)), out)
    assert [row["checkpoint"] for row in rows] == ["checkpoint-1", "checkpoint-2"] and alive == [0, 0]
