"""What is wrong with a picture as it is drawn, in bits: squared error, or how it looks, by what it is drawn for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calotype.models import perceptual, structure
from calotype.models.quantizers import lagrangian
from calotype.models.zoo import Tune

ERROR, FEATURES, STRUCTURE, GROWTH = 0.15, 24.0, 30.0, 0.7
"""Of pictures drawn for their looks: squared error counts so much of what it does otherwise; distances of features and
of structure cost so many bits per pixel, times λ to this power, as the bits of pictures grow."""
SMALLEST = 64
"""Side of a picture below which there is nothing to look at."""

Distortion = Callable[[Tensor], Tensor]
"""Of pictures as drawn [B, 3, h, w]: bits [B]."""


def squared_error(pixels: Tensor, t: Tensor) -> Distortion:
    """λ · 255² · squared error per colour, of pictures [B, 3, h, w] in [-0.5, 0.5] at quality `t` [B] in [0, 1]."""
    weight = lagrangian(t) * 255**2 / pixels.shape[1]
    return lambda drawn: weight * (drawn - pixels).square().sum((1, 2, 3))


def looks(pixels: Tensor, t: Tensor) -> Distortion:
    """Distances of features and of structure, and some squared error; that alone if less than 64 pixels wide.

    Features may be computed with autocast; structure takes differences of like numbers and needs float32.
    """
    error = squared_error(pixels, t)
    if min(pixels.shape[2:]) < SMALLEST:
        return error
    with torch.no_grad():
        features = perceptual.features(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            scales = structure.scales(pixels)
    bits = lagrangian(t) ** GROWTH * pixels[0, 0].numel()

    def distortion(drawn: Tensor) -> Tensor:
        unlike = FEATURES * perceptual.distance(features, perceptual.features(drawn))
        with torch.autocast(pixels.device.type, enabled=False):
            unlike = unlike + STRUCTURE * structure.distance(scales, structure.scales(drawn))
        return ERROR * error(drawn) + bits * unlike

    return distortion


DISTORTIONS: dict[Tune, Callable[[Tensor, Tensor], Distortion]] = {"psnr": squared_error, "visual": looks}
"""From pixels and quality, by what pictures are drawn for."""
