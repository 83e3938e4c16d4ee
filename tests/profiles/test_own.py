"""A folder of pictures becomes instructions, splits that share no picture, and a profile that judges by claims."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from rlaifv import ROOT
from rlaifv.params import ParamsError, load_params
from rlaifv.profiles.own import (
    PROMPTS,
    describe,
    find_pictures,
    main,
    make_instructions,
    overlay,
    read_questions,
    split_sizes,
    write_own,
)

SIZES = {"dev": 3, "test": 4}


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twelve pictures, of which one is there three times under other names and in another format, and what else lies
    about in such a folder."""
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for seed in range(12):
        picture = Image.effect_noise((24, 18), 10 + seed).convert("RGB")
        picture.save(folder / "trip" / f"{seed}.png")
    shutil.copy(folder / "trip" / "0.png", folder / "copy.png")
    Image.open(folder / "trip" / "0.png").save(folder / "same picture.bmp")
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff no more")
    (folder / "IMG_1.HEIC").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    return folder


def test_every_file_of_the_folder_is_accounted_for(photos):
    found = find_pictures(photos)
    assert len(found.digests) == 14 and len(set(found.digests.values())) == 12
    assert list(found.broken) == ["cut.jpg"] and found.others == Counter({".HEIC": 1})
    files, lost = make_instructions(found, PROMPTS, 7, SIZES)
    said = describe(found, files, lost)
    assert (
        "14 pictures, 2 of them copies of another" in said and "1 pictures cannot be used; the first, cut.jpg" in said
    )
    assert "(1 .HEIC)" in said and "train: 40 instructions about 5 pictures" in said and "±50 points" in said


def test_no_picture_is_in_two_splits_whatever_it_is_called(photos):
    found = find_pictures(photos)
    for seed in range(20):
        files, _ = make_instructions(found, PROMPTS, seed, SIZES)
        shown = {split: {found.digests[row.image_path] for row in rows} for split, rows in files.items()}
        assert {split: len(digests) for split, digests in shown.items()} == {"train": 5, **SIZES}
        assert not shown["train"] & shown["dev"] and not (shown["train"] | shown["dev"]) & shown["test"]
        assert len({row.id for rows in files.values() for row in rows}) == sum(map(len, files.values()))


def test_a_picture_of_dev_and_test_is_asked_once_and_few_of_train_in_all_wordings(photos):
    files, _ = make_instructions(find_pictures(photos), PROMPTS, 7, SIZES)
    assert [len(files[split]) for split in ("dev", "test")] == [3, 4]
    assert set(Counter(row.image_path for row in files["train"]).values()) == {len(PROMPTS)}
    assert make_instructions(find_pictures(photos), PROMPTS, 7, SIZES)[0] == files, "the same again"


def test_own_prompts_are_lines_and_own_instructions_are_rows_whose_copies_stay_together(photos, tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("What is it?\n\nWhere is it?\nWhat is it?\n")
    assert read_questions(text) == ["What is it?", "Where is it?"]
    table, names = (
        tmp_path / "q.jsonl",
        ["copy.png", "same picture.bmp", "gone.png", *(f"trip/{k}.png" for k in range(12))],
    )
    rows = [{"id": f"{name} {k}", "image_path": f"./{name}", "question": "What?"} for name in names for k in range(2)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files, lost = make_instructions(find_pictures(photos), read_questions(table), 7, SIZES)
    assert lost == ["gone.png"] and sum(map(len, files.values())) == 28
    of = {row.image_path: split for split, split_rows in files.items() for row in split_rows}
    assert of["copy.png"] == of["same picture.bmp"] == of["trip/0.png"]
    table.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match=r"the id 'copy\.png 0' is there twice"):
        read_questions(table)
    table.write_text('{"id": "a", "question": "What?"}\n')
    with pytest.raises(ValueError, match=r"q\.jsonl, line 1: has no field 'image_path'"):
        read_questions(table)


def test_too_few_pictures_are_refused_with_what_is_wanted():
    assert split_sizes(30, {}) == {"dev": 4, "test": 7} and split_sizes(10_000, {}) == {"dev": 200, "test": 500}
    with pytest.raises(ValueError, match="4 different pictures are too few: there must be 5, 1 for dev, 1 for test"):
        split_sizes(4, {})
    with pytest.raises(ValueError, match=r"20 different pictures are too few: .* 10 for dev, 10 for test"):
        split_sizes(20, {"dev": 10, "test": 10})


@pytest.fixture
def checkout(tmp_path) -> Path:
    shutil.copytree(ROOT / "params", tmp_path / "checkout" / "params", ignore=shutil.ignore_patterns("own.yaml"))
    shutil.copy(ROOT / "params" / "default.yaml", tmp_path / "checkout" / "params.yaml")
    return tmp_path / "checkout"


def written(checkout: Path, base: str, photos: Path, second: str | None = None, force: bool = True):
    params = load_params(checkout / "params" / f"{base}.yaml")
    files, _ = make_instructions(find_pictures(photos), PROMPTS, params.seed, SIZES)
    profile = overlay(base, params, photos, len(files["train"]), second, checkout)
    write_own(files, profile, force, checkout)
    return params, load_params(checkout / "params.yaml")


@pytest.mark.parametrize("base", ["default", "llava15-7b", "qwen3vl-4b", "rlaifv-7b"])
def test_params_yaml_is_the_base_profile_with_these_pictures_and_no_annotations(checkout, photos, base):
    before, now = written(checkout, base, photos)
    assert (now.policy, now.labeler, now.divider, now.generate) == (
        before.policy, before.labeler, before.divider, before.generate)  # fmt: skip
    assert now.prepare.image_root == str(photos) and now.benchmarks == {}
    assert now.prepare.dev.instances is now.prepare.test.instances is now.train.keep_checkpoints is None
    assert now.prepare.per_iteration == 40 // len(before.iterations) and now.iterations == before.iterations
    assert len((checkout / now.prepare.test.instructions).read_text().splitlines()) == SIZES["test"]
    written(checkout, base, photos, force=False)  # nothing was edited: the same again needs no force


def test_a_second_labeler_is_written_as_it_was_named(checkout, photos):
    before, now = written(checkout, "llava15-7b", photos, "org/judge-8b@abc")
    judge = now.evaluate.labeler
    assert (judge.path, judge.revision, judge.dtype) == ("org/judge-8b", "abc", before.labeler.dtype)
    _, now = written(checkout, "default", photos, "http://host:8000/v1#judge")
    assert (now.evaluate.labeler.path, now.evaluate.labeler.revision) == ("http://host:8000/v1#judge", None)


def test_edits_are_not_overwritten_unasked(checkout, photos):
    written(checkout, "default", photos)
    (checkout / "params" / "own.yaml").write_text((checkout / "params" / "own.yaml").read_text() + "seed: 3\n")
    with pytest.raises(ParamsError, match=r"params\.yaml was edited"):  # its profile says something else now
        written(checkout, "default", photos, force=False)
    (photos / "trip" / "11.png").unlink()
    written(checkout, "default", photos)
    shutil.copy(checkout / "params" / "default.yaml", checkout / "params.yaml")
    assert load_params(checkout / "params" / "own.yaml").seed != 3


def test_a_wrong_folder_or_profile_ends_the_command_with_one_line(photos):
    with pytest.raises(SystemExit, match=r"^own: no folder nowhere$"):
        main(["--images", "nowhere"])
    with pytest.raises(SystemExit, match=r"^own: the profile public-dataset trains on pairs that are there already"):
        main(["--images", str(photos), "--base", "public-dataset"])
    with pytest.raises(SystemExit, match=r"^own: no parameter file .*nobodys"):
        main(["--images", str(photos), "--base", "nobodys"])
