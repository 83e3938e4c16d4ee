"""OmniLMM, the model of RLAIF-V-12B, which no library maintains: a model like those of transformers, in plain PyTorch.

Importing this room makes transformers' AutoConfig, AutoModelForImageTextToText, AutoImageProcessor and AutoProcessor
know it, so that everything here loads it like any other. A released checkpoint becomes one of it by
`python -m rlaifv.convert`.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from rlaifv.vlm.omnilmm.configuration import OmniLMMConfig, OmniLMMVisionConfig
from rlaifv.vlm.omnilmm.modeling import OmniLMMForConditionalGeneration
from rlaifv.vlm.omnilmm.processing import OmniLMMImageProcessor, OmniLMMProcessor

AutoConfig.register(OmniLMMConfig.model_type, OmniLMMConfig)
AutoModelForImageTextToText.register(OmniLMMConfig, OmniLMMForConditionalGeneration)
AutoImageProcessor.register(OmniLMMConfig, image_processor_classes={"pil": OmniLMMImageProcessor})
AutoProcessor.register(OmniLMMConfig, OmniLMMProcessor)

__all__ = [
    "OmniLMMConfig",
    "OmniLMMForConditionalGeneration",
    "OmniLMMImageProcessor",
    "OmniLMMProcessor",
    "OmniLMMVisionConfig",
]
