"""A model's own settings change what it is shown, are saved with what is written, and are refused where they cannot be.

The checkpoints are stand-ins with the hub's file layout: LLaVA-1.5 names CLIP's image processor there.
"""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import build, picture, template
from PIL import Image, ImageDraw
from tiny_llava import save_tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

from rlaifv.params import TrainParams, load_params
from rlaifv.records import ModelRecord
from rlaifv.steps.models import write_models
from rlaifv.training.checkpoints import write_checkpoint
from rlaifv.training.policy import load_policy
from rlaifv.vlm import loading
from rlaifv.vlm.chat_format import encode, folded_prompt, prompt_text
from rlaifv.vlm.checkpoint import fingerprint_checkpoint, write_pointer
from rlaifv.vlm.loading import check_model, load_model, load_reader, load_vlm

SYSTEM = "You see the image."


def saved(name: str, folder: Path, chat_template: str | None = None) -> str:
    vlm = build(name)
    vlm.model.save_pretrained(folder)
    reads = vlm.processor or vlm.tokenizer
    if chat_template:
        reads.chat_template = chat_template
    reads.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    return str(save_tiny_llava(tmp_path_factory.mktemp("llava")))


def record(path: str, **settings) -> ModelRecord:
    return ModelRecord(path, None, "float32", "cpu", "", **settings)


def pixels(path: str, image: Image.Image, **settings) -> torch.Tensor:
    return encode(load_reader(path, settings=settings), image, "what is in the image ?").inputs["pixel_values"]


def photo_and_photo_without_sides() -> tuple[Image.Image, Image.Image]:
    """640×480, and the same with its left and right eighth painted over."""
    photo = picture(640, 480)
    painted = photo.copy()
    for left in (0, 560):
        ImageDraw.Draw(painted).rectangle((left, 0, left + 79, 479), fill="black")
    return photo, painted


# ---- the image processor


def test_with_do_pad_llava_sees_the_sides_of_a_photo_that_its_hub_files_crop_away(llava):
    cropped, cropped_painted = (pixels(llava, image) for image in photo_and_photo_without_sides())
    inner = slice(3, -3)  # resampling draws a little of what is cut off into the columns at the edge
    assert torch.equal(cropped[..., inner], cropped_painted[..., inner])
    whole, painted = (pixels(llava, image, processor={"do_pad": True}) for image in photo_and_photo_without_sides())
    inside = slice(4, -4)  # rows: above and below is the padding
    assert all((whole - painted)[..., inside, side].abs().min() > 0.1 for side in (slice(0, 2), slice(-2, None)))


def test_padding_is_the_original_s_square_of_the_mean_color(llava):
    processor = load_reader(llava).processor.image_processor
    photo = Image.new("RGB", (640, 480), "white")
    square = Image.new("RGB", (640, 640), tuple(int(255 * mean) for mean in processor.image_mean))
    square.paste(photo, (0, 80))
    assert torch.allclose(pixels(llava, photo, processor={"do_pad": True}), pixels(llava, square), atol=1e-4)


def test_what_training_writes_has_the_settings_by_itself(llava, tmp_path):
    own = {"processor": {"do_pad": True}, "system": SYSTEM}
    write_pointer(tmp_path / "policy", record(llava, **own))  # iteration 0 of a run
    policy = load_policy(str(tmp_path / "policy"), TrainParams(dtype="float32"))
    write_checkpoint(policy.model, policy.processor, tmp_path / "trained", "float32")
    photo, painted = photo_and_photo_without_sides()
    asked = pixels(llava, photo, **own)
    trained = str(tmp_path / "trained")
    assert torch.equal(pixels(trained, photo), asked) and not torch.equal(pixels(trained, painted), asked)
    assert torch.equal(pixels(trained, photo, **own), asked), "set twice is set once"
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
    elsewhere = AutoProcessor.from_pretrained(trained)  # a server, or another trainer
    assert torch.equal(elsewhere.image_processor(photo, return_tensors="pt")["pixel_values"], asked)
    for vlm in (load_reader(trained), load_reader(trained, settings=own), load_reader(llava, settings=own)):
        assert prompt_text(vlm, "what ?") == elsewhere.apply_chat_template(turns, add_generation_prompt=True)
        assert prompt_text(vlm, "what ?").count(SYSTEM) == 1


def image_tokens(path: str, pixels: tuple[int, int], **processor) -> int:
    return folded_prompt(load_reader(path, settings={"processor": processor}), picture(*pixels), "Is it?")[1]


@pytest.mark.parametrize("cap", [{"max_pixels": 1024}, {"size": {"longest_edge": 1024}}])
def test_an_image_of_qwen_is_capped_in_tokens(tmp_path, cap):
    path = saved("qwen3-vl", tmp_path)
    assert image_tokens(path, (64, 64)) == 64  # of 8 by 8 pixels
    assert image_tokens(path, (64, 64), **cap) == 16


def test_an_image_of_llava_next_is_capped_by_its_tiles_and_the_model_knows(tmp_path):
    path, fewer = saved("llava-next", tmp_path), {"image_grid_pinpoints": [[24, 48]]}
    assert image_tokens(path, (48, 48), **fewer) < image_tokens(path, (48, 48))
    vlm = load_vlm(path, settings={"processor": fewer})
    coded = encode(vlm, picture(48, 48), "Is it?")
    logits = vlm.model(input_ids=torch.tensor([coded.prompt_ids]), **coded.inputs).logits
    assert logits.shape[1] == len(coded.prompt_ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"processor": {"do_padd": True}}, r"CLIPImageProcessorPil has no setting do_padd; it has .*do_resize"),
        ({"processor": {"max_pixels": 9}}, r"has no setting max_pixels; it has crop_size"),
        ({"processor": {"size": {"side": 9}}}, r"size must have one of"),
        ({"template": {"enable_thinkin": False}}, r"the chat template reads no variable 'enable_thinkin'"),
    ],
)
def test_a_setting_that_a_checkpoint_does_not_have_is_refused_in_one_line(llava, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        load_vlm(llava, settings=settings)
    assert str(error.value).startswith(llava) and len(str(error.value).splitlines()) == 1


def test_a_text_model_has_no_image_settings(tmp_path):
    with pytest.raises(ValueError, match=r"it sees no images, so it has no settings for them"):
        load_reader(saved("llama", tmp_path), settings={"processor": {"do_pad": True}})


def test_settings_are_part_of_a_model_s_fingerprint(llava, tmp_path):
    plain, system = record(llava), record(llava, system=SYSTEM)
    marks = [fingerprint_checkpoint(llava, settings=r.settings) for r in (plain, system)]
    assert marks[0] == fingerprint_checkpoint(llava) != marks[1]
    write_pointer(tmp_path / "policy", system)
    assert (
        fingerprint_checkpoint(str(tmp_path / "policy")) == marks[1] == load_vlm(str(tmp_path / "policy")).fingerprint
    )


# ---- the chat template


@pytest.mark.parametrize("name", ["llava", "llama"])
def test_a_system_turn_comes_before_every_question_that_has_none(name, tmp_path):
    chat = template("<image>\n").replace(
        "{% else %}ASSISTANT:",
        "{% elif message['role'] == 'system' %}"
        "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }} "
        "{% else %}ASSISTANT:",
        1,
    )
    vlm = load_reader(saved(name, tmp_path, chat), settings={"system": 'Say "no" — {{ 1 }}\n%} é 🙂'})
    assert prompt_text(vlm, "Is it?").startswith('Say "no" — {{ 1 }}\n%} é 🙂 USER: ')
    reads = vlm.processor or vlm.tokenizer
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Is it?"}]
    assert reads.apply_chat_template(own, tokenize=False) == "Mine. USER: Is it? "


def test_a_system_text_that_the_template_leaves_out_is_refused(tmp_path):
    chat = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"leaves system turns out: write system: null"):
        load_reader(saved("llama", tmp_path, chat), settings={"system": SYSTEM})


def thinking(folder: Path, end: str, name: str = "llava") -> str:
    """A checkpoint whose generation prompt ends so; `end` is Jinja."""
    return saved(name, folder, template("<image>\n") + "{% if add_generation_prompt %}{{ " + end + " }}{% endif %}")


OFF = "enable_thinking is defined and not enable_thinking"


@pytest.mark.parametrize("role", ["policy", "labeler", "divider"])
@pytest.mark.parametrize(
    "end",
    [
        f"'' if {OFF} else '<think>\\n'",  # opens a thought unless it is switched off
        f"'<think>\\n\\n</think>\\n\\n' if {OFF} else ''",  # leaves the opening to the model
    ],
)
def test_a_model_that_thinks_aloud_is_refused_by_name_until_it_is_switched_off(tmp_path, role, end):
    path = thinking(tmp_path, end)
    for on in ({}, {"enable_thinking": True}):
        with pytest.raises(
            ValueError, match=rf"^{role} {path} thinks aloud .*{role}\.template: {{enable_thinking: false}}$"
        ):
            check_model(record(path, template=on), role)
    check_model(record(path, template={"enable_thinking": False}), role)


def test_a_thought_without_a_switch_is_refused_and_a_closed_one_is_fine(tmp_path):
    with pytest.raises(ValueError, match=r"thinks aloud before it answers: use its version that does not"):
        check_model(record(thinking(tmp_path / "open", "'<think>\\n'")), "policy")
    check_model(record(thinking(tmp_path / "closed", "'<think>\\n\\n</think>\\n\\n'")), "policy")


# ---- who can play which role


def test_a_text_model_can_be_divider_alone(tmp_path):
    path = saved("llama", tmp_path)
    check_model(record(path), "divider")
    for role in ("policy", "labeler"):
        with pytest.raises(ValueError, match=rf"^{role} {path} is a llama model that sees no images"):
            check_model(record(path), role)


def test_a_model_whose_prompt_has_no_image_or_no_template_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^labeler .*its chat template gives an image no place"):
        check_model(record(saved("llava", tmp_path / "blind", template(""))), "labeler")
    path = saved("llava", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"^policy .*it has no chat template: give the version of it"):
        check_model(record(path), "policy")


def test_the_stage_models_refuses_before_any_weights_are_read(tmp_path, monkeypatch):
    params = load_params()
    text = replace(params, policy=params.divider)
    monkeypatch.setattr("rlaifv.steps.models.fingerprint_checkpoint", lambda *_: pytest.fail("read the weights"))
    with pytest.raises(ValueError, match=r"^policy models/tiny/divider is a llama model that sees no images"):
        write_models(text, text.server, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- where and how it is loaded


def test_a_loaded_model_is_told_in_one_line(llava, caplog):
    caplog.set_level(logging.INFO, "rlaifv")
    load_vlm(llava)
    assert caplog.messages == [f"{llava} on cpu in float32, 0.0 M parameters"]
    assert loading.rounded(7_063_000_000) == "7.1 B" and loading.rounded(1_530_000) == "1.5 M"


def test_a_large_model_runs_on_a_cpu_only_when_that_is_asked_for(llava, monkeypatch):
    monkeypatch.setattr(loading, "LARGE", 1000)
    with pytest.raises(ValueError, match=r"^policy .* parameters and torch .* finds no GPU .*driver.*device: cpu"):
        check_model(ModelRecord(llava, None, "float32", "auto", ""), "policy")
    with pytest.raises(ValueError, match=r"finds no GPU"):
        load_vlm(llava)
    assert load_vlm(llava, device="cpu").device.type == "cpu"


@pytest.mark.parametrize(("free", "goes_to"), [(1e9, 0), (1e3, "auto")])
def test_a_model_that_fits_one_gpu_stays_on_it(llava, monkeypatch, free, goes_to):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 8e10))
    assert asked_of_transformers(llava, monkeypatch)["device_map"] == goes_to


class Asked(Exception):
    """What transformers would have loaded."""


def asked_of_transformers(path: str, monkeypatch, **model) -> dict:
    def loads(*_, **options):
        raise Asked(options)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", loads)
    with pytest.raises(Asked) as asked:
        load_model(ModelRecord(path, None, "bfloat16", model.pop("device", "auto"), "", **model))
    return asked.value.args[0]


def test_four_bits_are_asked_of_transformers_with_what_qlora_names(llava, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: True)
    monkeypatch.setattr("transformers.utils.quantization_config.BitsAndBytesConfig.post_init", lambda self: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    asked = asked_of_transformers(llava, monkeypatch, load_in_4bit=True)
    config = asked["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert config.bnb_4bit_compute_dtype == torch.bfloat16 and asked["device_map"] == 0


def test_four_bits_need_bitsandbytes_and_a_gpu(llava):
    with pytest.raises(ModuleNotFoundError, match=r"load_in_4bit needs bitsandbytes.*pip install bitsandbytes"):
        load_vlm(llava, device="cpu", load_in_4bit=True)
    with pytest.raises(ValueError, match=r"finds no GPU for it"):
        load_vlm(llava, load_in_4bit=True)
