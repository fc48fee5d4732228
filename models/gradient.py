"""An estimate of the gradient that noise shaping looks at, made before anything is drawn.

To draw a picture and to lead the gradient of its error back (`calotype.models.shaping`) costs the encoder more than
all else. What a rounding error does to the picture is linear as long as the error is small: the error is spread over
the picture, weighted by what is there, and gathered again. That is what this network does at 1/8, with weights (gates)
that it takes from the features of the analysis:

    y_hat - y -> 1x1 --shuffle 2--> * gates -> 3x3 -> mix + features -> 3x3 -> * gates --unshuffle 2--> 1x1 --+
    y_hat - y -> 1x1 -----------------------------------------------------------------------------------------+-> g
    features at 1/16 -> 1x1 ----------------------------------------------------------------------------------+

The features also say what the analysis itself could have done better. An encoder that has chosen its symbols by the
estimate looks at true errors next. Only encoders use it; nothing here is on the entropy path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.models.blocks import SLOPE
from calotype.models.quantizers import Modulation
from calotype.models.transforms import Analysed, gather, spread

UNIT = 8.0
"""Bits per quantisation step that the network's outputs are multiples of: about what gradients are."""


@dataclass(frozen=True)
class GradientConfig:
    """Widths: of the features and the latent that the network is made for, and its own."""

    fine: int = 128
    coarse: int = 192
    latent: int = 320
    width: int = 128


class LearnedGradient(nn.Module):
    """See the module's text."""

    def __init__(self, config: GradientConfig = GradientConfig()) -> None:
        super().__init__()
        c = self.config = config
        self.error_modulation = Modulation(c.latent)
        self.feature_modulation = Modulation(c.fine)
        self.modulation = Modulation(c.latent)
        self.up = nn.Conv2d(c.latent, 4 * c.width, 1, bias=False)
        self.gates = nn.Conv2d(c.fine, 4 * c.width, 1)
        self.first = nn.Conv2d(c.width, c.width, 3, padding=1, groups=c.width)
        self.mix = nn.Conv2d(c.width, c.width, 1)
        self.second = nn.Conv2d(c.width, c.width, 3, padding=1, groups=c.width)
        self.down = nn.Conv2d(4 * c.width, c.latent, 1, bias=False)
        self.linear = nn.Conv2d(c.latent, c.latent, 1, bias=False)
        self.known = nn.Conv2d(c.coarse, c.latent, 1)
        nn.init.normal_(self.up.weight, std=0.05)
        nn.init.normal_(self.down.weight, std=0.02)
        for layer in (self.linear, self.known):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.known.bias)  # type: ignore[arg-type]
        with torch.no_grad():  # start near the identity: each position by itself, all gates open
            self.gates.bias[: 3 * c.width] += 1  # type: ignore[index]
            for layer in (self.first, self.second):
                layer.weight.mul_(0.1)[:, :, 1, 1] += 1

    def forward(self, error: Tensor, analysed: Analysed, t: Tensor) -> Tensor:
        """Gradient of the squared error of the picture by the latent, in bits per quantisation step; [B, M, H, W].

        Args:
            error: y_hat - y [B, M, H, W], in quantisation steps.
            analysed: what the analysis of the picture gave.
            t: [B], quality in [0, 1].
        """
        error = error * self.error_modulation(t)
        gates = F.leaky_relu(self.gates(analysed.fine.float() * self.feature_modulation(t)), SLOPE)
        before, past, after, known = gates.chunk(4, 1)
        f = self.first(spread(self.up(error), 2) * before)
        f = self.second(f * past + self.mix(f) + known) * after
        g = self.down(gather(f, 2)) + self.linear(error) + self.known(analysed.coarse.float())
        return UNIT * g.float() * self.modulation(t)
