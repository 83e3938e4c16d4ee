"""Images are decoded as a person sees them: upright, and with all their values."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from rlaifv.vlm.images import TURNS, decode_image, is_upright

UPRIGHT = Image.fromarray(np.kron([[250, 10, 90], [40, 200, 150]], np.ones((16, 16))).astype(np.uint8)).convert("RGB")


def file_of(image: Image.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def photo(orientation: int) -> bytes:
    """A JPEG as a turned camera writes it: the pixels lie on their side, and EXIF says how to turn them back."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    back = {
        Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    }
    turn = TURNS[orientation]
    return file_of(UPRIGHT.transpose(back.get(turn, turn)), "JPEG", exif=exif, quality=95)


@pytest.mark.parametrize("orientation", sorted(TURNS))
def test_a_photo_of_a_turned_camera_is_decoded_upright(orientation):
    decoded = decode_image(photo(orientation), "photo")
    assert decoded.size == UPRIGHT.size
    assert np.abs(np.asarray(decoded, int) - np.asarray(UPRIGHT, int)).mean() < 5, "the colors of a JPEG, in place"


def test_bytes_that_need_turning_are_known():
    assert not is_upright(photo(6))
    assert is_upright(file_of(UPRIGHT)) and is_upright(file_of(UPRIGHT, "JPEG"))


def test_a_broken_exif_block_does_not_lose_the_picture():
    data = file_of(UPRIGHT, exif=b"Exif\0\0not a block")
    assert is_upright(data)
    assert np.array_equal(decode_image(data, "photo"), UPRIGHT)


def test_sixteen_bits_are_scaled_and_not_cut_off():
    deep = Image.fromarray(np.array([[0, 256, 32768, 65535]] * 4, np.uint16))
    assert np.asarray(decode_image(file_of(deep), "deep"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_palette_s_colors_are_kept():
    assert np.array_equal(
        decode_image(file_of(UPRIGHT.convert("P", palette=Image.Palette.ADAPTIVE)), "palette"), UPRIGHT
    )
