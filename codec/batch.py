"""Batches of pictures of one size: tensors in, and out through a model together, on its device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calotype import windows
from calotype.container import Still
from calotype.errors import InputError
from calotype.models.quantizers import QUALITY_STEPS
from calotype.models.transforms import STRIDE
from calotype.picture import PictureCoder
from calotype.stopwatch import Stopwatch
from calotype.windows import Box, grid


@torch.inference_mode()
def decode(coder: PictureCoder, stills: Mapping[int, Still], scale: int = 1) -> Tensor:
    """Pixels [N, 3, ceil(H/scale), ceil(W/scale)] uint8 on the coder's device, in the order of `stills`.

    Args:
        stills: intact files of one size and tile side and of any quality, written with the coder's weights, by a number
            that messages name.
        scale: 1, 2, 4 or 8.
    Raises:
        FormatError, DriftError.
    """
    numbers = list(stills)
    groups = [numbers[start : start + coder.batch] for start in range(0, len(numbers), coder.batch)]
    return torch.cat([_decode_group(coder, {n: stills[n] for n in group}, scale) for group in groups])


def _decode_group(coder: PictureCoder, stills: Mapping[int, Still], scale: int) -> Tensor:
    header = next(iter(stills.values())).header
    rows, columns = -(-header.height // STRIDE), -(-header.width // STRIDE)
    qualities = [still.header.quality for still in stills.values()]
    names = [f"file {number} of the batch" for number in stills]
    watch = Stopwatch(coder.device)
    t = torch.tensor(qualities, device=coder.device).float() / QUALITY_STEPS
    channels = coder.network.latent_channels
    # Channels innermost, as the networks give and take them.
    latent = torch.empty(len(stills), rows, columns, channels, device=coder.device).permute(0, 3, 1, 2)
    for tile, box in enumerate(grid(Box(0, 0, rows, columns), header.tile // STRIDE)):
        payloads = [still.tiles[tile] or b"" for still in stills.values()]
        latent[(..., *box.slices)] = coder.decode_together(payloads, names, qualities, box.shape, watch)
    whole = Box(0, 0, -(-header.height // scale), -(-header.width // scale))
    out = torch.empty(len(stills), 3, *whole.shape, dtype=torch.uint8, device=coder.device)
    for window in windows.split(Box(0, 0, rows, columns)):
        outer = window.grown(coder.network.halo, rows, columns)
        part = latent[(..., *outer.slices)].contiguous(memory_format=coder.layout)
        x = coder.transforms.synthesise(coder.network.dequantise(part), t, scale)
        seen = window.scaled(STRIDE // scale).within(whole)
        x = x[(..., *seen.relative_to(outer.scaled(STRIDE // scale)).slices)]
        out[(..., *seen.slices)] = x.add(0.5).mul(255).round().clamp(0, 255).to(torch.uint8)
    return out


def as_bytes(x: Tensor | npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """[N, H, W, C] uint8 of a batch [N, C, H, W] of uint8 or floats in [0, 1]. Raises InputError."""
    x = torch.as_tensor(x)
    if x.ndim != 4 or x.shape[1] not in (1, 2, 3, 4) or 0 in x.shape[1:]:
        raise InputError(f"a batch must be [N, 1 to 4, H, W] and its pictures not empty, got {list(x.shape)}")
    if x.is_floating_point():
        if not ((x >= 0) & (x <= 1)).all():
            raise InputError("float pixels must be in [0, 1]: divide by 255 or clamp them")
        x = x.detach().float().mul(255).round().to(torch.uint8)
    if x.dtype != torch.uint8:
        raise InputError(f"pixels must be uint8 or float, got {x.dtype}")
    return np.ascontiguousarray(x.permute(0, 2, 3, 1).cpu().numpy())
