"""`video`: frames predicted from the frame before, by motion compensation and conditional coding.

    reference --block motion--> w (luma and chroma at full resolution)
    x - w --unshuffle 8--> 1x1 -> N --+--> blocks --2x2/2--> K -> blocks -> M --+--> y --round--> y_hat
    w --unshuffle 8--> 1x1 -> blocks -> c                                      |
    x - w --unshuffle 16--> linear shortcut -----------------------------------+
    y_hat -> K -> blocks --shuffle 2--> N + c -> blocks -> 1x1 --shuffle 8--> + shortcut + w --> x_hat

The transforms are those of `calotype.models.hyperprior`, conditioned on features c of the prediction, so the model
starts as a hybrid residual codec and learns conditional coding (Li et al., "Deep Contextual Video Compression", NeurIPS
2021; quantization-scale modulation after DCVC-FM, CVPR 2024). Frames are Y'CbCr 4:2:0: half of the work of RGB.

The entropy model knows only integers: hyper-latents, the latents of the frame before and of the key frame, and the
motion. Decoded pixels never enter it, which is what breaks decoding on other devices in the published codecs.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.models import tables
from calotype.models.blocks import blocks
from calotype.models.exact import LIMIT, QuantConv, exact_matmul, round_clamp
from calotype.models.motion import HALF_WIDTHS, Planes, code_field, fit_tables
from calotype.models.priors import HYPER_STRIDE, HYPER_UNIT, Condition, ContextNet, HyperAnalysis, Prior, Request
from calotype.models.quantizers import KNOTS, Modulation, base_step, lagrangian, quality_level

STRIDE = 16
"""Luma pixels per latent position, each way."""
MOTION_CHANNELS = 25
KEY_OFFSET = 140
"""A key frame is better than its group's quality says, because all others are predicted from it, ..."""
OFFSETS = (-40, 0, -40, 80)
"""... and so is every fourth of the others, as in the hierarchical quality of DCVC-FM; in steps of quality."""


def quality_offset(place: int) -> int:
    """Steps of quality by which the frame at this place of its group is better than the group's quality says."""
    return OFFSETS[(place - 1) % len(OFFSETS)] if place else KEY_OFFSET


@dataclass(frozen=True)
class VideoConfig:
    """Widths and depths; the defaults are those of the shipped weights."""

    fine: int = 128
    coarse: int = 192
    latent: int = 320
    hyper: int = 96
    context: int = 2
    analysis_fine: int = 3
    analysis_coarse: int = 4
    synthesis_coarse: int = 4
    synthesis_fine: int = 4


class Memory(NamedTuple):
    """What the entropy model remembers of decoded frames.

    previous: latent [B, M, H/16, W/16] of the frame before, zeros if that is the key frame;
    key: latent of the key frame, in the same unit: quantisation steps in training, integers of 1/64 in coding;
    first: [B] 1.0 where the frame before is the key frame.
    """

    previous: Tensor
    key: Tensor
    first: Tensor


class FrameRates(NamedTuple):
    """Output of a training step: the frame, its latent in steps, bits [B] of latent and hyper-latent."""

    frame: Planes
    latent: Tensor
    latent_bits: Tensor
    hyper_bits: Tensor


def unshuffle(frame: Planes, factor: int) -> Tensor:
    """[B, 1.5 factor², H / factor, W / factor]: the samples of factor x factor luma pixels as channels."""
    return torch.cat([F.pixel_unshuffle(frame.luma, factor), F.pixel_unshuffle(frame.chroma, factor // 2)], 1)


def shuffle(x: Tensor, factor: int) -> Planes:
    """The inverse of `unshuffle`."""
    luma, chroma = x.split([factor**2, factor**2 // 2], 1)
    return Planes(F.pixel_shuffle(luma, factor), F.pixel_shuffle(chroma, factor // 2))


def frame_psnr(a: Planes, b: Planes) -> float:
    """PSNR-YUV in dB of samples one apart from black to white: the mean of the planes', weighted 6:1:1."""
    planes = ((a.luma, b.luma, 6), (a.chroma[:, :1], b.chroma[:, :1], 1), (a.chroma[:, 1:], b.chroma[:, 1:], 1))
    return sum(-10 * w * math.log10(max((x - y).square().mean().item(), 1e-10)) for x, y, w in planes) / 8


def search_cost(t: Tensor) -> float:
    """What a bit of motion may save in absolute differences at quality `t` [1]: the square root of 1 / λ, as in other
    encoders."""
    return 0.6 / (255 * math.sqrt(lagrangian(t).item()))


def motion_features(field: Tensor) -> Tensor:
    """What the entropy model sees of a motion field [B, 2, H/8, W/8]: [B, 24, H/16, W/16] in 1/64 (vectors in pixels).

    The vectors, and how much they differ from their left and upper neighbours: where motion breaks, residuals live.
    """
    field = field.float()
    left = F.pad(field, (1, 0, 0, 0), mode="replicate")[..., :-1]
    upper = F.pad(field, (0, 0, 1, 0), mode="replicate")[..., :-1, :]
    stacked = torch.cat([field, (field - left).abs(), (field - upper).abs()], 1)
    return F.pixel_unshuffle(stacked, 2) * (tables.MEAN_UNIT // 4)


class TemporalPrior(Prior):
    """The prior of stills, told by integers what is known of the time before."""

    def __init__(self, latent: int, hyper: int, *, hidden: int = 160) -> None:
        super().__init__(latent, hyper, hidden=hidden)
        self.temporal_enter = QuantConv(
            2 * latent + MOTION_CHANNELS, hidden, leaky=True, in_unit=1 / tables.COMPAND_GAIN, knots=KNOTS
        )
        self.temporal_spatial = QuantConv(hidden, hidden, 5)
        self.temporal_mix = QuantConv(hidden, hidden, leaky=True)
        self.temporal_out = QuantConv(hidden, hidden)
        nn.init.normal_(self.temporal_out.weight, std=0.002)
        gain = self.hyper_first.gain
        self.hyper_first = QuantConv(hidden, 2 * hyper, knots=KNOTS, gain=gain)
        nn.init.normal_(self.hyper_first.weight, std=0.01)
        with torch.no_grad():
            self.hyper_first.bias[:, hyper:] = torch.log(torch.tensor(1 / tables.SCALE_MIN))
        self.hyper_second = ContextNet(hidden, hyper, hyper, hidden=96, known_unit=1 / HYPER_UNIT, mean_unit=HYPER_UNIT)

    def condition(self, integers: Tensor, t: Tensor) -> Condition:
        """What companded integers [B, 2 M + 25, h, w] (latents before, motion) say of the next latent."""
        x = self.temporal_enter(integers, t)
        x = self.temporal_mix(self.temporal_spatial(x, t), t)
        height, width = x.shape[2:]
        padded = F.pad(x, (0, -width % HYPER_STRIDE, 0, -height % HYPER_STRIDE))
        # A sum of 16 integers is exact, and so is its division by a power of two.
        pooled = F.avg_pool2d(padded, HYPER_STRIDE)
        return Condition(self.temporal_out(x, t), round_clamp(pooled, LIMIT))

    # Training ---------------------------------------------------------------------------------------------------------

    def rates(self, z: Tensor, y: Tensor, t: Tensor, memory: Memory, field: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Prior.forward`, with the memory."""
        with torch.autocast(z.device.type, enabled=False):
            known = torch.cat([memory.previous, memory.key, motion_features(field) / tables.MEAN_UNIT], 1)
            integers = torch.cat([tables.compand_ste(known.detach()), _flag(memory)], 1)
            condition = self.condition(integers, torch.round(t * 64) / 64)
        return self.forward(z, y, t, condition)

    # Coding -----------------------------------------------------------------------------------------------------------

    def remember(self, memory: Memory, field: Tensor, level: Tensor) -> Condition:
        """The condition from integers only, for an exported prior."""
        known = torch.cat([memory.previous, memory.key, motion_features(field)], 1)
        with exact_matmul(level.device):
            return self.condition(torch.cat([self._compand(known), _flag(memory)], 1), level)


def _flag(memory: Memory) -> Tensor:
    """A plane [B, 1, h, w] that says whether the frame before is the key frame."""
    return float(LIMIT) * memory.first[:, None, None, None].expand(-1, 1, *memory.key.shape[2:])


class Video(nn.Module):
    """See the module's text. Frames are `Planes` around [-0.5, 0.5] whose luma sides are multiples of 16."""

    motion_frequencies: Tensor

    def __init__(self, config: VideoConfig = VideoConfig()) -> None:
        super().__init__()
        c = self.config = config
        self.enc_in = nn.Conv2d(96, c.fine, 1)
        self.enc_condition = nn.Conv2d(c.fine, c.fine, 1, bias=False)
        self.enc_fine = blocks(c.fine, c.analysis_fine)
        self.enc_down = nn.Conv2d(c.fine, c.coarse, 2, stride=2)
        self.enc_coarse = blocks(c.coarse, c.analysis_coarse)
        self.enc_out = nn.Conv2d(c.coarse, c.latent, 1)
        self.enc_linear = nn.Conv2d(384, c.latent, 1, bias=False)
        self.enc_modulation = Modulation(c.fine)
        self.enc_step = Modulation(c.latent)

        self.context_in = nn.Conv2d(96, c.fine, 1)
        self.context_blocks = blocks(c.fine, c.context)

        self.dec_in = nn.Conv2d(c.latent, c.coarse, 1)
        self.dec_coarse = blocks(c.coarse, c.synthesis_coarse)
        self.dec_up = nn.Conv2d(c.coarse, 4 * c.fine, 1)
        self.dec_condition = nn.Conv2d(c.fine, c.fine, 1, bias=False)
        self.dec_fine = blocks(c.fine, c.synthesis_fine)
        self.dec_out = nn.Conv2d(c.fine, 96, 1)
        self.dec_linear = nn.Conv2d(c.latent, 384, 1, bias=False)
        self.dec_modulation = Modulation(c.fine)
        self.dec_step = Modulation(c.latent)

        self.hyper_analysis = HyperAnalysis(c.latent, c.hyper)
        self.prior = TemporalPrior(c.latent, c.hyper)
        # Tables of vector components, behind those of the prior; counted on clips after training.
        self.register_buffer("motion_frequencies", fit_tables([torch.zeros(2 * half + 2) for half in HALF_WIDTHS]))
        for layer in (self.enc_condition, self.dec_condition):
            nn.init.zeros_(layer.weight)

    # Transforms: float, never on the entropy path ---------------------------------------------------------------------

    def context(self, prediction: Planes) -> Tensor:
        """Features [B, N, H/8, W/8] of a predicted frame."""
        return self.context_blocks(self.context_in(unshuffle(prediction, 8)))

    def analyse(self, x: Planes, prediction: Planes, context: Tensor, t: Tensor) -> Tensor:
        """Latent y [B, M, H/16, W/16] in quantisation steps, at quality `t` [B] in [0, 1]."""
        residual = Planes(x.luma - prediction.luma, x.chroma - prediction.chroma)
        f = self.enc_in(unshuffle(residual, 8))
        f = f * self.enc_modulation(t).to(f.dtype) + self.enc_condition(context)
        f = self.enc_coarse(self.enc_down(self.enc_fine(f)))
        y = self.enc_out(f) + self.enc_linear(unshuffle(residual, STRIDE))
        return y.float() * (self.enc_step(t) / base_step(t)[:, None, None, None])

    def synthesise(self, y_hat: Tensor, prediction: Planes, context: Tensor, t: Tensor) -> Planes:
        """The decoded frame, clamped to [-0.5, 0.5], from a latent in quantisation steps."""
        y = y_hat * (self.dec_step(t) * base_step(t)[:, None, None, None])
        f = F.pixel_shuffle(self.dec_up(self.dec_coarse(self.dec_in(y))), 2)
        f = self.dec_fine(f * self.dec_modulation(t).to(f.dtype) + self.dec_condition(context))
        fine, linear = shuffle(self.dec_out(f), 8), shuffle(self.dec_linear(y), STRIDE)
        return Planes(
            (prediction.luma + fine.luma.float() + linear.luma.float()).clamp(-0.5, 0.5),
            (prediction.chroma + fine.chroma.float() + linear.chroma.float()).clamp(-0.5, 0.5),
        )

    # Training ---------------------------------------------------------------------------------------------------------

    def forward(self, x: Planes, prediction: Planes, field: Tensor, memory: Memory, t: Tensor) -> FrameRates:
        """Rates and reconstruction of one frame, differentiable."""
        context = self.context(prediction)
        y = self.analyse(x, prediction, context, t)
        z = self.hyper_analysis(y)
        y_hat, y_bits, z_bits = self.prior.rates(z, y, t, memory, field)
        return FrameRates(self.synthesise(y_hat, prediction, context, t), y_hat, y_bits, z_bits)

    # Coding -----------------------------------------------------------------------------------------------------------

    def code(
        self,
        shape: tuple[int, int, int],
        quality: Tensor,
        memory: Memory,
        last_field: Tensor,
        field: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Generator[Request, Tensor, tuple[Tensor, Tensor]]:
        """Encode a motion field and a latent, or decode them if both are None: the same steps over the same integers.

        Args:
            shape: (B, H, W) of the latent.
            quality: [B] int64 in steps of 1/`QUALITY_STEPS`.
            memory: with latents as integers in 1/64 step.
            last_field: of the frame before, zeros after a key frame.
        Returns:
            The field, and the latent as float32 integers in 1/64 step.
        """
        batch, height, width = shape
        field = yield from code_field((batch, 2 * height, 2 * width), last_field, tables.SCALES, field)
        level = quality_level(quality)
        condition = self.prior.remember(memory, field, level)
        z = None if y is None else self.hyper_analysis(y)
        latent = yield from self.prior.code(shape, level, z, y, condition)
        return field, latent

    def dequantise(self, latent: Tensor) -> Tensor:
        """From the integers of `code` to quantisation steps, the input of `synthesise`."""
        return latent / tables.MEAN_UNIT
