"""PNG files: any picture comes back from Pillow's reader, whatever the strips are."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from calotype.media import Picture, read_picture, write_picture
from calotype.png import write_png


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (13, 7), (300, 211)])
@pytest.mark.parametrize("channels", [0, 2, 3, 4])
@pytest.mark.parametrize("strip", [1, 5000, 2**20])
def test_pixels_come_back(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], channels: int, strip: int) -> None:
    monkeypatch.setattr("calotype.png._STRIP", strip)
    rng = np.random.default_rng(sum(shape))
    noise = rng.integers(0, 256, (*shape, channels) if channels else shape).astype(np.uint8)
    for array in (noise, noise // 64 * 85, np.full_like(noise, 255)):
        with Image.open(io.BytesIO(write_png(array))) as image:
            image.load()
            assert (np.asarray(image) == array).all()


def test_photo_with_metadata(photo: Picture) -> None:
    picture = Picture(photo.pixels, photo.pixels[:, :, 0].copy(), b"profile", None, b"<xmp/>")
    back = read_picture(write_picture(picture, "png"))
    assert (back.pixels == picture.pixels).all()
    assert back.alpha is not None
    assert (back.alpha == picture.alpha).all()
    assert (back.icc, back.xmp) == (picture.icc, picture.xmp)


def test_size_is_that_of_a_good_writer(photo: Picture, synthetic: Callable[..., Picture]) -> None:
    for picture in (photo, synthetic(200, 300, 1)):
        out = io.BytesIO()
        Image.fromarray(picture.pixels.squeeze()).save(out, "PNG", compress_level=1)
        assert len(write_picture(picture, "png")) < 1.05 * len(out.getvalue())
