"""The data sets of SFT+ as conversations, and their mixture by weights."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rlaifv.params import SftPart
from rlaifv.records import write_jsonl
from rlaifv.steps.sft_rows import (
    SftRow,
    a_okvqa,
    flickr30k,
    instructions,
    llava_instruct,
    mixture,
    questions,
    read_parts,
    vqa_yes_no,
)


def write(folder: Path, name: str, content) -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_llava_instruct_keeps_all_turns_and_rejects_broken_rows_by_id(tmp_path):
    turns = [
        {"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(["<image>\nA?", "B.", "C?", "D."])
    ]
    rows = [
        {"id": "1", "image": "1.jpg", "conversations": turns},
        {"id": "2", "image": "2.jpg", "conversations": turns[:3]},
        {"id": "3", "conversations": turns},
    ]
    kept, rejects = llava_instruct(write(tmp_path, "llava.json", rows))
    assert kept == [SftRow("llava-0:1", "1.jpg", ["A?", "B.", "C?", "D."], "llava")]
    assert [(r.id, r.reason) for r in rejects] == [
        ("llava-1:2", "its turns are not of human and gpt in turn, the last of gpt"),
        ("llava-2:3", "lacks 'image'"),
    ]


def test_vqa_gives_its_yes_no_questions_alone(tmp_path):
    asked = [{"question_id": k, "image_id": 7, "question": f"Q{k}?"} for k in (1, 2, 3)]
    known = [
        {"question_id": 1, "image_id": 7, "answer_type": "yes/no", "multiple_choice_answer": "no"},
        {"question_id": 2, "image_id": 7, "answer_type": "number", "multiple_choice_answer": "3"},
        {"question_id": 3, "image_id": 7, "answer_type": "yes/no", "multiple_choice_answer": "maybe"},
    ]
    questions = write(tmp_path, "q.json", {"questions": asked, "data_subtype": "train2014"})
    kept, (reject,) = vqa_yes_no(questions, write(tmp_path, "a.json", {"annotations": known}))
    assert kept == [SftRow("vqa-1", "COCO_train2014_000000000007.jpg", ["Q1?", "No."], "vqa")]
    assert reject.id == "vqa-3" and "'maybe'" in reject.reason


def test_a_okvqa_answers_with_a_reason_and_the_right_letter(tmp_path):
    row = {
        "question_id": "x",
        "image_id": 7,
        "question": "What naps?",
        "choices": ["dog", "cat"],
        "correct_choice_idx": 1,
        "rationales": ["Its eyes are shut"],
    }
    path = write(tmp_path, "aok.json", [row, row | {"correct_choice_idx": 20}])
    (kept,), (reject,) = a_okvqa(path)
    asked = "What naps?\nA. dog\nB. cat"
    assert kept.conversation == [asked, "Its eyes are shut. The correct option is B."]
    assert reject.id == "aokvqa-x"
    assert a_okvqa(path, rationale=False)[0][0].conversation[1] == "The correct option is B."


def test_flickr_gives_the_captions_of_its_training_images(tmp_path):
    rows = [
        {"filename": f"{k}.jpg", "split": k, "sentences": [{"raw": "A. "}, {"raw": "B."}]} for k in ("train", "val")
    ]
    ((row,), _) = flickr30k(write(tmp_path, "f.json", {"images": rows}))
    assert row.image_path == "train.jpg" and row.conversation[1] == "A.\nB."


def test_the_projects_own_instructions_and_questions_are_rows_too(tmp_path):
    asked = {"id": "i", "image_path": "1.png", "question": "What?"}
    write_jsonl(tmp_path / "i.jsonl", [asked | {"reference": "A cup."}, asked | {"id": "j"}])
    (row,), (reject,) = instructions(tmp_path / "i.jsonl")
    assert (row.conversation, reject.id) == (["What?", "A cup."], "i.jsonl:2") and "no reference" in reject.reason
    write_jsonl(tmp_path / "q.jsonl", [asked | {"answer": "no"}, asked | {"answer": "maybe"}])
    (row,), (reject,) = questions(tmp_path / "q.jsonl")
    assert row.conversation == ["What? Please answer yes or no.", "No"] and "'maybe'" in reject.reason


def part(kind: str, *files: str, images: str = "") -> SftPart:
    return SftPart(kind=kind, files=files, images=images, weight=1.0)


def test_parts_name_their_rows_and_have_their_own_images(tmp_path):
    rows = [{"filename": f"{k}.jpg", "split": "train", "sentences": [{"raw": "A."}]} for k in range(2)]
    write(tmp_path, "f.json", {"images": rows})
    turns = [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]
    write(tmp_path, "l.json", [{"id": "1", "image": "1.jpg", "conversations": turns}, {"id": "2"}])
    told = {"short": part("flickr30k", "f.json", images="flickr"), "talk": part("llava_instruct", "l.json")}
    found, (reject,) = read_parts(told, tmp_path)
    assert [(row.id, row.image_path, row.source) for row in found["short"]] == [
        (f"short/flickr-{k}.jpg", f"flickr/{k}.jpg", "short") for k in range(2)
    ]
    assert found["talk"][0].id == "talk/llava-0:1" and reject.id == "talk/llava-1:2"


def test_a_missing_file_and_an_id_that_is_there_twice_are_named_with_their_part(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file gone\.json \(sft_parts\.talk\.files\)"):
        read_parts({"talk": part("llava_instruct", "gone.json")}, tmp_path)
    row = {"id": "i", "image_path": "1.png", "question": "What?", "reference": "A cup."}
    write_jsonl(tmp_path / "i.jsonl", [row, row])
    with pytest.raises(ValueError, match=r"i\.jsonl: the id 'i' is there twice \(sft_parts\.own\)"):
        read_parts({"own": part("instructions", "i.jsonl")}, tmp_path)


def test_an_image_outside_the_folder_is_refused(tmp_path):
    assert SftRow("a", "b/1.png", ["?", "."], "").image(tmp_path) == tmp_path / "b" / "1.png"
    with pytest.raises(ValueError, match=r"image \.\./1\.png lies outside"):
        SftRow("a", "../1.png", ["?", "."], "").image(tmp_path)


def parts(**sizes: int) -> dict[str, list[SftRow]]:
    return {name: [SftRow(f"{name}{k}", "", ["a", "b"], name) for k in range(size)] for name, size in sizes.items()}


def test_a_mixture_gives_each_part_its_share_of_the_weights():
    many = parts(a=100, b=50)
    drawn = mixture(many, {"a": 3.0, "b": 1.0}, 80, seed=1)
    assert Counter(row.source for row in drawn) == {"a": 60, "b": 20} and len({row.id for row in drawn}) == 80
    assert [row.source for row in drawn] != sorted(row.source for row in drawn)
    assert drawn == mixture(many, {"a": 3.0, "b": 1.0}, 80, seed=1) != mixture(many, {"a": 3.0, "b": 1.0}, 80, seed=2)


def test_a_part_that_is_too_small_for_its_weight_is_named():
    with pytest.raises(ValueError, match="b has 5 rows, its weight asks for 40 of 80"):
        mixture(parts(a=100, b=5), {"a": 1.0, "b": 1.0}, 80, seed=1)
    with pytest.raises(ValueError, match="weights of a for parts a, b"):
        mixture(parts(a=100, b=5), {"a": 1.0}, 80, seed=1)
