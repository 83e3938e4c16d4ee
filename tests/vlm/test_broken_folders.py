"""Folders that look like a checkpoint and are none: each is refused in one line, and nothing in it runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_llava import save_tiny_llava
from transformers import LlamaConfig, LlamaForCausalLM

from rlaifv.records import ModelRecord
from rlaifv.vlm.loading import check_model, load_vlm

CODE = "from pathlib import Path\nPath(__file__).with_name('it-ran').touch()\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("whole"))


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def without_image_token(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<image> ", ""))


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def remote_code(folder: Path) -> None:
    (folder / "modeling.py").write_text(CODE)
    code = {"AutoConfig": "modeling.Config", "AutoModelForImageTextToText": "modeling.Model"}
    edit(folder / "config.json", model_type="own", auto_map=code)


def text_model(folder: Path) -> None:
    small = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 8}
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, **small)
    LlamaForCausalLM(config).save_pretrained(folder)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_cut(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])


def tokenizer_cut(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (without_template, "template"),
        (without_image_token, "image"),
        (pickle_only, "safetensors"),
        (remote_code, "custom code"),
        (text_model, "sees no images"),
        (no_config, "config"),
        (config_cut, "config"),
        (tokenizer_cut, "broken: tokenizer.json cannot be read"),
        (no_weights, "safetensors"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused_in_one_line_and_nothing_in_it_runs(whole, tmp_path, break_it, said):
    folder = shutil.copytree(whole, tmp_path / "broken")
    break_it(folder)
    record = ModelRecord(str(folder), None, "float32", "cpu", "0" * 16)
    with pytest.raises((OSError, ValueError)) as caught:
        check_model(record, "labeler")
        load_vlm(str(folder), device="cpu")
    assert "\n" not in str(caught.value) and said in str(caught.value).lower(), str(caught.value)
    assert not (folder / "it-ran").exists()
