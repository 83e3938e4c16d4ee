"""What an iteration leaves is written part by part, read back as one record, and never read as whole when it is not."""

import json

import pytest

from rlaifv.results import FILES, OF_TRAINING, Result, last_line, read_result, read_timings, write_result

PARTS = {
    "dev": [{"checkpoint": "checkpoint-1", "recall": 0.9}],
    "selection": {"checkpoint": "checkpoint-1"},
    "pairs": {"pairs": 3},
    "feedback": {"answers": 12},
    "log": [{"step": 1, "loss": 0.7}],
    "test": {"recall": 0.9},
    "answers": [{"id": "a", "answer": "a dog — «loin»"}],
    "paired_test": {"recall": {"p_value": 0.5}},
    "gallery": [{"id": "a", "claims": []}],
    "benchmarks": {},
}


def test_a_result_is_read_as_it_was_written(tmp_path):
    write_result(tmp_path / "1", **PARTS)
    assert read_result(tmp_path / "1") == Result(**PARTS)
    assert {p.relative_to(tmp_path / "1").as_posix() for p in (tmp_path / "1").rglob("*.*")} == set(FILES.values())


def test_the_base_model_was_not_trained_and_needs_no_selection(tmp_path):
    write_result(tmp_path / "0", **{name: part for name, part in PARTS.items() if name not in OF_TRAINING})
    assert read_result(tmp_path / "0").selection is None and read_result(tmp_path / "0").dev == PARTS["dev"]


def test_a_part_that_is_missing_is_named_with_the_stage_that_writes_it(tmp_path):
    write_result(tmp_path / "1", **{name: part for name, part in PARTS.items() if name != "test"})
    with pytest.raises(FileNotFoundError, match=r"1/test/metrics\.json: the stage that writes test has not run"):
        read_result(tmp_path / "1")
    assert read_result(tmp_path / "1", "dev", "pairs") == Result(dev=PARTS["dev"], pairs=PARTS["pairs"])


def test_every_part_is_the_output_of_one_stage_whose_folder_it_lies_in():
    folders = {path.split("/")[0] for path in FILES.values()}
    assert folders == {"dev", "selection", "test", "benchmarks"} and set(FILES) == set(PARTS)
    assert json.loads(json.dumps(PARTS)) == PARTS


def test_a_run_ends_with_what_became_of_the_base():
    truth = {"base": {"response_hallucination": 0.557, "recall": 0.9998}, "final": {"iteration": 2}}
    truth["final"] |= {"response_hallucination": 0.0015, "recall": 0.9988}
    said = "base → iteration 2, on test: response hallucination 55.7 % → 0.15 %, recall 99.98 % → 99.88 %"
    assert last_line(truth) == said
    claims = {"base": {"response_rejection": 0.4, "accepted_claims": 8.04}, "final": {"iteration": 1}}
    claims["final"] |= {"response_rejection": 0.25, "accepted_claims": 7.5}
    assert last_line(claims).endswith("response rejection 40 % → 25 %, accepted claims 8.04 → 7.5")


def test_what_a_run_took_leaves_out_what_was_run_beside_it(tmp_path):
    for stage in ("world", "test@0", "train@1", "train@3", "rloo@rloo-plain-plain", "self_feedback"):
        (tmp_path / f"{stage}.json").write_text(json.dumps({"stage": stage, "minutes": 1.0}))
    assert [row["stage"] for row in read_timings(tmp_path, ["1", "2"])] == ["test@0", "train@1", "world"]
    assert len(read_timings(tmp_path)) == 6
