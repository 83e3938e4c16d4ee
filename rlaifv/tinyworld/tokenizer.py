"""Tokenizer and processor of the embedded checkpoints: one lossless word-level tokenizer for all three.

A token is a word with the space before it, so decoding the tokens of any text of this world gives back its bytes.
"""

import itertools
import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from rlaifv.steps.divide import CLAIMS_PROMPT, QUESTIONS_PROMPT
from rlaifv.tinyworld.language import BRIEF_REMARKS, INSTRUCTIONS, NUMBERS, OPINIONS, PLURALS, REMARKS, STYLES, YES_NO
from rlaifv.tinyworld.scenes import CLASSES, COLOR_NAMES, POSITIONS

IMAGE_SIZE, PATCH_SIZE = 72, 24
"""Pixels: the processor scales an image to 72 × 72, nine patches, one for each cell of the grid."""

IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}"
    "{% if message['role'] != 'assistant' %}{{ message['content'] + ' ' }}"
    "{% else %}{% generation %}{{ message['content'] + ' ' }}{% endgeneration %}{% endif %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}"
    "{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] != 'assistant' %}{{ content['text'] + ' ' }}"
    "{% else %}{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The template of the LLaVA-1.5 checkpoints on the hub, which also takes plain strings as content."""

_WORD = r" ?[A-Za-z-]+| ?[0-9]+|\n| ?[^\sA-Za-z0-9]"
_SPECIAL = ("<pad>", "</s>", "<unk>", "<image>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer: every word of this world's texts and prompts, with and without a leading space."""
    words = dict.fromkeys(itertools.chain.from_iterable(re.findall(_WORD, text) for text in _texts()))
    bare = dict.fromkeys(word.lstrip(" ") for word in words if word != "\n")
    forms = [form for word in bare for form in (word, " " + word)]
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, "\n", " ", *forms])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The LLaVA processor: images of any size to 72 × 72 pixels, `<image>` to nine tokens."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the "default" strategy drops again
        chat_template=CHAT_TEMPLATE,
    )


def _texts() -> list[str]:
    """Texts that contain every word that the tokenizer must know."""
    things = [f"{number} {number.capitalize()}" for number in NUMBERS] + [*COLOR_NAMES, *POSITIONS, *CLASSES]
    blank = {"be": "is are", "thing": "", "Thing": "", "position": ""}
    styles = [style.phrase.format(**blank).replace("  ", " ") for style in STYLES]
    claims = ["There is are Is Are there in the image The at. ?"]
    answers = ["What color is are the? How many are there? Where none one"]
    answers += ["Yes No yes no Yes. No, 0 1 2 3 4 5 6 7 8 9 10 ! ' \" ; / * _ ( ) [ ] { } < > ="]
    prompts = [CLAIMS_PROMPT, QUESTIONS_PROMPT, "### Facts:\n- ### Modified sentences:\n- ", "USER: ASSISTANT: \n"]
    texts = [
        *prompts,
        *INSTRUCTIONS,
        *OPINIONS,
        *REMARKS,
        *BRIEF_REMARKS,
        YES_NO,
        *styles,
        *claims,
        *answers,
        *things,
        *PLURALS.values(),
    ]
    return [re.sub(r"\{(question|answer|claims)\}", "", text) for text in texts]
