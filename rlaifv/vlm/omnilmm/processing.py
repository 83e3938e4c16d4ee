"""What an OmniLMM reads: a picture squashed to a square, and Zephyr's chat with its places for an image."""

from typing import Any, ClassVar

import numpy as np
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict

IMAGE, IMAGE_START, IMAGE_END = "<im_patch>", "<im_start>", "<im_end>"

SYSTEM = (
    "You are an artificial intelligence assistant, which gives helpful, detailed, and polite answers to the human's "
    "questions."
)

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|system|>\n" + SYSTEM.replace("'", "\\'") + "</s>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}"
    f"{{{{ '{IMAGE_START}{IMAGE}{IMAGE_END}' + ('' if loop.last else '\n') }}}}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Zephyr's turns, behind the model's own system sentence unless a chat brings one."""


class OmniLMMImageProcessor(PilBackend):
    """RGB, squashed to `size` whatever its shape, and normalized like CLIP's pictures."""

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size: ClassVar = {"height": 448, "width": 448}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def resize(self, image: np.ndarray, size: SizeDict, resample: Any = None, **kwargs: Any) -> np.ndarray:
        """(3, H, W) → (3, size): the width first, then the height. Pillow 13 chooses the order by the shape when both
        change at once; its older versions, with which the model was trained, never did."""
        wide = super().resize(image, SizeDict(height=image.shape[-2], width=size.width), resample, **kwargs)
        return super().resize(wide, size, resample, **kwargs)


class OmniLMMProcessor(ProcessorMixin):
    """Pictures and texts as the model gets them: every `<im_patch>` of a text is an image's place, and becomes
    `image_seq_length` of them."""

    def __init__(
        self,
        image_processor: OmniLMMImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_seq_length: int = 64,
        chat_template: str | None = None,
    ):
        self.image_seq_length = image_seq_length
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def replace_image_token(self, image_inputs: BatchFeature, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.image_seq_length
