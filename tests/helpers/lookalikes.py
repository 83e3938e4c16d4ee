"""Repositories as the hub has them, without weights: published configurations, chat templates, settings of image
processors and special tokens; tokenizers of the published class and size, with few words that are real ones."""

import json
import re
import shutil
import tempfile
from pathlib import Path

from hub import Hub
from published import CONFIGS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AddedToken,
    LlamaTokenizer,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from rlaifv import ROOT
from rlaifv.convert.reward_head import SYSTEM as REWARD_SYSTEM
from rlaifv.convert.tokens import SYSTEM, chat_template
from rlaifv.params import load_params
from rlaifv.steps.divide import CLAIMS_PROMPT, QUESTIONS_PROMPT
from rlaifv.vlm.loading import load_reader
from rlaifv.vlm.omnilmm import OmniLMMImageProcessor, OmniLMMProcessor
from rlaifv.vlm.reward_format import RewardFormat, RewardHead, write_reward_files

WORDS = 800
"""Pieces that a look-alike's tokenizer has learned; the rest of its vocabulary is filled with made-up ones."""

LLAVA_TURNS = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
YI_TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_TURNS = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a "
    "helpful assistant.<|im_end|>\n' }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + "
    "'\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_VL_TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "resample": 3,
    "size": {"shortest_edge": 336},
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
QWEN_SPECIAL = re.findall(
    r"<\|.+?\|>",
    "<|endoftext|><|im_start|><|im_end|><|object_ref_start|><|object_ref_end|><|box_start|><|box_end|><|quad_start|>"
    "<|quad_end|><|vision_start|><|vision_end|><|vision_pad|><|image_pad|><|video_pad|>",
)
OMNILMM_SPECIAL = ["<im_patch>", "<im_start>", "<im_end>", "<box>", "</box>", "<ref>", "</ref>", "<quad>", "</quad>"]
TILES = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def write_repository(folder: Path, name: str) -> Path:
    """The folder of a look-alike of `name`, with a file of weights that nobody should fetch."""
    path = folder / name.replace("/", "--")
    path.mkdir(parents=True)
    config = CONFIGS[name]
    write(path / "config.json", config)
    (path / "model.safetensors").write_bytes(b"gigabytes of weights")
    {"llava": llava, "llava_next": llava_next, "qwen2": qwen2, "qwen3_vl": qwen3_vl, "rlaifv_omnilmm": omnilmm}[
        config["model_type"]
    ](path)
    return path


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2))


def llava(path: Path) -> None:
    if path.name.startswith("data--"):  # converted by this package
        scores = "-rm-" in path.name
        side = json.loads((path / "config.json").read_text())["vision_config"]["image_size"]
        tokens = {"unk_token": None, "pad_token": "</s>", "extra_special_tokens": {"image_token": "<image>"}}
        tokenizer = llama_tokenizer(32000, ["<image>", "<s>", "</s>"], [], add_bos_token=True, **tokens)
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        looks = LlavaImageProcessorPil(do_pad=True, **sizes)
        turns = chat_template(path, REWARD_SYSTEM if scores else SYSTEM)
        parts = {"image_processor": looks, "tokenizer": tokenizer, "chat_template": turns}
        LlavaProcessor(**parts, **TILES).save_pretrained(path)
        write(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
        if scores:
            form = RewardFormat(
                "  USER: Is it good, given {factual_prompt}? ASSISTANT: It is", "", "- {}\n", "", "released"
            )
            write_reward_files(path, RewardHead(1), form, load_reader(str(path)))
        return
    tokenizer = llama_tokenizer(
        32000, ["<unk>", "<s>", "</s>"], ["<image>", "<pad>"], add_bos_token=True, pad_token="<pad>"
    )
    save(tokenizer, path, LLAVA_TURNS, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001})
    write(path / "preprocessor_config.json", CLIP | {"processor_class": "LlavaProcessor"})
    write(path / "processor_config.json", TILES | {"image_token": "<image>", "processor_class": "LlavaProcessor"})


def llava_next(path: Path) -> None:
    special = ["<unk>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    tokenizer = llama_tokenizer(64000, special, ["<image>", "<pad>"], add_bos_token=False, **names)
    save(tokenizer, path, YI_TURNS, {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 64001})
    kind = {"processor_class": "LlavaNextProcessor"}
    tiles = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS, "do_pad": True}
    write(path / "preprocessor_config.json", CLIP | tiles | kind)
    write(path / "processor_config.json", TILES | {"image_token": "<image>"} | kind)


def qwen2(path: Path) -> None:
    save(qwen_tokenizer(), path, QWEN_TURNS, {"eos_token_id": [151645, 151643], "pad_token_id": 151643})


def qwen3_vl(path: Path) -> None:
    save(qwen_tokenizer(), path, QWEN_VL_TURNS, {"eos_token_id": [151645, 151643], "pad_token_id": 151643})
    patches = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3}
    size = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "image_std": [0.5] * 3}
    kind = {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"}
    write(path / "preprocessor_config.json", patches | size | kind)
    write(
        path / "video_preprocessor_config.json",
        patches | size | kind | {"video_processor_type": "Qwen3VLVideoProcessor"},
    )


def omnilmm(path: Path) -> None:
    OmniLMMProcessor(OmniLMMImageProcessor(), zephyr_tokenizer(32000)).save_pretrained(path)
    write(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})


def save(tokenizer: PreTrainedTokenizerBase, path: Path, turns: str, generation: dict) -> None:
    tokenizer.chat_template = turns
    tokenizer.save_pretrained(path)
    write(path / "generation_config.json", generation)


def llama_tokenizer(size: int, special: list[str], added: list[str], **names: str) -> LlamaTokenizer:
    """SentencePiece's kind: bytes for what it has no piece for, a begin token, then `added` from id `size` on."""
    first = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces, merges = learned(pre_tokenizers.Metaspace(), [])
    tokenizer = LlamaTokenizer(vocab=filled(first, pieces, size, added), merges=merges, **names)
    return with_special(tokenizer, added)


def zephyr_tokenizer(size: int | None = None) -> PreTrainedTokenizerFast:
    """Byte-pair pieces with a `▁` before every piece of text, also behind a special token, and bytes for all else;
    `size` of them, or as many as were learned. Behind them come an OmniLMM's own."""
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces, merges = learned(pre_tokenizers.Metaspace(), [])
    vocabulary = filled(first, pieces, size or len(dict.fromkeys([*first, *pieces])), [])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in [*first[:3], *OMNILMM_SPECIAL]])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", model_max_length=2048, **names)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes and their merges, no begin token; special tokens from id 151643 on."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces, merges = learned(split, pre_tokenizers.ByteLevel.alphabet())
    vocabulary = filled([], pieces, 151643, QWEN_SPECIAL)
    return with_special(Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>"), QWEN_SPECIAL)


def with_special(tokenizer: PreTrainedTokenizerBase, added: list[str]) -> PreTrainedTokenizerBase:
    """The tokenizer, which knows those tokens of its vocabulary wherever they stand in a text."""
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return tokenizer


def learned(split: pre_tokenizers.PreTokenizer, alphabet: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges of a byte-pair encoding of this project's own English."""
    text = [CLAIMS_PROMPT, QUESTIONS_PROMPT, "Yes yes No no " * 100, (ROOT / "README.md").read_text()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    trainer = trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return list(model["vocab"]), [tuple(merge) for merge in model["merges"]]


def filled(first: list[str], pieces: list[str], size: int, added: list[str]) -> dict[str, int]:
    """Tokens → ids: what no text is tokenized to fills up to id `size`, where those that were `added` begin."""
    tokens = list(dict.fromkeys([*first, *pieces]))
    fill = (f"x{number}z" for number in range(size - len(tokens)))
    return {token: number for number, token in enumerate([*tokens, *fill, *added])}


def write_converted(profile: str, root: Path) -> list[Path]:
    """Look-alikes of the models that a profile expects in the checkout `root`, converted; the folders of those that
    were not there."""
    params = load_params(f"params/{profile}.yaml")
    paths = {model.path for model in (params.policy, params.labeler, params.divider)}
    paths |= {params.sft.base, params.reward_model.base, *(run.scored_by for run in params.rloo_runs.values())}
    absent = [path for path in paths if path in CONFIGS and path.startswith("data/") and not (root / path).is_dir()]
    for path in absent:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(write_repository(Path(folder), path), root / path)
    return [root / path for path in absent]


def push_models(hub: Hub, profile: str, folder: Path) -> None:
    """Give the hub a look-alike of every hub model of a profile, at the commit that the profile pins."""
    params = load_params(f"params/{profile}.yaml")
    for model in (params.policy, params.labeler, params.divider):
        hub_model = model.path in CONFIGS and not model.path.startswith("data/")
        if hub_model and not (folder / model.path.replace("/", "--")).is_dir():
            hub.push(model.path, write_repository(folder, model.path), model.revision)
