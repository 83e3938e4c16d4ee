"""AMBER's four description rates and its yes/no rates, as its own scorer counts them."""

import json

import pytest

from rlaifv.benchmarks import amber
from rlaifv.evaluation.answers import Answer, read_answers, to_answers
from rlaifv.evaluation.nouns import text_nouns

ANNOTATIONS = amber.Annotations(
    images={
        "1": {"type": "generative", "truth": ["dog", "person", "grass"], "hallu": ["cat", "tree"]},
        "2": {"type": "generative", "truth": ["table"], "hallu": ["cup"]},
        "1005": {"type": "discriminative-hallucination", "truth": "no"},
        "1006": {"type": "discriminative-attribute-state", "truth": "yes"},
        "1007": {"type": "relation", "truth": "no"},
    },
    associations={
        "person": ["man", "woman"],
        "dog": [],
        "cat": ["kitten"],
        "tree": [],
        "table": ["desk"],
        "light": [],
    },
    safe_words=frozenset({"light"}),
)


def test_descriptions_are_rated_by_hallucination_and_by_coverage():
    answers = [Answer("1", "A man with two dogs, a kitten and a light."), Answer("2", "There is a desk.")]
    metrics = amber.score(answers, ANNOTATIONS).metrics
    assert metrics["chair"] == 1 / 5  # man, dog, kitten, light, desk
    assert metrics["cover"] == 3 / 4
    assert metrics["hal"] == 1 / 2
    assert metrics["cog"] == 1 / 3


def test_similar_words_cover_and_do_not_hallucinate_when_vectors_are_given():
    answers = [Answer("1", "A kitten.")]
    close = lambda first, second: {first, second} == {"kitten", "dog"}  # noqa: E731
    assert amber.score(answers, ANNOTATIONS).metrics["hal"] == 1
    assert amber.score(answers, ANNOTATIONS, close).metrics["hal"] == 0


def test_the_positive_class_is_no_and_only_exact_answers_count():
    answers = [Answer("1005", "No"), Answer("1006", "Yes, it is."), Answer("1007", "Yes")]
    metrics = amber.score(answers, ANNOTATIONS).metrics
    assert metrics["accuracy"] == 1 / 3
    assert (metrics["precision"], metrics["recall"]) == (1, 1 / 2)
    assert (metrics["existence_f1"], metrics["relation_f1"]) == (1, 0)
    assert metrics["n_neither_yes_nor_no"] == 1
    assert "chair" not in metrics


def test_the_number_of_a_row_without_an_id_is_not_taken_for_ambers_id():
    given, _ = to_answers([{"response": "A tree."}, {"response": "A cat."}, {"id": 2, "response": "A desk."}])
    result = amber.score(given, ANNOTATIONS)
    assert (result.metrics["n"], result.metrics["hal"], len(result.missing)) == (1, 0, 2)


def test_a_row_that_only_names_its_image_is_its_description_unless_several_do():
    described, _ = to_answers([{"image": "image/AMBER_2.jpg", "caption": "A desk."}])
    assert amber.score(described, ANNOTATIONS).metrics["cover"] == 1
    asked, _ = to_answers([{"image": "AMBER_2.jpg", "answer": "Yes"}, {"image": "AMBER_2.jpg", "answer": "No"}])
    result = amber.score(asked, ANNOTATIONS)
    assert (result.metrics["n"], len(result.missing)) == (0, 2)


def test_files_that_are_not_ambers_are_refused_by_folder(tmp_path):
    for name in ("relation.json", "safe_words.txt"):
        (tmp_path / name).write_text("{}")
    for text in ('[{"id": 1, "type"', '{"1": {}}', '[{"id": 1}]'):
        (tmp_path / "annotations.json").write_text(text)
        with pytest.raises(ValueError, match=tmp_path.name):
            amber.read_annotations(tmp_path)


def test_ids_that_amber_does_not_have_and_second_answers_are_listed():
    result = amber.score([Answer("7", "A dog."), Answer("1", "A dog."), Answer("1", "A cat.")], ANNOTATIONS)
    assert result.metrics["n"] == 1
    assert [row["id"] for row in result.missing] == ["7", "1"]


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("a seagull can be seen, and a can of beer", ["seagull", "can", "beer"]),
        ("hot air balloons", ["air", "balloon"]),
        ("she skates to board a boat sailing on the lake", ["boat", "lake"]),
        ("He paints a small building and a painting.", ["paint", "building", "painting"]),
    ],
)
def test_verbs_and_adjectives_are_no_nouns(text, nouns):
    names = {"seagull", "can", "beer", "air", "balloon", "boat", "lake", "board", "skate", "sailing"}
    names |= {"paint", "building", "painting", "hot"}
    found = [noun for noun in text_nouns(text) if noun in names]
    assert found == [noun for noun in nouns if noun != "paint"]


def test_the_published_row_is_met_within_half_a_point_without_vectors(fetched):
    annotations = amber.read_annotations(fetched("amber/annotations.json").parent)
    answers, bad = read_answers(fetched("golden/amber_llava15/llava-v1.5-7b.jsonl"))
    metrics = amber.score(answers, annotations).metrics
    assert not bad and metrics["n"] == 166
    got = [100 * metrics[name] for name in ("chair", "cover", "hal", "cog")]
    assert got == pytest.approx([7.5, 50.9, 37.3, 3.2], abs=0.5)


def test_a_folder_without_the_files_says_how_to_get_them(tmp_path):
    (tmp_path / "annotations.json").write_text(json.dumps([]))
    with pytest.raises(FileNotFoundError, match="fetch amber"):
        amber.read_annotations(tmp_path)
