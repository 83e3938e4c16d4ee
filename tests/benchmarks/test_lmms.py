"""Results of lmms-eval are read, lost ability is named, and exported answers come back unchanged."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaifv.benchmarks import lmms
from rlaifv.evaluation.answers import Answer, to_answers


def write(path, **tasks):
    path.write_text(json.dumps({"results": tasks, "config": {}}))
    return path


def test_numbers_of_a_result_file_are_read_and_the_rest_is_left(tmp_path):
    path = write(
        tmp_path / "results.json",
        mmstar={"alias": "mmstar", "average,none": 0.33, "average_stderr,none": "N/A"},
        llava_in_the_wild={"gpt_eval_llava_all,none": 58.9, "gpt_eval_llava_all_stderr,none": 1.5},
        group={"alias": "group"},
    )
    assert lmms.read_results(path).numbers == {
        "mmstar": {"average": 0.33},
        "llava_in_the_wild": {"gpt_eval_llava_all": 58.9, "gpt_eval_llava_all_stderr": 1.5},
    }
    assert lmms.read_results(tmp_path) == lmms.read_results(path)


def test_a_loss_beyond_the_tolerance_is_named_and_its_certainty_given():
    base = {"a": {"acc": 0.50, "acc_stderr": 0.01}, "b": {"score": 60.0}}
    aligned = {"a": {"acc": 0.45, "acc_stderr": 0.01}, "b": {"score": 59.5}, "c": {"acc": 1.0}}
    lost, kept = lmms.guard(lmms.Results(base), lmms.Results(aligned))
    assert (lost.task, lost.lost, lost.certain) == ("a", True, True)
    assert lost.change == pytest.approx(-0.05)
    assert (kept.task, kept.lost, kept.certain) == ("b", False, None)


def test_a_number_of_which_less_is_better_is_lost_when_it_rises(tmp_path):
    """`higher_is_better` of the file decides; where it says nothing, more is better."""
    files = []
    for name, errors, accuracy in (("base", 0.2, 0.5), ("aligned", 0.3, 0.6)):
        path = write(tmp_path / f"{name}.json", hall={"errors,none": errors, "acc,none": accuracy, "other,none": 1})
        content = json.loads(path.read_text())
        path.write_text(
            json.dumps({**content, "higher_is_better": {"hall": {"errors": False, "acc": True, "other": None}}})
        )
        files.append(lmms.read_results(path))
    assert [(a.metric, a.lost) for a in lmms.guard(*files)] == [("errors", True), ("acc", False), ("other", False)]
    assert [(a.metric, a.lost) for a in lmms.guard(*files[::-1])] == [
        ("errors", False),
        ("acc", True),
        ("other", False),
    ]


def test_the_standard_error_that_was_computed_is_taken(tmp_path):
    values = {"acc,none": 0.5, "acc_stderr,none": "N/A", "acc_stderr_clt,none": 0.01, "acc,strict": 0.5}
    files = [
        lmms.read_results(write(tmp_path / "a.json", a=values)),
        lmms.read_results(write(tmp_path / "b.json", a={**values, "acc,none": 0.45, "acc,strict": 0.45})),
    ]
    assert [(a.metric, a.certain) for a in lmms.guard(*files)] == [("acc", True), ("acc,strict", None)]


def test_the_share_of_yes_is_no_ability():
    base, aligned = ({"pope": {"pope_yes_ratio": ratio, "pope_accuracy": 0.8}} for ratio in (0.5, 0.3))
    assert [a.metric for a in lmms.guard(lmms.Results(base), lmms.Results(aligned))] == ["pope_accuracy"]


def test_the_guard_fails_a_run_that_lost_ability(tmp_path, capsys):
    base = write(tmp_path / "base.json", mmstar={"average,none": 0.34})
    aligned = write(tmp_path / "aligned.json", mmstar={"average,none": 0.30})
    with pytest.raises(SystemExit, match="1 of 1 abilities lost"):
        lmms.main(["guard", "--base", str(base), "--aligned", str(aligned), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["lost"] == ["mmstar average"]
    lmms.main(["guard", "--base", str(base), "--aligned", str(base)])


@pytest.mark.parametrize("content", ["[]", "no json", '{"other": 1}'])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="no result file of lmms-eval"):
        lmms.read_results(path)


def test_results_without_a_common_benchmark_are_refused():
    with pytest.raises(ValueError, match="no benchmark in common: a against b"):
        lmms.guard(lmms.Results({"a": {"acc": 1.0}}), lmms.Results({"b": {"acc": 1.0}}))


@given(st.lists(st.text(max_size=40).map(str.strip), max_size=5))
def test_exported_answers_come_back_unchanged(texts):
    answers = [Answer(f"q{i}", text, "Describe.", f"{i}.jpg") for i, text in enumerate(texts)]
    back, bad = to_answers(json.loads(json.dumps(lmms.sample_rows(answers, "task"))))
    assert not bad
    keep = [(a.id, a.text.removeprefix("Assistant:").strip(), a.question, a.image) for a in answers]
    assert [(b.id, b.text, b.question, b.image) for b in back] == keep


@pytest.mark.parametrize("text", ['{"results": [1]}', '{"results": 3}', "[]", "junk"])
def test_a_file_that_is_no_result_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is no result file"):
        lmms.read_results(path)
