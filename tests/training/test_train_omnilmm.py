"""OmniLMM trains like any other model: in full, with LoRA, packed or plain."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_llava import save_pairs
from tiny_omnilmm import HEADS, save_original
from training_runs import PARAMS, log_rows, run

from rlaifv.convert.layouts import Layout
from rlaifv.convert.omnilmm import convert_omnilmm
from rlaifv.vlm.loading import load_vlm

ONE_EPOCH = replace(PARAMS, epochs=1, checkpoints_per_epoch=1, learning_rate=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("omnilmm")
    convert_omnilmm(Layout("tiny", "omnilmm", save_original(folder / "released")), folder / "model", heads=HEADS)
    save_pairs(folder / "pairs.parquet", 8)
    return folder


def moved(folder: Path, checkpoint: str) -> set[str]:
    """The names of what training has changed, weights and tables."""
    before, after = (load_vlm(str(path), device="cpu").model.state_dict() for path in (folder / "model", checkpoint))
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_packed_and_plain_pairs_make_the_same_steps_and_move_all_but_tower_and_positions(folder):
    packed, plain = (run(folder, f"packed-{on}", replace(ONE_EPOCH, packed=on)) for on in (True, False))
    assert (packed.layout, plain.layout) == ("packed, features kept", "plain, features kept")
    for ours, theirs in zip(log_rows(packed), log_rows(plain), strict=True):
        for value in ("loss", "logps_chosen", "logps_rejected", "grad_norm"):
            assert ours[value] == pytest.approx(theirs[value], rel=1e-4, abs=1e-4), value
    names = moved(folder, packed.checkpoints[-1])
    assert {"lm_head.weight", "model.resampler.query", "model.language_model.layers.1.mlp.up_proj.weight"} <= names
    assert "model.resampler.pos_embed" not in names and not any("vision_tower" in name for name in names)


def test_lora_with_recomputed_activations_moves_the_language_model_alone(folder):
    params = replace(ONE_EPOCH, lora_r=4, gradient_checkpointing=True, learning_rate=1e-2)
    names = moved(folder, run(folder, "lora", params).checkpoints[-1])
    assert names and all(".language_model.layers." in name and name.endswith("_proj.weight") for name in names)
