"""One row per pair: `[prompt | chosen | rejected]`, the image's features once, hidden states at answer positions only.
What both answers begin with alike is part of what they share, like the prompt: it goes through the model once.

`build_batch` lays out a batch of pairs, `RowReader` teaches a model to read it. TRL's loss sees neither: it gets
`input_ids` that hold only the answers, and hidden states that stand exactly where the answers' predictions are, so
every loss and metric of `DPOTrainer` works on it unchanged. The plain layout (two ordinary rows per pair) goes through
the same door, for architectures that cannot read the packed one.
"""

import difflib
from collections.abc import Sequence
from types import MethodType

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from rlaifv.training.pair_data import EncodedPair
from rlaifv.training.vision_features import FrozenTower, ImageInputs

PAD_BRANCH = -1


def build_batch(pairs: Sequence[EncodedPair], pad_token_id: int, *, packed: bool) -> dict:
    """Lay out B pairs for `DPOTrainer`.

    Returns `input_ids`, `attention_mask`, `completion_mask` [2B, 1 + A] (chosen rows first; column 0 stands for the
    last prompt token; `attention_mask` there holds the prompt's length, so that its sum is the number of tokens) and
    `rows`, what the model really reads:

    - `input_ids` [R, n], right-padded; R = B packed, 2B plain
    - `branch` [R, n] int8: 0 what both share (the prompt, and in packed rows the tokens that both answers begin with),
      1 chosen, 2 rejected, -1 padding
    - `position_ids` [R, n]: the second branch starts where the first did (packed only)
    - `gather` [2B, 1 + A]: index into the flattened [R * n] of the position that predicts each column's next token
    - `images` [R]: which image each row is about
    """
    answers = [(p.chosen, p.chosen_start) for p in pairs] + [(p.rejected, p.rejected_start) for p in pairs]
    width = 1 + max(len(ids) for ids, _ in answers)
    labels = np.full((len(answers), width), pad_token_id, np.int64)
    completion = np.zeros((len(answers), width), np.int64)
    tokens = np.zeros((len(answers), width), np.int64)
    gather = np.zeros((len(answers), width), np.int64)
    branches = [[p.chosen, p.rejected] for p in pairs] if packed else [[ids] for ids, _ in answers]
    prompts = list(pairs) if packed else [*pairs, *pairs]
    common = [p.common if packed else 0 for p in prompts]
    n = max(p.row_length if packed else len(p.prompt) + len(b[0]) for p, b in zip(prompts, branches, strict=True))
    ids = np.full((len(prompts), n), pad_token_id, np.int64)
    branch = np.full((len(prompts), n), PAD_BRANCH, np.int8)
    positions = np.zeros((len(prompts), n), np.int64)
    types = {key: np.zeros((len(prompts), n), np.int64) for key in pairs[0].token_types}
    for row, (pair, row_branches, k) in enumerate(zip(prompts, branches, common, strict=True)):
        prompt, shared = len(pair.prompt), len(pair.prompt) + k
        ids[row, :prompt], ids[row, prompt:shared] = pair.prompt, pair.chosen[:k]
        branch[row, :shared], positions[row, :shared] = 0, np.arange(shared)
        for key, values in pair.token_types.items():
            types[key][row, :prompt] = values
        start = shared
        for number, answer in enumerate(row_branches):
            stop = start + len(answer) - k
            ids[row, start:stop] = answer[k:]
            branch[row, start:stop] = number + 1
            positions[row, start:stop] = shared + np.arange(stop - start)
            out = row + number * len(pairs)  # chosen rows first, rejected rows behind them
            labels[out, 1 : 1 + len(answer)] = answer
            completion[out, 1 + answers[out][1] : 1 + len(answer)] = 1
            tokens[out, 0], tokens[out, 1 : 1 + len(answer)] = prompt, 1
            # the last prompt token predicts an answer's first token, then each token the one behind it
            gather[out, : 1 + k] = row * n + np.arange(prompt - 1, shared)
            gather[out, 1 + k : 1 + len(answer)] = row * n + np.arange(start, stop)
            start = stop
    as_tensor = torch.from_numpy
    return {
        "input_ids": as_tensor(labels),
        "attention_mask": as_tensor(tokens),
        "completion_mask": as_tensor(completion),
        "rows": {
            "input_ids": as_tensor(ids),
            "branch": as_tensor(branch),
            "position_ids": as_tensor(positions) if packed else None,
            "gather": as_tensor(gather),
            "images": [pair.image for pair in prompts],
            "token_types": {key: as_tensor(value) for key, value in types.items()},
        },
    }


def changed_tokens(ids: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Bool mask [len(ids)] of the tokens that an alignment with `other` inserts or replaces (RLHF-V's segments)."""
    mask = np.ones(len(ids), bool)
    matcher = difflib.SequenceMatcher(None, ids.tolist(), other.tolist(), autojunk=False)
    for block in matcher.get_matching_blocks():
        mask[block.a : block.a + block.size] = False
    return mask


def segment_weights(pairs: Sequence[EncodedPair], width: int, weight: float) -> torch.Tensor:
    """Weights [2B, width - 1] of the answers' log-probs: `weight` for changed tokens, 1 for the rest.

    Dense DPO of RLHF-V (arXiv 2312.00849, eq. 3 without its 1/N): segments that a correction changed count more.
    """
    weights = np.ones((2 * len(pairs), width - 1), np.float32)
    for i, pair in enumerate(pairs):
        for row, ids, other in ((i, pair.chosen, pair.rejected), (i + len(pairs), pair.rejected, pair.chosen)):
            weights[row, : len(ids)][changed_tokens(ids, other)] = weight
    return torch.from_numpy(weights)


def block_mask(branch: torch.Tensor) -> torch.Tensor:
    """Bool attention mask [R, n, n] from `branch` [R, n]: causal, and a branch sees only what both share and itself."""
    n = branch.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=branch.device).tril()
    return causal & ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None]))


def packed_masks(rows: dict, config: PretrainedConfig) -> torch.Tensor | dict[str, torch.Tensor]:
    """Mask [R, 1, n, n] of packed rows, or one per type of layer where some layers see only a sliding window.

    `token_type_ids` (Gemma3) mark image tokens, which see each other in both directions.
    """
    seen = block_mask(rows["branch"])
    if "token_type_ids" in rows["token_types"]:
        image = rows["token_types"]["token_type_ids"] == 1
        number = (image & ~image.roll(1, dims=1)).cumsum(1).masked_fill(~image, 0)  # 1, 2, ... for each run of them
        seen = seen | ((number[:, :, None] == number[:, None, :]) & (number[:, None, :] > 0))
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    if not window or "sliding_attention" not in layer_types:
        return seen[:, None]
    positions = rows["position_ids"]
    near = seen & (positions[:, :, None] - positions[:, None, :] < window)
    if "full_attention" not in layer_types:
        return near[:, None]
    return {"full_attention": seen[:, None], "sliding_attention": near[:, None]}


def packed_positions(rows: dict, backbone: torch.nn.Module, image_inputs: dict) -> torch.Tensor:
    """Positions [R, n] of packed rows; [3, R, n] for models that place image tokens in three dimensions (Qwen-VL)."""
    if not hasattr(backbone, "get_rope_index"):
        return rows["position_ids"]
    shared = (rows["branch"] == 0).long()
    grids = {key: value for key, value in image_inputs.items() if key.endswith("grid_thw")}
    in_shared, delta = backbone.get_rope_index(
        input_ids=rows["input_ids"], attention_mask=shared, **rows["token_types"], **grids
    )
    return torch.where(shared.bool(), in_shared, rows["position_ids"] + delta)


class RowReader:
    """Teaches `model` to read batches of `build_batch`: gives its backbone a forward that understands `rows`.

    The last hidden states come back at the positions in `gather` only, [2B, 1 + A, hidden], so that whoever projects
    them onto the vocabulary does so for answers alone. Without `rows` the forward is the original one. `images` says
    where image inputs come from and can be exchanged.
    """

    def __init__(self, model: PreTrainedModel, images: FrozenTower | ImageInputs):
        self.images = images
        backbone = model.base_model
        self._original, self._config = backbone.forward, model.get_decoder().config
        backbone.forward = MethodType(self._forward, backbone)

    def _forward(self, backbone: torch.nn.Module, *args, rows: dict | None = None, **kwargs):
        if rows is None:
            return self._original(*args, **kwargs)
        branch = rows["branch"]
        with self.images.serve(backbone, rows["images"], branch.device) as image_inputs:
            if rows["position_ids"] is not None:
                mask = packed_masks(rows, self._config)
                kwargs["position_ids"] = packed_positions(rows, backbone, image_inputs)
            else:
                mask = (branch != PAD_BRANCH).long()
            kwargs.pop("inputs_embeds", None)
            read = {"input_ids": rows["input_ids"], "attention_mask": mask, **rows["token_types"], **image_inputs}
            out = self._original(**kwargs | read)
        hidden = out.last_hidden_state
        out.last_hidden_state = hidden.reshape(-1, hidden.shape[-1])[rows["gather"]]
        return out


def answer_logps(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """Log-prob [2B, A] of every answer token of a `build_batch`, 0 where `completion_mask` is; a plain log-softmax."""
    hidden = model.base_model(rows=batch["rows"], use_cache=False).last_hidden_state[:, :-1]
    logits = model.get_output_embeddings()(hidden).float()
    chosen = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return chosen * batch["completion_mask"][:, 1:]


def score_logits(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What TRL's fused head says of every answer token, [2B, A] each and 0 where `labels` [2B, 1 + A] are -100.

    From all the `logits` [2B, 1 + A, V] at once: the fused head projects in tiles, on a CPU at padding too, and a
    second time for the gradient. That saves the memory of a large vocabulary; for a small one it is the slower way.
    """
    seen = labels[:, 1:] != -100
    logits = logits[:, :-1][seen].float()
    targets = labels[:, 1:][seen]
    logps = logits.log_softmax(-1)
    with torch.no_grad():
        watched = {
            "entropy": -(logps.exp() * logps).sum(-1),
            "mean_logits": logits.mean(-1),
            "is_top1": logits.argmax(-1) == targets,
        }
    scores = {"log_probs": logps.gather(-1, targets[:, None])[:, 0], **watched}
    return {key: value.new_zeros(seen.shape).masked_scatter(seen, value) for key, value in scores.items()}
