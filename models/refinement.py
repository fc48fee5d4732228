"""Latent refinement: gradient descent on the latent of one picture, at encode time; the bitstream stays as it is.

For how a picture looks, whose gradient differs too much from place to place for `calotype.models.shaping`.

The analysis transform maps every picture with the same weights; the latent that is best for one picture lies nearby.
It is sought with soft rounding, whose temperature falls until the soft symbols are hard ones, after Campos et al.,
"Content Adaptive Optimization for Neural Image Compression" (CVPR Workshops 2019) and Yang, Bamler & Mandt,
"Improving Inference for Neural Image Compression" (NeurIPS 2020), but without their sampling: few steps are too few to
average noise out. The hyper-latent is left alone: refining it too gained nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calotype.models.distortion import Distortion, looks
from calotype.models.exact import restore
from calotype.models.hyperprior import Hyperprior
from calotype.models.transforms import STRIDE


@dataclass(frozen=True)
class Schedule:
    """How a latent is refined.

    steps: of gradient descent.
    rate: largest change of a latent in a step, in quantisation steps; falls to zero as a half cosine.
    hot, cold: first and last temperature of soft rounding.
    """

    steps: int
    rate: float
    hot: float
    cold: float


_BETAS = (0.8, 0.95)
"""Of Adam: shorter memories than usual, because there are only tens of steps."""
_WEAK = 1.0
"""A gradient in bits per quantisation step; latents with weaker ones move in proportion, not at the full rate."""


def differentiable(network: Hyperprior) -> Hyperprior:
    """A copy of a network ready to code, through which gradients flow to the latent."""
    copy = Hyperprior(network.config).to(network.dec_in.weight.device)
    own = copy.state_dict()
    copy.load_state_dict({k: v for k, v in network.state_dict().items() if k in own and v.shape == own[k].shape}, False)
    restore(copy, network)
    return copy.eval().requires_grad_(False)


def soft_round(temperature: float) -> Callable[[Tensor], Tensor]:
    """Rounding to a mean of the two integers around, weighted by their nearness; hard at temperature 0."""

    def rounding(x: Tensor) -> Tensor:
        low = torch.floor(x.detach())
        part = (x - low).clamp(1e-4, 1 - 1e-4)
        return low + torch.sigmoid((torch.atanh(part) - torch.atanh(1 - part)) / temperature)

    return rounding


@dataclass(frozen=True)
class Scene:
    """What the latent of a tile is judged by.

    pixels: [1, 3, h, w] in [-0.5, 0.5], those of the tile alone, without padding.
    around: [1, M, H, W], latent of the tile and of the halo that its synthesis sees.
    top, left: where the tile begins in `around`.
    z: [1, Z, ...], hyper-latent of the tile.
    t: [1], quality in [0, 1].
    """

    pixels: Tensor
    around: Tensor
    top: int
    left: int
    z: Tensor
    t: Tensor

    def objective(
        self,
        network: Hyperprior,
        y: Tensor,
        distortion: Distortion,
        rounding: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Bits and distortion of the tile's latent `y`; of its symbols without a `rounding`."""
        y_hat, y_bits, z_bits = network.prior(self.z, y, self.t, rounding=rounding)
        whole = self.around.clone()
        whole[:, :, self.top : self.top + y.shape[2], self.left : self.left + y.shape[3]] = y_hat
        top, left = STRIDE * self.top, STRIDE * self.left
        height, width = self.pixels.shape[2:]
        shown = network.synthesise(whole, self.t)[:, :, top : top + height, left : left + width]
        return (y_bits + z_bits + distortion(shown)).sum()


def refine(
    network: Hyperprior,
    scene: Scene,
    y: Tensor,
    schedule: Schedule,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """A latent of a lower objective than `y` [1, M, H, W], or `y` itself if none was found.

    Args:
        network: of `differentiable`.
        progress: called with the fraction that is done.
    """
    start, distortion = y, looks(scene.pixels, scene.t)
    with torch.no_grad():
        before = scene.objective(network, start, distortion)
    with torch.enable_grad():
        y = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([y], lr=schedule.rate, betas=_BETAS, eps=_WEAK)
        for step in range(schedule.steps):
            done = step / schedule.steps
            optimiser.param_groups[0]["lr"] = schedule.rate * (1 + math.cos(math.pi * done)) / 2
            temperature = schedule.hot * (schedule.cold / schedule.hot) ** done
            y.grad = None
            scene.objective(network, y, distortion, soft_round(temperature)).backward()
            optimiser.step()
            if progress:
                progress((step + 1) / schedule.steps)
    with torch.no_grad():
        found = y.detach()
        return found if scene.objective(network, found, distortion) < before else start
