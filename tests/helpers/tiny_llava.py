"""A random LLaVA of a few thousand parameters with a word-level tokenizer, saved as an ordinary checkpoint."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TEXT = "what is in the image ? a red blue green dog cat kite and left right of describe it there no yes . big small"
WORDS = TEXT.split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {% for c in m['content'] %}{{ c['text'] }}{% endfor %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, "USER", "ASSISTANT", ":", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def save_tiny_llava(folder: Path, *, seed: int = 0, hidden: int = 32, layers: int = 2, context: int = 256) -> Path:
    """Write a checkpoint with 4 image tokens (2x2 patches of 12 pixels) to `folder`."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=24,
            patch_size=12,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=context,
            initializer_range=0.2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config).float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def save_wide_llava(folder: Path) -> Path:
    """The same as wide as a 2B model, with six layers: 0.6 GB in bfloat16, all weights alike."""
    config = LlavaConfig.from_pretrained(save_tiny_llava(folder))
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 2048, 5632, 6
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 16, 16, 128
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.constant_(weight, 0.01)
    model.save_pretrained(folder)
    return folder


def picture(seed: int, size: tuple[int, int] = (24, 24)) -> bytes:
    """A random PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def answer(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, size=words))


def save_pairs(path: Path, n: int = 12, *, words: tuple[int, int] = (3, 9), seed: int = 0) -> Path:
    """Write `n` pairs of random answers about `n // 2` random images, in the public dataset's columns."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "ds_name": "test",
            "image": {"bytes": picture(i // 2), "path": f"{i // 2}.png"},
            "question": "what is in the image ?" if i % 4 else "describe it .",
            "chosen": answer(rng, rng.integers(*words)),
            "rejected": answer(rng, rng.integers(*words)),
            "origin_dataset": "test",
            "origin_split": "{}",
            "idx": 100 + i,
            "image_path": f"{i // 2}.png",
        }
        for i in range(n)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
