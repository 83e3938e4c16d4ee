"""CHAIR counts what the published scorer counts, loses no row, and never divides by zero."""

import gzip
import json
import subprocess
import sys

import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

from rlaifv.benchmarks import chair as command
from rlaifv.evaluation import chair
from rlaifv.evaluation.answers import Answer, image_key, read_answers, to_answers

VOCABULARY = chair.load_vocabulary()


def test_the_vocabulary_has_the_80_classes_of_coco():
    assert len(set(VOCABULARY.classes.values())) == 80
    assert not [word for word in VOCABULARY.classes if word != word.strip().lower()]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Two dogs and a baby elephant near the dining table.", ["dog", "elephant", "dining table"]),
        ("A passenger train, a passenger jet.", ["train", "jet"]),
        ("A man in a bow tie lifts the toilet seat.", ["man", "tie", "toilet"]),
        ("The seat of the toilet is up; no seat elsewhere.", ["toilet"]),
        ("People seated at home plate near the train tracks.", ["people"]),
        ("Wine glasses, hot dogs and teddy bears!", ["wine glass", "hot dog", "teddy bear"]),
        ("Yes it is.", []),
        ("", []),
    ],
)
def test_mentions_are_found_as_the_published_scorer_finds_them(text, found):
    assert chair.find_mentions(text, VOCABULARY) == found


def test_every_mention_counts_in_the_original_and_each_word_once_in_the_unique_counting():
    answers = [Answer("a", "A dog, a dog and a puppy on a sofa.", image="1")]
    objects = {"1": ["couch"]}
    original = chair.score(answers, objects).metrics
    unique = chair.score(answers, objects, counting="unique").metrics
    assert (original["mentions"], unique["mentions"]) == (4, 3)
    assert (original["chair_i"], unique["chair_i"]) == (3 / 4, 2 / 3)


def test_answers_about_unknown_images_are_listed_and_count_nowhere():
    answers = [Answer("a", "A dog.", image="7"), Answer("b", "A cat.", image="8")]
    result = chair.score(answers, {"7": ["dog"]})
    assert result.metrics["n"] == 1
    assert [row["id"] for row in result.missing] == ["b"]


def test_an_empty_answer_is_an_answer():
    answers = [Answer("a", "", image="1"), Answer("b", "A dog.", image="1")]
    result = chair.score(answers, {"1": {"dog"}})
    assert (result.missing, result.metrics["n"], result.metrics["recall"]) == ([], 2, 0.5)


def test_nothing_to_count_gives_zero_and_no_error():
    assert chair.score([], {}).metrics["chair_i"] == 0
    assert chair.score([Answer("a", "Yes it is.", image="1")], {"1": []}).metrics["recall"] == 0


@given(
    st.lists(st.lists(st.sampled_from(["dog", "cats", "table", "walking", "men", "kite"]), max_size=6), max_size=6),
    st.sets(st.sampled_from(["dog", "cat", "kite"])),
)
def test_the_rates_keep_their_bounds_and_order(texts, truth):
    answers = [Answer(str(i), " ".join(text), image="1") for i, text in enumerate(texts)]
    metrics = chair.score(answers, {"1": truth}).metrics
    assert 0 <= metrics["chair_i"] <= 1
    assert metrics["chair_s"] <= metrics["chair_s_refine"] <= 1
    assert 0 <= metrics["recall"] <= 1
    assert metrics["n"] == len(texts)


def test_an_image_is_found_by_id_number_file_name_and_path():
    known = {"123456": [], "scene-07": []}
    for name in ("123456", "COCO_val2014_000000123456.jpg", "val2014/000000123456.jpg", "000000123456"):
        assert image_key(name, known) == "123456"
    assert image_key("images/scene-07.png", known) == "scene-07"
    assert image_key("C:\\coco\\COCO_val2014_000000123456.jpg", known) == "123456"
    assert image_key("000000000007.jpg", known) is None


def test_a_number_at_the_end_of_any_other_name_is_no_coco_image():
    assert image_key("kitchen_20.jpg", {"20": []}) is None
    assert image_key("coco_20.jpg", {"20": []}) == "20"


def test_truth_is_instances_and_caption_words_and_images_without_annotation_have_none(tmp_path):
    instances = {
        "images": [{"id": 1}, {"id": 276731}],
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 18}],
    }
    captions = {"annotations": [{"image_id": 1, "caption": "A man walks his puppies."}]}
    paths = [tmp_path / "instances.json", tmp_path / "captions.json"]
    for path, content in zip(paths, (instances, captions), strict=True):
        path.write_text(json.dumps(content))
    assert chair.load_objects(paths) == {"1": {"dog", "person"}, "276731": set()}
    assert chair.load_objects(paths, images=["COCO_val2014_000000000001.jpg"]) == {"1": {"dog", "person"}}


def test_truth_may_name_its_images_by_their_files(tmp_path):
    path = tmp_path / "objects.json"
    path.write_text('{"COCO_val2014_000000000001.jpg": ["dog"], "scene-07": []}')
    assert chair.load_objects([path]) == {"1": {"dog"}, "scene-07": set()}


@pytest.mark.parametrize(
    "content",
    [
        {"images": [{"id": 1}], "categories": [], "annotations": [{"image_id": 1, "category_id": 5}]},
        {"annotations": [{"caption": "A dog."}]},
        {"images": [{"file_name": "1.jpg"}], "annotations": []},
    ],
)
def test_a_truth_that_is_not_in_cocos_form_is_refused_by_name(tmp_path, content):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances\.json"):
        chair.load_objects([path])


def test_a_category_that_the_vocabulary_does_not_know_is_named(tmp_path):
    path = tmp_path / "objects.json"
    path.write_text('{"1": ["dog", "unicorn"]}')
    with pytest.raises(ValueError, match="unicorn"):
        chair.load_objects([path])


def test_a_published_table_is_read_as_its_scorer_reads_it(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text("cake,  cheesecake, cupcake\ndog, puppy \n")
    vocabulary = chair.load_vocabulary(path)
    found = chair.find_mentions("cheesecake, cupcakes, a puppy", vocabulary)
    assert [(word, vocabulary.classes[word]) for word in found] == [("cupcake", "cake"), ("puppy", "dog")]


@pytest.mark.parametrize(
    "record",
    [
        {"image_id": 9, "caption": "A dog."},
        {"question_id": 0, "image_id": "000000000009.jpg", "prompt": "Describe.", "text": "A dog."},
        {"question_id": "COCO_val2014_000000000009.jpg", "question": "Describe.", "answer": "A dog."},
        {
            "doc_id": 3,
            "doc": {"image_id": 9, "answer": "gold"},
            "filtered_resps": ["A dog."],
            "target": "gold",
        },
        {"doc_id": 3, "doc": {"image": "COCO_val2014_000000000009.jpg"}, "resps": [["A dog."]]},
        {"image_id": 9.0, "prediction": "A dog."},
        {"image": ["000000000009.jpg"], "response": "A dog."},
        {"image_id": " 9 ", "caption": "A dog."},
    ],
)
def test_result_files_of_other_tools_are_read(record):
    answers, bad = to_answers([record])
    assert not bad
    assert answers[0].text == "A dog."
    assert image_key(answers[0].image, {"9": []}) == "9"


ROWS = '{"image_id": 9, "caption": "A dog."}\n{"image_id": 9, "caption": ""}\n'


@pytest.mark.parametrize(
    "data",
    [
        ROWS.replace("\n", "\r\n").encode("utf-8-sig"),
        ROWS.encode("utf-16"),
        gzip.compress(ROWS.encode(), mtime=0),
        ("[" + ROWS.strip().replace("\n", ",") + "]").encode(),
    ],
)
def test_a_file_is_read_whatever_its_line_ends_its_encoding_and_its_compression(tmp_path, data):
    path = tmp_path / "answers.gz"
    path.write_bytes(data)
    answers, bad = read_answers(path)
    assert ([answer.text for answer in answers], bad) == (["A dog.", ""], [])


@pytest.mark.parametrize(
    "data", [ROWS.encode() + b"\xe9\n", gzip.compress(ROWS.encode(), mtime=0)[:-9], b"\x1f\x8b junk"]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, data):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"answers\.jsonl"):
        read_answers(path)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["1", "2", "3"]),
            st.lists(st.sampled_from(["dogs", "puppy", "cat", "kite", "tree", "man", "hot dog"]), max_size=5),
        ),
        max_size=5,
    ),
    st.booleans(),
)
def test_the_rates_are_those_of_a_plain_count_over_answers(rows, unique):
    classes = {"dogs": "dog", "puppy": "dog", "cat": "cat", "kite": "kite", "man": "person", "hot dog": "hot dog"}
    truth = {"1": {"dog", "person"}, "2": set()}  # nothing is known of image 3
    answers = [Answer(str(i), ", ".join(said), image=image) for i, (image, said) in enumerate(rows)]
    bad_answers = answers_with_mentions = bad_mentions = all_mentions = covered = present = n = 0
    for image, said in rows:
        if image in truth:
            found = [classes[word] for word in (dict.fromkeys(said) if unique else said) if word in classes]
            bad = [name for name in found if name not in truth[image]]
            n, bad_answers, answers_with_mentions = n + 1, bad_answers + bool(bad), answers_with_mentions + bool(found)
            bad_mentions, all_mentions = bad_mentions + len(bad), all_mentions + len(found)
            covered, present = covered + len(set(found) & truth[image]), present + len(truth[image])
    metrics = chair.score(answers, truth, counting="unique" if unique else "original").metrics
    assert metrics["n"] == n
    assert metrics["chair_s"] == pytest.approx(bad_answers / max(n, 1))
    assert metrics["chair_s_refine"] == pytest.approx(bad_answers / max(answers_with_mentions, 1))
    assert metrics["chair_i"] == pytest.approx(bad_mentions / max(all_mentions, 1))
    assert metrics["recall"] == pytest.approx(covered / max(present, 1))


def test_the_command_prints_json_and_loses_no_row(tmp_path):
    answers, objects = tmp_path / "answers.jsonl", tmp_path / "objects.json"
    answers.write_text(
        '{"image_id": 1, "caption": "A dog and a cat."}{"image_id": 2, "caption": "A dog."}\n'
        'not json\n{"image_id": 1}\n{"image_id": 1, "caption": "A dog."}'
    )
    objects.write_text('{"1": ["dog"]}')
    command = [
        sys.executable,
        "-m",
        "rlaifv.benchmarks.chair",
        "--answers",
        answers,
        "--objects",
        objects,
        "--json",
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = json.loads(output.splitlines()[-1])
    assert (result["n"], result["chair_s"], result["chair_i"], result["recall"]) == (2, 1 / 2, 1 / 3, 1)
    assert [row["id"] for row in result["missing"]] == ["line 2", "1", "2"]


def of_chair_py(caption, words, image=1):
    """A row of chair.py's output."""
    return {"image_id": image, "caption": caption, "mscoco_gt_words": ["dog"], "words": words, "metrics": {"CHAIRs": 0}}


def test_chair_pys_own_output_is_scored_by_its_text_and_by_its_lemmas(tmp_path, capsys):
    """There a verb became a chair: "seated" → seat → chair."""
    rows = [of_chair_py("A dog, seated.", ["a", "dog", ",", "seat", "."]), of_chair_py("A dog.", ["a", "dog", "."])]
    answers, objects = tmp_path / "chair.json", tmp_path / "objects.json"
    answers.write_text(json.dumps({"overall_metrics": {"CHAIRs": 0.5}, "sentences": rows}))
    objects.write_text('{"1": ["dog"]}')
    command.main(["--answers", str(answers), "--objects", str(objects), "--json"])
    said = capsys.readouterr().out.splitlines()
    result = json.loads(said[-1])
    assert (result["chair_s"], result["stored_chair_s"], result["n_stored_differ"]) == (0, 0.5, 1)
    line = next(line for line in said if "own lemmas" in line)
    assert "chair_s +50.00, chair_i +33.33, recall +0.00; mentions differ in 1 of 2 answers" in line


def test_phrases_that_were_joined_already_count_as_their_words_do():
    joined = ["a", "hot dog", "at", "home plate", "near", "baby", "elephant"]
    assert chair.mentions_of(joined, VOCABULARY) == ["hot dog", "elephant"]


def test_answers_are_read_from_a_table_of_any_separator_and_broken_lines_are_named(tmp_path):
    for name, text in {
        "a.csv": 'image_id,caption\n9,"A dog, a\ncat."\n9,\n9\n9,a,b\n',
        "b.tsv": "image_id\tcaption\n9\tA dog, a cat.\n9\t\n9\n9\ta\tb\n",
        "c.csv": "\ufeffimage_id;caption\r\n9;A dog, a cat.\r\n9;\r\n9\r\n9;a;b\r\n",
    }.items():
        (tmp_path / name).write_text(text, newline="")
        answers, bad = read_answers(tmp_path / name)
        assert [a.text.replace("\n", " ") for a in answers] == ["A dog, a cat.", ""] and answers[0].image == "9"
        assert [row["reason"].split()[0] for row in bad] == ["fewer", "more"]
    (tmp_path / "empty.csv").write_text("image_id,caption\n")
    with pytest.raises(ValueError, match=r"empty\.csv holds no rows"):
        read_answers(tmp_path / "empty.csv")
    (tmp_path / "other.csv").write_text("image_id,x\n1,2\n")
    assert "found: image_id, x" in read_answers(tmp_path / "other.csv")[1][0]["reason"]


GOLDEN = {
    "chair_opera/llava-1.5/ours.jsonl": (44.6, 12.7, 79.0),
    "chair_lessismore/r1-llava1.5-7b.jsonl": (50.0, 15.3, 77.0),
    "chair_lessismore/r7-llava1.5-13b.jsonl": (47.2, 13.0, 77.2),
    "chair_cca/llava-v1.5-7b_coco_chair_long_ans.jsonl": (46.0, 12.9, 80.2),
    "chair_cca/llava-v1.5-7b_coco_chair_short_ans.jsonl": (20.6, 6.1, 65.9),
}


@pytest.fixture(scope="module")
def coco_objects(fetched):
    beside = SHARED / "golden/coco2014_objects.json.gz"  # of all images, as somebody else has extracted them
    if beside.is_file():
        return chair.load_objects([beside])
    images = [a.image for file in GOLDEN for a in read_answers(fetched(f"golden/{file}"))[0]]
    names = ("instances_val2014.json", "captions_val2014.json")
    return chair.load_objects([fetched(f"coco/annotations/{name}") for name in names], images=images)


@pytest.mark.parametrize(("file", "expected"), GOLDEN.items())
def test_published_scores_are_met_within_a_tenth_of_a_point(fetched, coco_objects, file, expected):
    answers, bad = read_answers(fetched(f"golden/{file}"))
    result = chair.score(answers, coco_objects)
    assert not bad and not result.missing
    got = [100 * result.metrics[name] for name in ("chair_s", "chair_i", "recall")]
    assert got == pytest.approx(expected, abs=0.1)


def test_our_table_differs_from_the_refined_published_one_only_in_the_words_that_were_added_there(fetched):
    published = chair.load_vocabulary(fetched("object_halbench/synonyms_refine.txt"))
    added = {"brother", "pedestrian", "coffee table", "remote control", "cheesecake", "motor bike"}
    differing = {word for word, name in published.classes.items() if VOCABULARY.classes.get(word) != name}
    unsaid = {
        "solider",
        "knive",
        "televison",
        "phon",
        "iPhone",
        "stove top oven",
    }  # misspellings; never matched
    assert differing == added | unsaid
    assert set(VOCABULARY.classes) <= set(published.classes)
