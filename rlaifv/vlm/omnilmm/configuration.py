"""The configuration of an OmniLMM; the defaults are the sizes of the 12B."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig, PreTrainedConfig


@strict
class OmniLMMVisionConfig(PreTrainedConfig):
    """The image encoder: EVA02's enormous CLIP tower without its last block.

    `image_size` is what the model sees, in pixels a side; `position_grid` the side of the table of positions in the
    checkpoint, which is interpolated to the patches of an image.
    """

    model_type = "rlaifv_omnilmm_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1792
    intermediate_size: int = 15360
    num_hidden_layers: int = 63
    num_attention_heads: int = 16
    patch_size: int = 14
    image_size: int = 448
    position_grid: int = 16
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02


@strict
class OmniLMMConfig(PreTrainedConfig):
    """Image encoder, resampler and language model.

    The resampler's `image_seq_length` queries take the places of the tokens `image_token_id`; its width is the language
    model's, in heads of 128. The name of the type is not the original's (`omnilmm`), whose files have another layout.
    """

    model_type = "rlaifv_omnilmm"
    sub_configs_defaults: ClassVar = {"vision_config": OmniLMMVisionConfig, "text_config": MistralConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32000
    image_seq_length: int = 64
    tie_word_embeddings: bool = False
