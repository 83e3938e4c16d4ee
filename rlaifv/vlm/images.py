"""Read images safely: size-checked before decoding, upright, with an error that names the file."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is opened. Pillow knows forty more, some of which start other programs (Ghostscript for EPS)."""

MAX_IMAGE_PIXELS = 64_000_000
"""An image with more pixels is refused before it is decoded (a small file can hide a huge picture)."""

MIN_SIDE = 4
"""Pixels of the shorter side; libraries take a side of 1 or 3 for the color channels."""

MAX_ASPECT = 100
"""Longer side / shorter side. Processors scale by the shorter one: CLIP's would make 4 GB of a 5000x1 picture."""

TURN = Image.Transpose
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE}
TURNS |= {6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}
"""EXIF's orientation → what makes the picture upright; 1 is upright."""


def open_image(path: Path) -> Image.Image:
    """Read an image whole as RGB; FileNotFoundError or ValueError name the file and what is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    return decode_image(path.read_bytes(), str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file as RGB, upright as its EXIF says; ValueError says what is wrong with the image
    called `name`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                problem = refused(image)
                if not problem:
                    return upright_rgb(image)
    except UnidentifiedImageError:  # its own text holds a memory address, another one in every run
        raise ValueError(f"image {name} cannot be decoded: it is no {', '.join(FORMATS)}") from None
    except MemoryError:
        raise
    except Exception as error:  # garbled bytes break Pillow's readers in many ways
        raise ValueError(f"image {name} cannot be decoded: {error or type(error).__name__}") from None
    raise ValueError(f"image {name} {problem}")


def refused(image: Image.Image) -> str:
    """Why an image is not decoded, from its header alone; "" if it is."""
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        return f"has {width}x{height} pixels, more than {MAX_IMAGE_PIXELS}"
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        return f"has {width}x{height} pixels: a side must have {MIN_SIDE}, and at most {MAX_ASPECT} times the other's"
    if image.mode in ("I", "F"):
        return "has 32-bit values, whose white is not known: save it with 8 or 16 bits a color"
    return ""


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image as RGB, turned as its EXIF says."""
    if (turn := orientation(image)) in TURNS:
        image = image.transpose(TURNS[turn])
    if image.mode.startswith("I;16"):  # the upper 8 bits, as of 16-bit color; Pillow would cut its values off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """EXIF's orientation of an opened image; 1, upright, where its EXIF is missing or broken."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many kinds, and none says anything about the picture
        return 1


def is_upright(data: bytes) -> bool:
    """Whether the bytes of an image file that can be decoded show it upright to a reader that ignores EXIF."""
    with Image.open(io.BytesIO(data)) as image:
        return orientation(image) not in TURNS
