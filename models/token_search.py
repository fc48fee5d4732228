"""Token search: gradient descent on the latent of one picture, at encode time, for tokens that draw it better.

The nearest codeword to a latent is the one that looks like it, not the one whose picture does, and neighbours are
drawn together. So the latent is moved against the gradient of what is seen of the whole picture, which passes from
codewords straight to latents (van den Oord et al., "Neural Discrete Representation Learning", NeurIPS 2017), and the
best tokens on the way are kept. The bitstream stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from calotype.models import perceptual
from calotype.models.vqgan import STRIDE, Vqgan

_RATE = 0.025
"""Largest change of a latent in a step, where codewords have a mean square of about 0.2; falls as a half cosine."""
_BETAS = (0.8, 0.95)
"""Of Adam: shorter memories than usual, because there are only tens of steps."""
_COMMITMENT = 10.0
"""Pull of latents to their codewords, per pixel: without it they run ahead of tokens that do not change."""
_ABSOLUTE = 1.0
"""Weight of the absolute error of samples in [0, 1] against the feature distance."""


def search(
    network: Vqgan,
    x: Tensor,
    ladder_step: int,
    steps: int,
    *,
    bf16: bool,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Tokens [1, H/16, W/16] int64 of a picture [1, 3, H, W]: those of `Vqgan.analyse` or better ones.

    Args:
        steps: of gradient descent.
        bf16: whether to compute in bfloat16.
    """
    place = torch.tensor([ladder_step], device=x.device)
    book = network.codebook(ladder_step)
    codewords = book.codewords.detach()
    with torch.no_grad():
        wanted = perceptual.features(x)
        start = network.latent(x, place)
    best, least = book.nearest(start), math.inf
    with torch.enable_grad():
        y = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([y], lr=_RATE, betas=_BETAS)
        for step in range(steps + 1):
            tokens = book.nearest(y.detach())
            chosen = codewords[tokens].movedim(-1, 1)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                drawn = network.synthesise(y + (chosen - y).detach(), place).clamp(-0.5, 0.5)
                seen = perceptual.features(drawn)
            objective = perceptual.distance(wanted, seen).sum() + _ABSOLUTE * (drawn - x).abs().mean()
            if objective.item() < least:
                best, least = tokens, objective.item()
            if step == steps:
                break
            optimiser.param_groups[0]["lr"] = _RATE * (1 + math.cos(math.pi * step / steps)) / 2
            y.grad = None
            off = (y - chosen).square().sum(1).mean() / STRIDE**2
            (objective + _COMMITMENT * off).backward()
            optimiser.step()
            if progress:
                progress((step + 1) / steps)
    return best
