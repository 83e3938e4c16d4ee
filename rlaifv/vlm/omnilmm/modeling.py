"""An OmniLMM: EVA image encoder → resampler → Mistral. The names of weights are the released checkpoint's, but for the
language model's, which stand below `model.language_model`."""

from math import isqrt
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import gelu, interpolate, linear, scaled_dot_product_attention
from transformers import Cache, GenerationMixin, MistralModel, PreTrainedModel, initialization
from transformers.generation import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from rlaifv.vlm.omnilmm.configuration import OmniLMMConfig, OmniLMMVisionConfig

RESAMPLER_HEAD = 128
"""Width of a head of the resampler."""


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """Multi-head attention of (B, Q, D) queries to (B, K, D) keys, without projections: (B, Q, D)."""
    split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def resize_grid(table: torch.Tensor, side: int, antialias: bool) -> torch.Tensor:
    """A table of positions (n·n, D), row by row, interpolated to (side·side, D) in float32."""
    own = isqrt(len(table))
    grid = table.float().view(1, own, own, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=antialias)
    return grid.flatten(2)[0].T


def sines(side: int, width: int) -> torch.Tensor:
    """The fixed positions (side·side, width) of a grid: sines and cosines of the column in the first half of the width,
    of the row in the second."""
    rates = 1 / 10000 ** (torch.arange(width // 4) / (width / 4))
    angles = torch.arange(side)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], -1)  # (side, width / 2)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1)


class OmniLMMVisionAttention(nn.Module):
    """Self-attention whose queries and values have a bias and whose keys have none."""

    def __init__(self, config: OmniLMMVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.proj(attend(query + self.q_bias, key, value + self.v_bias, self.heads))


class OmniLMMVisionMLP(nn.Module):
    def __init__(self, config: OmniLMMVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(gelu(self.fc1(x)))


class OmniLMMVisionBlock(GradientCheckpointingLayer):
    """A block that normalizes what it adds, not what it reads."""

    def __init__(self, config: OmniLMMVisionConfig):
        super().__init__()
        self.attn = OmniLMMVisionAttention(config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = OmniLMMVisionMLP(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class OmniLMMPatches(nn.Module):
    def __init__(self, config: OmniLMMVisionConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → (B, patches, D), row by row."""
        return self.proj(pixel_values.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class OmniLMMPreTrainedModel(PreTrainedModel):
    config: OmniLMMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["OmniLMMVisionBlock", "OmniLMMResampler"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, OmniLMMVisionAttention):
            initialization.zeros_(module.q_bias)
            initialization.zeros_(module.v_bias)
        elif isinstance(module, OmniLMMVisionModel):
            initialization.normal_(module.cls_token, std=std)
            initialization.normal_(module.pos_embed, std=std)
        elif isinstance(module, OmniLMMResampler):
            for weight in (module.query, module.proj, module.attn.in_proj_weight):
                initialization.normal_(weight, std=std)
            initialization.zeros_(module.attn.in_proj_bias)
            initialization.copy_(module.pos_embed, sines(isqrt(len(module.query)), module.query.shape[1]))


class OmniLMMVisionModel(OmniLMMPreTrainedModel):
    config: OmniLMMVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: OmniLMMVisionConfig):
        super().__init__(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.position_grid**2, config.hidden_size))
        self.patch_embed = OmniLMMPatches(config)
        self.blocks = nn.ModuleList(OmniLMMVisionBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """(B, 3, side, side) → `last_hidden_state` (B, patches, D): those of the patches, row by row."""
        x = self.patch_embed(pixel_values)
        first, grid = self.pos_embed[:, :1], self.pos_embed[0, 1:]
        # antialiased although it enlarges: PyTorch's bicubic kernel is another one then
        grid = resize_grid(grid, isqrt(x.shape[1]), antialias=True).to(x)
        x = torch.cat([(self.cls_token + first).expand(len(x), -1, -1).to(x), x + grid], 1)
        for block in self.blocks:
            x = block(x)
        return BaseModelOutputWithPooling(last_hidden_state=self.norm(x)[:, 1:])


class OmniLMMCrossAttention(nn.Module):
    """Attention of queries to other keys than values, its three projections in one matrix."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // RESAMPLER_HEAD)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        projections = zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        inputs = (linear(x, *by) for x, by in zip((query, key, value), projections, strict=True))
        return self.out_proj(attend(*inputs, self.heads))


class OmniLMMResampler(nn.Module):
    """The patches of an image → as many vectors of the language model's width as there are learned queries."""

    def __init__(self, config: OmniLMMConfig):
        super().__init__()
        width, count = config.text_config.hidden_size, config.image_seq_length
        self.query = nn.Parameter(torch.empty(count, width))
        self.register_buffer("pos_embed", sines(isqrt(count), width))  # fixed, and rounded in the released files
        self.kv_proj = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.attn = OmniLMMCrossAttention(width)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, n·n, tower's width) → (B, queries, width)."""
        value = self.ln_kv(self.kv_proj(patches))
        key = value + resize_grid(self.pos_embed, isqrt(patches.shape[1]), antialias=False).to(value.dtype)
        query = self.ln_q(self.query) + self.pos_embed.to(value.dtype)
        return self.ln_post(self.attn(query.expand(len(patches), -1, -1), key, value)) @ self.proj


class OmniLMMModel(OmniLMMPreTrainedModel):
    """Everything but the output layer."""

    def __init__(self, config: OmniLMMConfig):
        super().__init__(config)
        self.vision_tower = OmniLMMVisionModel._from_config(config.vision_config)
        self.resampler = OmniLMMResampler(config)
        self.language_model = MistralModel._from_config(config.text_config)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """What the tower gave, with the images' vectors (B, queries, D) as `pooler_output`."""
        seen = self.vision_tower(pixel_values)
        features = self.resampler(seen.last_hidden_state)
        return BaseModelOutputWithPooling(last_hidden_state=seen.last_hidden_state, pooler_output=features)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The hidden states of a batch whose image tokens, in order, are those of `pixel_values`; the rest goes to
        the language model. `mm_encoder_outputs` brings images that transformers' `generate` has encoded before.

        Raises ValueError for image tokens that are more or fewer than the images'.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        images = (mm_encoder_outputs or {}).get("image")
        if images is None and pixel_values is not None:
            images = self.get_image_features(pixel_values)
        if images is not None:
            features = images.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            if input_ids is None:
                raise ValueError("the places of images are known from input_ids alone: give them")
            places = input_ids == self.config.image_token_id
            if int(places.sum()) != features.shape[0] * features.shape[1]:
                raise ValueError(
                    f"{int(places.sum())} image tokens for {len(features)} images of {features.shape[1]} tokens each"
                )
            inputs_embeds = inputs_embeds.masked_scatter(places[..., None].to(inputs_embeds.device), features)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


class OmniLMMForConditionalGeneration(OmniLMMPreTrainedModel, GenerationMixin):
    """An OmniLMM with its output layer.

        model = AutoModelForImageTextToText.from_pretrained(folder)    # after `import rlaifv.vlm.omnilmm`
        model.generate(**processor(images=[image], text=[prompt], return_tensors="pt"), repetition_penalty=1.1)

    As published, a repetition penalty sees the tokens of the answer alone, not those of the prompt.
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: OmniLMMConfig):
        super().__init__(config)
        self.model = OmniLMMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' models: logits of the last `logits_to_keep` places (0: all), and the loss of `labels`."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _get_logits_processor(
        self, generation_config: GenerationConfig, input_ids_seq_length: int | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, **kwargs)
        for processor in processors:
            if isinstance(processor, RepetitionPenaltyLogitsProcessor):
                processor.prompt_ignore_length = input_ids_seq_length or 0
        return processors
