"""The backbone of policy and labeler: a small LLaVA, and the alignment of its vision tower with its words.

Alignment comes first: the projected feature of each patch learns to be the sum of the embeddings of its class, color,
number and position words. The language model then finds an object by matching a word with the patches, which its
attention can do from the first step because queries and keys start equal (mimetic initialization, Trockman & Kolter,
arXiv 2305.09828).
"""

import time

import torch
import torch.nn.functional as F
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from rlaifv.tinyworld.language import NUMBERS, PLURALS
from rlaifv.tinyworld.scenes import CLASSES, COLOR_NAMES, GRID, POSITIONS, Scene, render
from rlaifv.tinyworld.tokenizer import IMAGE_SIZE, IMAGE_TOKENS, PATCH_SIZE

WIDTH = 128
_CELLS = GRID * GRID
_KINDS = {"class": CLASSES, "color": COLOR_NAMES, "number": NUMBERS, "position": POSITIONS}
SHOWN: tuple[str, ...] = tuple(word for words in _KINDS.values() for word in words)
"""The words for what a patch can show: 24 classes, 8 colors, 3 numbers, 9 positions."""
SLICES: dict[str, slice] = {
    kind: slice(SHOWN.index(words[0]), SHOWN.index(words[0]) + len(words)) for kind, words in _KINDS.items()
}


def text_config(tokenizer: PreTrainedTokenizerFast, layers: int, width: int = WIDTH) -> LlamaConfig:
    """A small Llama. `initializer_range` 0.08 suits this width, and a large RoPE base keeps matching by content."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=(2 if layers == 3 else 3) * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_vlm(tokenizer: PreTrainedTokenizerFast, layers: int = 3) -> LlavaForConditionalGeneration:
    """A LLaVA of about 1.5 million parameters with random weights, queries equal to keys and related words close."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=WIDTH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(tokenizer, layers),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    start_language_model(model.model.language_model, tokenizer)
    start_lookup(model.model.language_model)
    start_binding(model.model.language_model)
    return model


def start_language_model(
    language_model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, quiet: float = 1.0
) -> None:
    """Start a LlamaModel so that equal and related words attend to each other: keys = queries, and the embedding of a
    plural or of a capitalized word is that of the plain word plus a common vector. Every layer adds `quiet` times its
    random output to the residual stream."""
    with torch.no_grad():
        for layer in language_model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
            layer.self_attn.o_proj.weight.mul_(quiet)
            layer.mlp.down_proj.weight.mul_(quiet)
        table = language_model.embed_tokens.weight
        basis = directions()
        free = basis[2][1:]  # the first direction is left for what all words share
        plural, bare = torch.randn(2, len(free)) * 0.06 @ free
        rest = torch.randn(len(table), len(free)) @ free
        table.copy_(0.9 * F.normalize(rest, dim=-1))
        for index, word in enumerate(SHOWN):
            table[tokenizer.convert_tokens_to_ids(" " + word)] = 0.9 * basis[0][index]

        def relate(word: str, base: str, shift: torch.Tensor) -> None:
            ids = tokenizer.convert_tokens_to_ids([word, base])
            table[ids[0]] = table[ids[1]] + shift

        for token in sorted(tokenizer.get_vocab()):
            if token.startswith(" ") and len(token) > 1:
                relate(token[1:], token.lower() if token.lower() in tokenizer.get_vocab() else token, bare)
        relate(" one", " a", plural)
        for name, form in PLURALS.items():
            if form != name:
                relate(" " + form, " " + name, plural)


def directions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three orthogonal bases (44, 44 and 40 of 128 directions): words of what is shown, the same things as patches
    show them, and the rest."""
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0]
    return tuple(basis.split([len(SHOWN), len(SHOWN), WIDTH - 2 * len(SHOWN)]))


def start_lookup(language_model: torch.nn.Module, gain: float = 0.8, copied: float = 0.17) -> None:
    """Start three heads of the first layer as lookups by class, color and position: the word attends to the patch that
    shows it and receives, as words, what else the patch shows. Training goes on from there.

    A word's query and a patch's key live in the rotary pairs that hardly turn with distance.
    """
    words, patches, _ = directions()
    attention = language_model.layers[0].self_attn
    side = WIDTH // language_model.config.num_attention_heads
    slow = [*range(side // 2 - 12, side // 2), *range(side - 12, side)]
    with torch.no_grad():
        for head, (asked, told) in enumerate(
            [("class", ("color", "number", "position")), ("color", ("class",)), ("position", ("class", "color"))]
        ):
            rows = slice(head * side, (head + 1) * side)
            for projection, source in ((attention.q_proj, words), (attention.k_proj, patches)):
                weight = torch.randn(side, WIDTH) * 0.02
                found = source[SLICES[asked]]
                weight[slow[: len(found)]] = gain * found
                projection.weight[rows] = weight
            value, output = attention.v_proj.weight[rows], attention.o_proj.weight[:, rows]
            at = 0
            for kind in told:
                length = SLICES[kind].stop - SLICES[kind].start
                value[at : at + length] = patches[SLICES[kind]]
                output[:, at : at + length] = copied * words[SLICES[kind]].T
                at += length


def start_binding(language_model: torch.nn.Module, gain: float = 0.7) -> None:
    """Start two heads of the second layer as comparisons: the color word of a question looks for the color that the
    lookup gave its noun, the position word for the position, and is flagged when they agree.

    The value is the noun's number, which no color or position word has, so that the word's match with itself (where
    attention rests when nothing agrees) raises no flag.
    """
    words, _, rest = directions()
    attention = language_model.layers[1].self_attn
    side = WIDTH // language_model.config.num_attention_heads
    slow = [*range(side // 2 - 12, side // 2), *range(side - 12, side)]
    with torch.no_grad():
        for head, kind in enumerate(("color", "position")):
            rows = slice(head * side, (head + 1) * side)
            weight = torch.randn(side, WIDTH) * 0.02
            weight[slow[: SLICES[kind].stop - SLICES[kind].start]] = gain * words[SLICES[kind]]
            attention.q_proj.weight[rows] = weight
            attention.k_proj.weight[rows] = weight
            attention.v_proj.weight[rows.start] = words[SLICES["number"]].sum(0)
            attention.o_proj.weight[:, rows.start] = rest[head]


def start_copying(language_model: torch.nn.Module, common: float = 0.3, copied: float = 0.17) -> None:
    """Start the heads that dividing needs: in the first layer a token learns the last noun before it, and a noun the
    color or number before it and the number before that ("three pink trains"); in the second, the same noun elsewhere
    in the text tells its color, number and position.

    Recency comes from rotary pairs that turn slowly enough not to repeat within a line, matching from those that
    hardly turn. All words share a small common direction, so that a head can look by place alone.
    """
    words, spare, rest = directions()
    side = WIDTH // language_model.config.num_attention_heads
    half = side // 2
    slow = [*range(half - 12, half), *range(side - 12, side)]
    turn = 1e6 ** (-torch.arange(half) / half)
    every, nouns = rest[0], words[SLICES["class"]].sum(0)
    first, second = (language_model.layers[index].self_attn for index in (0, 1))
    color, number, position = (range(SLICES[kind].start, SLICES[kind].stop) for kind in ("color", "number", "position"))
    with torch.no_grad():
        language_model.embed_tokens.weight.add_(common * every)
        for layer, heads in ((first, 3), (second, 2)):
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
                projection.weight[: heads * side] = torch.randn(heads * side, WIDTH) * 0.01
        for pair in (2, 3):  # the last noun: a peak at distance 0 that falls over a line
            first.q_proj.weight[pair], first.k_proj.weight[pair] = every, nouns
        first.v_proj.weight[:24], first.o_proj.weight[:, :24] = words[:24], copied * spare[:24].T
        for head, told in ((1, [*color, *number]), (2, [*number])):  # a peak at distance 1 and one at distance 2
            at = head * side
            for pair in (0, 1, 2):
                angle = head * turn[pair]
                first.q_proj.weight[at + pair] = 3 * torch.cos(angle) * every
                first.q_proj.weight[at + half + pair] = -3 * torch.sin(angle) * every
                first.k_proj.weight[at + pair] = every
            for row, index in enumerate(told, start=at):
                first.v_proj.weight[row], first.o_proj.weight[:, row] = words[index], copied * spare[index]
        # the same noun's line tells its words; the noun itself what the first layer told it
        for head, keys, values, told in (
            (0, spare, words, [*color, *number, *position]),
            (1, words, spare, [*color, *number]),
        ):
            at = head * side
            for row, dim in enumerate(slow):
                second.q_proj.weight[at + dim] = 0.8 * spare[row]
                second.k_proj.weight[at + dim] = 0.8 * keys[row]
            for row, index in enumerate(told, start=at):
                second.v_proj.weight[row], second.o_proj.weight[:, row] = values[index], copied * words[index]


def pixel_values(scenes: list[Scene], seed: int, processor: LlavaProcessor) -> torch.Tensor:
    """Images of scenes as the processor gives them to the model: (scenes, 3, 72, 72) float32."""
    batches = []
    for start in range(0, len(scenes), 256):
        images = [render(scene, seed) for scene in scenes[start : start + 256]]
        batches.append(processor.image_processor(images=images, return_tensors="pt")["pixel_values"])
    return torch.cat(batches)


def patch_labels(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """What each cell shows: class, color and number as index + 1 (0 = empty) and position, each (scenes, 9)."""
    labels = {name: torch.zeros(len(scenes), _CELLS, dtype=torch.long) for name in ("class", "color", "number")}
    for row, scene in enumerate(scenes):
        for group in scene.groups:
            labels["class"][row, group.cell] = CLASSES.index(group.name) + 1
            labels["color"][row, group.cell] = COLOR_NAMES.index(group.color) + 1
            labels["number"][row, group.cell] = group.count
    labels["position"] = torch.arange(1, _CELLS + 1).expand(len(scenes), -1)
    return labels


def patch_scores(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores of each patch (scenes, 9, width) for what it may show: kind → (scenes, 9, 1 + words), index 0 = none."""
    patches = directions()[1]
    match = 8 * features @ patches.T
    return {
        kind: torch.cat([torch.full_like(match[..., :1], 4.0), match[..., where]], dim=-1)
        for kind, where in SLICES.items()
    }


def patch_targets(labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of the directions that name each cell: (scenes, 9, width)."""
    patches = directions()[1]
    return sum(torch.cat([torch.zeros(1, WIDTH), patches[where]])[labels[kind]] for kind, where in SLICES.items())


def align(
    model: LlavaForConditionalGeneration,
    pixels: torch.Tensor,
    scenes: list[Scene],
    steps: int,
    lr: float = 2e-3,
    batch: int = 64,
) -> list[dict]:
    """Train vision tower and projector until each patch's feature names its cell; word embeddings stay as they are.

    Returns the learning curve: step, loss and the share of right patches of each kind on the last batch.
    """
    parameters = [
        *model.model.vision_tower.parameters(),
        *model.model.multi_modal_projector.parameters(),
    ]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    labels, curve, started = patch_labels(scenes), [], time.time()
    for step in range(1, steps + 1):
        rows = torch.randint(len(scenes), (batch,))
        features = image_features(model, pixels[rows])
        scores = patch_scores(features)
        losses = {kind: F.cross_entropy(scores[kind].flatten(0, 1), labels[kind][rows].flatten()) for kind in scores}
        target = patch_targets({kind: labels[kind][rows] for kind in labels})
        loss = sum(losses.values()) + (features - target).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            right = {kind: (scores[kind].argmax(-1) == labels[kind][rows]).float().mean().item() for kind in scores}
            curve.append({"phase": "align", "step": step, "loss": loss.item(), **right})
            print(f"align {step}/{steps} {time.time() - started:.0f} s {curve[-1]}", flush=True)
    return curve


def image_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Projected patch features (images, 9, width): exactly what the model puts in place of its image tokens."""
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    return model.model.multi_modal_projector(hidden)


@torch.no_grad()
def cached_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """image_features of many images, without gradient, in batches."""
    return torch.cat([image_features(model, pixels[i : i + 256]) for i in range(0, len(pixels), 256)])
