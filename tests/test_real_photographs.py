"""The original's photographs and instruction file go through the unchanged notebooks at LLaVA-1.5's real image size."""

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from checkout import copy_repository, run
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from rlaifv.records import Instruction, read_jsonl, write_jsonl
from rlaifv.vlm.chat_format import encode
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import load_vlm

INSTRUCTIONS = 6


def llava_336(source: Path, out: Path, seed: int) -> None:
    """A tiny checkpoint's language model behind a random vision tower of LLaVA-1.5's shape: 336 px, 576 tokens."""
    small = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        image_size=336, patch_size=14, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    text = small.config.text_config
    text.max_position_embeddings = 4096
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=small.config.image_token_id,
            image_seq_length=576,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=small.config.tie_word_embeddings,
        )
    )
    model.model.language_model.load_state_dict(small.model.language_model.state_dict())
    model.lm_head.load_state_dict(small.lm_head.state_dict())
    model.generation_config = small.generation_config
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(source)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_center_crop=True
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template or (source / "chat_template.jinja").read_text(),
    ).save_pretrained(out)


@pytest.fixture(scope="module")
def repository(shared, tmp_path_factory):
    real = shared / "real"
    if not real.is_dir():
        pytest.skip(f"{real} is absent: the original's photographs are not part of the repository")
    folder = tmp_path_factory.mktemp("real") / "repository"

    def change(content) -> None:
        for role in ("policy", "labeler"):
            content[role]["path"] = f"models/{role}-336"
        section = content["prepare"]
        section.update(image_root=str(real), instructions="data/real.jsonl", per_iteration=INSTRUCTIONS)
        for split in ("dev", "test"):
            section[split].update(instructions="data/real.jsonl", instances="data/instances.json")
            section[split].update(captions=None, questions=None)
        for name in ("generate", "divide", "feedback"):
            content[name]["max_reject_rate"] = 1.0
        content["generate"].update(samples=10, temperature=1.3, max_new_tokens=64)
        content["pairs"].update(min_gap=1)
        content["ablation"].update(balance_length=False)
        content["train"].update(epochs=1, checkpoints_per_epoch=1, batch_size=2, micro_batch_size=1)

    copy_repository(folder, change)
    for seed, role in enumerate(("policy", "labeler")):
        llava_336(folder / "models" / "tiny" / role, folder / "models" / f"{role}-336", seed)
    rows = read_jsonl(real / "detail_test_30_input.jsonl")[:INSTRUCTIONS]
    (folder / "data").mkdir()
    write_jsonl(folder / "data" / "real.jsonl", rows)
    images = [{"id": k, "file_name": Path(row["image_path"]).name} for k, row in enumerate(rows)]
    (folder / "data" / "instances.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    run(folder, "rlaifv.run", "10_prepare")
    run(folder, "rlaifv.run", "12_models")
    for stage in ("20_generate", "30_divide", "40_feedback", "50_pairs", "60_train"):
        run(folder, "rlaifv.run", stage, "iteration=1", "prev=0")
    return folder


def test_the_original_instruction_file_is_taken_as_it_is(repository):
    rows = read_jsonl(repository / "data" / "prepared" / "train.jsonl")
    assert len(rows) == INSTRUCTIONS
    assert set(rows[0]) == {f.name for f in dataclasses.fields(Instruction)}
    assert read_jsonl(repository / "data" / "prepared" / "rejects.jsonl") == []


def test_every_candidate_is_divided_or_rejected_and_every_claim_is_judged(repository):
    folder = repository / "data" / "iterations" / "1"
    candidates = read_jsonl(folder / "candidates" / "candidates.jsonl")
    claims = read_jsonl(folder / "claims" / "claims.jsonl")
    rejects = read_jsonl(folder / "claims" / "rejects.jsonl")
    judgements = read_jsonl(folder / "judgements" / "judgements.jsonl")
    assert len(candidates) == INSTRUCTIONS * 10
    assert len({claim["candidate_id"] for claim in claims}) + len(rejects) == len(candidates)
    assert [j["claim_id"] for j in judgements] and {j["claim_id"] for j in judgements} == {c["id"] for c in claims}


def test_pairs_hold_the_photographs_and_one_training_run_changes_the_policy(repository, shared):
    folder = repository / "data" / "iterations" / "1"
    pairs = pq.read_table(folder / "pairs" / "pairs.parquet").to_pylist()
    assert pairs
    for row in pairs:
        assert row["image"]["bytes"] == (shared / "real" / row["image_path"]).read_bytes(), "the bytes as they were"
    before = load_vlm(str(repository / "models" / "policy-336")).model.state_dict()
    after = load_vlm(str(folder / "checkpoints" / "checkpoint-1")).model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and not any("vision_tower" in name for name in changed), "the vision tower is frozen"


def test_a_photograph_takes_576_image_tokens(repository, shared):
    vlm = load_vlm(str(repository / "models" / "policy-336"))
    row = json.loads((repository / "data" / "real.jsonl").read_text().splitlines()[0])
    encoded = encode(vlm, open_image(shared / "real" / row["image_path"]), row["question"])
    assert encoded.prompt_ids.count(vlm.model.config.image_token_id) == 576
    assert encoded.inputs["pixel_values"].shape == (1, 3, 336, 336)
