"""Scores, pairs and the length balance do what the paper says, for any answers."""

import json
import math

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_llava import picture, save_tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

from rlaifv.params import PairsParams
from rlaifv.records import Candidate, Claim, Instruction, Judgement
from rlaifv.steps.pairs import (
    SCHEMA,
    Pair,
    balance_lengths,
    make_pairs,
    relative_length_gap,
    require_pairs,
    score_candidates,
    words,
    write_pairs,
)

PARAMS = PairsParams(min_gap=1, max_per_instruction=2)


def instruction(name: str) -> Instruction:
    return Instruction(name, "a.png", "Describe.")


def candidate(name: str, sample: int, answer: str = "") -> Candidate:
    return Candidate(f"{name}#{sample}", name, sample, answer or f"answer {sample}", 2, "stop", 1, "model")


def pair(chosen: int, rejected: int) -> Pair:
    a, b = candidate("i", 0, "word " * chosen), candidate("i", 1, "word " * rejected)
    return Pair(instruction("i"), a, b, 0, -1)


def test_the_score_is_minus_the_number_of_rejected_claims():
    claims = [Claim(f"i#0/{k}", "i#0", "", "") for k in range(3)] + [Claim("i#1/0", "i#1", "", "")]
    judgements = [Judgement(c.id, 0.9 if c.id == "i#0/1" else 0.4, 0.6, c.id == "i#0/1", "labeler") for c in claims]
    assert score_candidates(claims, judgements) == {"i#0": -2, "i#1": -1}


def test_a_candidate_with_an_unjudged_claim_has_no_score():
    claims = [Claim("i#0/0", "i#0", "", ""), Claim("i#0/1", "i#0", "", "")]
    assert score_candidates(claims, [Judgement("i#0/0", 0.9, 0.1, True, "labeler")]) == {}


def test_judgements_of_two_labelers_or_of_other_claims_make_no_scores():
    claims = [Claim("i#0/0", "i#0", "", ""), Claim("i#0/1", "i#0", "", "")]
    ours, other = Judgement("i#0/0", 0.9, 0.1, True, "a"), Judgement("i#0/1", 0.9, 0.1, True, "b")
    with pytest.raises(ValueError, match=r"judgements of 2 labelers \(a, b\): run feedback again"):
        score_candidates(claims, [ours, other])
    with pytest.raises(ValueError, match="1 judgements are of no known claim, first i#9/0"):
        score_candidates(claims, [ours, Judgement("i#9/0", 0.9, 0.1, True, "a")])


scores = st.dictionaries(st.integers(0, 9), st.integers(-5, 0), min_size=0, max_size=10)


@given(scores=scores, seed=st.integers(0, 3), gap=st.integers(1, 3), most=st.integers(1, 4))
def test_pairs_differ_by_the_gap_and_are_at_most_so_many(scores, seed, gap, most):
    params = PairsParams(min_gap=gap, max_per_instruction=most)
    candidates = [candidate("i", s) for s in scores]
    named = {f"i#{s}": score for s, score in scores.items()}
    pairs = make_pairs([instruction("i")], candidates, named, params, seed)
    possible = sum(abs(a - b) >= gap for k, a in enumerate(scores.values()) for b in list(scores.values())[:k])
    assert len(pairs) == min(most, possible)
    assert all(p.chosen_score - p.rejected_score >= gap for p in pairs)
    assert len({(p.chosen.id, p.rejected.id) for p in pairs}) == len(pairs)


def test_equal_answers_make_no_pair_however_they_were_judged():
    candidates = [candidate("i", s, "A dog." if s < 3 else "A cat.") for s in range(4)]
    params = PairsParams(min_gap=1, max_per_instruction=10)
    pairs = make_pairs([instruction("i")], candidates, {f"i#{s}": -s for s in range(4)}, params, 1)
    assert {(p.chosen.id, p.rejected.id) for p in pairs} == {(f"i#{s}", "i#3") for s in range(3)}


def test_the_pairs_of_an_instruction_do_not_depend_on_the_others():
    scored = {f"{n}#{s}": -s for n in "ab" for s in range(6)}
    candidates = [candidate(n, s) for n in "ab" for s in range(6)]
    both = make_pairs([instruction("a"), instruction("b")], candidates, scored, PARAMS, 1)
    alone = make_pairs([instruction("b")], candidates[6:], scored, PARAMS, 1)
    assert [p for p in both if p.instruction.id == "b"] == alone


def test_two_questions_about_one_image_are_two_instructions():
    scored = {f"{n}#{s}": -s for n in "ab" for s in range(4)}
    candidates = [candidate(n, s) for n in "ab" for s in range(4)]
    assert len(make_pairs([instruction("a"), instruction("b")], candidates, scored, PARAMS, 1)) == 4


@given(lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=40))
def test_the_length_balance_never_widens_the_gap(lengths):
    pairs = [pair(c, r) for c, r in lengths]
    kept, r = balance_lengths(pairs)
    assert set(map(id, kept)) <= set(map(id, pairs))
    if pairs:
        assert kept and relative_length_gap(kept) <= relative_length_gap(pairs)
        assert all(words(p.rejected.answer) - words(p.chosen.answer) <= r * words(p.rejected.answer) for p in kept)


def test_the_length_balance_drops_the_pairs_with_a_much_longer_rejected_answer():
    pairs = [pair(10, 10)] * 8 + [pair(5, 50)] * 2
    kept, r = balance_lengths(pairs)
    assert len(kept) == 8
    assert r == pytest.approx(0.88)


def test_parquet_has_the_public_columns_and_the_image_inside(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    write_pairs(tmp_path / "pairs.parquet", [pair(2, 3)], tmp_path, "name")
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert table.to_pylist()[0]["image"] == {"bytes": b"picture", "path": "a.png"}


@pytest.fixture
def published(tmp_path):
    """Four pairs about a picture, as `write_pairs` leaves them, read by `datasets` with nothing said about them."""
    (tmp_path / "a.png").write_bytes(picture(0))
    answers = [candidate("i", s, text) for s, text in enumerate(("a dog .", "a cat ."))]
    pairs = [Pair(Instruction("i", "a.png", "what is in the image ?"), *answers, 0, -1)] * 4
    write_pairs(tmp_path / "pairs.parquet", pairs, tmp_path, "name")
    file = str(tmp_path / "pairs.parquet")
    return datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))


def test_the_parquet_says_itself_that_images_are_images_and_origins_json(published):
    assert isinstance(published[0]["image"], Image.Image)
    assert all(json.loads(row["origin_split"]) == {"model": "model", "instruction": "i"} for row in published)
    assert published["idx"][:] == ["0", "1", "2", "3"]


def test_trl_trains_on_the_parquet_with_its_columns_renamed(published, tmp_path):
    texts = {"chosen": "chosen_text", "rejected": "rejected_text"}
    chats = {f"trl_{name}": name for name in ("prompt", "chosen", "rejected")}
    model = save_tiny_llava(tmp_path / "model")
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "max_length": None}
    trainer = DPOTrainer(
        AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32),
        args=DPOConfig(output_dir=str(tmp_path / "out"), save_strategy="no", **settings),
        train_dataset=published.rename_columns(texts).rename_columns(chats),
        processing_class=AutoProcessor.from_pretrained(model),
    )
    assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-3)


def test_no_pairs_stops_the_run_with_the_way_out():
    with pytest.raises(ValueError, match=r"no pairs: among 5 scored candidates .* pairs\.min_gap = 1"):
        require_pairs([], 5, PARAMS)


def test_no_pairs_is_an_empty_file_that_still_reads(tmp_path):
    write_pairs(tmp_path / "pairs.parquet", [], tmp_path, "name")
    assert pq.read_table(tmp_path / "pairs.parquet").num_rows == 0
    assert balance_lengths([]) == ([], 1.0)
