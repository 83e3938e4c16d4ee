"""A frozen tower's features are those of each image alone, whichever images are asked for and in whatever order."""

import torch

from rlaifv.training.vision_features import KeptFeatures


class Shapes:
    """Images of given (height, width)."""

    def __init__(self, sizes: list[tuple[int, int]]):
        generator = torch.Generator().manual_seed(0)
        self.pixels = [torch.randn(1, 3, *size, generator=generator) for size in sizes]

    def image_inputs(self, image: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[image]}


class Backbone(torch.nn.Module):
    """What calls a tower, as a VLM does."""

    def __init__(self, tower: torch.nn.Module):
        super().__init__()
        self.tower = tower

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.tower(pixel_values)


def make_tower(data: Shapes, tower: torch.nn.Module) -> tuple[KeptFeatures, Backbone, list[int]]:
    """A frozen tower with the backbone that calls it, and the batch sizes that went through it."""
    sizes: list[int] = []
    tower.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    return KeptFeatures(data, tower), Backbone(tower), sizes


class Sums(torch.nn.Module):
    """Features whose rows are patches of all images together, as towers of packed patches give them."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.unfold(2, 2, 2).unfold(3, 2, 2).sum((-1, -2)).permute(0, 2, 3, 1).flatten(0, 2)


def served(kept: KeptFeatures, backbone: Backbone, tower: torch.nn.Module, images: list[int]) -> torch.Tensor:
    with kept.serve(backbone, images, torch.device("cpu")) as inputs:
        assert inputs["pixel_values"].shape[0] == len(images)
        features = backbone.get_image_features(**inputs)
    assert backbone.tower is tower and [*backbone.state_dict()] == [f"tower.{key}" for key in tower.state_dict()]
    return features


def test_an_image_goes_through_the_tower_once_and_alone():
    data, tower = Shapes([(8, 8), (8, 8), (8, 8)]), torch.nn.Conv2d(3, 5, 4, stride=4)
    kept, backbone, sizes = make_tower(data, tower)
    features = served(kept, backbone, tower, [2, 0])
    assert torch.equal(features, torch.cat([kept.outputs[2], kept.outputs[0]]))
    again = served(kept, backbone, tower, [0, 1, 2])
    assert torch.equal(again[2], features[0]) and torch.equal(again[0], features[1])
    assert sizes == [1, 1, 1] and sorted(kept.outputs) == [0, 1, 2]
    alone = torch.cat([torch.nn.functional.conv2d(data.pixels[i], tower.weight, tower.bias, 4) for i in range(3)])
    torch.testing.assert_close(again, alone)


def test_features_of_images_of_other_shapes_are_put_after_each_other_where_rows_are_patches():
    data, tower = Shapes([(4, 4), (4, 4), (4, 8)]), Sums()
    kept, backbone, _ = make_tower(data, tower)
    features = served(kept, backbone, tower, [2, 1])
    assert torch.equal(features, torch.cat([tower.__class__.forward(tower, data.pixels[i]) for i in (2, 1)]))
