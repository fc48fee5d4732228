"""The formats in daily use, at the size of a file of ours: the picture that one would get for the same bytes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from calotype.api import psnr
from calotype.errors import TargetError
from calotype.evaluation.codecs import FAMILIES
from calotype.evaluation.still_codecs import PillowCodec
from calotype.media import Picture

Format = Literal["avif", "webp", "jpeg"]
# Family and variant of the evaluation, so that pictures and figures come from the same encoders.
_ANCHORS: dict[Format, tuple[str, str]] = {"avif": ("avif444", "6"), "webp": ("webp", "6"), "jpeg": ("jpeg", "420")}


@dataclass(frozen=True)
class Written:
    """A file of another format, its encoder's own quality, its PSNR in dB, and seconds to encode and decode it."""

    data: bytes
    quality: int
    psnr: float
    seconds: Mapping[str, float]


def largest_within(
    picture: Picture,
    format: Format,
    size: int,
    metadata: Collection[str],
    check: Callable[[], None],
    variant: str | None = None,
) -> Written:
    """Encode at the highest quality, 1 to 100, whose file has at most `size` bytes; alpha is left out.

    Args:
        metadata: which of "icc", "exif" and "xmp" go into the file.
        check: called before each trial; may raise to end the search.
        variant: of the evaluation's codec, if not the usual one.
    Raises:
        TargetError: even the lowest quality is larger.
    """
    family, usual = _ANCHORS[format]
    codec = FAMILIES[family].open(variant or usual, "cpu", 1)
    assert isinstance(codec, PillowCodec)
    pixels = picture.pixels
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    names = {"icc": "icc_profile", "exif": "exif", "xmp": "xmp"}
    extra: dict[str, Any] = {names[kind]: value for kind in metadata if (value := getattr(picture, kind))}

    def write(quality: int) -> bytes:
        check()
        out = io.BytesIO()
        image.save(out, codec.format, **codec.options(quality), **extra)
        return out.getvalue()

    # Sizes grow with quality but for small steps back: whatever the bisection ends at does fit.
    best, data, encoding = 0, b"", 0.0
    low, high, smallest = 1, 100, 0
    while low <= high:
        middle = (low + high) // 2
        started = time.perf_counter()
        trial = write(middle)
        if len(trial) <= size:
            best, data, encoding, low = middle, trial, time.perf_counter() - started, middle + 1
        else:
            high, smallest = middle - 1, len(trial)
    if not best:
        raise TargetError(f"{format} cannot make this picture as small as {size} bytes: it needs {smallest} at least")
    started = time.perf_counter()
    with Image.open(io.BytesIO(data), formats=(codec.format,)) as again:
        decoded = np.asarray(again.convert(image.mode))
    seconds = {"encode": encoding, "decode": time.perf_counter() - started}
    return Written(data, best, psnr(pixels, decoded.reshape(pixels.shape)), seconds)
