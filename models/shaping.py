"""Noise shaping: symbols of a picture whose rounding errors cancel in its pixels, chosen at encode time.

The synthesis is not orthogonal, so errors of neighbouring latents add up in some pixels and cancel in others. Plain
rounding does not look at them. Here the rounded latent is drawn, the gradient of the squared error leads back to the
latent, and the latent moves against it, from somewhere between its own value and the rounded one; then it is rounded
again. One such step does most of what tens of steps of gradient descent with soft rounding do
(`calotype.models.refinement`), because it knows the errors that are really made. The bitstream stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calotype.models.distortion import squared_error

if TYPE_CHECKING:
    from calotype.models.hyperprior import Hyperprior

BITS = 2 / 3
"""Weight of a symbol's own bits against what is wrong with the picture, the best of those tried."""
FASTER = 0.9, 0.3
"""A rate is multiplied by the first plus the second times the quality in [0, 1]."""
FARTHEST = 1.0
"""Quantisation steps that a latent moves at most for the sake of the picture at a time."""


@dataclass(frozen=True)
class Schedule:
    """How often symbols are chosen anew, and how.

    steps: gradients that are looked at.
    keep: first and last share of what rounding did to a latent that is undone before the gradient moves it: 1 begins
        at the latent, 0 at its symbol.
    rate: first and last factor of the gradient, in (quantisation steps)^2 per bit.
    contexts: whether the bits of symbols that are predicted from a symbol count, too.
    guess: share kept and factor of a gradient that is estimated (`calotype.models.gradient`) before the first is
        looked at, if any is.
    straight: whether gradients go straight past the blocks at 1/16 (`Transforms.synthesise`).
    bits: weight of a symbol's own bits against what is wrong with the picture.
    """

    steps: int
    keep: tuple[float, float]
    rate: tuple[float, float]
    contexts: bool = False
    guess: tuple[float, float] | None = None
    straight: bool = False
    bits: float = BITS

    def at(self, step: int) -> tuple[float, float]:
        """(keep, rate) of a step."""
        part = step / max(1, self.steps - 1)
        keep, rate = self.keep, self.rate
        return keep[0] + (keep[1] - keep[0]) * part, rate[0] * (rate[1] / rate[0]) ** part


ONCE = Schedule(1, (0.75, 0.75), (0.015, 0.015))
"""One look at the errors: what weights are trained, and tables counted, for."""


ESTIMATED = Schedule(0, ONCE.keep, ONCE.rate, guess=(0.75, 0.015))
"""No look at all: only the estimate."""
GUESSED = Schedule(1, (0.7, 0.7), (0.017, 0.017), guess=(0.82, 0.013), straight=True, bits=0.55)
"""The same number of multiplications: an estimate first, then one look whose gradient costs less."""


def cheaper(y: Tensor, y_hat: Tensor, slope: Tensor, keep: float, rate: float, bits: float = BITS) -> Tensor:
    """The latent, on its way to its symbols, before it is moved for the sake of the picture; all [B, M, H, W].

    Args:
        y, y_hat: the latent, and as it is decoded, in quantisation steps.
        slope: `calotype.models.priors.rate_slope`.
        keep, rate: of `Schedule.at`.
        bits: as in `Schedule`.
    """
    return torch.lerp(y_hat, y, keep).sub_(slope, alpha=rate * bits)


def error_gradient(
    synthesise: Callable[..., Tensor],
    y_hat: Tensor,
    pixels: Tensor,
    t: Tensor,
    *,
    bf16: bool,
    straight: bool = False,
) -> Tensor:
    """Gradient of the squared error of the picture by the latent, in bits per quantisation step; [B, M, H, W].

    Args:
        y_hat: the latent as it is decoded, in quantisation steps.
        pixels: [B, 3, h, w] in [-0.5, 0.5], at most as large as what is drawn; what is drawn beyond does not count.
        t: [B], quality in [0, 1].
        bf16: whether to multiply in bfloat16, which is good enough here.
        straight: as in `Schedule`.
    """
    # What was computed in inference mode has no place in a graph: copies have.
    with torch.inference_mode(False), torch.enable_grad():
        y_hat, pixels, t = (v.clone() for v in (y_hat, pixels, t))
        y_hat.requires_grad_()
        with torch.autocast(y_hat.device.type, torch.bfloat16, enabled=bf16):
            drawn = synthesise(y_hat, t, straight=straight)[..., : pixels.shape[2], : pixels.shape[3]]
        wrong = squared_error(pixels, t)(drawn).sum()
        (gradient,) = torch.autograd.grad(wrong, y_hat)
        return gradient


def far(gradient: Tensor, t: Tensor, rate: float) -> Tensor:
    """How far a gradient [B, M, H, W], in bits per quantisation step, moves a latent, against it; overwrites it."""
    return gradient.mul_(rate * (FASTER[0] + FASTER[1] * t)[:, None, None, None]).clamp_(-FARTHEST, FARTHEST)


def shaped_once(
    synthesise: Callable[..., Tensor],
    y: Tensor,
    y_hat: Tensor,
    slope: Tensor,
    pixels: Tensor,
    t: Tensor,
    *,
    bf16: bool,
) -> Tensor:
    """The latents of whole pictures after `ONCE`; arguments as in `cheaper` and `error_gradient`."""
    keep, rate = ONCE.at(0)
    gradient = error_gradient(synthesise, y_hat, pixels, t, bf16=bf16)
    return cheaper(y, y_hat, slope, keep, rate) - far(gradient, t, rate)


@torch.no_grad()
def push(network: Hyperprior, x: Tensor, t: Tensor, *, bf16: bool) -> Tensor:
    """In training: how far `ONCE` moves the latents of pictures [B, 3, H, W]; [B, M, H/16, W/16]."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        y = network.analyse(x, t)
        expected = network.prior.estimate(network.hyper_analysis(y), y, t)
        y_hat = expected.coded
        slope = expected.slope(y.float(), y_hat)
    return shaped_once(network.synthesise, y, y_hat, slope, x, t, bf16=bf16) - y
