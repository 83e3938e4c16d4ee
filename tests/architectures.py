"""Tiny random models of every supported architecture, each with a processor built here: no network, no files."""

from collections.abc import Callable
from itertools import chain

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from rlaifv.vlm import VLM, end_token_ids

WORDS = [
    "is",
    "there",
    "a",
    "an",
    "the",
    "in",
    "image",
    "on",
    "left",
    "right",
    "of",
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "table",
    "umbrella",
    "kite",
    "person",
    "what",
    "color",
    "how",
    "many",
    "do",
    "you",
    "see",
    "please",
    "answer",
    "yes",
    "no",
    "describe",
    "this",
    "it",
    "two",
    "three",
    "and",
    "sitting",
    "near",
    "large",
    "small",
    "not",
    "USER",
    "ASSISTANT",
    "user",
    "assistant",
    "model",
    "question",
    "Yes",
    "No",
    "Is",
    "There",
    "The",
    "A",
    "Describe",
    "What",
    "How",
    "Please",
]

QUESTIONS = [
    "Is there a cat in the image? Please answer yes or no.",
    "Is there a red umbrella on the left of the small table? Please answer yes or no.",
    "Is the kite blue?",
    "Describe the image.",
]
ANSWERS = ["There is a cat on the table.", "A dog.", "The image is not red and there is a large blue kite near it."]

WIDTH, LAYERS, HEADS = 32, 2, 2


def picture(width: int = 40, height: int = 40, seed: int = 0) -> Image.Image:
    """Noise, so that no two patches are alike."""
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def build_tokenizer(special: dict[str, str], template: str, *, bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """A word-level tokenizer; `special` maps attribute names (`image_token`) to tokens."""
    tokens = ["<pad>", "<unk>", "</s>", *([bos] if bos else []), *dict.fromkeys(special.values())]
    letters = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!:;<>|_-/\n"]
    forms = chain.from_iterable((word, " " + word) for word in [*WORDS, *letters])
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, " ", *forms]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces = "|".join(f" ?{word}(?![A-Za-z])" for word in WORDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{pieces}| ?[^ ]| "), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        bos_token=bos,
        extra_special_tokens=special,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def template(image: str, user: str = "USER: ", end: str = " ", assistant: str = "ASSISTANT:", space: str = " ") -> str:
    """A chat template of the LLaVA kind: turn prefixes, the image placeholder, the answer behind a space."""
    return (
        "{% for message in messages %}{% if message['role'] == 'user' %}" + user + "{% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}" + image
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '" + end + "' }}{% else %}" + assistant
        + "{{ '" + space + "' }}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{{ message['content'][0]['text'] }}{% endif %}{{ '" + end + "' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + assistant + "{% endif %}"
    )  # fmt: skip


def text_settings(tokenizer: PreTrainedTokenizerFast, **changes) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,
        **changes,
    }


def clip_settings(size: int = 24) -> dict:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "image_size": size,
        "patch_size": 8,
        "initializer_range": 0.2,
    }


def vlm_of(model, tokenizer, processor, name: str) -> VLM:
    model.eval().requires_grad_(False)
    return VLM(model, tokenizer, processor, name, f"{name}-fingerprint", end_token_ids(model, tokenizer))


def llava() -> VLM:
    tokenizer = build_tokenizer({"image_token": "<image>"}, template("<image>\n"))
    images = CLIPImageProcessorPil(size={"height": 24, "width": 24}, crop_size={"height": 24, "width": 24})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**clip_settings()),
        text_config=LlamaConfig(**text_settings(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=9,
        vision_feature_layer=-1,
    )
    return vlm_of(LlavaForConditionalGeneration(config), tokenizer, processor, "llava")


def text_only() -> VLM:
    tokenizer = build_tokenizer({}, template(""))
    config = LlamaConfig(**text_settings(tokenizer, num_key_value_heads=1))
    return vlm_of(LlamaForCausalLM(config), tokenizer, None, "llama")


BUILDERS: dict[str, Callable[[], VLM]] = {"llava": llava}


def build(name: str) -> VLM:
    """The architecture's tiny model, the same weights every time."""
    torch.manual_seed(0)
    return {**BUILDERS, "llama": text_only}[name]()
