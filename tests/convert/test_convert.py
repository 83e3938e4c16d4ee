"""A made-up checkpoint in the original layout becomes an ordinary one, comes back as it was, or is refused by name."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import Hub, settings_for
from original_llava import pieces, save_adapter, save_original, sentencepiece_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_llava import save_pairs
from transformers import AutoModelForImageTextToText

import rlaifv.convert.weights
from rlaifv import ROOT
from rlaifv.convert.__main__ import main
from rlaifv.convert.weights import all_tensors
from rlaifv.params import load_params
from rlaifv.training.checkpoints import write_checkpoint
from rlaifv.training.dpo import PairScorer
from rlaifv.training.packed_pairs import choose_layout
from rlaifv.training.pair_data import PairData
from rlaifv.training.policy import freeze
from rlaifv.vlm.chat_format import UnfitText, encode, prompt_text
from rlaifv.vlm.loading import load_reader, load_vlm

PHOTO = Image.linear_gradient("L").resize((40, 20)).convert("RGB")


def convert(source: Path, out: Path, *options: str) -> Path:
    main([str(source), str(out), *options])
    return out


def refused(capsys, *arguments: object) -> str:
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, str) and len(end.value.code.splitlines()) == 1
    return end.value.code


def change(folder: Path, name: str = "config.json", **values) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def logits(folder: Path) -> torch.Tensor:
    vlm = load_vlm(str(folder), dtype="float32", device="cpu")
    encoded = encode(vlm, PHOTO, "Is it a dog?")
    with torch.inference_mode():
        return vlm.model(input_ids=torch.tensor([encoded.prompt_ids]), **encoded.inputs).logits[0]


def same_tensors(one: Path, other: Path) -> bool:
    was, now = dict(all_tensors(one)), dict(all_tensors(other))
    return was.keys() == now.keys() and all(
        was[name].dtype == now[name].dtype and torch.equal(was[name], now[name]) for name in was
    )


KINDS = {
    "as RLAIF-V-7B": {"shards": 2},
    "as LLaVA-1.5": {"tower": False, "bin": True, "shards": 3, "model_type": "llava"},
    "linear": {"mm_projector_type": None, "tower": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_an_original_is_in_the_ordinary_checkpoint_and_comes_back(tmp_path, kind):
    source = save_original(tmp_path, **KINDS[kind])
    out = convert(source, tmp_path / "out")
    model, found = AutoModelForImageTextToText.from_pretrained(out, dtype="float32", output_loading_info=True)
    assert not any(found.values())
    clip = load_file(tmp_path / "clip" / "model.safetensors")
    ours = model.model.vision_tower.state_dict()
    for name, weight in clip.items():
        ours_now = ours[name.removeprefix("vision_model.")]
        assert torch.equal(ours_now, weight.bfloat16().float() if KINDS[kind].get("tower", True) else weight)
    back = convert(out, tmp_path / "back", "--to", "original")
    assert same_tensors(source, back)
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert torch.equal(logits(convert(back, tmp_path / "again", "--tower", str(tmp_path / "clip"))), logits(out))


def test_the_tokenizer_spells_and_merges_as_sentencepiece_and_has_a_place_for_images(tmp_path):
    reader = load_reader(str(convert(save_original(tmp_path), tmp_path / "out")))
    tokens = reader.tokenizer.convert_ids_to_tokens
    ids = reader.tokenizer("the dog\né")["input_ids"]
    assert tokens(ids) == ["<s>", "▁the", "▁dog", "<0x0A>", "<0xC3>", "<0xA9>"]
    assert len(reader.tokenizer) == len(pieces()) and reader.tokenizer.convert_tokens_to_ids("<image>") == 0
    assert prompt_text(reader, "Is it?").endswith("questions. USER: <image> \nIs it? ASSISTANT:")
    assert prompt_text(reader, "Is it?", answer="No.").endswith("ASSISTANT: No.</s>")
    for text in ("<image> again", "a </s> b"):
        with pytest.raises(UnfitText):
            prompt_text(reader, text)


def test_a_converted_checkpoint_is_trained_packed_and_from_kept_features(tmp_path):
    vlm = load_vlm(str(convert(save_original(tmp_path, max_position_embeddings=1024), tmp_path / "out")), device="cpu")
    data = PairData(vlm, save_pairs(tmp_path / "pairs.parquet", 4))
    params = load_params().train
    freeze(vlm.model, params)
    assert choose_layout(PairScorer(vlm.model), vlm, data, params) == "packed, features kept"


def test_what_a_user_should_know_is_said(tmp_path, capsys):
    convert(save_original(tmp_path), tmp_path / "out", "--system", "Be brief.")
    said = capsys.readouterr().out
    for text in ("in the release’s files, for images of 28 pixels, padded", "two layers", "begin with: Be brief.",
                 "temperature 0.9, top_p 0.6, left out"):  # fmt: skip
        assert text in said
    assert "temperature" not in (tmp_path / "out" / "generation_config.json").read_text()
    assert "Be brief." in (tmp_path / "out" / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'; what is converted has None or square or"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear', its weights are another projector's"),
        ({"model_type": "llava_mistral"}, "model_type is 'llava_mistral'"),
        ({"mm_tunable_parts": "all"}, "mm_tunable_parts is 'all', which LLaVA-1.5 has not"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"mm_vision_tower": "../siglip"}, "--tower"),
        ({"text_config": {}}, "in no layout that is converted"),
    ],
)
def test_another_layout_is_refused_by_name(tmp_path, capsys, config, said):
    source = save_original(tmp_path)
    change(source, **config)
    assert said in refused(capsys, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def spoil(source: Path, do) -> None:
    weights = load_file(source / "model.safetensors")
    do(weights)
    save_file(weights, source / "model.safetensors")


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (
            lambda w: w.update({"model.image_newline": torch.zeros(32)}),
            "model.image_newline is no weight of LLaVA-1.5",
        ),
        (lambda w: w.pop("model.norm.weight"), "lacks 1 weight (model.language_model.norm.weight)"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), "norm.weight (3,) instead of (32,)"),
    ],
)
def test_a_weight_too_many_or_too_few_or_of_another_shape_stops(tmp_path, capsys, do, said):
    source = save_original(tmp_path)
    spoil(source, do)
    assert said in refused(capsys, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickled_code_is_not_run(tmp_path, capsys):
    source = save_original(tmp_path, bin=True)
    torch.save({"model.norm.weight": subprocess.Popen}, source / "pytorch_model.bin")
    assert "pytorch_model.bin cannot be read: Weights only load failed" in refused(capsys, source, tmp_path / "out")


def test_a_tokenizer_of_another_kind_is_refused(tmp_path, capsys):
    source = save_original(tmp_path)
    (source / "tokenizer.model").write_bytes(sentencepiece_model(byte_fallback=False))
    assert "is not of Llama's kind" in refused(capsys, source, tmp_path / "out")
    (source / "tokenizer.model").write_bytes(b"no model")
    assert "is no SentencePiece model" in refused(capsys, source, tmp_path / "out2")


def test_an_adapter_is_added_to_the_language_model_alone_and_to_all_of_it(tmp_path, capsys):
    source = save_original(tmp_path)
    adapter = save_adapter(tmp_path / "adapter", source)
    change(adapter, "adapter_config.json", base_model_name_or_path=str(source))
    plain, summed = (dict(all_tensors(convert(s, tmp_path / s.name / "out"))) for s in (source, adapter))
    changed = {name for name in plain if not torch.equal(plain[name].float(), summed[name].float())}
    assert len(changed) == 9 and all("language_model.model.layers" in name for name in changed)
    lora = torch.load(adapter / "adapter_model.bin", weights_only=True)
    name = "model.layers.1.mlp.down_proj"
    b, a = (lora[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
    whole = plain[f"language_model.{name.replace('model', 'model', 1)}.weight"].float() + 2 / 4 * b @ a
    assert torch.equal(summed[f"language_model.{name}.weight"], whole), "in float32: nothing is rounded"
    half = dict(all_tensors(convert(adapter, tmp_path / "half", "--dtype", "bfloat16")))
    assert {weight.dtype for weight in half.values()} == {torch.bfloat16}
    lora.pop(f"base_model.model.{name}.lora_A.weight")
    torch.save(lora, adapter / "adapter_model.bin")
    assert "half of a pair" in refused(capsys, adapter, tmp_path / "no")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_rslora": True}, "use_rslora: True"),
        ({"bias": "all"}, "bias: all"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path, capsys, settings, said):
    source = save_original(tmp_path)
    adapter = save_adapter(tmp_path / "adapter", source)
    change(adapter, "adapter_config.json", **settings)
    assert said in refused(capsys, adapter, tmp_path / "out", "--base", source)


def test_the_lora_release_of_rlaif_v_brings_its_projector(tmp_path):
    source = save_original(tmp_path)
    adapter = save_adapter(tmp_path / "adapter", source)
    shutil.copyfile(source / "config.json", adapter / "config.json")
    projector = {f"model.mm_projector.{k}.{kind}": 2.0 for k in (0, 2) for kind in ("weight", "bias")}
    own = {name: torch.full_like(dict(all_tensors(source))[name], value) for name, value in projector.items()}
    torch.save({f"base_model.model.{name}": w for name, w in own.items()}, adapter / "non_lora_trainables.bin")
    found = dict(all_tensors(convert(adapter, tmp_path / "out", "--base", str(source))))
    assert (found["multi_modal_projector.linear_1.weight"] == 2).all()


def release(folder: Path) -> Path:
    """LLaVA-RLHF's repository: the SFT model and two adapters that name the authors' own folder."""
    out = folder / "release"
    save_original(folder, mm_projector_type=None, tower=False, mm_vision_tower=str(folder / "clip"))
    out.mkdir()
    (folder / "checkpoint").rename(out / "sft_model")
    for name in ("rlhf", "rm"):
        adapter = save_adapter(out / f"{name}_lora_adapter_model", out / "sft_model")
        change(adapter, "adapter_config.json", base_model_name_or_path="/home/author/sft")
    torch.save({"weight": torch.ones(1, 32), "bias": torch.zeros(1)}, adapter / "reward_head")
    return out


def test_llava_rlhf_is_policy_sft_model_or_reward_model(tmp_path, capsys):
    source, prompt, facts = release(tmp_path), tmp_path / "prompt.txt", tmp_path / "facts.txt"
    prompt.write_text("\nUSER: Is it so? {factual_prompt} ASSISTANT: It is\n")
    facts.write_text("The facts:")
    sft, policy = convert(source, tmp_path / "sft", "--part", "sft"), convert(source, tmp_path / "policy")
    assert not torch.equal(logits(sft), logits(policy))
    assert torch.equal(logits(policy), logits(convert(source / "rlhf_lora_adapter_model", tmp_path / "same")))
    assert "is a reward model, which is asked in its own words" in refused(
        capsys, source, tmp_path / "rm", "--part", "reward"
    )
    told = ("--part", "reward", "--prompt", str(prompt))
    assert "has a place for facts" in refused(capsys, source, tmp_path / "rm", *told)
    reward = convert(source, tmp_path / "rm", *told, "--facts", str(facts))
    form = json.loads((reward / "reward.json").read_text())
    assert form["prompt"] == "  USER: Is it so? {factual_prompt} ASSISTANT: It is"
    assert form["facts_intro"] == "The facts:\n" and form["fact_line"] == "  - {}\n"
    assert (load_file(reward / "reward_head.safetensors")["weight"] == 1).all()
    assert "a curious user" in (reward / "chat_template.jinja").read_text()
    assert "has no original layout" in refused(capsys, reward, tmp_path / "back", "--to", "original")


def test_a_trained_checkpoint_comes_back_like_the_release_it_began_with(tmp_path, capsys):
    source = save_original(tmp_path, mm_projector_type=None, tower=False)
    out = convert(source, tmp_path / "out")
    vlm = load_vlm(str(out), dtype="float32", device="cpu")
    torch.manual_seed(1)
    for name, weight in vlm.model.named_parameters():
        if "vision_tower" not in name:
            weight.add_(torch.randn_like(weight) / 50)
    trained = tmp_path / "trained"
    write_checkpoint(vlm.model, vlm.processor, trained, "float32")
    assert "does not remember an original layout" in refused(capsys, trained, tmp_path / "no", "--to", "original")
    back = convert(trained, tmp_path / "back", "--to", "original", "--like", str(out))
    said = capsys.readouterr().out
    assert "float32 weights are rounded to the released type" in said and "image encoder stays out" in said
    assert dict(all_tensors(back)).keys() == dict(all_tensors(source)).keys()
    assert {weight.dtype for weight in dict(all_tensors(back)).values()} == {torch.bfloat16}
    again = convert(back, tmp_path / "again", "--tower", str(tmp_path / "clip"))
    assert (logits(again) - logits(trained)).abs().max() < 0.2 < (logits(out) - logits(trained)).abs().max()


def test_a_checkpoint_with_rows_for_the_image_token_loses_them_on_the_way_back(tmp_path):
    source = save_original(tmp_path)
    out = convert(source, tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.ones(3, 32, dtype=torch.bfloat16)])
    hub = tmp_path / "hub"
    shutil.copytree(out, hub)
    save_file(weights, hub / "model.safetensors")
    assert same_tensors(source, convert(hub, tmp_path / "back", "--to", "original"))


def test_a_stopped_conversion_goes_on_where_it_was(tmp_path, monkeypatch):
    source, written, write = save_original(tmp_path, shards=3), [], rlaifv.convert.weights.write_file

    def killed(weights, file):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        write(weights, file)

    monkeypatch.setattr(rlaifv.convert.weights, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        main([str(source), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(rlaifv.convert.weights, "write_file", lambda w, f: (written.append(f.name), write(w, f)))
    convert(source, tmp_path / "out")
    assert written == [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    whole = convert(source, tmp_path / "whole")
    assert same_tensors(tmp_path / "out", whole)
    assert {p.name for p in tmp_path.iterdir()} == {"clip", "checkpoint", "out", "whole"}, "nothing else is left"


def test_another_job_does_not_go_on_with_what_is_unfinished(tmp_path, monkeypatch, capsys):
    source = save_original(tmp_path, shards=2)
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    assert "is something else: move it" in refused(capsys, source, tmp_path / "out")
    assert (partial / "thesis.txt").exists()
    (partial / "job.json").write_text("{}")
    (partial / "model-00001-of-00002.safetensors").write_text("of another model")
    convert(source, tmp_path / "out")
    assert "out is there already" in refused(capsys, source, tmp_path / "out")


def test_everybody_may_read_what_was_written(tmp_path):
    out = convert(save_original(tmp_path), tmp_path / "out")
    for place in (out, *out.rglob("*")):
        assert place.stat().st_mode & 0o777 == (0o755 if place.is_dir() else 0o644)


PEAKS = """
import sys
from pathlib import Path
from rlaifv import ROOT
from rlaifv.convert.__main__ import main

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM")) * 1024

main([sys.argv[1], sys.argv[1] + "/out"])
for source in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    main([source, source + "/out"])
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read as Linux has it")
def test_a_conversion_holds_less_than_two_files_of_weights(tmp_path):
    big = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 8}
    small = save_original(tmp_path / "small")
    safe, pickled = (save_original(tmp_path / str(bin), shards=4, bin=bin, **big) for bin in (False, True))
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, small, safe, pickled], capture_output=True, text=True, check=True
    )
    largest = max(file.stat().st_size for file in safe.glob("*-of-*"))
    for used in (int(line) for line in done.stdout.splitlines() if line.isdigit()):
        assert largest / 4 < used < 2 * largest, f"{used / largest:.2f} files"


def test_of_a_hub_repository_what_is_needed_is_fetched(tmp_path):
    source = save_original(tmp_path / "a", tower=False, bin=True, shards=2, mm_vision_tower="openai/clip")
    (source / "mm_projector.bin").write_bytes(b"of an earlier training stage")
    with Hub() as hub:
        hub.push("owner/model", source)
        hub.push("openai/clip", tmp_path / "a" / "clip")
        settings = settings_for(hub.endpoint, tmp_path / "home")
        command = [sys.executable, "-m", "rlaifv.convert", "owner/model", str(tmp_path / "out")]
        subprocess.run(command, env=settings, cwd=ROOT, check=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    assert not list((tmp_path / "home").rglob("mm_projector.bin"))
