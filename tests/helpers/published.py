"""Configurations of models that people use, as their publishers give them, without any weights."""

import json
from pathlib import Path

TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}


def qwen3_vl(text: dict, vision: dict) -> dict:
    """A dense Qwen3-VL of a size; what all sizes share stands here."""
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    shared = {"head_dim": 128, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
    shared |= {"max_position_embeddings": 262144, "rope_scaling": rope, "rope_theta": 5000000, "vocab_size": 151936}
    tower = {"num_heads": 16, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    tower |= {"num_position_embeddings": 2304, "out_hidden_size": text["hidden_size"]}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": {"model_type": "qwen3_vl_text", **shared, **text},
        "vision_config": {"model_type": "qwen3_vl", **tower, **vision},
    }


def llava_rlhf(size: str, side: int) -> dict:
    """LLaVA-RLHF as `rlaifv.convert` writes it: Vicuna, and one linear layer behind an image encoder of that side."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32000}
    if size == "13b":
        text |= {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40}
        text |= {"num_key_value_heads": 40}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 0,
        "image_seq_length": (side // 14) ** 2,
        "projector_hidden_act": "linear",
        "vision_config": TOWER | {"image_size": side},
        "text_config": text,
    }


CONFIGS = {
    "data/checkpoints/llava-rlhf-7b": llava_rlhf("7b", 224),
    "data/checkpoints/llava-sft-7b": llava_rlhf("7b", 224),
    "data/checkpoints/llava-rlhf-13b": llava_rlhf("13b", 336),
    "data/checkpoints/llava-sft-13b": llava_rlhf("13b", 336),
    "data/checkpoints/llava-rm-13b": llava_rlhf("13b", 336),
    "Qwen/Qwen3-VL-4B-Instruct": qwen3_vl(
        {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
    ),
    "Qwen/Qwen3-VL-8B-Instruct": qwen3_vl(
        {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
    ),
    "llava-hf/llava-1.5-7b-hf": {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": TOWER,
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
    },
    "llava-hf/llava-v1.6-34b-hf": {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_token_index": 64000,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": TOWER,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 7168,
            "intermediate_size": 20480,
            "num_hidden_layers": 60,
            "num_attention_heads": 56,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
            "vocab_size": 64064,
        },
    },
    "data/checkpoints/rlaif-v-7b": {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 0,
        "vision_config": TOWER,
        "text_config": {
            "model_type": "llama",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32000,
        },
    },
    "data/checkpoints/omnilmm-12b": {
        "architectures": ["OmniLMMForConditionalGeneration"],
        "model_type": "rlaifv_omnilmm",
        "image_token_id": 32000,
        "vision_config": {},
        "text_config": {
            "model_type": "mistral",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "vocab_size": 32009,
        },
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
}


def write_config(folder: Path, name: str) -> Path:
    """The folder of a published model that holds its config.json alone."""
    path = folder / name.replace("/", "--")
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIGS[name]))
    return path
