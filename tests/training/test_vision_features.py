"""A frozen tower's features are those of each image alone, whichever images are asked for and in whatever order."""

import pytest
import torch
from tiny_llava import save_pairs, save_tiny_llava

from rlaifv.training import pair_data as preferences
from rlaifv.training.pair_data import PairData
from rlaifv.training.vision_features import GROUP, KeptFeatures
from rlaifv.vlm.loading import load_vlm


class Shapes:
    """Images of given (height, width), and which of them are not needed any more."""

    def __init__(self, sizes: list[tuple[int, int]]):
        generator = torch.Generator().manual_seed(0)
        self.pixels = [torch.randn(1, 3, *size, generator=generator) for size in sizes]
        self.prompts = [(i, "") for i in range(len(sizes))]
        self.forgotten: list[int] = []

    def image_inputs(self, image: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[image]}

    def forget_inputs(self, image: int) -> None:
        self.forgotten.append(image)


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


def test_images_of_one_shape_go_through_together_and_those_of_another_shape_apart():
    data, tower = Shapes([(8, 8), (8, 8), (8, 12), (8, 8), (8, 12)]), torch.nn.Conv2d(3, 5, 4, stride=4)
    kept, backbone, sizes = make_tower(data, tower)
    features = served(kept, backbone, tower, [3, 0])
    alone = torch.cat([torch.nn.functional.conv2d(data.pixels[i], tower.weight, tower.bias, 4) for i in (3, 0)])
    torch.testing.assert_close(features, alone)
    assert sizes[0] == 3 and sorted(kept.outputs) == [0, 1, 3] == sorted(data.forgotten)
    served(kept, backbone, tower, [4])
    assert sorted(kept.outputs) == [0, 1, 2, 3, 4]


def test_groups_do_not_depend_on_which_image_is_asked_for_first():
    """A resumed run begins in the middle of an epoch: its features must have the same bits."""
    results = []
    for first in ([GROUP + 1, 2], [0, GROUP]):
        torch.manual_seed(0)
        data, tower = Shapes([(8, 8)] * (GROUP + 3)), torch.nn.Conv2d(3, 5, 4, stride=4)
        kept, backbone, sizes = make_tower(data, tower)
        served(kept, backbone, tower, first)
        assert sorted(sizes[:2]) == [3, GROUP]
        results.append(kept.outputs)
    assert results[0].keys() == results[1].keys() == set(range(GROUP + 3))
    assert all(torch.equal(results[0][i][0], results[1][i][0]) for i in results[0])


def test_a_tower_whose_rows_are_not_images_reads_them_one_by_one():
    data, tower = Shapes([(4, 4), (4, 4), (4, 4)]), Sums()
    kept, backbone, sizes = make_tower(data, tower)
    features = served(kept, backbone, tower, [2, 1])
    assert sizes[:3] == [3, 1, 1], "together once, to find out"
    assert torch.equal(features, torch.cat([tower.__class__.forward(tower, data.pixels[i]) for i in (2, 1)]))


@pytest.mark.parametrize("room", [0, 6912, 1 << 20], ids=["nothing", "one image", "all"])
def test_preprocessed_images_are_the_same_kept_or_made_again(tmp_path, monkeypatch, room):
    monkeypatch.setattr(preferences, "KEPT_INPUTS", room)  # one image of 3 × 24 × 24 floats takes 6912 bytes
    vlm = load_vlm(str(save_tiny_llava(tmp_path / "model")), device="cpu")
    data = PairData(vlm, save_pairs(tmp_path / "pairs.parquet", 8))
    made = [data.image_inputs(i)["pixel_values"] for i in range(len(data.prompts))]
    kept = [data.image_inputs(i)["pixel_values"] is made[i] for i in range(len(data.prompts))]
    assert sum(kept) == min(room // 6912, len(kept))
    for i in range(len(data.prompts)):
        data.forget_inputs(i)
        assert torch.equal(data.image_inputs(i)["pixel_values"], made[i])
