"""Icons of the embedded world: 24 COCO classes drawn with Pillow from a table of simple shapes.

A shape is (kind, numbers, fill). Coordinates are percent of the icon's square. Kinds: "ellipse" and "box" (left,
top, right, bottom; a fifth number rounds the corners), "poly" (x, y, x, y, ...), "line" (width, x, y, x, y, ...),
"ring" (width, left, top, right, bottom), "arc" (width, left, top, right, bottom, start, end in degrees) and "pie"
(left, top, right, bottom, start, end). Fills: "c" the object's color, "d" darker, "l" lighter, "k" dark, "w" white,
"o" amber.
"""

import functools

from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    # "orange" is a COCO class as well as a color: CHAIR would count the color as a mentioned fruit.
    "red": (214, 40, 45),
    "yellow": (247, 201, 30),
    "green": (42, 157, 62),
    "blue": (38, 96, 214),
    "purple": (126, 58, 180),
    "pink": (246, 122, 182),
    "brown": (134, 84, 42),
    "black": (42, 42, 48),
}

_DARK, _WHITE, _AMBER = (38, 40, 48), (252, 252, 252), (240, 150, 30)
_SMOOTH = 4  # icons are drawn this many times larger and scaled down, for smooth edges

_WHEELS = [
    ("ellipse", (14, 60, 38, 84), "k"),
    ("ellipse", (21, 67, 31, 77), "w"),
    ("ellipse", (62, 60, 86, 84), "k"),
    ("ellipse", (69, 67, 79, 77), "w"),
]

ICONS: dict[str, list[tuple[str, tuple[float, ...], str]]] = {
    "cup": [
        ("arc", (8, 56, 40, 92, 74, -100, 100), "c"),
        ("box", (20, 28, 70, 88, 12), "c"),
        ("ellipse", (20, 20, 70, 38), "d"),
        ("line", (3, 36, 15, 40, 8, 36, 2), "d"),
        ("line", (3, 52, 15, 56, 8, 52, 2), "d"),
    ],
    "fork": [
        ("box", (28, 5, 36, 44, 3), "c"),
        ("box", (46, 5, 54, 44, 3), "c"),
        ("box", (64, 5, 72, 44, 3), "c"),
        ("box", (28, 34, 72, 50, 8), "c"),
        ("box", (45, 44, 55, 97, 5), "c"),
    ],
    "knife": [
        ("poly", (42, 4, 54, 10, 63, 26, 63, 60, 42, 60), "c"),
        ("line", (3, 46, 12, 46, 56), "l"),
        ("box", (42, 60, 60, 97, 5), "d"),
        ("ellipse", (48, 68, 53, 73), "w"),
        ("ellipse", (48, 83, 53, 88), "w"),
    ],
    "spoon": [
        ("ellipse", (30, 3, 70, 48), "c"),
        ("ellipse", (38, 10, 58, 36), "l"),
        ("box", (45, 44, 55, 97, 5), "c"),
    ],
    "bowl": [
        ("box", (34, 78, 66, 92, 3), "d"),
        ("pie", (5, 4, 95, 88, 0, 180), "c"),
        ("ellipse", (5, 34, 95, 58), "d"),
        ("ellipse", (13, 38, 87, 55), "l"),
    ],
    "bottle": [
        ("box", (41, 2, 59, 14, 2), "k"),
        ("poly", (43, 14, 57, 14, 57, 30, 70, 46, 70, 52, 30, 52, 30, 46, 43, 30), "c"),
        ("box", (30, 44, 70, 97, 7), "c"),
        ("box", (30, 58, 70, 80), "w"),
        ("line", (3, 36, 69, 64, 69), "d"),
    ],
    "car": [
        ("poly", (18, 50, 32, 26, 68, 26, 84, 50), "c"),
        ("box", (3, 46, 97, 74, 9), "c"),
        ("poly", (27, 46, 36, 31, 48, 31, 48, 46), "w"),
        ("poly", (53, 46, 53, 31, 65, 31, 75, 46), "w"),
        ("box", (90, 52, 97, 59), "o"),
        *_WHEELS,
    ],
    "bus": [
        ("box", (3, 14, 97, 76, 8), "c"),
        ("box", (9, 22, 26, 44), "w"),
        ("box", (30, 22, 47, 44), "w"),
        ("box", (51, 22, 68, 44), "w"),
        ("box", (73, 22, 91, 66), "w"),
        ("box", (3, 52, 69, 57), "d"),
        *_WHEELS,
    ],
    "bicycle": [
        ("ring", (5, 3, 44, 43, 84), "c"),
        ("ring", (5, 57, 44, 97, 84), "c"),
        ("line", (5, 23, 64, 38, 36, 68, 36, 50, 64, 23, 64), "c"),
        ("line", (5, 38, 36, 50, 64), "c"),
        ("line", (5, 77, 64, 66, 22, 78, 20), "c"),
        ("box", (28, 28, 46, 35, 3), "k"),
    ],
    "truck": [
        ("box", (2, 16, 60, 70, 3), "c"),
        ("line", (3, 20, 22, 20, 64), "d"),
        ("line", (3, 40, 22, 40, 64), "d"),
        ("poly", (63, 32, 82, 32, 97, 50, 97, 70, 63, 70), "d"),
        ("poly", (69, 38, 80, 38, 90, 51, 69, 51), "w"),
        *_WHEELS,
    ],
    "motorcycle": [
        ("ring", (8, 2, 48, 38, 84), "k"),
        ("ring", (8, 62, 48, 98, 84), "k"),
        ("poly", (18, 62, 30, 42, 64, 36, 76, 52, 62, 70, 34, 70), "c"),
        ("poly", (6, 38, 44, 36, 42, 46, 14, 48), "d"),
        ("ellipse", (40, 26, 68, 50), "c"),
        ("line", (5, 80, 66, 66, 22, 52, 20), "k"),
        ("ellipse", (66, 24, 80, 38), "o"),
    ],
    "train": [
        ("box", (12, 34, 62, 66, 8), "c"),
        ("box", (56, 12, 92, 66, 3), "c"),
        ("box", (52, 8, 96, 16, 3), "d"),
        ("box", (64, 22, 84, 42), "w"),
        ("poly", (18, 12, 36, 12, 32, 36, 22, 36), "k"),
        ("box", (8, 64, 94, 72), "d"),
        ("poly", (8, 68, 14, 68, 10, 88, 0, 88), "d"),
        ("ellipse", (16, 66, 36, 88), "k"),
        ("ellipse", (40, 66, 60, 88), "k"),
        ("ellipse", (66, 62, 92, 88), "k"),
        ("ellipse", (74, 70, 84, 80), "w"),
    ],
    "dog": [
        ("line", (7, 24, 54, 10, 40, 8, 28), "c"),
        ("box", (20, 46, 74, 70, 12), "c"),
        ("box", (22, 60, 32, 95, 3), "c"),
        ("box", (36, 60, 45, 92, 3), "d"),
        ("box", (62, 60, 72, 95, 3), "c"),
        ("ellipse", (56, 18, 88, 54), "c"),
        ("box", (76, 34, 99, 50, 6), "c"),
        ("ellipse", (92, 32, 100, 40), "k"),
        ("poly", (58, 20, 70, 20, 68, 48, 56, 46), "d"),
        ("ellipse", (75, 26, 81, 32), "w"),
    ],
    "cat": [
        ("arc", (7, 60, 52, 96, 94, -90, 100), "c"),
        ("ellipse", (22, 46, 74, 97), "c"),
        ("poly", (25, 36, 24, 4, 46, 20), "c"),
        ("poly", (75, 36, 76, 4, 54, 20), "c"),
        ("ellipse", (22, 14, 78, 60), "c"),
        ("ellipse", (33, 28, 44, 41), "w"),
        ("ellipse", (56, 28, 67, 41), "w"),
        ("ellipse", (37, 30, 42, 40), "k"),
        ("ellipse", (59, 30, 64, 40), "k"),
        ("poly", (46, 44, 54, 44, 50, 49), "o"),
        ("ellipse", (36, 66, 60, 96), "l"),
    ],
    "horse": [
        ("line", (6, 22, 46, 10, 56, 8, 80), "d"),
        ("ellipse", (16, 38, 74, 66), "c"),
        ("box", (20, 56, 28, 97, 2), "c"),
        ("box", (32, 58, 39, 95, 2), "d"),
        ("box", (54, 58, 61, 95, 2), "d"),
        ("box", (64, 54, 72, 97, 2), "c"),
        ("poly", (54, 50, 66, 12, 82, 14, 74, 56), "c"),
        ("poly", (66, 10, 80, 6, 99, 30, 92, 38, 78, 28), "c"),
        ("poly", (70, 2, 76, 8, 68, 12), "c"),
        ("line", (6, 70, 8, 62, 18, 55, 44), "d"),
        ("ellipse", (79, 14, 84, 19), "w"),
    ],
    "cow": [
        ("line", (4, 12, 42, 5, 54, 6, 72), "c"),
        ("box", (10, 32, 74, 70, 8), "c"),
        ("ellipse", (18, 36, 38, 56), "w"),
        ("ellipse", (44, 46, 62, 66), "w"),
        ("box", (13, 62, 23, 95, 2), "c"),
        ("box", (30, 62, 39, 92, 2), "d"),
        ("box", (62, 62, 72, 95, 2), "c"),
        ("ellipse", (44, 64, 58, 76), "o"),
        ("arc", (5, 66, 6, 96, 32, 20, 160), "k"),
        ("box", (68, 24, 94, 58, 8), "c"),
        ("ellipse", (66, 44, 97, 64), "l"),
        ("ellipse", (73, 50, 78, 56), "k"),
        ("ellipse", (85, 50, 90, 56), "k"),
        ("ellipse", (74, 32, 79, 38), "w"),
        ("ellipse", (84, 32, 89, 38), "w"),
    ],
    "sheep": [
        ("box", (24, 66, 32, 94, 2), "k"),
        ("box", (38, 66, 46, 94, 2), "k"),
        ("box", (56, 66, 64, 94, 2), "k"),
        ("ellipse", (8, 34, 38, 68), "c"),
        ("ellipse", (20, 22, 50, 54), "c"),
        ("ellipse", (40, 20, 70, 54), "c"),
        ("ellipse", (54, 34, 82, 70), "c"),
        ("ellipse", (18, 46, 48, 80), "c"),
        ("ellipse", (40, 46, 72, 80), "c"),
        ("arc", (3, 22, 36, 44, 58, 180, 360), "d"),
        ("arc", (3, 42, 44, 64, 66, 180, 360), "d"),
        ("ellipse", (68, 26, 95, 62), "k"),
        ("ellipse", (64, 20, 86, 36), "c"),
        ("ellipse", (80, 38, 86, 45), "w"),
    ],
    "bird": [
        ("line", (4, 46, 70, 44, 94, 52, 94), "o"),
        ("line", (4, 58, 70, 58, 94, 66, 94), "o"),
        ("poly", (34, 52, 2, 34, 6, 62), "d"),
        ("ellipse", (22, 34, 76, 80), "c"),
        ("ellipse", (54, 10, 88, 46), "c"),
        ("poly", (85, 20, 100, 29, 85, 36), "o"),
        ("ellipse", (69, 20, 77, 28), "w"),
        ("ellipse", (72, 22, 76, 27), "k"),
        ("pie", (20, 28, 64, 70, 20, 180), "d"),
    ],
    "laptop": [
        ("box", (14, 10, 86, 64, 5), "c"),
        ("box", (21, 17, 79, 57), "w"),
        ("poly", (14, 66, 86, 66, 99, 86, 1, 86), "c"),
        ("poly", (18, 69, 82, 69, 87, 77, 13, 77), "l"),
        ("box", (40, 79, 60, 84), "d"),
    ],
    "keyboard": [
        ("box", (1, 26, 99, 76, 6), "c"),
        *[("box", (7 + 11 * i, 32, 15 + 11 * i, 41), "w") for i in range(8)],
        *[("box", (7 + 11 * i, 46, 15 + 11 * i, 55), "w") for i in range(8)],
        ("box", (7, 60, 15, 69), "w"),
        ("box", (19, 60, 81, 69), "w"),
        ("box", (84, 60, 92, 69), "w"),
    ],
    "mouse": [
        ("line", (4, 50, 24, 50, 12, 60, 6, 72, 2), "k"),
        ("box", (26, 20, 74, 96, 23), "c"),
        ("line", (3, 28, 52, 72, 52), "l"),
        ("line", (3, 50, 20, 50, 52), "l"),
        ("box", (45, 28, 55, 44, 4), "w"),
    ],
    "book": [
        ("box", (22, 8, 84, 94, 3), "d"),
        ("box", (24, 84, 82, 91), "w"),
        ("box", (16, 5, 80, 86, 3), "c"),
        ("box", (16, 5, 28, 92, 3), "d"),
        ("box", (38, 20, 70, 30), "w"),
        ("box", (38, 36, 62, 41), "w"),
    ],
    "clock": [
        ("ellipse", (4, 4, 96, 96), "c"),
        ("ellipse", (17, 17, 83, 83), "w"),
        ("line", (6, 50, 52, 50, 26), "k"),
        ("line", (6, 50, 50, 68, 60), "k"),
        *[("box", box, "d") for box in ((48, 19, 52, 25), (48, 75, 52, 81), (19, 48, 25, 52), (75, 48, 81, 52))],
    ],
    "chair": [
        ("box", (22, 3, 31, 60, 3), "c"),
        ("box", (69, 3, 78, 60, 3), "c"),
        ("box", (24, 6, 76, 18, 3), "c"),
        ("box", (24, 26, 76, 36, 3), "c"),
        ("box", (16, 50, 84, 63, 4), "d"),
        ("box", (18, 60, 27, 97, 2), "c"),
        ("box", (73, 60, 82, 97, 2), "c"),
    ],
}


def _shade(rgb: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    """Darker (factor < 0) or lighter (factor > 0) by that share of the way to black or white."""
    target = 255 if factor > 0 else 0
    return tuple(round(value + (target - value) * abs(factor)) for value in rgb)


@functools.cache
def draw_icon(name: str, color: str, size: int) -> Image.Image:
    """One object of class `name` in `color` as a transparent (size × size) RGBA image.

    Raises KeyError for a class or color that this world does not have.
    """
    main = COLORS[color]
    fills = {
        "c": main,
        "d": _shade(main, -0.35),
        "l": _shade(main, 0.45),
        "k": _DARK,
        "w": _WHITE,
        "o": _AMBER,
    }
    scale = size * _SMOOTH / 100
    image = Image.new("RGBA", (size * _SMOOTH, size * _SMOOTH))
    draw = ImageDraw.Draw(image)
    for kind, numbers, fill in ICONS[name]:
        paint = (*fills[fill], 255)
        values = [number * scale for number in numbers]
        if kind == "ellipse":
            draw.ellipse(values, fill=paint)
        elif kind == "box":
            draw.rounded_rectangle(values[:4], radius=values[4] if len(values) > 4 else 0, fill=paint)
        elif kind == "poly":
            draw.polygon(values, fill=paint)
        elif kind == "line":
            draw.line(values[1:], fill=paint, width=round(values[0]), joint="curve")
        elif kind == "ring":
            draw.ellipse(values[1:], outline=paint, width=round(values[0]))
        elif kind == "arc":
            draw.arc(values[1:5], numbers[5], numbers[6], fill=paint, width=round(values[0]))
        else:  # pie
            draw.pieslice(values[:4], numbers[4], numbers[5], fill=paint)
    return image.resize((size, size), Image.Resampling.LANCZOS)
