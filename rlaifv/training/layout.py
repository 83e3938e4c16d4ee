"""Choose the fastest way of pairs through a model that is exact for it, on two real pairs, before training."""

import logging

import torch

from rlaifv.params import TrainParams
from rlaifv.training.packed_pairs import RowReader, answer_logps, build_batch
from rlaifv.training.pair_data import PairData
from rlaifv.training.vision_features import FrozenTower, ImageInputs, vision_tower
from rlaifv.vlm.loading import VLM

log = logging.getLogger(__name__)


TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}
"""Largest accepted difference of answer tokens' log-probs from those of two plain rows, in nats: of any token in
float32, on average in bfloat16, where single improbable tokens differ by more between any two ways to sum."""


def choose_layout(vlm: VLM, data: PairData, params: TrainParams) -> str:
    """Prepare `vlm.model` to read `build_batch` in the fastest way that is exact for it; returns that way's name.

    The plain way is two rows per pair and images encoded each time. The others are packed rows and cached features of
    a frozen tower; each is compared with the plain way on the shortest and the longest pair, and one that fails is
    named in a warning and not used.
    """
    mixed = torch.autocast(vlm.device.type, torch.bfloat16, enabled=params.dtype == "bfloat16")
    with torch.no_grad(), mixed:
        return _choose(vlm, data, params)


def _choose(vlm: VLM, data: PairData, params: TrainParams) -> str:
    by_length = sorted(data.pairs, key=lambda pair: pair.row_length)
    sample, pad = [by_length[0], by_length[-1]], vlm.tokenizer.pad_token_id
    anew, kept = ImageInputs(data), None
    tower = vision_tower(vlm.model)
    if tower is not None and params.feature_cache_gb and not any(p.requires_grad for p in tower.parameters()):
        kept = FrozenTower(data, tower)
    reader = RowReader(vlm.model, anew)
    expected = answer_logps(vlm.model, move(build_batch(sample, pad, packed=False), vlm.device))
    for packed in (True, False) if params.packed else (False,):
        batch = move(build_batch(sample, pad, packed=packed), vlm.device)
        for images in (kept, anew) if kept else (anew,):
            name = ("packed" if packed else "plain") + (", features kept" if images is kept else "")
            reader.images = images
            if problem := why_not(vlm, batch, expected, params.dtype):
                log.warning("%s cannot train %s: %s", vlm.name, name, problem)
                continue
            if images is kept and (need := kept.bytes_per_image() * len(data.prompts) / 1e9) > params.feature_cache_gb:
                log.info("features need %.1f GB, train.feature_cache_gb is %g: not kept", need, params.feature_cache_gb)
                continue
            log.info("train: pairs go through %s %s", vlm.name, name)
            return name
    raise RuntimeError(f"{vlm.name} gives other log-probs for the same two rows each time: it cannot be trained on")


def why_not(vlm: VLM, batch: dict, expected: torch.Tensor, dtype: str) -> str | None:
    """None when this batch's answer log-probs are the expected ones [2B, A], else what is wrong."""
    try:
        off = (answer_logps(vlm.model, batch) - expected).abs()
        off = (off.max() if dtype == "float32" else off.sum() / batch["completion_mask"].sum()).item()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not off <= TOLERANCE[dtype]:
        return f"log-probs differ by {off:.2g} nats from two plain rows"
    return None


def move(value, device: torch.device):
    """A nested batch on another device."""
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value
