"""A perceptual distance of pictures on ImageNet features: `calotype.models.perceptual` of 8-bit pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from calotype.media import Pixels

if TYPE_CHECKING:
    from torch import Tensor


def distance(reference: Pixels, decoded: Pixels) -> float:
    """Distance of two pictures [H, W, 3] uint8: 0 for equal ones, lower is better."""
    import torch

    from calotype.models import perceptual

    with torch.inference_mode():
        pair = [perceptual.features(_to_tensor(pixels)) for pixels in (reference, decoded)]
        return perceptual.distance(*pair).item()


def _to_tensor(pixels: Pixels) -> Tensor:
    import torch

    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255 - 0.5
