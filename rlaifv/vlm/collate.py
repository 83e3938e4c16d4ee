"""Join the rows of tokens and what a processor made of several images into one batch."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from rlaifv.vlm.loading import VLM


def pad_rows(rows: list[list[int]], value: int) -> torch.Tensor:
    """(rows, longest) int64, padded on the right."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)


def collate_inputs(vlm: VLM, inputs: list[dict[str, torch.Tensor]], lengths: list[int]) -> dict:
    """What the processor made of several images, as one batch on the model's device.

    Per-token inputs (`token_type_ids`, `mm_token_type_ids`) are cut or zero-padded to each row's length: what follows
    an image is text.
    """
    batch = stack_inputs([{k: v for k, v in item.items() if "token_type_ids" not in k} for item in inputs], vlm.device)
    for key in inputs[0].keys() - batch.keys():
        values = [item[key][0].tolist() for item in inputs]
        rows = [(value + [0] * length)[:length] for value, length in zip(values, lengths, strict=True)]
        batch[key] = pad_rows(rows, 0).to(vlm.device)
    return {k: v.to(vlm.network.dtype) if v.is_floating_point() else v for k, v in batch.items()}


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
        joined[key] = tensors[0].new_zeros(sum(map(len, tensors)), *shape)
        for place, tensor in zip(joined[key].split([len(t) for t in tensors]), tensors, strict=True):
            place[tuple(map(slice, tensor.shape))] = tensor
        joined[key] = joined[key].to(device)
    return joined
