"""Frames as the networks see them: float planes padded to whole latent positions, and their way to RGB and back."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calotype.models.motion import Planes
from calotype.models.video import STRIDE
from calotype.video.frames import LUMA_WEIGHTS, Colour, Frame, Plane, sample_ranges


def to_planes(frame: Frame, device: torch.device) -> Planes:
    """Floats in [-0.5, 0.5]; edges are repeated up to luma sides that are multiples of 16."""
    height, width = (-(-side // STRIDE) * STRIDE for side in frame.y.shape)

    def padded(plane: Plane, rows: int, columns: int) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(plane)).to(device)[None, None].float() / 255 - 0.5
        return F.pad(x, (0, columns - plane.shape[1], 0, rows - plane.shape[0]), mode="replicate")

    chroma = [padded(plane, height // 2, width // 2) for plane in (frame.u, frame.v)]
    return Planes(padded(frame.y, height, width), torch.cat(chroma, 1))


def to_frame(planes: Planes, width: int, height: int) -> Frame:
    """The frame of width x height in the top left corner, rounded to 8 bits."""

    def samples(plane: Tensor, rows: int, columns: int) -> Plane:
        return ((plane[:rows, :columns] + 0.5) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()

    half = -(-height // 2), -(-width // 2)
    return Frame(
        samples(planes.luma[0, 0], height, width),
        samples(planes.chroma[0, 0], *half),
        samples(planes.chroma[0, 1], *half),
    )


def to_rgb(planes: Planes, colour: Colour) -> Tensor:
    """RGB [1, 3, H, W] around [-0.5, 0.5], neither rounded nor clamped: `from_rgb` gives the planes back.

    Each chroma sample covers its 2x2 pixels. Interpolation between them costs the shipped models about 1 % of rate.
    """
    offset, luma_span, chroma_span = sample_ranges(colour)
    red, blue = LUMA_WEIGHTS[colour.matrix]
    y = ((planes.luma[0, 0] + 0.5) * 255 - offset) / luma_span
    u, v = (planes.chroma[0].repeat_interleave(2, 1).repeat_interleave(2, 2) * 255 - 0.5) / chroma_span
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    return torch.stack([r, g, b])[None] - 0.5


def frame_rgb(frame: Frame, colour: Colour, device: torch.device) -> Tensor:
    """RGB [1, 3, height, width] of a frame as `to_rgb` gives it."""
    return to_rgb(to_planes(frame, device), colour)[..., : frame.height, : frame.width]


def from_rgb(x: Tensor, colour: Colour) -> Planes:
    """Planes, clamped to [-0.5, 0.5], of RGB [1, 3, H, W] around [-0.5, 0.5]; chroma is the mean of 2x2 pixels."""
    offset, luma_span, chroma_span = sample_ranges(colour)
    red, blue = LUMA_WEIGHTS[colour.matrix]
    r, g, b = x[0].float() + 0.5
    y = red * r + (1 - red - blue) * g + blue * b
    chroma = torch.stack([(b - y) / (2 * (1 - blue)), (r - y) / (2 * (1 - red))])[None]
    return Planes(
        ((y[None, None] * luma_span + offset) / 255 - 0.5).clamp(-0.5, 0.5),
        ((F.avg_pool2d(chroma, 2) * chroma_span + 0.5) / 255).clamp(-0.5, 0.5),
    )
