"""Read images safely: size-checked before decoding, with an error that names the file."""

import io
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

MAX_IMAGE_PIXELS = 64_000_000
"""An image with more pixels is refused before it is decoded (a small file can hide a huge picture)."""


def open_image(path: Path) -> Image.Image:
    """Read an image whole as RGB; FileNotFoundError or ValueError name the file and what is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    return decode_image(path.read_bytes(), str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file as RGB; ValueError says what is wrong with the image called `name`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > MAX_IMAGE_PIXELS:
                    raise ValueError(f"image {name} has {width}x{height} pixels, more than {MAX_IMAGE_PIXELS}")
                return image.convert("RGB")
    except UnidentifiedImageError:  # its own text holds a memory address, another one in every run
        raise ValueError(f"image {name} cannot be decoded: it is in no known image format") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {name} cannot be decoded: {error}") from None
