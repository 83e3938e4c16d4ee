"""POPE is scored by question id, and answers to other questions are refused by name."""

import json
import subprocess
import sys

import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st

from rlaifv.benchmarks import pope
from rlaifv.evaluation.answers import Answer, read_answers, to_answers

QUESTIONS = [
    pope.PopeQuestion("1", "Is there a dog in the image?", "yes", "COCO_val2014_000000000009.jpg"),
    pope.PopeQuestion("2", "Is there a cat in the image?", "no"),
    pope.PopeQuestion("3", "Is there a kite in the image?", "no"),
    pope.PopeQuestion("4", "Is there a cup in the image?", "yes"),
]


def answers(*texts):
    return [Answer(str(i + 1), text) for i, text in enumerate(texts)]


def test_the_positive_class_is_yes():
    metrics = pope.score(QUESTIONS, answers("Yes", "Yes", "No", "No")).metrics
    cells = [metrics[name] for name in ("tp", "fp", "tn", "fn")]
    assert cells == [1, 1, 1, 1]
    rates = [metrics[name] for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")]
    assert rates == [0.5] * 5


@pytest.mark.parametrize(
    ("text", "yes", "clear"),
    [
        ("Yes", True, True),
        ("No, there is no dog.", False, True),
        ("Yes. No cat though.", True, True),  # only the first sentence counts
        ("There is not a dog", False, True),
        ("A dog.", True, False),
        ("", True, False),
    ],
)
def test_free_answers_are_read_by_the_published_rule_and_unclear_ones_are_counted(text, yes, clear):
    assert pope.says_yes(text) is yes
    assert pope.is_clear(text) is clear


def test_order_does_not_matter_and_missing_and_foreign_answers_are_listed():
    given = [Answer("9", "Yes"), *reversed(answers("Yes", "No", "No"))]
    result = pope.score(QUESTIONS, given)
    assert result.metrics["accuracy"] == 1 and result.metrics["n"] == 3
    assert [row["id"] for row in result.missing] == ["9", "4"]


def test_answers_to_other_questions_or_images_are_refused_with_their_ids():
    wrong = [
        Answer("1", "Yes", "Is there a dog in the image?\nOne word."),
        Answer("2", "No", "Is there a cow?"),
    ]
    with pytest.raises(ValueError, match=r"1 of 2 .*Ids that do not match: 2$"):
        pope.score(QUESTIONS, wrong)
    with pytest.raises(ValueError, match=r"Ids that do not match: 1$"):
        pope.score(QUESTIONS, [Answer("1", "Yes", image="000000000010.jpg")])


def test_a_question_answered_twice_and_ids_of_another_file_are_refused():
    with pytest.raises(ValueError, match="answered twice: 1"):
        pope.score(QUESTIONS, answers("Yes") * 2)
    with pytest.raises(ValueError, match=r"no answer has an id of the questions \(1 … 4\).*1000"):
        pope.score(QUESTIONS, [Answer("1000", "Yes")])


def test_answers_without_an_id_are_refused_instead_of_counted_off():
    given, _ = to_answers([{"question": q.text, "answer": "yes"} for q in QUESTIONS])
    with pytest.raises(ValueError, match="no question_id"):
        pope.score(QUESTIONS, given)


def test_an_lmms_eval_file_brings_its_own_questions_labels_and_categories(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [
        {
            "doc_id": i,
            "doc": {
                "question_id": str(i),
                "question": "Is there a dog?",
                "answer": label,
                "category": "popular",
            },
            "target": label,
            "filtered_resps": [text],
        }
        for i, (label, text) in enumerate([("yes", "Yes"), ("no", "Yes"), ("no", "No")])
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    given, bad = read_answers(path)
    metrics = pope.score(pope.read_questions(path), given).metrics
    assert not bad
    assert metrics["accuracy"] == metrics["popular_accuracy"] == pytest.approx(2 / 3)


def test_the_three_splits_of_one_lmms_eval_file_are_told_apart(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [
        {
            "doc_id": number,
            "doc": {"question_id": "1", "question": "Is there a dog?", "answer": label, "category": category},
            "filtered_resps": ["Yes"],
        }
        for number, (category, label) in enumerate([("random", "yes"), ("popular", "yes"), ("adversarial", "no")])
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    metrics = pope.score(pope.read_questions(path), read_answers(path)[0]).metrics
    assert metrics["n"] == 3
    assert [metrics[f"{name}_accuracy"] for name in ("random", "popular", "adversarial")] == [1, 1, 0]


def test_the_row_number_of_an_lmms_eval_file_alone_is_no_question_id():
    given, _ = to_answers([{"doc_id": 1, "resps": ["Yes"]}])
    with pytest.raises(ValueError, match="no question_id"):
        pope.score(QUESTIONS, given)


@pytest.mark.parametrize("text", ["", "NO", "no!", "There isn't a dog", "Yes, no doubt", "Perhaps"])
def test_an_answer_that_the_published_rule_may_misread_is_counted_as_unclear(text):
    assert not pope.is_clear(text)


@given_any(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_the_rates_are_those_of_a_plain_count(rows):
    questions = [pope.PopeQuestion(str(i), "Is it?", "yes" if truth else "no") for i, (truth, _) in enumerate(rows)]
    given = [Answer(str(i), "Yes" if said else "No") for i, (_, said) in enumerate(rows)]
    tp, fp = (sum(said and truth == kind for truth, said in rows) for kind in (True, False))
    fn = sum(truth and not said for truth, said in rows)
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    metrics = pope.score(questions, given).metrics
    assert metrics["accuracy"] == pytest.approx(sum(truth == said for truth, said in rows) / len(rows))
    assert (metrics["precision"], metrics["recall"]) == pytest.approx((precision, recall))
    assert metrics["f1"] == pytest.approx(2 * precision * recall / (precision + recall) if tp else 0)
    assert metrics["yes_ratio"] == pytest.approx((tp + fp) / len(rows))


def test_the_published_adversarial_split_is_met_exactly(fetched):
    folder = fetched("golden/pope_llava15")
    given, _ = read_answers(folder / "answers_llava-v1.5-7b.jsonl")
    metrics = pope.score(pope.read_questions(folder / "coco_pope_adversarial.json"), given).metrics
    assert [metrics[name] for name in ("tp", "fp", "tn", "fn")] == [1187, 133, 1367, 313]
    assert metrics["f1"] == pytest.approx(0.8418439716312057)


def test_the_misaligned_random_split_is_refused_with_the_ids(fetched):
    folder = fetched("golden/pope_llava15")
    command = [sys.executable, "-m", "rlaifv.benchmarks.pope", "--json"]
    command += ["--answers", folder / "answers_llava-v1.5-7b.jsonl"]
    command += ["--questions", folder / "coco_pope_random.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "2801 of 2910" in done.stderr and "Ids that do not match: 2, 4, 6," in done.stderr
    assert "Traceback" not in done.stderr
    assert "2801 of 2910" in json.loads(done.stdout.splitlines()[-1])["error"]
