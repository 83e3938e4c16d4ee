"""Where the images of a batch come from: preprocessed anew, or a frozen tower's outputs computed once per image."""

from types import MethodType

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from rlaifv.training.pair_data import PairData
from rlaifv.vlm.collate import stack_inputs


def vision_tower(model: PreTrainedModel) -> torch.nn.Module | None:
    """The model's image encoder."""
    tower = model.get_encoder(modality="image")
    return None if tower is model or tower is model.base_model else tower


class ImageInputs:
    """The images of a batch, preprocessed anew each time they are needed."""

    def __init__(self, data: PairData):
        self.data = data

    def serve(self, backbone: torch.nn.Module, images: list[int], device: torch.device) -> "ImageInputs":
        self._now = (images, device)
        return self

    def __enter__(self) -> dict[str, torch.Tensor]:
        images, device = self._now
        return stack_inputs([self.data.image_inputs(i) for i in images], device)

    def __exit__(self, *_) -> None:
        self._now = None


GROUP = 16
"""Images that go through the tower together where they are alike."""


class FrozenTower:
    """The outputs of a frozen vision tower, computed once per image and kept in main memory.

    Everything behind the tower (the projector, the merge into the text) stays the model's own code and may train. The
    first use of an image runs the tower on it and on those of its `GROUP` numbers that have its shape; later ones
    replay what it returned. Groups are fixed, so that a resumed run sums every image's features in the same order.
    """

    def __init__(self, data: PairData, tower: torch.nn.Module):
        self.data, self.tower = data, tower
        self.outputs: dict[int, list] = {}  # per image: the tower's output, flattened
        self.meta: dict[int, dict[str, torch.Tensor]] = {}  # per image: what else the model wants to know of it
        self._spec = None
        self._one_row_an_image = True  # until the tower's output shows otherwise
        self._recording: list | None = None
        self._serving: list[int] | None = None
        self._original = tower.forward
        tower.forward = MethodType(self._forward, tower)

    def _forward(self, tower: torch.nn.Module, *args, **kwargs):
        if self._serving is not None:
            parts = [self.outputs[i] for i in self._serving]
            device = self._device
            leaves = [
                torch.cat(leaf).to(device) if isinstance(leaf[0], torch.Tensor) else leaf[0]
                for leaf in zip(*parts, strict=True)
            ]
            return tree_unflatten(leaves, self._spec)
        out = self._original(*args, **kwargs)
        if self._recording is not None:
            leaves, self._spec = tree_flatten(out)
            self._recording.append([x.detach().cpu() if isinstance(x, torch.Tensor) else x for x in leaves])
        return out

    def serve(self, backbone: torch.nn.Module, images: list[int], device: torch.device) -> "FrozenTower":
        for image in images:
            if image not in self.outputs:
                self._compute(backbone, image, device)
        self._now, self._device = images, device
        return self

    def __enter__(self) -> dict[str, torch.Tensor]:
        self._serving = self._now
        return stack_inputs([self.meta[i] for i in self._serving], self._device)

    def __exit__(self, *_) -> None:
        self._serving = None

    @torch.no_grad()
    def _compute(self, backbone: torch.nn.Module, image: int, device: torch.device) -> None:
        inputs = self._inputs_alike(image)
        parts = self._record(backbone, stack_inputs(list(inputs.values()), device), len(inputs))
        if parts is None:  # the tower's output is not one row an image: this model's images go through it one by one
            self._one_row_an_image = False
            inputs = {image: inputs[image]}
            parts = self._record(backbone, stack_inputs(list(inputs.values()), device), 1)
        for number, part in zip(inputs, parts, strict=True):
            self.outputs[number] = part
            # only the shape of the pixels is looked at behind the tower: one number stands for all of them
            pixels = inputs[number]["pixel_values"]
            self.meta[number] = {**inputs[number], "pixel_values": pixels.new_ones(1).expand(pixels.shape)}
            self.data.forget_inputs(number)

    def _inputs_alike(self, image: int) -> dict[int, dict[str, torch.Tensor]]:
        """The inputs of `image` and of the images of its group whose pixels, and nothing else, have the same shape."""
        own = self.data.image_inputs(image)
        shape = own["pixel_values"].shape
        if not self._one_row_an_image or set(own) != {"pixel_values"} or len(shape) != 4 or shape[0] != 1:
            return {image: own}
        first = image - image % GROUP
        group = range(first, min(first + GROUP, len(self.data.prompts)))
        inputs = {i: own if i == image else self.data.image_inputs(i) for i in group}
        return {i: part for i, part in inputs.items() if part["pixel_values"].shape == shape}

    def _record(self, backbone: torch.nn.Module, inputs: dict[str, torch.Tensor], n: int) -> list[list] | None:
        """The tower's flattened output for each of n images, or None when it cannot be told apart."""
        self._recording = []
        try:
            backbone.get_image_features(**inputs)
            (leaves,) = self._recording
        finally:
            self._recording = None
        if n == 1:
            return [leaves]
        if any(isinstance(x, torch.Tensor) and (not x.ndim or len(x) != n) for x in leaves):
            return None
        return [[x[i : i + 1].clone() if isinstance(x, torch.Tensor) else x for x in leaves] for i in range(n)]

    def bytes_per_image(self) -> int:
        """Main memory that one image's outputs take (of those computed so far)."""
        return max(
            (
                sum(x.numel() * x.element_size() for x in leaves if isinstance(x, torch.Tensor))
                for leaves in self.outputs.values()
            ),
            default=0,
        )
