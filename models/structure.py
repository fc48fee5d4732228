"""SSIMULACRA 2 as something to descend: how far apart two pictures are in structure, artifacts and lost detail.

After Sneyers, "Detecting the psychovisual impact of compression related artifacts using SSIMULACRA 2" (2023): pictures
in XYB colours at six sizes, each half the last; in each plane a map of structural similarity, one of edges that the
original has not, and one of edges that are lost; of each map the mean and the 4-norm over places; all weighted as
people judged. Weights below 0.1 are left out. Figures come from another implementation, in `calotype.evaluation`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = 6
SMALLEST = 8
"""Sides of a picture that still counts as a size."""
_X, _Y, _B = range(3)
_UNLIKE, _ARTIFACT, _LOST = range(3)
_MEAN, _NORM = range(2)
WEIGHTS: dict[int, tuple[tuple[int, int, int, float], ...]] = {
    0: ((_Y, _NORM, _UNLIKE, 7.467), (_Y, _NORM, _LOST, 17.446)),
    1: ((_X, _NORM, _UNLIKE, 1.104), (_Y, _NORM, _UNLIKE, 6.684), (_Y, _NORM, _LOST, 1.028)),
    2: (
        (_X, _NORM, _UNLIKE, 1.842), (_X, _NORM, _ARTIFACT, 11.441),
        (_Y, _MEAN, _UNLIKE, 225.205), (_Y, _NORM, _UNLIKE, 19.213),
    ),
    3: (
        (_X, _NORM, _UNLIKE, 1.879), (_X, _NORM, _ARTIFACT, 10.949),
        (_Y, _MEAN, _UNLIKE, 176.393), (_Y, _NORM, _UNLIKE, 24.433), (_Y, _NORM, _ARTIFACT, 0.285),
        (_B, _NORM, _UNLIKE, 8.827), (_B, _NORM, _ARTIFACT, 23.192),
    ),
    4: (
        (_X, _MEAN, _ARTIFACT, 0.968), (_X, _NORM, _ARTIFACT, 0.998),
        (_Y, _NORM, _UNLIKE, 34.779), (_Y, _NORM, _ARTIFACT, 44.836),
        (_B, _MEAN, _UNLIKE, 95.108), (_B, _MEAN, _ARTIFACT, 0.986), (_B, _MEAN, _LOST, 0.983),
        (_B, _NORM, _ARTIFACT, 171.267), (_B, _NORM, _LOST, 0.981),
    ),
}  # fmt: skip
"""By size: plane, norm, map, weight."""
_POLYNOMIAL = (0.9562382616834844 * 2.326765642916932, -0.019096451, 5.46364e-05)
"""From the weighted sum to the number whose power is the score: coefficients of its first three powers."""
_POWER = 0.6276336467831387
_ABSORBANCE = ((0.30, 0.622, 0.078), (0.23, 0.692, 0.078), (0.24342269, 0.20476744, 0.55180987))
_BIAS = 0.0037930732552754493
_STABLE = 0.0009
"""Of structural similarity, against division by zero."""
_REACH = 5
_SIGMA = 1.5


class Scale(NamedTuple):
    """A picture at one size: XYB planes [B, 3, h, w], their local means, and local means of their squares."""

    planes: Tensor
    mean: Tensor
    square: Tensor


def scales(x: Tensor) -> list[Scale]:
    """Of pictures [B, 3, H, W] in [-0.5, 0.5], at least 8 pixels high and wide; differentiable."""
    x = (x.float() + 0.5).clamp(0, 1)
    light = torch.where(x <= 0.04045, x / 12.92, ((x.clamp(min=0.04) + 0.055) / 1.055) ** 2.4)
    found: list[Scale] = []
    while len(found) < max(WEIGHTS) + 1 and min(light.shape[2:]) >= SMALLEST:
        planes = _xyb(light)
        found.append(Scale(planes, _blur(planes), _blur(planes.square())))
        light = F.avg_pool2d(light, 2, ceil_mode=True, count_include_pad=False)
    return found


def distance(reference: list[Scale], x: list[Scale]) -> Tensor:
    """Of two pictures' `scales`: [B], (100 - score) / 100, below 0.005 for equal ones; differentiable."""
    total = reference[0].planes.new_zeros(len(reference[0].planes))
    for size, (a, b) in enumerate(zip(reference, x, strict=True)):
        cross = _blur(a.planes * b.planes) - a.mean * b.mean
        spread = a.square - a.mean.square() + b.square - b.mean.square()
        alike = (1 - (a.mean - b.mean).square()) * (2 * cross + _STABLE) / (spread + _STABLE)
        edge = (1 + (b.planes - b.mean).abs()) / (1 + (a.planes - a.mean).abs()) - 1
        maps = torch.stack([1 - alike, edge, -edge], 1).clamp(min=0)
        # The root of zero has no gradient.
        norms = maps.mean((3, 4)), (maps.square().square().mean((3, 4)) + 1e-20) ** 0.25
        for plane, norm, kind, weight in WEIGHTS[size]:
            total = total + weight * norms[norm][:, kind, plane]
    powers = torch.stack([total, total**2, total**3])
    worse = torch.tensordot(powers.new_tensor(_POLYNOMIAL), powers, 1)
    return worse.clamp(min=1e-6) ** _POWER / 10


def _xyb(light: Tensor) -> Tensor:
    """Linear RGB to XYB planes, shifted and scaled to positive numbers."""
    mixed = torch.einsum("oc,bchw->bohw", light.new_tensor(_ABSORBANCE), light) + _BIAS
    long, medium, short = (mixed ** (1 / 3) - _BIAS ** (1 / 3)).unbind(1)
    y = (long + medium) / 2
    return torch.stack([7 * (long - medium) + 0.42, y + 0.01, short - y + 0.55], 1)


def _blur(x: Tensor) -> Tensor:
    """Gaussian local means; nothing but zeros lies to the left and right, what is above and below is mirrored."""
    window = torch.exp(-torch.arange(-_REACH, _REACH + 1, device=x.device).square() / (2 * _SIGMA**2))
    window = (window / window.sum()).expand(3, 1, 1, -1)
    x = F.conv2d(x, window, padding=(0, _REACH), groups=3)
    x = torch.cat([x[:, :, :_REACH].flip(2), x, x[:, :, -_REACH:].flip(2)], 2)
    return F.conv2d(x, window.transpose(2, 3), groups=3)
