"""A checkpoint whose weights are not all there is refused by name: transformers would give the model random ones."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_llava import save_tiny_llava
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForImageTextToText

from rlaifv import plan
from rlaifv.chat.__main__ import main as chat
from rlaifv.params import ModelParams, TrainParams
from rlaifv.training.policy import load_policy
from rlaifv.vlm.loading import load_reader, load_vlm

FILE = "model.safetensors"
HEAD = "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def changed(whole, tmp_path) -> Callable[[Callable[[str, torch.Tensor], dict]], str]:
    """A copy of the checkpoint whose every weight became what a function of its name and value gives."""

    def make(change: Callable[[str, torch.Tensor], dict], folder: str = "changed") -> str:
        shutil.copytree(whole, tmp_path / folder)
        weights = {}
        for name, value in load_file(whole / FILE).items():
            weights |= change(name, value)
        save_file(weights, tmp_path / folder / FILE, metadata={"format": "pt"})
        return str(tmp_path / folder)

    return make


def without(part: str) -> Callable[[str, torch.Tensor], dict]:
    return lambda name, value: {} if part in name else {name: value}


def refusal(load: Callable[[], object], capfd) -> str:
    """The one line that a load ends with; nothing else is said."""
    with pytest.raises(ValueError) as caught:
        load()
    assert "LOAD REPORT" not in capfd.readouterr().err and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("part", "count", "first"),
    [
        ("multi_modal_projector", 4, "model.multi_modal_projector.linear_1.bias"),
        ("vision_tower", 55, "model.vision_tower.embeddings.class_embedding"),
        ("embed_tokens", 1, "model.language_model.embed_tokens.weight"),
        ("layers.1.mlp.up_proj", 1, "model.language_model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_missing_weights_are_counted_and_named(changed, capfd, part, count, first):
    path = changed(without(part))
    said = refusal(lambda: load_vlm(path, device="cpu"), capfd)
    assert said.startswith(f"{path} lacks {count} weight") and first in said and "would be random" in said


def test_where_all_are_renamed_both_names_are_told(changed, capfd):
    path = changed(lambda name, value: {f"module.{name}": value})
    said = refusal(lambda: load_vlm(path, device="cpu"), capfd)
    assert "lacks 80 weights (lm_head.weight, " in said and f"holds 80 weights (module.{HEAD}, " in said


def test_a_weight_of_another_shape_is_named_with_both(changed, capfd):
    path = changed(lambda name, value: {name: value[:-1].clone() if name == HEAD else value})
    assert "has 1 weight (lm_head.weight (32, 32) instead of (33, 32))" in refusal(lambda: load_vlm(path), capfd)


def test_a_file_that_is_cut_is_named(changed, capfd):
    path = changed(lambda name, value: {name: value})
    data = (Path(path) / FILE).read_bytes()
    (Path(path) / FILE).write_bytes(data[: len(data) // 2])
    assert refusal(lambda: load_vlm(path), capfd).startswith(f"{path}: its weights cannot be read")


def test_weights_that_the_model_does_not_have_are_only_told(changed, caplog):
    path = changed(lambda name, value: {name: value, **({"mtp.head.weight": value.clone()} if name == HEAD else {})})
    with caplog.at_level(logging.WARNING, "rlaifv"):
        load_vlm(path, device="cpu")
    assert f"{path} holds 1 weight (mtp.head.weight) that the model has no use for" in caplog.messages


@pytest.mark.parametrize("kept", ["lm_head", "embed_tokens"])
def test_a_weight_that_is_tied_to_one_that_is_there_is_not_missing(changed, caplog, kept):
    other = {"lm_head": "embed_tokens", "embed_tokens": "lm_head"}[kept]
    path = Path(changed(without(other)))
    config = json.loads((path / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        model = load_vlm(str(path), device="cpu").model
    (name,) = (name for name in load_file(path / FILE) if kept in name)
    expected = load_file(path / FILE)[name]
    assert torch.equal(model.get_input_embeddings().weight, expected)
    assert torch.equal(model.get_output_embeddings().weight, expected) and not caplog.messages


def test_training_and_chat_refuse_them_too(changed, capfd, monkeypatch):
    path = changed(without("multi_modal_projector"))
    assert "lacks 4 weights" in refusal(lambda: load_policy(path, TrainParams(dtype="float32")), capfd)
    image = Path(path) / "a.png"
    Image.new("RGB", (32, 32)).save(image)
    with pytest.raises(SystemExit) as caught:
        chat(["--image", str(image), "--question", "what is it ?", "--model", path])
    assert str(caught.value).startswith(f"chat: {path} lacks 4 weights") and "\n" not in str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_of_a_sharded_run_refuses_them_although_it_reads_no_weight_itself(changed, capfd, monkeypatch, rank):
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    torch.distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    try:
        load_policy(changed(lambda name, value: {name: value}), TrainParams())
        said = refusal(lambda: load_policy(changed(without("vision_tower"), "less"), TrainParams()), capfd)
    finally:
        torch.distributed.destroy_process_group()
    assert "lacks 55 weights" in said


# ---- adapters


@pytest.fixture
def adapter(whole, tmp_path) -> Path:
    model = AutoModelForImageTextToText.from_pretrained(whole)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(adapter: Path, change: Callable[[str, torch.Tensor], dict]) -> None:
    file, weights = adapter / "adapter_model.safetensors", {}
    for name, value in load_file(file).items():
        weights |= change(name, value)
    save_file(weights, file)


def test_an_adapter_that_fits_is_merged(whole, adapter):
    rewrite(adapter, lambda name, value: {name: torch.ones_like(value)})
    plain, merged = (load_vlm(str(whole), device="cpu", adapter=given).model for given in (None, str(adapter)))
    layer = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(plain.state_dict()[layer], merged.state_dict()[layer])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda name, value: {} if "layers.1" in name and "lora_A" in name else {name: value},
            r"lacks \d+ weights? \(",
        ),
        (lambda name, value: {name.replace("layers", "blocks"): value}, r"lacks \d+ weights .* and holds \d+ weights"),
        (lambda name, value: {name: value[:, :1].clone()}, "is another model's: .*size mismatch"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(whole, adapter, capfd, change, said):
    rewrite(adapter, change)
    line = refusal(lambda: load_vlm(str(whole), device="cpu", adapter=str(adapter)), capfd)
    assert line.startswith(f"the adapter {adapter} ") and re.search(said, line)


# ---- what has to be rewritten first


@pytest.mark.parametrize(
    "own",
    [
        {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
        {"model_type": "llava", "mm_vision_tower": "../clip_tower", "hidden_size": 64},
        {"model_type": "omnilmm", "mm_vision_tower": "eva02", "num_query": 64},
    ],
)
def test_an_original_layout_is_never_loaded_and_the_command_that_converts_it_is_named(
    own, tmp_path, monkeypatch, capfd
):
    (tmp_path / "config.json").write_text(json.dumps(own))
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    path = str(tmp_path)
    params = ModelParams(path=path, **UNSET)
    for load in (load_vlm, load_reader, lambda _: load_policy(path, TrainParams()), lambda _: plan.measure(params)):
        assert f"`python -m rlaifv.convert {path} OUT`" in refusal(lambda load=load: load(path), capfd)


UNSET = {"revision": None, "dtype": "float32", "device": "cpu", "load_in_4bit": False}
UNSET |= {"processor": {}, "template": {}, "system": None}


def test_a_folder_with_an_adapter_names_the_command_that_merges_it(whole, adapter, capfd, tmp_path):
    both = shutil.copytree(whole, tmp_path / "both")
    shutil.copyfile(adapter / "adapter_config.json", both / "adapter_config.json")
    for path in (adapter, both):
        said = refusal(lambda path=path: load_vlm(str(path)), capfd)
        assert said.startswith(f"{path} holds a LoRA adapter: `python -m rlaifv.training.checkpoints MODEL {path} OUT`")
