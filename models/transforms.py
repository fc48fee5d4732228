"""The transforms of the image models: between pixels and a latent at 1/16, one set of weights for every rate.

    x --unshuffle 8--> 1x1 -> N -> blocks --2x2/2--> K -> blocks -> 1x1 -> M --+--> y
    x --unshuffle 16--> linear shortcut (starts as a DCT) ---------------------+
    y_hat -> 1x1 -> K -> blocks --shuffle 2--> N -> blocks -> 1x1 --shuffle 8--+--> x_hat
    y_hat -> linear shortcut -> shuffle 16 ------------------------------------+

All work happens at 1/8 resolution and below, which makes it fast on a CPU. The linear shortcut lets training start as a
transform codec instead of searching for one. Rates are switched by quantization-scale modulation
(`calotype.models.quantizers`); a synthesis may also have other weights at either end of the quality range, which costs
no multiplications. All is float: nothing here is on the entropy path.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.models import tables
from calotype.models.blocks import between, blocks, in_bfloat16, start_as_dct, works_in_strips
from calotype.models.quantizers import Modulation, base_step

STRIDE = 16
"""Pixels per latent position, each way."""
ROUGH_FROM = 0.2
"""Quality from which half of the blocks at 1/8, not only the first, may be computed in bfloat16."""
_STRIP = 512
"""Positions that pointwise layers compute at a time on a CPU."""
_INTERPOLATED = ("dec_in", "dec_coarse", "dec_up", "dec_fine", "dec_out", "dec_linear")
"""Layers of the synthesis that may be others at the ends of the quality range; modulations have knots of their own."""


@dataclass(frozen=True)
class TransformsConfig:
    """Widths and depths."""

    fine: int = 128
    coarse: int = 192
    latent: int = 320
    analysis_fine: int = 3
    analysis_coarse: int = 4
    synthesis_coarse: int = 4
    synthesis_fine: int = 4
    synthesis_ends: bool = False
    """Whether the synthesis has weights of its own at qualities 0 and 100, between which and those at 50 it moves."""


class Rates(NamedTuple):
    """Output of a training step: x_hat [B, 3, H, W], bits of the latent [B], bits of the hyper-latents [B]."""

    x_hat: Tensor
    latent_bits: Tensor
    hyper_bits: Tensor


class Analysed(NamedTuple):
    """A latent [B, M, H/16, W/16] and the features of its analysis: [B, N, H/8, W/8] and [B, K, H/16, W/16]."""

    latent: Tensor
    fine: Tensor
    coarse: Tensor


class Transforms(nn.Module):
    """See the module's text. Pictures are [B, 3, H, W] in [-0.5, 0.5] with H and W multiples of 16."""

    def __init__(self, config: TransformsConfig) -> None:
        super().__init__()
        c = self.config = config
        self.enc_in = nn.Conv2d(192, c.fine, 1)
        self.enc_fine = blocks(c.fine, c.analysis_fine)
        self.enc_down = nn.Conv2d(c.fine, c.coarse, 2, stride=2)
        self.enc_coarse = blocks(c.coarse, c.analysis_coarse)
        self.enc_out = nn.Conv2d(c.coarse, c.latent, 1)
        self.enc_linear = nn.Conv2d(768, c.latent, 1, bias=False)
        self.enc_modulation = Modulation(c.fine)
        self.enc_step = Modulation(c.latent)

        self.dec_in = nn.Conv2d(c.latent, c.coarse, 1)
        self.dec_coarse = blocks(c.coarse, c.synthesis_coarse)
        self.dec_up = nn.Conv2d(c.coarse, 4 * c.fine, 1)
        self.dec_fine = blocks(c.fine, c.synthesis_fine)
        self.dec_out = nn.Conv2d(c.fine, 192, 1)
        self.dec_linear = nn.Conv2d(c.latent, 768, 1, bias=False)
        self.dec_modulation = Modulation(c.fine)
        self.dec_step = Modulation(c.latent)
        self.dec_rough: nn.Sequential | None = None
        """`dec_fine` with more products in bfloat16, in an economical network."""

        start_as_dct(self.enc_linear, self.dec_linear, STRIDE, self.enc_out, self.dec_out)
        self.soft = False
        """Whether the synthesis is to be computed in bfloat16 where that is good enough."""
        self.dec_ends: nn.ModuleList | None = None
        """The layers of the synthesis at qualities 0 and 100, by their names."""
        if c.synthesis_ends:
            middle = nn.ModuleDict({name: getattr(self, name) for name in _INTERPOLATED})
            self.dec_ends = nn.ModuleList(copy.deepcopy(middle) for _ in range(2))

    @property
    def halo(self) -> int:
        """Latent positions around a tile that its synthesis (and, in pixels / 16, its analysis) depends on."""
        fine = max(self.config.analysis_fine, self.config.synthesis_fine)
        return max(self.config.analysis_coarse, self.config.synthesis_coarse) + -(-fine // 2)

    @property
    def latent_channels(self) -> int:
        return self.config.latent

    def economical(self) -> Self:
        """A network that shares its weights with this one and mostly multiplies in bfloat16 (`Bfloat16Block`).

        Its pixels differ by less than 1/255, before rounding, from what float32 gives. For that the last blocks,
        which draw the finest detail, must be in float32: all but the first where quantisation steps are large, below
        `ROUGH_FROM`.
        """
        twin = self._copy()
        for name in ("enc_in", "enc_down", "enc_out"):
            setattr(twin, name, copy.deepcopy(getattr(self, name)).bfloat16())
        for name in ("enc_fine", "enc_coarse"):
            setattr(twin, name, in_bfloat16(getattr(self, name)))
        twin.soft = True
        return twin if twin.dec_ends is not None else twin._softened()

    def _softened(self) -> Self:
        """The part of `economical` that draws."""
        twin = self._copy()
        twin.dec_coarse = in_bfloat16(self.dec_coarse)
        fine, soft = list(self.dec_fine), list(in_bfloat16(self.dec_fine))
        half = len(fine) // 2
        twin.dec_fine = nn.Sequential(*soft[:1], *fine[1:])
        twin.dec_rough = nn.Sequential(*soft[:half], *fine[half:])
        return twin

    @torch.no_grad()
    def begin_ends(self) -> None:
        """Give both ends the weights of the middle."""
        for end in self.dec_ends or ():
            assert isinstance(end, nn.ModuleDict)
            for name, layer in end.items():
                layer.load_state_dict(getattr(self, name).state_dict())

    def drop_ends(self) -> Self:
        """Draw as in the middle at every quality."""
        self.dec_ends, self.config = None, replace(self.config, synthesis_ends=False)
        return self

    def at(self, quality: float) -> Self:
        """A network that draws what this one does at one quality in [0, 1], without finding its weights every time."""
        if self.dec_ends is None:
            return self
        twin, (low, high) = self._copy(), self.dec_ends
        twin.dec_ends = None
        end = low if quality < 0.5 else high
        assert isinstance(end, nn.ModuleDict)
        with torch.inference_mode(False):  # whoever draws, gradients may be asked of it
            for name in _INTERPOLATED:
                setattr(twin, name, between(getattr(self, name), end[name], abs(2 * quality - 1)))
        return twin._softened() if self.soft else twin

    def _copy(self) -> Self:
        """Another network of the same layers."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        return twin

    def analyse(self, x: Tensor, t: Tensor) -> Tensor:
        """Latent y [B, M, H/16, W/16] in quantisation steps, at quality `t` [B] in [0, 1]."""
        return self.analyse_with_features(x, t).latent

    def analyse_with_features(self, x: Tensor, t: Tensor) -> Analysed:
        """The latent, as of `analyse`, and what the analysis knows of the picture on the way to it."""
        into, linear = (
            _in_runs(layer.weight.flatten(1).t(), outer, 8).t()
            for layer, outer in ((self.enc_in, 1), (self.enc_linear, 2))
        )
        factors = self.enc_modulation(t)
        eighth = gather(x, 8)
        # The layers may be in bfloat16; what goes from one to the next is in float32.
        f = _by_strips(lambda x: _pointwise(x.to(into.dtype), into, self.enc_in.bias) * factors.to(x.dtype), eighth)
        fine = self.enc_fine(f)
        coarse = self.enc_coarse(_apply(self.enc_down, fine))
        y = _by_strips(lambda f, x: _apply(self.enc_out, f) + _pointwise(gather(x, 2), linear), coarse, eighth)
        return Analysed(y.float() * (self.enc_step(t) / base_step(t)[:, None, None, None]), fine, coarse)

    def synthesise(self, y_hat: Tensor, t: Tensor, scale: int = 1, *, straight: bool = False) -> Tensor:
        """Picture [B, 3, 16 H / scale, 16 W / scale], around [-0.5, 0.5], from a latent in quantisation steps.

        `straight` changes no pixel: gradients then go straight past the blocks at 1/16, as if these added a constant.

        With `scale` 2, 4 or 8 each pixel is the mean of scale x scale pixels: the last linear layers give the means
        directly, so the large picture is never made.
        """
        if self.dec_ends is not None:
            qualities = t.tolist()
            if len(set(qualities)) == 1:
                return self.at(qualities[0]).synthesise(y_hat, t, scale, straight=straight)
            parts = zip(y_hat.split(1), t.split(1), strict=True)
            return torch.cat([self.synthesise(*part, scale, straight=straight) for part in parts])
        y = y_hat * (self.dec_step(t) * base_step(t)[:, None, None, None])
        assert self.dec_up.bias is not None
        assert self.dec_out.bias is not None
        up, out, linear = (
            _in_runs(layer.weight.flatten(1), *shuffle)
            for layer, shuffle in (
                (self.dec_up, (1, 2)), (self.dec_out, (1, 8, scale)), (self.dec_linear, (2, 8, scale)),
            )
        )  # fmt: skip
        up_bias, out_bias = _in_runs(self.dec_up.bias, 1, 2), _in_runs(self.dec_out.bias, 1, 8, scale)
        factors = self.dec_modulation(t)
        f = self.dec_in(y)
        if straight:
            with torch.no_grad():
                added = self.dec_coarse(f) - f
            f = f + added
        else:
            f = self.dec_coarse(f)
        f = _by_strips(lambda f: spread(_pointwise(f, up, up_bias), 2) * factors.to(f.dtype), f)
        rough = self.dec_rough if self.dec_rough is not None and bool((t >= ROUGH_FROM).all()) else None
        f = self.dec_fine(f) if rough is None else rough(f)

        def draw(y: Tensor, f: Tensor) -> Tensor:
            return spread(_pointwise(f, out, out_bias) + spread(_pointwise(y, linear), 2), 8 // scale)

        return _by_strips(draw, y, f).float()

    def dequantise(self, latent: Tensor) -> Tensor:
        """From the integers of coding, in 1/64, to quantisation steps, the input of `synthesise`."""
        return latent / tables.MEAN_UNIT


def _apply(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The layer in its own precision."""
    return layer(x.to(layer.weight.dtype)).to(x.dtype)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution by a matrix [outputs, inputs]."""
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def _in_runs(parameter: Tensor, outer: int, inner: int, scale: int = 1) -> Tensor:
    """Rows for pixel shuffle by outer * inner, reordered and reduced to the means over scale x scale pixels.

    Rows (channel, row, column) as torch's pixel shuffle has them become (outer row, outer column, inner row,
    inner column, channel): what goes side by side in a picture lies side by side, and a shuffle moves runs of memory.
    """
    side = inner // scale
    parameter = parameter.unflatten(0, (-1, outer, side, scale, outer, side, scale)).mean((3, 6))
    return parameter.movedim((1, 3, 2, 4, 0), (0, 1, 2, 3, 4)).flatten(0, 4)


def gather(x: Tensor, factor: int) -> Tensor:
    """Pixel unshuffle into channels (row, column, channel)."""
    batch, _, height, width = x.shape
    x = x.permute(0, 2, 3, 1).reshape(batch, height // factor, factor, width // factor, -1)
    return x.transpose(2, 3).flatten(3).permute(0, 3, 1, 2)


def spread(x: Tensor, factor: int) -> Tensor:
    """Pixel shuffle of channels (row, column, channel)."""
    batch, _, height, width = x.shape
    x = x.permute(0, 2, 3, 1).unflatten(3, (factor, -1)).transpose(2, 3)
    return x.reshape(batch, height * factor, width * factor, -1).permute(0, 3, 1, 2)


def _by_strips(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function` of features whose rows do not depend on each other, in strips of rows that stay in the cache.

    The first input is the coarsest: the heights of the others are multiples of its.
    """
    height, width = inputs[0].shape[2:]
    if not works_in_strips(inputs[0]):
        return function(*inputs)
    rows = max(1, _STRIP // width)
    strips = zip(*(x.split(rows * (x.shape[2] // height), 2) for x in inputs), strict=True)
    return torch.cat([function(*strip) for strip in strips], 2)
