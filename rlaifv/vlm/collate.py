"""Join the rows of tokens and what a processor made of several images into one batch."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from rlaifv.vlm.loading import VLM


def pad_rows(rows: list[list[int]], value: int, side: str = "right") -> torch.Tensor:
    """(rows, longest) int64."""
    return pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value, padding_side=side
    )


def collate_inputs(vlm: VLM, inputs: list[dict[str, torch.Tensor]], lengths: list[int], side: str = "right") -> dict:
    """What the processor made of several images, as one batch on the model's device.

    Per-token inputs (`token_type_ids`, `mm_token_type_ids`) are cut or zero-padded to each row's length: what follows
    an image is text. Everything else must agree in shape after the first dimension (see `inputs_shape`).
    """
    batch = {}
    for key in inputs[0]:
        values = [item[key] for item in inputs]
        if "token_type_ids" in key:
            rows = [(value[0].tolist() + [0] * length)[:length] for value, length in zip(values, lengths, strict=True)]
            batch[key] = pad_rows(rows, 0, side)
        elif key == "pixel_values" and "target_sizes" in inputs[0]:
            batch[key] = torch.cat(values, dim=-1)  # MiniCPM-V packs the patches of all images along the last one
        else:
            batch[key] = torch.cat(values)
        batch[key] = batch[key].to(vlm.device)
        if batch[key].is_floating_point():
            batch[key] = batch[key].to(vlm.network.dtype)
    return batch


def inputs_shape(inputs: dict[str, torch.Tensor]) -> tuple:
    """Images with equal values can go in one batch."""
    return tuple((k, tuple(v.shape[1:])) for k, v in sorted(inputs.items()) if "token_type_ids" not in k)


def stack_inputs(parts: Sequence[dict[str, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    """Join the processor's outputs for single images along the batch; other dimensions are padded with zeros."""
    joined = {}
    for key in parts[0]:
        tensors = [part[key] for part in parts]
        if key == "pixel_values" and "target_sizes" in parts[0]:
            joined[key] = torch.cat(tensors, dim=-1).to(device)  # MiniCPM-V puts all images' patches in one row
            continue
        shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
        if any(list(t.shape[1:]) != shape for t in tensors):
            padded = [t.new_zeros(t.shape[0], *shape) for t in tensors]
            for target, tensor in zip(padded, tensors, strict=True):
                target[tuple(slice(0, size) for size in tensor.shape)] = tensor
            tensors = padded
        joined[key] = torch.cat(tensors).to(device)
    return joined
