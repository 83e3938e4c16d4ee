"""Where the images of a batch come from: preprocessed anew, or a frozen tower's outputs computed once per image."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from transformers import PreTrainedModel

from rlaifv.training.pair_data import PairData
from rlaifv.vlm.collate import stack_inputs


def vision_tower(model: PreTrainedModel) -> torch.nn.Module | None:
    """The model's image encoder."""
    tower = model.get_encoder(modality="image")
    return None if tower is model or tower is model.base_model else tower


class ImageInputs:
    """The images of a batch, preprocessed and encoded anew each time they are needed."""

    def __init__(self, data: PairData):
        self.data = data

    @contextmanager
    def serve(self, backbone: torch.nn.Module, images: list[int], device: torch.device) -> Iterator[dict]:
        """The image inputs with which `backbone` is to be called within the block."""
        yield stack_inputs([self.data.image_inputs(i) for i in images], device)


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
    first use of an image runs the tower on it alone, so that its features depend on nothing else; later ones replay
    what it returned.
    """

    def __init__(self, data: PairData, tower: torch.nn.Module):
        self.data, self.tower = data, tower
        self.outputs: dict[int, Any] = {}  # per image: what the tower returned
        self.inputs: dict[int, dict[str, torch.Tensor]] = {}  # per image: what else the model wants to know of it

    @contextmanager
    def serve(self, backbone: torch.nn.Module, images: list[int], device: torch.device) -> Iterator[dict]:
        """Within the block the tower of `backbone` is replaced by one that returns these images' stored output."""
        for image in images:
            if image not in self.outputs:
                self._compute(backbone, image, device)

        def join(*leaves):
            return torch.cat(leaves).to(device) if isinstance(leaves[0], torch.Tensor) else leaves[0]

        output = tree_map(join, *(self.outputs[i] for i in images))
        name = next(name for name, module in backbone.named_modules() if module is self.tower)
        backbone.set_submodule(name, StoredOutput(self.tower, output))
        try:
            yield stack_inputs([self.inputs[i] for i in images], device)
        finally:
            backbone.set_submodule(name, self.tower)

    @torch.no_grad()
    def _compute(self, backbone: torch.nn.Module, image: int, device: torch.device) -> None:
        inputs, seen = self.data.image_inputs(image), []
        hook = self.tower.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            backbone.get_image_features(**stack_inputs([inputs], device))
        finally:
            hook.remove()
        (output,) = seen
        self.outputs[image] = tree_map_only(torch.Tensor, torch.Tensor.cpu, output)
        # only the shape of the pixels is looked at after the tower: one number stands for all of them
        pixels = inputs["pixel_values"]
        self.inputs[image] = {**inputs, "pixel_values": pixels.new_ones(1).expand(pixels.shape)}

    def bytes_per_image(self) -> int:
        """Main memory that one image's outputs take (the most of those computed so far)."""
        return max(
            sum(x.nbytes for x in tree_leaves(output) if isinstance(x, torch.Tensor))
            for output in self.outputs.values()
        )
