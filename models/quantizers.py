"""Scalar quantisation with quantization-scale modulation: one set of weights for every rate.

Following DCVC-FM (Li et al., "Neural Video Compression with Feature Modulation", CVPR 2024), the quality chooses a
Lagrange multiplier on a log-linear scale, and with it a quantisation step; learned per-channel factors, interpolated
over the quality range, refine the step and the features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from calotype.models.exact import LEVELS, interpolate

LAMBDA_MIN = 0.0003
LAMBDA_MAX = 0.24
KNOTS = 5
QUALITY_STEPS = 1000
"""Quality travels as an integer in [0, QUALITY_STEPS]."""


def quality_level(quality: Tensor) -> Tensor:
    """Level of the conditional integer layers, below `exact.LEVELS`, of an integer quality; integer arithmetic only."""
    return (quality * (LEVELS - 1) + QUALITY_STEPS // 2) // QUALITY_STEPS


def lagrangian(t: Tensor) -> Tensor:
    """λ of bpp + λ · 255² · MSE at quality `t` in [0, 1]."""
    return LAMBDA_MIN * torch.exp(t * math.log(LAMBDA_MAX / LAMBDA_MIN))


def base_step(t: Tensor) -> Tensor:
    """Quantisation step in units of orthonormal coefficients of pixels in [-0.5, 0.5]: the high-rate optimum for λ."""
    return torch.sqrt(6 / (math.log(2) * lagrangian(t) * 255**2))


class Modulation(nn.Module):
    """Learned positive per-channel factors over the quality range; starts at 1 everywhere."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(KNOTS, channels))

    def forward(self, t: Tensor) -> Tensor:
        """Factors [B, C, 1, 1] at quality `t` [B] in [0, 1]."""
        return torch.exp(interpolate(self.log, t))[:, :, None, None]
