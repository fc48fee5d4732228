"""`vqgan`: pictures as maps of tokens, for 0.008 to 0.05 bits per pixel.

    x --unshuffle 8--> 1x1 -> N -> blocks --2x2/2--> K -> blocks -> 1x1 -> D --+--> y --nearest codeword--> token
    x --unshuffle 16--> linear shortcut (starts as a DCT) ---------------------+
    token --codeword--> 1x1 -> W -> blocks --shuffle 2--> N -> blocks --shuffle 2--> F -> blocks --shuffle 4--+--> x_hat
    codeword --> linear shortcut -> shuffle 16 ---------------------------------------------------------------+

A token stands for 16 x 16 pixels. A ladder of codebooks, each shrunk from the next larger one by k-means, gives the
rates; encoder and decoder are told the step by modulation, so one set of weights serves all. Trained with a feature
loss and a patch discriminator (Esser et al., "Taming Transformers", CVPR 2021; Mao et al., "Extreme Image Compression
using Fine-tuned VQGANs", DCC 2024): at such rates a picture is drawn, not reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.models.blocks import blocks, start_as_dct
from calotype.models.codebook import Codebook
from calotype.models.quantizers import QUALITY_STEPS, Modulation
from calotype.models.restoration import Restorer
from calotype.models.tokens import TokenCoding, TokenPrior
from calotype.models.zoo import ladder_step

STRIDE = 16
"""Pixels per token, each way."""
DEAR_RATE, CHEAP_RATE = 16.0, 2.0
"""What a bit per pixel is worth, in feature distance, at the beginning and at the end of a step of the ladder."""


@dataclass(frozen=True)
class VqganConfig:
    """Widths and depths; the defaults are those of the shipped weights. `ladder`: sizes of the codebooks."""

    ladder: tuple[int, ...] = (8, 64, 256, 1024, 4096)
    codeword: int = 64
    fine: int = 128
    coarse: int = 192
    analysis_fine: int = 3
    analysis_coarse: int = 4
    wide: int = 256
    finest: int = 48
    synthesis_wide: int = 6
    synthesis_fine: int = 4
    synthesis_finest: int = 2


class Drawing(NamedTuple):
    """Output of a training step: picture [B, 3, H, W]; latent and its codewords, both [B, D, H/16, W/16]."""

    x_hat: Tensor
    latent: Tensor
    codewords: Tensor


class Vqgan(nn.Module):
    """See the module's text. Pictures are [B, 3, H, W] in [-0.5, 0.5] with H and W multiples of 16."""

    def __init__(self, config: VqganConfig = VqganConfig()) -> None:
        super().__init__()
        c = self.config = config
        self.enc_in = nn.Conv2d(192, c.fine, 1)
        self.enc_fine = blocks(c.fine, c.analysis_fine)
        self.enc_down = nn.Conv2d(c.fine, c.coarse, 2, stride=2)
        self.enc_coarse = blocks(c.coarse, c.analysis_coarse)
        self.enc_out = nn.Conv2d(c.coarse, c.codeword, 1)
        self.enc_linear = nn.Conv2d(768, c.codeword, 1, bias=False)
        self.enc_modulation = Modulation(c.fine)

        self.codebooks = nn.ModuleList(Codebook(size, c.codeword) for size in c.ladder)

        self.dec_in = nn.Conv2d(c.codeword, c.wide, 1)
        self.dec_wide = blocks(c.wide, c.synthesis_wide)
        self.dec_up = nn.Conv2d(c.wide, 4 * c.fine, 1)
        self.dec_modulation = Modulation(c.fine)
        self.dec_fine = blocks(c.fine, c.synthesis_fine)
        self.dec_up_finest = nn.Conv2d(c.fine, 4 * c.finest, 1)
        self.dec_finest = blocks(c.finest, c.synthesis_finest)
        self.dec_out = nn.Conv2d(c.finest, 48, 1)
        self.dec_linear = nn.Conv2d(c.codeword, 768, 1, bias=False)

        self.prior = TokenPrior(c.ladder)
        self.restorer = Restorer(c.codeword)

        start_as_dct(self.enc_linear, self.dec_linear, STRIDE, self.enc_out, self.dec_out)

    @property
    def halo(self) -> int:
        """Tokens around a tile that its synthesis (and, in pixels / 16, its analysis) depends on."""
        c = self.config
        finest = -(-c.synthesis_finest // 4)
        return max(c.analysis_coarse + -(-c.analysis_fine // 2), c.synthesis_wide + -(-c.synthesis_fine // 2) + finest)

    def ladder_step(self, quality: int) -> int:
        """The codebook of an integer quality in [0, QUALITY_STEPS]: equal parts of the range."""
        return ladder_step(quality, len(self.config.ladder))

    def rate_weight(self, quality: int) -> float:
        """What a bit per pixel is worth to an encoder, in feature distance, at an integer quality.

        Falls along each step of the ladder, so that a step ends where the next begins.
        """
        steps = len(self.config.ladder)
        place = quality * steps / QUALITY_STEPS - self.ladder_step(quality)
        return DEAR_RATE * (CHEAP_RATE / DEAR_RATE) ** place

    def codebook(self, ladder_step: int) -> Codebook:
        """The codebook of a step of the ladder."""
        book = self.codebooks[ladder_step]
        assert isinstance(book, Codebook)
        return book

    def _position(self, steps: Tensor) -> Tensor:
        """Place [B] in [0, 1] of steps [B] of the ladder."""
        return steps.float() / (len(self.config.ladder) - 1)

    # Transforms: float, never on the entropy path ---------------------------------------------------------------------

    def latent(self, x: Tensor, steps: Tensor) -> Tensor:
        """Latent [B, D, H/16, W/16] of pictures, for the codebooks `steps` [B]."""
        f = self.enc_in(F.pixel_unshuffle(x, 8))
        f = f * self.enc_modulation(self._position(steps)).to(f.dtype)
        f = self.enc_coarse(self.enc_down(self.enc_fine(f)))
        return (self.enc_out(f) + self.enc_linear(F.pixel_unshuffle(x, STRIDE))).float()

    def analyse(self, x: Tensor, ladder_step: int) -> Tensor:
        """Tokens [B, H/16, W/16] int64 of pictures."""
        steps = torch.full((len(x),), ladder_step, device=x.device)
        return self.codebook(ladder_step).nearest(self.latent(x, steps))

    def embed(self, tokens: Tensor, ladder_step: int, known: Tensor | None = None) -> Tensor:
        """Codewords [B, D, H, W] of tokens [B, H, W]; those that are not `known` [B, H, W] are restored."""
        book = self.codebook(ladder_step)
        codewords = book(tokens)
        return codewords if known is None or known.all() else self.restorer(codewords, known, book.codewords)

    def synthesise(self, codewords: Tensor, steps: Tensor, scale: int = 1) -> Tensor:
        """Pictures [B, 3, 16 H / scale, 16 W / scale], around [-0.5, 0.5], of codewords [B, D, H, W].

        With `scale` 2, 4 or 8 each pixel is the mean of scale x scale pixels.
        """
        f = F.pixel_shuffle(self.dec_up(self.dec_wide(self.dec_in(codewords))), 2)
        f = self.dec_fine(f * self.dec_modulation(self._position(steps)).to(f.dtype))
        f = self.dec_finest(F.pixel_shuffle(self.dec_up_finest(f), 2))
        x = (F.pixel_shuffle(self.dec_out(f), 4) + F.pixel_shuffle(self.dec_linear(codewords), STRIDE)).float()
        return x if scale == 1 else F.avg_pool2d(x, scale)

    # Training ---------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, steps: Tensor) -> Drawing:
        """Pictures through the codebooks `steps` [B]; gradients pass from codewords straight to latents."""
        y = self.latent(x, steps)
        codewords = torch.empty_like(y)
        for step in steps.unique().tolist():
            book = self.codebook(step)
            chosen = steps == step
            codewords[chosen] = book(book.nearest(y[chosen]))
        straight = y + (codewords - y).detach()
        return Drawing(self.synthesise(straight, steps), y, codewords)

    # Coding -----------------------------------------------------------------------------------------------------------

    def code(
        self,
        shape: tuple[int, int, int],
        ladder_step: int,
        packet: int = 0,
        packets: int = 1,
        tokens: Tensor | None = None,
        *,
        device: torch.device,
    ) -> TokenCoding:
        """Encode or decode one packet of a token map. See `TokenPrior.code`."""
        return self.prior.code(shape, ladder_step, packet, packets, tokens, device=device)
