"""`encode` and `decode` between arrays and bytes, in the calling convention of imagecodecs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from calotype import api
from calotype.errors import InputError

Pixels = npt.NDArray[np.uint8]


def encode(
    data: npt.ArrayLike, level: float | None = None, *, out: bytearray | memoryview | None = None, device: str = "auto"
) -> bytes | memoryview:
    """Encode an array to the bytes of a `.clt` file.

    Args:
        data: [H, W] gray, or [H, W, C] with C of 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA; uint8.
        level: the quality, 0 to 100; None is 60.
        out: a writable buffer for the file.
    Returns:
        The file, or the part of `out` that it fills.
    Raises:
        InputError for an array of another kind, a level out of range or a buffer that is too small.
    """
    encoded = api.encode(data, device=device, quality=api.DEFAULT_QUALITY if level is None else level)
    if out is None:
        return encoded
    view = memoryview(out).cast("B")
    if view.readonly or len(view) < len(encoded):
        raise InputError(f"the buffer must be writable and hold {len(encoded)} bytes, it has {len(view)}")
    view[: len(encoded)] = encoded
    return view[: len(encoded)]


def decode(data: Any, *, out: Pixels | None = None, device: str = "auto") -> Pixels:
    """Decode the bytes of a `.clt` file, any object with the buffer protocol.

    Args:
        out: a contiguous array of uint8 with as many elements as the picture; its shape may be another.
    Returns:
        [H, W] for gray, [H, W, C] otherwise (see `encode`), uint8; or `out`.
    Raises:
        FormatError and its kinds, LimitError, ModelNotFoundError, InputError for an unfit `out`.
    """
    pixels = api.decode(memoryview(data).cast("B"), device=device)
    if out is None:
        return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    if out.dtype != np.uint8 or not out.flags.c_contiguous or not out.flags.writeable or out.size != pixels.size:
        raise InputError(f"out must be a contiguous, writable array of {pixels.size} uint8, like {list(pixels.shape)}")
    out.reshape(-1)[:] = pixels.reshape(-1)
    return out
