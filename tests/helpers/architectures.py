"""Tiny random models of every supported architecture, each with a processor built here: no network, no files."""

from collections.abc import Callable
from itertools import chain

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6ImageProcessorPil,
    MiniCPMV4_6Processor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
    Qwen3_5TextConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from rlaifv.vlm.loading import VLM, context_length, end_token_ids
from rlaifv.vlm.omnilmm import OmniLMMConfig, OmniLMMForConditionalGeneration, OmniLMMImageProcessor, OmniLMMProcessor
from rlaifv.vlm.processors import image_only

WORDS = """is there a an the in image on left right of red blue green cat dog table umbrella kite person what color
how many do you see please answer yes no describe this it two three and sitting near large small not USER ASSISTANT
user assistant model question Yes No Is There The A Describe What How Please"""

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
    forms = chain.from_iterable((word, " " + word) for word in [*WORDS.split(), *letters])
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, " ", *forms]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces = "|".join(f" ?{word}(?![A-Za-z])" for word in WORDS.split())
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
        "{% for message in messages %}{% if message['role'] == 'user' %}" + user
        + "{% if message['content'] is string %}"
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
    return VLM(
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        name=name,
        fingerprint=f"{name}-fingerprint",
        eos_token_ids=end_token_ids(model.generation_config, tokenizer),
        context=context_length(model.config),
    )


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


def llava_next() -> VLM:
    tokenizer = build_tokenizer({"image_token": "<image>"}, template("<image>\n"))
    grids = [[24, 48], [48, 24], [48, 48]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_grid_pinpoints=grids
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**clip_settings()),
        text_config=MistralConfig(**text_settings(tokenizer, num_key_value_heads=1, sliding_window=None)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids,
        vision_feature_layer=-1,
    )
    return vlm_of(LlavaNextForConditionalGeneration(config), tokenizer, processor, "llava-next")


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    special = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return build_tokenizer(special, template(image, "user\n", "\\n", "assistant\n", ""), bos=None)


def qwen_processor(kind: type, tokenizer: PreTrainedTokenizerFast):
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 256, "longest_edge": 4096}, patch_size=4, merge_size=2, temporal_patch_size=2
    )
    return image_only(kind, images, tokenizer, {"chat_template": tokenizer.chat_template})


QWEN_VISION = {
    "depth": 2,
    "hidden_size": WIDTH,
    "out_hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_heads": HEADS,
    "patch_size": 4,
}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in tokens.items()}


def qwen2_5_vl() -> VLM:
    tokenizer = qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        vision_config={**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config=text_settings(
            tokenizer,
            num_key_value_heads=1,
            rope_parameters=QWEN_ROPE,
        ),
        **qwen_ids(tokenizer),
    )
    processor = qwen_processor(Qwen2_5_VLProcessor, tokenizer)
    return vlm_of(Qwen2_5_VLForConditionalGeneration(config), tokenizer, processor, "qwen2.5-vl")


def qwen3_vl() -> VLM:
    tokenizer = qwen_tokenizer()
    config = Qwen3VLConfig(
        vision_config={
            **QWEN_VISION,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config=text_settings(
            tokenizer,
            head_dim=16,
            rope_parameters=QWEN_ROPE,
        ),
        **qwen_ids(tokenizer),
    )
    processor = qwen_processor(Qwen3VLProcessor, tokenizer)
    return vlm_of(Qwen3VLForConditionalGeneration(config), tokenizer, processor, "qwen3-vl")


def idefics_tokenizer() -> PreTrainedTokenizerFast:
    special = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
        "video_token": "<video>",
        **{f"tile_{r}_{c}": f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)},
    }
    return build_tokenizer(special, template("<image>", "User:", "<end_of_utterance>\\n", "Assistant:"))


IDEFICS_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}


def idefics_config(kind: type, tokenizer: PreTrainedTokenizerFast):
    return kind(
        vision_config=IDEFICS_VISION,
        text_config=LlamaConfig(**text_settings(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )


def idefics3() -> VLM:
    tokenizer = idefics_tokenizer()
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)
    model = Idefics3ForConditionalGeneration(idefics_config(Idefics3Config, tokenizer))
    return vlm_of(model, tokenizer, processor, "idefics3")


def smolvlm() -> VLM:
    tokenizer = idefics_tokenizer()
    images = SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    settings = {"image_seq_len": 4, "chat_template": tokenizer.chat_template}
    processor = image_only(SmolVLMProcessor, images, tokenizer, settings)
    model = SmolVLMForConditionalGeneration(idefics_config(SmolVLMConfig, tokenizer))
    return vlm_of(model, tokenizer, processor, "smolvlm")


def internvl() -> VLM:
    special = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = build_tokenizer(special, template("<IMG_CONTEXT>\n", "user\n", "\\n", "assistant\n", ""), bos=None)
    images = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=4)
    settings = {"image_seq_length": 4, "chat_template": tokenizer.chat_template}
    processor = image_only(InternVLProcessor, images, tokenizer, settings)
    vision = {k: v for k, v in IDEFICS_VISION.items() if k not in ("image_size", "patch_size")}
    config = InternVLConfig(
        vision_config={**vision, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=Qwen2Config(**text_settings(tokenizer, num_key_value_heads=1)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    return vlm_of(InternVLForConditionalGeneration(config), tokenizer, processor, "internvl")


def gemma3() -> VLM:
    special = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    turns = template("<start_of_image>", "user\n", "\\n", "model\n", "")
    tokenizer = build_tokenizer(special, turns)
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template)
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**IDEFICS_VISION),
        text_config=Gemma3TextConfig(
            **text_settings(
                tokenizer,
                head_dim=16,
                num_key_value_heads=1,
                query_pre_attn_scalar=16,
                sliding_window=12,
                layer_types=["sliding_attention", "full_attention"],
                final_logit_softcapping=None,
            )
        ),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zero would hide the image
    return vlm_of(model, tokenizer, processor, "gemma3")


def minicpm_v_4_6() -> VLM:
    special = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    turns = template("<|image_pad|>\n", "user\n", "\\n", "assistant\n", "")
    tokenizer = build_tokenizer(special, turns, bos=None)
    images = MiniCPMV4_6ImageProcessorPil(scale_resolution=32, patch_size=4, max_slice_nums=4)
    settings = {"chat_template": tokenizer.chat_template}
    processor = image_only(MiniCPMV4_6Processor, images, tokenizer, settings)
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    config = MiniCPMV4_6Config(
        vision_config={**{k: v for k, v in IDEFICS_VISION.items() if k != "initializer_range"}, "image_size": 32},
        text_config=Qwen3_5TextConfig(
            **text_settings(
                tokenizer,
                head_dim=16,
                num_key_value_heads=1,
                **linear,
                linear_num_value_heads=2,
                layer_types=["linear_attention", "full_attention"],
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            )
        ),
        insert_layer_id=0,
        image_size=32,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    return vlm_of(MiniCPMV4_6ForConditionalGeneration(config), tokenizer, processor, "minicpm-v-4.6")


def omnilmm() -> VLM:
    """3 × 3 patches become four vectors; the language model sees no further than 12 tokens back."""
    special = {"image_token": "<im_patch>", "image_start": "<im_start>", "image_end": "<im_end>"}
    tokenizer = build_tokenizer(special, template("<im_start><im_patch><im_end>\n", "user\n", "\\n", "assistant\n", ""))
    images = OmniLMMImageProcessor(size={"height": 24, "width": 24})
    processor = OmniLMMProcessor(images, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template)
    config = OmniLMMConfig(
        vision_config={**clip_settings(), "position_grid": 2},
        text_config=text_settings(tokenizer, num_key_value_heads=1, sliding_window=12),
        image_token_id=tokenizer.image_token_id,
        image_seq_length=4,
    )
    return vlm_of(OmniLMMForConditionalGeneration(config), tokenizer, processor, "omnilmm")


BUILDERS: dict[str, Callable[[], VLM]] = {
    "llava": llava,
    "llava-next": llava_next,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
    "gemma3": gemma3,
    "minicpm-v-4.6": minicpm_v_4_6,
    "omnilmm": omnilmm,
}


def build(name: str) -> VLM:
    """The architecture's tiny model, the same weights every time."""
    torch.manual_seed(0)
    return {**BUILDERS, "llama": text_only}[name]()
