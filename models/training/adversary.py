"""The patch discriminator that `vqgan` is trained against, and how its opinion is weighed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_RATE = 2e-4
_SHARE = 0.3
"""Of the gradient that the other losses give to the picture: how long that of the discriminator is made."""


class PatchDiscriminator(nn.Sequential):
    """Says of overlapping patches whether they are photographs (Isola et al., "pix2pix", CVPR 2017).

    [B, 3, H, W] in [-0.5, 0.5] to [B, 1, H/8, W/8]; positive means real.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),
            nn.GroupNorm(8, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 3, padding=1),
        )


class Adversary:
    """A discriminator in training; hinge losses."""

    def __init__(self, device: torch.device, *, bf16: bool) -> None:
        self.network = PatchDiscriminator().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=_RATE, betas=(0.5, 0.9))
        self.device, self.bf16 = device, bf16

    def learn(self, real: Tensor, drawn: Tensor) -> None:
        """One step on pictures [B, 3, H, W] of both kinds."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            on_real, on_drawn = self.network(torch.cat([real, drawn])).float().chunk(2)
        loss = F.relu(1 - on_real).mean() + F.relu(1 + on_drawn).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def push(self, drawn: Tensor, others: Tensor) -> Tensor:
        """What makes pictures look more real: a gradient [B, 3, H, W], as long as a share of that of `others`.

        The adaptive weight of VQGAN (Esser et al., 2021), taken at the picture instead of at the last layer.
        """
        self.network.requires_grad_(False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            (gradient,) = torch.autograd.grad(-self.network(drawn).float().mean(), drawn)
        self.network.requires_grad_(True)
        return gradient * (_SHARE * others.norm() / (gradient.norm() + 1e-12))
