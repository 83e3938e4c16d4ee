"""Where the images of a batch come from: preprocessed anew, or a frozen tower's outputs computed once per image."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from rlaifv.training.pair_data import PairData
from rlaifv.vlm.collate import stack_inputs

GROUP = 16
"""Images that go through the tower together where they are alike."""


def vision_tower(model: PreTrainedModel) -> torch.nn.Module | None:
    """The model's image encoder."""
    tower = model.get_encoder(modality="image")
    return None if tower is model or tower is model.base_model else tower


class ImageInputs:
    """The images of a batch, preprocessed and encoded anew each time they are needed."""

    kept = False

    def __init__(self, data: PairData):
        self.data = data

    @contextmanager
    def serve(self, backbone: torch.nn.Module, images: list[int], device: torch.device) -> Iterator[dict]:
        """The image inputs with which `backbone` is to be called within the block."""
        yield stack_inputs([self.data.image_inputs(i) for i in images], device)

    def bytes_per_image(self) -> int:
        """Main memory that one image's outputs take: none is kept."""
        return 0


class StoredOutput(torch.nn.Module):
    """Stands in a tower's place for one forward pass: returns `output`, whatever pixels it gets.

    Attributes that the model's code asks of its tower (`dtype`, `config`) are the tower's own.
    """

    def __init__(self, tower: torch.nn.Module, output):
        super().__init__()
        self.__dict__.update(tower=tower, output=output)  # not as a submodule: its weights are not needed

    def forward(self, *args, **kwargs):
        return self.output

    def __getattr__(self, name: str):
        return getattr(self.__dict__["tower"], name)


class KeptFeatures:
    """The outputs of a frozen vision tower, computed once per image and kept in main memory.

    Everything after the tower (the projector, the merge into the text) stays the model's own code and may train. The
    first use of an image runs the tower on it and on those of its `GROUP` numbers that have its shape; later ones
    replay what it returned. Groups are fixed, so that a resumed run sums every image's features in the same order.
    """

    kept = True

    def __init__(self, data: PairData, tower: torch.nn.Module):
        self.data, self.tower = data, tower
        self.outputs: dict[int, list] = {}  # per image: the tower's output, flattened
        self.inputs: dict[int, dict[str, torch.Tensor]] = {}  # per image: what else the model wants to know of it
        self._spec = None
        self._one_row_an_image = True  # until the tower's output shows otherwise

    @contextmanager
    def serve(self, backbone: torch.nn.Module, images: list[int], device: torch.device) -> Iterator[dict]:
        """Within the block the tower of `backbone` is replaced by one that returns these images' stored output."""
        for image in images:
            if image not in self.outputs:
                self._compute(backbone, image, device)
        leaves = [
            torch.cat(leaf).to(device) if isinstance(leaf[0], torch.Tensor) else leaf[0]
            for leaf in zip(*(self.outputs[i] for i in images), strict=True)
        ]
        name = next(name for name, module in backbone.named_modules() if module is self.tower)
        backbone.set_submodule(name, StoredOutput(self.tower, tree_unflatten(leaves, self._spec)))
        try:
            yield stack_inputs([self.inputs[i] for i in images], device)
        finally:
            backbone.set_submodule(name, self.tower)

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
            # only the shape of the pixels is looked at after the tower: one number stands for all of them
            pixels = inputs[number]["pixel_values"]
            self.inputs[number] = {**inputs[number], "pixel_values": pixels.new_ones(1).expand(pixels.shape)}
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
        seen: list = []
        hook = self.tower.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            backbone.get_image_features(**inputs)
        finally:
            hook.remove()
        (output,) = seen
        leaves, self._spec = tree_flatten(output)
        leaves = [x.detach().cpu() if isinstance(x, torch.Tensor) else x for x in leaves]
        if n == 1:
            return [leaves]
        if any(isinstance(x, torch.Tensor) and (not x.ndim or len(x) != n) for x in leaves):
            return None
        return [[x[i : i + 1].clone() if isinstance(x, torch.Tensor) else x for x in leaves] for i in range(n)]

    def bytes_per_image(self) -> int:
        """Main memory that one image's outputs take (the most of those computed so far)."""
        sizes = [
            sum(x.numel() * x.element_size() for x in leaves if isinstance(x, torch.Tensor))
            for leaves in self.outputs.values()
        ]
        return max(sizes, default=0)
