"""OmniLMM's released layout becomes an ordinary checkpoint and comes back the same; what is not like it is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_omnilmm import HEADS, save_original
from transformers import AutoTokenizer

from rlaifv.convert.layouts import Layout
from rlaifv.convert.omnilmm import convert_omnilmm, restore_omnilmm
from rlaifv.vlm.loading import load_vlm


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return save_original(tmp_path_factory.mktemp("omnilmm") / "released")


@pytest.fixture
def copy(released, tmp_path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "copy"))


def convert(source: Path, out: Path, heads: int | None = HEADS) -> list[str]:
    return convert_omnilmm(Layout(source.name, "omnilmm", source), out, heads=heads)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Let `change` edit the weights, which are in one file afterwards."""
    found = weights(folder)
    change(found)
    for file in folder.glob("model*"):
        file.unlink()
    save_file(found, folder / "model.safetensors")


def configure(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_a_released_checkpoint_comes_back_with_the_same_tensors_settings_and_tokens(released, tmp_path):
    convert(released, tmp_path / "ours")
    restore_omnilmm(tmp_path / "ours", tmp_path / "back")
    assert same(weights(tmp_path / "back"), weights(released))
    assert len([*(tmp_path / "back").glob("*.safetensors")]) == 2
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (released, tmp_path / "back"))
    assert before == after
    text = "<|user|>\n<im_start><im_patch><im_end>\nIs there a dog?</s>\n<box>§"
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "ours", tmp_path / "back"))
    assert old(text)["input_ids"] == new(text)["input_ids"]
    merges = json.loads((tmp_path / "back" / "tokenizer.json").read_text())["model"]["merges"]
    assert all(isinstance(merge, str) for merge in merges), "as tokenizers of 2023 read them"


def test_the_golden_checkpoint_comes_back_the_same(shared, tmp_path):
    source = shared / "golden_models" / "omnilmm" / "checkpoint"
    if not source.is_dir():
        pytest.skip(f"{source} is absent: what the original classes saved is not part of the repository")
    convert(source, tmp_path / "ours", heads=4)
    restore_omnilmm(tmp_path / "ours", tmp_path / "back")
    assert same(weights(tmp_path / "back"), weights(source))
    for name in ("config.json", "tokenizer.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (source, tmp_path / "back"))
        before.pop("transformers_version", None)
        assert before == after, name


def test_a_checkpoint_that_was_trained_here_goes_back_under_the_originals_names(released, tmp_path):
    convert(released, tmp_path / "ours")
    vlm = load_vlm(str(tmp_path / "ours"), dtype="bfloat16", device="cpu")
    vlm.model.lm_head.weight += 1
    vlm.model.save_pretrained(tmp_path / "trained")
    vlm.processor.save_pretrained(tmp_path / "trained")
    restore_omnilmm(tmp_path / "trained", tmp_path / "back")
    before, after = weights(released), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert [name for name in before if not before[name].equal(after[name])] == ["lm_head.weight"]


def test_bin_shards_give_the_same_checkpoint(copy, tmp_path):
    convert(copy, tmp_path / "ours")
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    for file in [*copy.glob("*.safetensors")]:
        torch.save(load_file(file), file.with_name(file.name.replace("model", "pytorch_model")).with_suffix(".bin"))
        file.unlink()
    places = index["weight_map"].items()
    index["weight_map"] = {k: v.replace("model", "pytorch_model").replace(".safetensors", ".bin") for k, v in places}
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors.index.json").unlink()
    convert(copy, tmp_path / "again")
    assert same(weights(tmp_path / "ours"), weights(tmp_path / "again"))


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda found: found.pop(name))


def larger(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda found: found.update({name: torch.zeros(9, 9)}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("model.vision_tower.pos_embed"), "lacks model.vision_tower.pos_embed: its image encoder is not in it"),
        (without("model.vision_tower.blocks.1.norm2.bias"), "lacks the weight model.vision_tower.blocks.1.norm2.bias"),
        (without("model.resampler.pos_embed"), "lacks the weight model.resampler.pos_embed"),
        (without("model.layers.1.mlp.up_proj.weight"), "lacks the weight model.layers.1.mlp.up_proj.weight"),
        (larger("model.mm_projector.weight"), "holds model.mm_projector.weight, which no released OmniLMM has"),
        (larger("model.resampler.proj"), r"model.resampler.proj is \(9, 9\), by config.json it is \(256, 256\)"),
        (lambda folder: configure(folder, mm_use_im_start_end=False), "mm_use_im_start_end is not true"),
        (lambda folder: configure(folder, image_size=50), "50 pixels in patches of 14"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    ],
)
def test_what_is_not_like_a_release_is_refused_by_name_before_anything_is_written(copy, tmp_path, change, said):
    change(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as refused:
        convert(copy, tmp_path / "ours")
    assert "\n" not in str(refused.value) and not (tmp_path / "ours").exists()


def test_heads_are_known_for_the_released_width_alone_and_asked_for_otherwise(released, tmp_path):
    with pytest.raises(ValueError, match="32 wide, so its attention heads are not known: give them"):
        convert(released, tmp_path / "ours", heads=None)
    with pytest.raises(ValueError, match="32 in 3 heads"):
        convert(released, tmp_path / "ours", heads=3)


def test_tokens_beyond_the_embeddings_are_refused(copy, tmp_path):
    def shorten(found: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            found[name] = found[name][:-3].clone()

    rewrite(copy, shorten)
    configure(copy, vocab_size=len(weights(copy)["lm_head.weight"]))
    with pytest.raises(ValueError, match=r"is token 106[5-7] of 1065 that the weights have"):
        convert(copy, tmp_path / "ours")
