"""Packed rows: a pair as one sequence `[prompt | chosen | rejected]`, and the check that a model reads it exactly.

What both answers begin with alike belongs to what they share, like the prompt: it goes through the model once. The
plain layout (two ordinary sequences per pair) has the same form, for architectures that cannot read the packed one.
"""

import difflib
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel

from rlaifv.params import TrainParams
from rlaifv.training.pair_data import EncodedPair, PairData
from rlaifv.training.policy import computing
from rlaifv.training.vision_features import ImageInputs, KeptFeatures, vision_tower
from rlaifv.vlm.collate import stack_inputs
from rlaifv.vlm.loading import VLM

log = logging.getLogger(__name__)

SHARED, PADDING = 0, -1
"""What a token of a row belongs to; 1 and up are the branches: chosen and rejected, or a plain row's one answer."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}
"""Largest accepted difference of answer tokens' log-probs from those of the model's own forward, in nats: of any token
in float32, on average in bfloat16, where single improbable tokens differ by more between any two ways to sum. A deep
model, or one in 4 bits, may have more noise than that: up to `NOISE` times what copies and padding beside it change in
a row is accepted."""

NOISE = 3.0


class Row(NamedTuple):
    """One sequence of n tokens. `branch` [n] says what each belongs to, `positions` [n] where it stands: the second
    branch starts where the first did. `predictors` holds for each answer in it the indices [tokens of that answer] of
    the positions that predict its tokens: the last prompt token the first one, then each token the next one."""

    ids: np.ndarray
    branch: np.ndarray
    positions: np.ndarray
    predictors: list[np.ndarray]


def lay_out(pair: EncodedPair, answers: Sequence[np.ndarray]) -> Row:
    """The prompt and the tokens that both answers begin with, then the rest of each of `answers`."""
    prompt, common = pair.prompt, pair.common
    end = shared = len(prompt) + common
    parts, positions, predictors = [prompt, answers[0][:common]], [np.arange(shared)], []
    for answer in answers:
        rest = np.arange(len(answer) - common)
        parts.append(answer[common:])
        positions.append(shared + rest)
        predictors.append(np.concatenate([np.arange(len(prompt) - 1, shared), end + rest])[:-1])
        end += len(rest)
    branch = np.repeat(range(1 + len(answers)), [shared, *map(len, parts[2:])]).astype(np.int8)
    return Row(np.concatenate(parts), branch, np.concatenate(positions), predictors)


def build_batch(pairs: Sequence[EncodedPair], pad_token_id: int, *, packed: bool) -> dict:
    """Lay out B pairs.

    Returns `answers` [2B, A], the answers' token ids, chosen ones first; `answer_mask` bool [2B, A], the tokens that
    are trained; `places`, where these are in the flattened [2B * A], of chosen answers [C] and of rejected ones [D] (a
    GPU that looked for them would be waited for); `tokens`, the tokens of two plain rows per pair (what throughput
    counts); and `rows`, what the model reads:

    - `input_ids` [R, n], right-padded; R = B packed, 2B plain
    - `branch` [R, n] int8: SHARED, 1 for a row's first answer, 2 for its second, or PADDING
    - `position_ids` [R, n] (packed only)
    - `predictors` [2B, A]: index into the flattened [R * n] of the position that predicts each answer token
    - `images` [R]: which image each row is about
    - `token_types`: [R, n] each, for processors that have them
    """
    answers = [(p.chosen, p.chosen_start) for p in pairs] + [(p.rejected, p.rejected_start) for p in pairs]
    sides = [("chosen", "rejected")] if packed else [("chosen",), ("rejected",)]
    about = [*pairs] * len(sides)  # the pair of each row
    rows = [lay_out(p, [getattr(p, side) for side in of_row]) for of_row in sides for p in pairs]
    n = max(len(row.ids) for row in rows)
    predictors = [i * n + row.predictors[number] for number in range(1 + packed) for i, row in enumerate(rows)]
    trained = padded([np.arange(len(ids)) >= start for ids, start in answers], False)
    places, chosen = trained.flatten().nonzero()[:, 0], int(trained[: len(pairs)].sum())
    return {
        "answers": padded([ids for ids, _ in answers], pad_token_id),
        "answer_mask": trained,
        "places": (places[:chosen], places[chosen:]),
        "tokens": sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs),
        "rows": {
            "input_ids": padded([row.ids for row in rows], pad_token_id),
            "branch": padded([row.branch for row in rows], PADDING),
            "position_ids": padded([row.positions for row in rows], 0) if packed else None,
            "predictors": padded(predictors, 0),
            "images": [pair.image for pair in about],
            "token_types": {
                key: padded([np.pad(pair.token_types[key], (0, n - len(pair.prompt))) for pair in about], 0)
                for key in pairs[0].token_types
            },
        },
    }


def padded(rows: Sequence[np.ndarray], fill: int) -> torch.Tensor:
    """Rows of different lengths as one tensor [rows, longest], `fill` after each row's end; token ids as int64."""
    table = pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=fill)
    return table.long() if table.dtype == torch.int32 else table


def changed_tokens(ids: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Bool mask [len(ids)] of the tokens that an alignment with `other` inserts or replaces (RLHF-V's segments)."""
    mask = np.ones(len(ids), bool)
    matcher = difflib.SequenceMatcher(None, ids.tolist(), other.tolist(), autojunk=False)
    for block in matcher.get_matching_blocks():
        mask[block.a : block.a + block.size] = False
    return mask


def segment_weights(pairs: Sequence[EncodedPair], weight: float) -> torch.Tensor:
    """Weights [2B, A] of the answers' log-probs: `weight` for changed tokens, 1 for the rest.

    Dense DPO of RLHF-V (arXiv 2312.00849, eq. 3 without its 1/N): segments that a correction changed count more.
    """
    sides = [(p.chosen, p.rejected) for p in pairs] + [(p.rejected, p.chosen) for p in pairs]
    return padded([np.where(changed_tokens(*side), weight, 1.0).astype(np.float32) for side in sides], 1.0)


def block_mask(branch: torch.Tensor) -> torch.Tensor:
    """Bool attention mask [R, n, n] from `branch` [R, n]: causal, and a branch sees only what both share and itself."""
    n = branch.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=branch.device).tril()
    return causal & ((branch[:, None, :] == SHARED) | (branch[:, None, :] == branch[:, :, None]))


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
    shared = (rows["branch"] == SHARED).long()
    grids = {key: value for key, value in image_inputs.items() if key.endswith("grid_thw")}
    in_shared, delta = backbone.get_rope_index(
        input_ids=rows["input_ids"], attention_mask=shared, **rows["token_types"], **grids
    )
    return torch.where(shared.bool(), in_shared, rows["position_ids"] + delta)


def choose_layout(scorer: torch.nn.Module, vlm: VLM, data: PairData, params: TrainParams) -> str:
    """Find the fastest way of pairs through a model that is exact for it, and set `scorer` (a `dpo.PairScorer`) to it.

    The ways are packed or plain rows, and images encoded each time or a frozen tower's features kept. Each is compared
    with the model's own forward, a row at a time, on the shortest and the longest pair; one that fails is named in a
    warning and not used. Returns the way's name; raises RuntimeError when even plain rows fail.
    """
    by_length = data.pairs.row_lengths.argsort(kind="stable")
    sample = [data.pairs[by_length[0]], data.pairs[by_length[-1]]]
    log.info("train: looking how pairs go through %s, on %s: seconds on a GPU, minutes on a CPU", vlm.name, vlm.device)
    ways = [ImageInputs(data)]
    tower = vision_tower(vlm.model)
    if tower is not None and params.feature_cache_gb and not any(p.requires_grad for p in tower.parameters()):
        ways.insert(0, KeptFeatures(data, tower))
    with torch.no_grad(), computing(params.dtype, vlm.device):
        answers = [(p, p.chosen) for p in sample] + [(p, p.rejected) for p in sample]
        expected = [own_logps(vlm, data, pair, answer) for pair, answer in answers]
        limit = TOLERANCE[params.dtype]
        if params.dtype != "float32":
            again = [own_logps(vlm, data, pair, answer, len(answer), len(answers)) for pair, answer in answers]
            limit = max(limit, NOISE * (torch.cat(again) - torch.cat(expected)).abs().mean().item())
        for packed in (True, False) if params.packed else (False,):
            batch = send_to_device(build_batch(sample, vlm.tokenizer.pad_token_id, packed=packed), vlm.device)
            for images in ways:
                scorer.images, kept, room = images, isinstance(images, KeptFeatures), params.feature_cache_gb
                name = ("packed" if packed else "plain") + (", features kept" if kept else "")
                if problem := why_not(scorer, batch, expected, params.dtype, limit):
                    log.warning("%s cannot train %s: %s", vlm.name, name, problem)
                elif kept and (need := images.bytes_per_image() * len(data.prompts) / 1e9) > room:
                    log.info("features need %.1f GB, train.feature_cache_gb is %g: not kept", need, room)
                else:
                    log.info("train: pairs go through %s %s", vlm.name, name)
                    return name
    raise RuntimeError(f"{vlm.name} gives other log-probs in batches than row by row: it cannot be trained on")


def image_source(layout: str, data: PairData, model: PreTrainedModel) -> ImageInputs | KeptFeatures:
    """Where images come from in a layout that `choose_layout` has named."""
    return KeptFeatures(data, vision_tower(model)) if layout.endswith("features kept") else ImageInputs(data)


def own_logps(
    vlm: VLM, data: PairData, pair: EncodedPair, answer: np.ndarray, padding: int = 0, copies: int = 1
) -> torch.Tensor:
    """Log-prob [len(answer)] of each answer token by the model's own forward, head and softmax on one plain row; after
    it, `padding` tokens that nothing sees, below it copies, so that there are `copies` rows."""
    row = torch.from_numpy(np.concatenate([pair.prompt, answer, answer[:1].repeat(padding)])).long()[None]
    seen = (torch.arange(row.shape[1]) < row.shape[1] - padding).long()[None]
    types = {key: padded([np.pad(v, (0, len(answer) + padding))], 0) for key, v in pair.token_types.items()}
    rows = {"input_ids": row, **types} | ({"attention_mask": seen} if padding else {})
    inputs = send_to_device({key: value.repeat(copies, 1) for key, value in rows.items()}, vlm.device)
    images = stack_inputs([data.image_inputs(pair.image)] * copies, vlm.device)
    n = len(answer) + padding + 1
    out = vlm.model(**inputs, **images, use_cache=False, logits_to_keep=n)
    logits = out.logits[0, -n:][: len(answer)]  # MiniCPM-V keeps all of them
    ids = torch.from_numpy(answer).long().to(vlm.device)
    return logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def why_not(scorer: torch.nn.Module, batch: dict, expected: list[torch.Tensor], dtype: str, limit: float) -> str | None:
    """None when this batch's answer log-probs are the expected ones up to `limit`, else what is wrong."""
    try:
        seen = scorer(batch)["logps"]
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    off = (seen - pad_sequence(expected, batch_first=True)).abs()[batch["answer_mask"]]
    worst = (off.max() if dtype == "float32" else off.mean()).item()
    return None if worst <= limit else f"log-probs differ by {worst:.2g} nats from the model's own"
