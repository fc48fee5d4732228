"""A handler for `webdataset.WebDataset(...).decode(...)`: members of a shard that end in `.clt` become pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from calotype import container
from calotype.api import Codec
from calotype.errors import InputError

Kind = Literal["torch", "numpy", "pil"]


def handler(kind: Kind, *, device: str = "cpu") -> Callable[[str, bytes], Any]:
    """A function of (key, data) for webdataset; it can be sent to other processes.

    It gives None for a key that does not end in `.clt`, so that the next handler is asked; otherwise the picture in
    RGB, gray repeated and alpha dropped: "torch" a uint8 tensor [3, H, W], "numpy" uint8 [H, W, 3], "pil" an image of
    Pillow.

    Args:
        device: where to decode. It is the CPU by default because the handler runs in the workers of a loader.
    Raises:
        InputError for another kind. The handler: FormatError and its kinds, LimitError, ModelNotFoundError.
    """
    if kind not in get_args(Kind):
        raise InputError(f"unknown kind {kind!r}: use one of {', '.join(get_args(Kind))}")
    return functools.partial(_decode, kind, device)


def _decode(kind: Kind, device: str, key: str, data: bytes) -> Any:
    if not key.lower().endswith(container.SUFFIX):
        return None
    pixels = Codec.load(device=device).decode(data).picture.pixels
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, 2)
    if kind == "numpy":
        return pixels
    if kind == "pil":
        return Image.fromarray(pixels)
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
