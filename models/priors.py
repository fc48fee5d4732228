"""The exact entropy model: from symbols already known to the tables of the symbols that come next.

A hyper-latent z (one vector per 4x4 latent positions) is coded first, then the latent y in slices of channels. The
order is a list of passes; a pass may cover only one colour of a checkerboard, so that the other colour can use it as
spatial context. Every network here is made of integer layers (`calotype.models.exact`), and its inputs are decoded
integers, never decoded features: encoder and decoder cannot drift apart.

After Ballé et al., "Variational image compression with a scale hyperprior" (ICLR 2018), Minnen & Singh,
"Channel-wise autoregressive entropy models" (ICIP 2020) and He et al., "Checkerboard context model" (CVPR 2021).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.models import tables
from calotype.models.exact import LIMIT, QuantConv, exact_matmul
from calotype.models.quantizers import KNOTS

HYPER_STRIDE = 4
"""Latent positions per hyper-latent position, each way."""
HYPER_UNIT = 8
"""Hyper-latents are integers in units of 1/8 of their quantisation step."""
SYMBOL_LIMIT = 2**17 - 1
"""Largest magnitude of a symbol."""


class Request(NamedTuple):
    """What the entropy coder has to code next.

    tables: [B, n] uint8, the table of each symbol; symbols of tables below `tables.SKIP` are zero and take no bits.
    symbols: [B, n] int32 when encoding, None when decoding.
    """

    tables: Tensor
    symbols: Tensor | None


Coding = Generator[Request, Tensor, Tensor]


class Pass(NamedTuple):
    """Channels [start, stop) of the latent; parity 0 or 1 names one colour of the checkerboard, None means both."""

    start: int
    stop: int
    parity: int | None


PASSES = (
    Pass(0, 32, 0),
    Pass(0, 32, 1),
    Pass(32, 80, 0),
    Pass(32, 80, 1),
    Pass(80, 160, None),
    Pass(160, 320, None),
)


def checkerboard(height: int, width: int, parity: int | None, device: torch.device) -> Tensor:
    """Boolean [H, W]: the positions of a pass. Parity 0 holds the top left corner."""
    if parity is None:
        return torch.ones(height, width, dtype=torch.bool, device=device)
    rows = torch.arange(height, device=device)[:, None]
    columns = torch.arange(width, device=device)[None]
    return (rows + columns) % 2 == parity


class ContextNet(nn.Module):
    """From integer features to the mean and table index of `channels` symbols per position.

    Args:
        features: width of the features that every pass shares; 0 if there are none.
        known: width of the latents already decoded; 0 if there are none.
        known_unit: real value of one integer step of those.
        mean_unit: steps of the predicted mean per quantisation step.
    """

    def __init__(
        self, features: int, known: int, channels: int, *, hidden: int, known_unit: float, mean_unit: int
    ) -> None:
        super().__init__()
        reduced = min(known, 96)
        self.reduce = QuantConv(known, reduced, in_unit=known_unit) if known else None
        self.enter = QuantConv(features + reduced, hidden, leaky=True, knots=KNOTS)
        self.spatial = QuantConv(hidden, hidden, 5)
        self.mix = QuantConv(hidden, hidden, leaky=True)
        gain = torch.cat(
            [torch.full((channels,), float(mean_unit)), torch.full((channels,), 1 / tables.LOG_SCALE_STEP)]
        )
        self.head = QuantConv(hidden, 2 * channels, gain=gain)
        nn.init.normal_(self.head.weight, std=0.01)
        with torch.no_grad():  # start at a scale of 1 step
            self.head.bias[:, channels:] = torch.log(torch.tensor(1 / tables.SCALE_MIN))

    def forward(self, features: Tensor | None, known: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor]:
        """Integers (mean, table index), each [B, channels, H, W] in float32."""
        inputs = [] if features is None else [features]
        if self.reduce is not None and known is not None:
            inputs.append(self.reduce(known, t))
        x = self.enter(torch.cat(inputs, 1), t)
        x = self.mix(self.spatial(x, t), t)
        return _parameters(self.head(x, t))


def _parameters(head: Tensor) -> tuple[Tensor, Tensor]:
    mean, index = head.chunk(2, 1)
    limit = tables.MEAN_LIMIT
    return mean.clamp(-limit, limit), index.clamp(0, tables.SCALES - 1)


class _LowerBound(torch.autograd.Function):
    """max(x, bound) whose gradient still passes when it would raise x."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound  # type: ignore[attr-defined]
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = grads[0]
        return grad * ((x >= ctx.bound) | (grad < 0)), None  # type: ignore[attr-defined]


def gaussian_bits(offset: Tensor, index: Tensor) -> Tensor:
    """Bits of a symbol `offset` steps away from its mean under table `index`; differentiable."""
    sigma = tables.scale_of(index)
    offset = offset.abs()
    root = 0.5**0.5
    mass = 0.5 * (torch.erfc((offset - 0.5) / sigma * root) - torch.erfc((offset + 0.5) / sigma * root))
    # Far outside the mass and its gradient vanish in float32; a gentle slope still leads back.
    beyond = F.relu(offset - 0.5 - 6 * sigma)
    return -torch.log2(_LowerBound.apply(mass, 1e-9)) + 2 * beyond


class Prior(nn.Module):
    """Entropy model of a latent y [B, M, H, W] and its hyper-latent z [B, Z, ceil(H/4), ceil(W/4)].

    After `exact.integerise` the same module codes; before, it trains.
    """

    compand: Tensor
    frequencies: Tensor

    def __init__(
        self, latent: int, hyper: int, *, hidden: int = 160, up: int = 128, passes: tuple[Pass, ...] = PASSES
    ) -> None:
        super().__init__()
        self.latent, self.hyper, self.passes = latent, hyper, passes
        # Fed with zeros: a bias per quality level is all that the first half of z has as a prior.
        self.hyper_first = QuantConv(
            1,
            2 * hyper,
            knots=KNOTS,
            gain=torch.cat([torch.full((hyper,), float(HYPER_UNIT)), torch.full((hyper,), 1 / tables.LOG_SCALE_STEP)]),
        )
        with torch.no_grad():
            self.hyper_first.bias[:, hyper:] = torch.log(torch.tensor(1 / tables.SCALE_MIN))
        self.hyper_second = ContextNet(0, hyper, hyper, hidden=96, known_unit=1 / HYPER_UNIT, mean_unit=HYPER_UNIT)
        self.up1 = QuantConv(hyper, 4 * up, leaky=True, in_unit=1 / HYPER_UNIT, knots=KNOTS)
        self.up_spatial = QuantConv(up, up, 3)
        self.up_mix = QuantConv(up, up, leaky=True)
        self.up2 = QuantConv(up, 4 * up, leaky=True)
        self.up_out = QuantConv(up, hidden)
        self.contexts = nn.ModuleList(
            ContextNet(
                hidden,
                p.stop if p.parity == 1 else p.start,
                p.stop - p.start,
                hidden=hidden,
                known_unit=1 / tables.COMPAND_GAIN,
                mean_unit=tables.MEAN_UNIT,
            )
            for p in passes
        )
        self.register_buffer("compand", tables.companding())
        self.register_buffer("frequencies", tables.gaussian_frequencies())

    def _features(self, z: Tensor, t: Tensor, height: int, width: int) -> Tensor:
        """Hyper-synthesis: integers [B, hidden, height, width] from hyper-latents in 1/8 steps."""
        x = F.pixel_shuffle(self.up1(z, t), 2)
        x = self.up_mix(self.up_spatial(x, t), t)
        x = F.pixel_shuffle(self.up2(x, t), 2)
        return self.up_out(x, t)[:, :, :height, :width]

    def _hyper_first(self, z_shape: tuple[int, ...], t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        batch, _, height, width = z_shape
        mean, index = _parameters(self.hyper_first(like.new_zeros(batch, 1, 1, 1), t))
        return mean.expand(-1, -1, height, width), index.expand(-1, -1, height, width)

    # Training ---------------------------------------------------------------------------------------------------------

    def forward(self, z: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rates and the quantised latent, differentiable.

        Args:
            z, y: hyper-latent and latent in quantisation steps.
            t: [B], quality in [0, 1].
        Returns:
            y_hat [B, M, H, W], bits of y [B], bits of z [B]. In training mode the rates are those of uniform noise in
            place of rounding, in evaluation mode those of the symbols.
        """
        with torch.autocast(z.device.type, enabled=False):
            z, y = z.float(), y.float()
            t = torch.round(t * 64) / 64
            z_hat, z_bits = self._rate_hyper(z, t)
            features = self._features(z_hat, t, *y.shape[2:])
            y_hat = torch.zeros_like(y)
            y_bits = y.new_zeros(y.shape[0])
            for p, context in zip(self.passes, self.contexts, strict=True):
                mask = checkerboard(y.shape[2], y.shape[3], p.parity, y.device)
                known = y_hat[:, : p.stop if p.parity == 1 else p.start]
                mean, index = context(features, tables.compand_ste(known), t)
                mean = mean / tables.MEAN_UNIT
                part = y[:, p.start : p.stop]
                coded = index.detach() >= tables.SKIP
                symbol = (torch.floor(part - mean + 0.5) * coded).detach()
                y_bits = y_bits + self._bits(part - mean, symbol, index, coded, mask)
                # Where nothing is coded the latent is the mean, and no gradient may tell the encoder otherwise: it
                # would push the latent on and on without any effect.
                rounded = torch.where(coded, part + (mean + symbol - part).detach(), mean)
                filled = torch.where(mask, rounded, y_hat[:, p.start : p.stop])
                y_hat = torch.cat([y_hat[:, : p.start], filled, y_hat[:, p.stop :]], 1)
            return y_hat, y_bits, z_bits

    def _bits(self, offset: Tensor, symbol: Tensor, index: Tensor, coded: Tensor, mask: Tensor) -> Tensor:
        if self.training:
            bits = gaussian_bits(offset + torch.rand_like(offset) - 0.5, index)
        else:
            bits = gaussian_bits(symbol, index) * coded
        return (bits * mask).sum((1, 2, 3))

    def _rate_hyper(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        z_hat = torch.zeros_like(z)
        bits = z.new_zeros(z.shape[0])
        for parity in (0, 1):
            mask = checkerboard(z.shape[2], z.shape[3], parity, z.device)
            if parity == 0:
                mean, index = self._hyper_first(tuple(z.shape), t, z)
            else:
                mean, index = self.hyper_second(None, z_hat, t)
            offset = z - mean / HYPER_UNIT
            coded = index.detach() >= tables.SKIP
            symbol = (torch.floor(offset + 0.5) * coded).detach()
            bits = bits + self._bits(offset, symbol, index, coded, mask)
            value = (mean + HYPER_UNIT * symbol).clamp(-LIMIT, LIMIT)
            rounded = torch.where(coded, HYPER_UNIT * z + (value - HYPER_UNIT * z).detach(), value)
            z_hat = torch.where(mask, rounded, z_hat)
        return z_hat, bits

    # Coding -----------------------------------------------------------------------------------------------------------

    def code(self, shape: tuple[int, int, int], level: Tensor, z: Tensor | None, y: Tensor | None) -> Coding:
        """Encode (z and y given, in quantisation steps) or decode (both None): the same steps over the same integers.

        Args:
            shape: (B, H, W) of the latent.
            level: [B] int64, quality level below `exact.LEVELS`.
        Yields:
            `Request`s; each must be answered with the symbols [B, n] int32.
        Returns:
            The latent [B, M, H, W] as float32 integers in units of 1/64 step.
        """
        batch, height, width = shape
        device = level.device
        z_shape = (batch, self.hyper, -(-height // HYPER_STRIDE), -(-width // HYPER_STRIDE))
        z_hat = torch.zeros(z_shape, device=device)
        for parity in (0, 1):
            with exact_matmul(device):
                if parity == 0:
                    mean, index = self._hyper_first(z_shape, level, z_hat)
                else:
                    mean, index = self.hyper_second(None, z_hat, level)
            mask = checkerboard(z_shape[2], z_shape[3], parity, device)
            value = yield from _code_part(z, mean, index, mask, HYPER_UNIT)
            z_hat[:, :, mask] = value.clamp(-LIMIT, LIMIT)
        with exact_matmul(device):
            features = self._features(z_hat, level, height, width)
        y_hat = torch.zeros(batch, self.latent, height, width, device=device)
        for p, context in zip(self.passes, self.contexts, strict=True):
            known = y_hat[:, : p.stop if p.parity == 1 else p.start]
            with exact_matmul(device):
                mean, index = context(features, self._compand(known), level)
            mask = checkerboard(height, width, p.parity, device)
            part = None if y is None else y[:, p.start : p.stop]
            value = yield from _code_part(part, mean, index, mask, tables.MEAN_UNIT)
            y_hat[:, p.start : p.stop, mask] = value
        return y_hat

    def _compand(self, latent: Tensor) -> Tensor:
        magnitude = latent.abs().clamp(max=tables.COMPAND_LIMIT).long()
        return self.compand[magnitude].float() * latent.sign()


def _code_part(
    target: Tensor | None, mean: Tensor, index: Tensor, mask: Tensor, unit: int
) -> Generator[Request, Tensor, Tensor]:
    """Code the masked positions around integer means in 1/unit; returns their values [B, C, n] in 1/unit."""
    mean, index = mean[:, :, mask], index[:, :, mask]
    symbols = None
    if target is not None:
        nearest = torch.floor(target[:, :, mask] - mean / unit + 0.5).clamp(-SYMBOL_LIMIT, SYMBOL_LIMIT)
        symbols = (nearest * (index >= tables.SKIP)).to(torch.int32).flatten(1)
    answer = yield Request(index.to(torch.uint8).flatten(1), symbols)
    return mean + unit * answer.view(mean.shape).to(mean.device, torch.float32)
