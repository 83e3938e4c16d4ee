"""Labeler and people: what is asked is blind and stands for all, no answer is lost, the numbers are the truth's."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rlaifv.evaluation.agreement import (
    Annotation,
    ClaimItem,
    PairItem,
    all_answers,
    answer_from_truth,
    between_people,
    claim_agreement,
    draw_claims,
    draw_pairs,
    majority,
    pair_agreement,
    read_answers,
)
from rlaifv.evaluation.feedback_truth import claim_accuracy, score_iteration
from rlaifv.params import PairsParams
from rlaifv.records import Candidate, Claim, Instruction, Judgement, read_records, write_jsonl
from rlaifv.report.annotate import Questions
from rlaifv.stage import Paths
from rlaifv.steps.claims_made import kind_of
from rlaifv.steps.pairs import make_pairs, score_candidates, write_pairs
from rlaifv.tinyworld.coco import read_scenes, write_world
from rlaifv.tinyworld.language import claims as claims_of
from rlaifv.tinyworld.language import imagined_caption, is_true


@pytest.fixture(scope="module")
def iteration(tmp_path_factory) -> tuple[Paths, Path, Path]:
    """An iteration over 30 images, four answers each, whose labeler is wrong about a tenth of the claims."""
    root = tmp_path_factory.mktemp("agreement")
    write_world(root / "world", train=30, dev=1, test=1)
    scenes, chance = read_scenes(root / "world" / "instances_train.json"), random.Random(1)
    instructions, candidates, claims, judgements = [], [], [], []
    for image, scene in scenes.items():
        instructions.append(Instruction(f"i{image}", f"{image:012d}.png", "What is there?"))
        for k in range(4):
            text = imagined_caption(scene, chance, 1.0)
            candidates.append(Candidate(f"i{image}#{k}", f"i{image}", k, text, 10, "stop", 0, "m"))
            for n, claim in enumerate(claims_of(text)):
                claims.append(Claim(f"i{image}#{k}/{n}", f"i{image}#{k}", claim, "?"))
                accepted = is_true(claim, scene) != (random.Random(f"{image}{claim}").random() < 0.1)
                yes = random.Random(claim).uniform(0.5, 1) if accepted else random.Random(claim).uniform(0, 0.49)
                judgements.append(Judgement(claims[-1].id, yes, 1 - yes, accepted, "l"))
    paths = Paths("1")
    paths.folder = root / "1"
    for name in ("candidates", "claims", "judgements", "pairs"):
        setattr(paths, name, root / "1" / name / f"{name}.{'parquet' if name == 'pairs' else 'jsonl'}")
        getattr(paths, name).parent.mkdir(parents=True)
    for rows, path in ((candidates, paths.candidates), (claims, paths.claims), (judgements, paths.judgements)):
        write_jsonl(path, rows)
    (root / "prepared").mkdir()
    write_jsonl(root / "prepared" / "train.jsonl", instructions)
    scores = score_candidates(claims, judgements)
    pairs = make_pairs(instructions, candidates, scores, PairsParams(min_gap=1, max_per_instruction=2), seed=0)
    write_pairs(paths.pairs, pairs, root / "world" / "images", "1")
    return paths, root / "prepared", root / "world"


def annotated(iteration, folder: Path, n: int = 100) -> tuple[Annotation, Annotation]:
    paths, prepared, world = iteration
    claims = Annotation(folder / "claims", draw_claims(paths, prepared, n, 0), "truth")
    pairs = Annotation(folder / "pairs", draw_pairs(paths, n, 0), "truth")
    for asked in (claims, pairs):
        answer_from_truth(asked, world / "instances_train.json")
    return claims, pairs


def test_a_hundred_claims_answered_from_truth_give_the_numbers_of_the_truth(iteration, tmp_path):
    paths, _, world = iteration
    claims, _ = annotated(iteration, tmp_path)
    found = claim_agreement(claims.items, all_answers(claims.folder))
    asked, scenes = {item.id: item for item in claims.items}, read_scenes(world / "instances_train.json")
    judgements = {j.claim_id: j for j in read_records(paths.judgements, Judgement)}
    judged = [(claim, judgements[claim.id]) for claim in read_records(paths.claims, Claim) if claim.id in asked]
    truth = claim_accuracy(judged, lambda candidate: scenes[int(candidate[1:].partition("#")[0])])
    assert found["n"] == 100 and found["accuracy"] == truth["accuracy"] < 1
    assert {kind: right for kind, (right, _) in found["per_kind"].items()} == pytest.approx(truth["per_type"])
    assert found["accuracy_interval"] == truth["accuracy_interval"] and 0 < found["alpha"] < 1


def test_weights_make_the_sample_stand_for_every_claim_of_the_iteration(iteration, tmp_path):
    paths, prepared, world = iteration
    everything = read_records(paths.claims, Claim)
    claims, pairs = annotated(iteration, tmp_path, n=10_000)
    assert sum(item.weight for item in claims.items) == pytest.approx(len(everything))
    found = claim_agreement(claims.items, all_answers(claims.folder))
    whole = score_iteration(paths.claims.parents[1], prepared, world / "instances_train.json")
    assert found["estimate"] == pytest.approx(whole["claims"]["accuracy"])
    assert pair_agreement(pairs.items, all_answers(pairs.folder))["agreement"] == whole["pairs"]["agreement"]


def test_a_sample_of_any_size_stands_for_as_many_claims(iteration):
    paths, prepared, _ = iteration
    items = draw_claims(paths, prepared, 40, seed=3)
    assert len(items) == 40 == len({item.id for item in items})
    assert sum(item.weight for item in items) == pytest.approx(len(read_records(paths.claims, Claim)))
    assert items == draw_claims(paths, prepared, 40, seed=3) != draw_claims(paths, prepared, 40, seed=4)


def test_the_strata_are_asked_evenly(iteration):
    paths, prepared, _ = iteration
    kinds = [item.kind for item in draw_claims(paths, prepared, 40, seed=0)]
    assert set(kinds) == {"color", "count", "existence", "position"} and min(map(kinds.count, set(kinds))) >= 5


def test_either_answer_of_a_pair_comes_first(iteration):
    assert {item.chosen for item in draw_pairs(iteration[0], 20, seed=0)} == {0, 1}


def test_every_person_has_an_order_of_their_own_over_the_same_items(iteration, tmp_path):
    paths, prepared, _ = iteration
    items = draw_claims(paths, prepared, 30, seed=0)
    one, other = (Annotation(tmp_path, items, name) for name in ("ann", "bob"))
    assert one.order != other.order and sorted(one.order, key=str) == sorted(other.order, key=str)


def test_other_items_in_the_same_folder_are_refused(iteration, tmp_path):
    paths, prepared, _ = iteration
    Annotation(tmp_path, draw_claims(paths, prepared, 30, seed=0), "ann")
    with pytest.raises(ValueError, match="holds other items"):
        Annotation(tmp_path, draw_claims(paths, prepared, 30, seed=1), "ann")


@pytest.mark.parametrize("name", ["", "../x", "items", "a/b"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="annotator"):
        Annotation(tmp_path, [], name)


def test_the_widget_saves_each_answer_at_once_and_goes_on_where_it_was(iteration, tmp_path):
    paths, prepared, world = iteration
    items = draw_claims(paths, prepared, 5, seed=0)
    first = Questions(Annotation(tmp_path, items, "ann"), world / "images")
    shown = first.waiting[0]
    first.hear("yes")
    assert read_answers(tmp_path / "ann.jsonl") == {shown.id: "yes"}
    del first  # the kernel is closed
    again = Questions(Annotation(tmp_path, items, "ann"), world / "images")
    assert len(again.waiting) == 4 and shown not in again.waiting and "1 of 5" in again.page
    for _ in range(4):
        again.hear("no")
    assert "All of them are answered" in again.page
    again.hear("back")
    again.hear("unsure")
    assert len(read_answers(tmp_path / "ann.jsonl")) == 5
    assert list(read_answers(tmp_path / "ann.jsonl").values()).count("unsure") == 1


def test_nothing_that_the_labeler_thinks_is_on_the_page(tmp_path):
    item = ClaimItem("c", "x.png", "There is a <b>cat</b>.", "existence", 0.123, 0.877, 1.0)

    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    page = Questions(Annotation(tmp_path / "a", [item], "ann"), tmp_path).page
    assert "There is a &lt;b&gt;cat&lt;/b&gt;." in page and "0.1" not in page and "0.8" not in page
    pair = PairItem("p", "x.png", "What?", ("one", "two"), 1)
    page = Questions(Annotation(tmp_path / "b", [pair], "ann"), tmp_path).page
    assert "chosen" not in page and page.index("one") < page.index("two")


def test_a_line_that_a_crash_cut_short_is_no_answer(tmp_path):
    file = tmp_path / "ann.jsonl"
    file.write_text(json.dumps({"id": "a", "answer": "yes"}) + '\n{"id": "b", "answ')
    assert read_answers(file) == {"a": "yes"}


def test_the_answer_after_a_line_that_a_crash_cut_short_is_not_lost(iteration, tmp_path):
    items = draw_claims(iteration[0], iteration[1], 2, seed=0)
    (tmp_path / "ann.jsonl").write_text('{"id": "b", "answ')
    annotation = Annotation(tmp_path, items, "ann")
    for asked in items:
        annotation.save(asked, "yes")
    assert annotation.answers() == {asked.id: "yes" for asked in items}


def item(name: str, accepted: bool = True) -> ClaimItem:
    return ClaimItem(name, f"{name}.png", "There is a cat.", "existence", float(accepted), float(not accepted), 1.0)


def test_unsure_and_split_answers_are_left_out_and_counted():
    people = {"ann": {"a": "yes", "b": "yes", "c": "unsure"}, "bob": {"a": "yes", "b": "no"}}
    assert [majority(name, people) for name in "abcd"] == ["yes", None, None, None]
    found = claim_agreement([item(name) for name in "abcd"], people)
    assert found["n"] == 1 and found["undecided"] == 2 and found["accuracy"] == 1.0


def test_whole_answers_are_judged_on_the_same_pairs_and_a_tie_is_no_agreement():
    pairs = [PairItem(name, f"{name}.png", "?", ("x", "y"), chosen) for name, chosen in (("a", 0), ("b", 1), ("c", 1))]
    people = {"ann": {"a": "0", "b": "0", "c": "equal"}}
    found = pair_agreement(pairs, people, {"a": (0.2, 0.7), "b": (0.9, 0.1), "c": (0.5, 0.5)})
    assert found["agreement"] == pytest.approx(1 / 3) and found["whole_answers"] == pytest.approx(1 / 3)
    assert found["equal"] == pytest.approx(1 / 3)
    assert pair_agreement(pairs[:1], people, {"a": (0.5, 0.5)})["whole_answers"] == 0


def test_people_who_say_the_same_have_an_alpha_of_one_and_opposites_a_negative_one():
    items = [item(f"{n}") for n in range(20)]
    ann = {i.id: ("yes", "no")[n % 2] for n, i in enumerate(items)}
    assert between_people(items, {"ann": ann, "bob": ann})["alpha"] == 1.0
    bob = {key: {"yes": "no", "no": "yes"}[value] for key, value in ann.items()}
    assert between_people(items, {"ann": ann, "bob": bob})["alpha"] < 0
    assert between_people(items, {"ann": ann}) == {"n": 0}


@given(st.lists(st.sampled_from(["yes", "no", "unsure"]), min_size=1, max_size=5))
def test_a_majority_is_said_by_more_than_any_other_answer(said):
    people = {f"{n}": {"a": answer} for n, answer in enumerate(said)}
    found, yes, no = majority("a", people), said.count("yes"), said.count("no")
    assert found == ("yes" if yes > no else "no" if no > yes else None)


@pytest.mark.parametrize(
    ("claim", "kind"),
    [
        ("There are two dogs on the sofa.", "count"),
        ("The dog is brown.", "color"),
        ("There is a dog in the image.", "existence"),
        ("The dog lies under the table.", "position"),
        ("The dog seems to be happy.", "other"),
    ],
)
def test_a_claim_about_anything_has_a_rough_type(claim, kind):
    assert kind_of(claim) == kind
