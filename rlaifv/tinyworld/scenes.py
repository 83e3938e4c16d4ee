"""Scenes of the embedded world: everyday objects in a 3×3 grid, drawn with Pillow.

A scene shows two to four groups of objects of one context (kitchen, street, animals, study), each group in its own
cell: one to three objects of one COCO class in one color. A scene is determined by (seed, image id) alone.
"""

import dataclasses
import random

import numpy as np
from PIL import Image

from rlaifv.tinyworld.icons import COLORS, draw_icon

CONTEXTS: dict[str, tuple[str, ...]] = {
    "kitchen": ("cup", "fork", "knife", "spoon", "bowl", "bottle"),
    "street": ("car", "bus", "bicycle", "truck", "motorcycle", "train"),
    "animals": ("dog", "cat", "horse", "cow", "sheep", "bird"),
    "study": ("laptop", "keyboard", "mouse", "book", "clock", "chair"),
}
CLASSES: tuple[str, ...] = tuple(name for names in CONTEXTS.values() for name in names)
COLOR_NAMES: tuple[str, ...] = tuple(COLORS)
POSITIONS: tuple[str, ...] = (
    "top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right",
)  # fmt: skip
"""Names of the cells in reading order: cell = 3 * row + column."""

GRID, CELL = 3, 72
SIZE = GRID * CELL
"""Side of an image in pixels."""

_BACKGROUNDS = {
    "kitchen": (253, 246, 231),
    "street": (231, 237, 244),
    "animals": (234, 246, 229),
    "study": (242, 237, 250),
}
_BLOCK = 12  # the background's texture is made of squares of this many pixels, so that the PNG stays small
_COUNT_WEIGHTS = (0.7, 0.2, 0.1)
# Where the copies of a group lie inside its cell: side of a copy, then (left, top) of each, in pixels.
_LAYOUTS = {
    1: (60, ((6, 6),)),
    2: (35, ((0, 18), (37, 18))),
    3: (34, ((19, 1), (0, 37), (38, 37))),
}


@dataclasses.dataclass(frozen=True)
class Group:
    """`count` objects of class `name` in one `color` and one `cell` (0 to 8 in reading order)."""

    name: str
    color: str
    count: int
    cell: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """One image's content: groups of distinct classes of one context in distinct cells, in reading order."""

    image_id: int
    context: str
    groups: tuple[Group, ...]

    def find(self, name: str) -> Group | None:
        """The group of class `name`, or None when the scene has no such object."""
        return next((group for group in self.groups if group.name == name), None)


def make_scene(seed: int, image_id: int, n_groups: tuple[int, int] = (2, 4), n_colors: int = 0) -> Scene:
    """The scene of (seed, image id), with n_groups[0] to n_groups[1] groups in at most n_colors colors (0: any)."""
    rng = random.Random(f"scene {seed} {image_id}")
    context = rng.choice(tuple(CONTEXTS))
    size = rng.randint(*n_groups)
    names = rng.sample(CONTEXTS[context], size)
    cells = sorted(rng.sample(range(GRID * GRID), size))
    colors = rng.sample(COLOR_NAMES, n_colors) if n_colors else COLOR_NAMES
    groups = tuple(
        Group(name, rng.choice(colors), rng.choices((1, 2, 3), _COUNT_WEIGHTS)[0], cell)
        for name, cell in zip(names, cells, strict=True)
    )
    return Scene(image_id, context, groups)


def place(scene: Scene, seed: int) -> list[tuple[Group, Image.Image, int, int]]:
    """Every single object of a scene as (its group, its RGBA icon, left, top), in pixels of the image."""
    rng = random.Random(f"place {seed} {scene.image_id}")
    placed = []
    for group in scene.groups:
        side, corners = _LAYOUTS[group.count]
        row, column = divmod(group.cell, GRID)
        for left, top in corners:
            x = min(max(left + rng.randint(-2, 2), 0), CELL - side)
            y = min(max(top + rng.randint(-2, 2), 0), CELL - side)
            placed.append((group, draw_icon(group.name, group.color, side), column * CELL + x, row * CELL + y))
    return placed


def render(scene: Scene, seed: int) -> Image.Image:
    """The (216 × 216) RGB image of a scene: its objects on the context's pale background with a slight texture."""
    rng = np.random.default_rng([seed, scene.image_id])
    noise = rng.integers(-3, 4, (SIZE // _BLOCK, SIZE // _BLOCK, 1))
    pixels = np.clip(np.array(_BACKGROUNDS[scene.context]) + noise, 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels.repeat(_BLOCK, 0).repeat(_BLOCK, 1))
    for _, icon, left, top in place(scene, seed):
        image.paste(icon, (left, top), icon)
    return image
