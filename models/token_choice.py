"""Which tokens an encoder takes: by what they cost in bits, and by gradient descent on what is seen of one picture.

The nearest codeword to a latent is neither the one whose picture looks most like it nor the cheapest to code. `choose`
weighs distance against bits (entropy-constrained vector quantisation: Chou, Lookabaugh and Gray, IEEE Trans. ASSP
1989). `search` moves the latent against the gradient of what is seen and of the bits, with codewords softened to means
of the likely ones, which harden step by step (Agustsson et al., "Soft-to-Hard Vector Quantization", NeurIPS 2017). The
bitstream stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from calotype.models import perceptual
from calotype.models.vqgan import STRIDE, Vqgan

_SQUARES_PER_RATE = (1 / 160, 1 / 40)
"""What a bit is worth in squared distance to a codeword, by the weight of the rate: for latents that stay where they
are, and for those that may move to where codewords are cheap."""
_LARGEST_CHANGE = 0.06
"""Of a latent in a step, where codewords have a mean square of about 0.2; falls as a half cosine."""
_BETAS = (0.5, 0.9)
"""Of Adam: shorter memories than usual, because there are only tens of steps."""
_SOFT, _HARD = 0.3, 0.02
"""Squared distances that make a codeword e times less likely, at the first and at the last step."""
_CANDIDATES = 32
"""Codewords that a softened one is a mean of."""
_KEPT = 2
"""Steps for which candidates and their bits are kept: they change slowly."""
_TRIED = 1 / 16
"""Share of the steps, the last ones, that draw with hardened codewords; the best tokens of these are taken."""
_ABSOLUTE = 1.0
"""Weight of the absolute error of samples in [0, 1] against the feature distance."""


@torch.no_grad()
def choose(network: Vqgan, y: Tensor, ladder_step: int, rate_weight: float) -> Tensor:
    """Tokens [1, h, w] int64 of a latent [1, D, h, w], near and cheap.

    Args:
        rate_weight: of `Vqgan.rate_weight`.
    """
    codewords = network.codebook(ladder_step).codewords
    worth = rate_weight * _SQUARES_PER_RATE[0]
    return network.prior.choose(y[0], codewords, ladder_step, worth, 1).tokens[None, ..., 0]


def search(
    network: Vqgan,
    x: Tensor,
    ladder_step: int,
    rate_weight: float,
    steps: int,
    *,
    bf16: bool,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Tokens [1, H/16, W/16] int64 of a picture [1, 3, H, W] that make the least of what is seen and of bits.

    Args:
        rate_weight: of `Vqgan.rate_weight`.
        steps: of gradient descent.
        bf16: whether to compute in bfloat16.
    """
    place = torch.tensor([ladder_step], device=x.device)
    codewords = network.codebook(ladder_step).codewords.detach()
    worth = rate_weight * _SQUARES_PER_RATE[1]
    with torch.no_grad():
        wanted = perceptual.features(x)
        y = network.latent(x, place)
    best, least = torch.empty(0), math.inf
    with torch.enable_grad():
        y.requires_grad_()
        optimiser = torch.optim.Adam([y], lr=_LARGEST_CHANGE, betas=_BETAS)
        for step in range(steps + 1):
            tried = step >= steps * (1 - _TRIED)
            if tried or step % _KEPT == 0:
                choice = network.prior.choose(y[0].detach(), codewords, ladder_step, worth, _CANDIDATES)
            hard = codewords[choice.tokens[..., 0]].movedim(-1, 0)[None]
            near = codewords[choice.tokens]
            cost = (y[0].movedim(0, -1)[..., None, :] - near).square().sum(-1) + worth * choice.bits
            likely = torch.softmax(-cost / (_SOFT * (_HARD / _SOFT) ** (step / steps)), -1)
            drawn_of = (likely[..., None] * near).sum(-2).movedim(-1, 0)[None]
            if tried:
                drawn_of = drawn_of + (hard - drawn_of).detach()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                drawn = network.synthesise(drawn_of, place).clamp(-0.5, 0.5)
                seen = perceptual.features(drawn)
            unlike = perceptual.distance(wanted, seen).sum() + _ABSOLUTE * (drawn - x).abs().mean()
            if tried:
                objective = unlike.item() + rate_weight * choice.bits[..., 0].mean().item() / STRIDE**2
                if objective < least:
                    best, least = choice.tokens[None, ..., 0], objective
            if step == steps:
                break
            optimiser.param_groups[0]["lr"] = _LARGEST_CHANGE * (1 + math.cos(math.pi * step / steps)) / 2
            y.grad = None
            (unlike + rate_weight * (likely * choice.bits).sum(-1).mean() / STRIDE**2).backward()
            optimiser.step()
            if progress:
                progress((step + 1) / steps)
    return best
