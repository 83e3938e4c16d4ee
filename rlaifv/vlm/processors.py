"""Load a VLM's processor, also without torchvision.

Several processors (Qwen-VL, InternVL, SmolVLM, MiniCPM-V) want a video processor, and transformers' video processors
want torchvision. Nothing here shows a model a video: such a processor is built from its image processor, tokenizer
and chat template, with the video's place left empty.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torchvision_available

NO_VIDEO = SimpleNamespace(slice_mode=False, downsample_mode="16x", num_frames=0, fps=0, model_input_names=[])
"""Stands where a video processor would; processors read these settings of it even when no video comes."""


def load_processor(folder: Path, settings: Mapping[str, Any] = {}) -> ProcessorMixin:
    """The checkpoint's processor; image-only where its video half cannot be loaded.

    `settings` take the place of the image processor's own, and are saved with it; ValueError names one it does not
    have.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    processor = own_processor(folder, config)
    if settings:
        kind = type(processor.image_processor)
        if config.model_type == "llava" and "do_pad" in settings:
            # the hub's LLaVA-1.5 names CLIP's class, which crops the sides; LLaVA's own can pad to a square instead
            kind = getattr(transformers, kind.__name__.replace("CLIPImage", "LlavaImage"))
        processor.image_processor = with_settings(kind, processor.image_processor.to_dict(), settings)
    return processor


def with_settings(kind: type[BaseImageProcessor], own: dict[str, Any], settings: Mapping[str, Any]) -> Any:
    """An image processor with its `own` settings changed; of a mapping (`size`), the keys that are given."""
    # every class accepts the general ones, whether it does anything with them or not
    general = {key for key in ImagesKwargs.__annotations__ if own.get(key) is None and getattr(kind, key, None) is None}
    known = kind.valid_kwargs.__annotations__.keys() - general
    if unknown := sorted(settings.keys() - known):
        raise ValueError(f"{kind.__name__} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    changed = dict(settings)
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(own.get(key), dict) and value.keys() <= own[key].keys():
            changed[key] = own[key] | value
    return kind(**own | changed)


def own_processor(folder: Path, config: PreTrainedConfig) -> ProcessorMixin:
    """The checkpoint's processor with its own settings."""
    name = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    kind = getattr(transformers, name, None) if name else None
    if kind is None or is_torchvision_available() or "video_processor" not in kind.get_attributes():
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    settings, _ = kind.get_processor_dict(folder)
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(folder, trust_remote_code=False),
        "tokenizer": AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    }
    return image_only(kind, **parts, settings=settings)


def image_only(
    kind: type[ProcessorMixin],
    image_processor: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
) -> ProcessorMixin:
    """A processor of class `kind` that never sees a video.

    Args:
        kind: a transformers processor class with a video processor among its parts.
        image_processor, tokenizer: the other parts.
        settings: the rest of the processor's configuration (`chat_template`, `image_seq_length`, ...).
    """

    class ImageOnly(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is NO_VIDEO:
                return SimpleNamespace
            return super().check_argument_for_proper_class(argument_name, argument)

    module = sys.modules[kind.__module__]
    if getattr(module, "num2words", True) is None:
        module.num2words = str  # SmolVLM spells out the number of a video's frames with it, and nothing else
    ImageOnly.__name__ = kind.__name__  # saved configurations carry the class's name
    parts = {"image_processor": image_processor, "tokenizer": tokenizer, "video_processor": NO_VIDEO}
    unused = {"image_processor", "video_processor", "tokenizer", "processor_class", "auto_map"}
    processor = ImageOnly(**parts, **{k: v for k, v in settings.items() if k not in unused})
    # out of the parts again: what is saved and listed is what is there
    del processor.video_processor
    ImageOnly.video_processor = NO_VIDEO
    ImageOnly.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])
    return processor
