"""Calotype as a codec of numcodecs, and so of Zarr: chunks of pixels, lossy.

It is found by its name, through an entry point: `numcodecs.get_codec({"id": "calotype", "quality": 70})`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numcodecs.abc import Codec
from numcodecs.compat import ensure_contiguous_ndarray, ndarray_copy

from calotype.api import DEFAULT_QUALITY
from calotype.embed import buffers
from calotype.errors import InputError


class Calotype(Codec):  # type: ignore[misc]  # numcodecs is not typed
    """Codes chunks of uint8: [..., H, W] gray or [..., H, W, C] with C of 1, 2, 3 or 4; leading sides must be 1.

    Args:
        quality: 0 (smallest) to 100 (best).
    """

    codec_id = "calotype"

    def __init__(self, quality: float = DEFAULT_QUALITY) -> None:
        if not 0 <= quality <= 100:
            raise InputError(f"quality must be 0 to 100, got {quality:g}")
        self.quality = quality

    def encode(self, buf: Any) -> bytes:
        """The bytes of a `.clt` file. Raises InputError unless `buf` is an array of the shapes above."""
        array = np.asarray(buf)
        while array.ndim > 2 and array.shape[0] == 1:
            array = array[0]
        return bytes(buffers.encode(array, self.quality))

    def decode(self, buf: Any, out: Any = None) -> Any:
        """The pixels, [H, W] or [H, W, C]; in `out` if it is given. Raises FormatError and its kinds."""
        return ndarray_copy(buffers.decode(ensure_contiguous_ndarray(buf)), out)
