"""Object HalBench: a judge lists objects, repeated words count once, and no answer leaves the denominator unseen."""

import json
import subprocess
import sys

import pytest

from rlaifv.benchmarks import object_halbench
from rlaifv.benchmarks.judge import Judge
from rlaifv.evaluation import chair
from rlaifv.evaluation.answers import Answer
from rlaifv.inference.server import NoReply

VOCABULARY = chair.load_vocabulary(extra=object_halbench.WORDS)


def test_the_worked_example_of_the_published_counting():
    answers = [Answer(str(i), "text", image=str(i)) for i in range(3)]
    objects = {"0": ["dog", "person"], "1": ["cat"], "2": ["dining table", "cup"]}
    listed = {0: ["dogs", "man", "woman", "frisbee"], 1: [], 2: ["coffee table", "coffee mug", "cup", "cups"]}
    result = object_halbench.score(answers, listed, objects)
    assert [len(row["mentions"]) for row in result.rows] == [4, 0, 2]
    metrics = result.metrics
    assert metrics["chair_s"] == 1 / 3
    assert metrics["chair_s_refine"] == 1 / 2
    assert metrics["chair_i"] == 1 / 6
    assert metrics["recall"] == 4 / 5


@pytest.mark.parametrize(
    ("phrase", "words"),
    [
        ("wooden dining table", ["dining table"]),
        ("large dog", ["dog"]),
        ("coffee mug", ["coffee mug"]),
        ("person standing", ["person"]),
        ("two men", ["two", "man"]),
        ("double beds", ["bed"]),
        ("slice of pizza", ["slice", "pizza"]),
        ("tennis player", ["tennis player"]),
        ("baby elephants", ["elephant"]),
        ("", []),
    ],
)
def test_an_objects_name_becomes_its_nouns(phrase, words):
    found = object_halbench.phrase_words(phrase, VOCABULARY)
    assert [word for word in found if word != "two"] == [word for word in words if word != "two"]


def test_a_taggers_words_are_joined_as_published():
    tagged = [("DT", "a"), ("JJ", "wooden"), ("NN", "coffee"), ("NN", "mug"), ("IN", "on"), ("NN", "shelf")]
    assert object_halbench.tagged_words(tagged, VOCABULARY) == ["coffee mug", "shelf"]
    assert object_halbench.tagged_words([("NN", "dining"), ("NN", "table")], VOCABULARY) == ["dining table"]


@pytest.mark.parametrize(
    ("reply", "objects"),
    [
        ('["dog", "cat"]', ["dog", "cat"]),
        ('Sure:\n```json\n["dog"]\n```\nDone.', ["dog"]),
        ('Not ["x"] but\n["dog",\n "cup"]', ["dog", "cup"]),
        ("[]", []),
        ("()", []),
        ("no objects", None),
        ("[dog, cat]", None),
        ("[1, 2]", None),
    ],
)
def test_a_list_of_objects_is_read_or_refused(reply, objects):
    assert object_halbench.parse_objects(reply) == objects


def test_short_answers_are_not_shown_to_the_judge_and_lost_ones_are_listed():
    asked = []

    def ask(requests):
        asked.extend(requests)
        return [NoReply("HTTP 500") if "lost" in r.text else '["dog"]' for r in requests]

    texts = ["Yes it is.", "There is a dog here.", "A lost dog is here.", "A dog is somewhere else."]
    answers = [Answer(f"q{i}", text, image="9" if i == 3 else "1") for i, text in enumerate(texts)]
    result = object_halbench.judge_and_score(answers, {"1": ["dog"]}, Judge("j", ask))
    assert len(asked) == 2
    assert result.metrics["n"] == 2 and result.metrics["n_without_verdict"] == 1
    assert {row["id"]: row["reason"] for row in result.missing} == {
        "q2": "no reply: HTTP 500",
        "q3": "unknown image '9'",
    }
    assert result.settings["judge"] == "j"


def test_the_command_goes_on_where_a_dead_judge_left_it(tmp_path, start_server):
    answers, objects = tmp_path / "answers.jsonl", tmp_path / "objects.json"
    lines = [{"image_id": i, "question": "What?", "answer": f"There is a dog in picture {i}."} for i in range(6)]
    answers.write_text("\n".join(map(json.dumps, lines)))
    objects.write_text(json.dumps({str(i): ["dog"] if i % 2 else [] for i in range(6)}))

    def evaluate(*habit):
        command = [sys.executable, "-m", "rlaifv.benchmarks.object_halbench", "--json", "--judge", "rules"]
        command += ["--answers", answers, "--objects", objects, "--tries", "1", "--concurrency", "1"]
        command += ["--base-url", start_server("judge_server.py", *habit)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr

    code, report, errors = evaluate("dying", "2")
    assert (code, report["n"], report["n_without_verdict"], len(report["missing"])) == (3, 2, 4, 4)
    assert "4 verdicts are missing" in errors
    code, report, _ = evaluate("well")
    assert (code, report["n"], report["missing"]) == (0, 6, [])
    assert (report["chair_s_refine"], report["chair_i"], report["recall"]) == (0.5, 0.5, 1)
    assert report["judge"] == "rules"
