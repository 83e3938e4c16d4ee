"""Read images safely: size-checked before decoding, upright, with an error that names the file."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_IMAGE_PIXELS = 64_000_000
"""An image with more pixels is refused before it is decoded (a small file can hide a huge picture)."""

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
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > MAX_IMAGE_PIXELS:
                    raise ValueError(f"image {name} has {width}x{height} pixels, more than {MAX_IMAGE_PIXELS}")
                return upright_rgb(image)
    except UnidentifiedImageError:  # its own text holds a memory address, another one in every run
        raise ValueError(f"image {name} cannot be decoded: it is in no known image format") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {name} cannot be decoded: {error}") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image as RGB, turned as its EXIF says."""
    if (turn := orientation(image)) in TURNS:
        image = image.transpose(TURNS[turn])
    if image.mode.startswith("I"):  # 16 bits: Pillow would cut its values off at 255
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
