"""`mixture`: a cascade of vector-quantised latents whose codewords are coded by a Gaussian mixture.

    y  (1/16) --1x1, 2x2/2--> w2 (1/32) --2x2/2--> w3 (1/64)                     floats, encoder only
    w3 <- bias of the quality      w2 <- w3      y <- w2, w3                     integers: means and scales

Every level is cut into groups of 1, 2 or 4 channels, and each group's difference from its predicted mean is quantised
to a codeword (`calotype.models.multicodebook`), chosen by rate and distortion. An exact network predicts mean and
scale of all groups of a level at once from the coarser levels, which carry what groups have in common: there are no
slices and no checkerboard, so coding takes three passes. The transforms (`calotype.models.transforms`) are shallower
than those of `hyperprior`. After Zhu et al., "Unified Multivariate Gaussian Mixture for Efficient Neural Image
Compression" (CVPR 2022), whose published code has no prior for its codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.models import tables
from calotype.models.exact import LIMIT, QuantConv, exact_matmul
from calotype.models.multicodebook import Book, Codebooks, channels, shrinkage
from calotype.models.priors import HYPER_UNIT, Coding, CodingTables, gaussian_bits, shuffle
from calotype.models.quantizers import KNOTS, quality_level
from calotype.models.transforms import Rates, Transforms, TransformsConfig

COARSE = (Book(16, 2, 36),)
MIDDLE = (Book(32, 2, 104),)
FINE = (
    Book(4, 1, 112), Book(4, 1, 80), Book(8, 1, 70), Book(16, 1, 60), Book(32, 1, 50),
    Book(16, 2, 127), Book(32, 2, 127), Book(48, 2, 127),
    Book(8, 4, 127), Book(8, 4, 127),
)  # fmt: skip
"""Sizes such that photographs use nearly all codewords."""


@dataclass(frozen=True)
class MixtureConfig(TransformsConfig):
    """Widths, depths and codebooks; the defaults are those of the shipped weights."""

    analysis_fine: int = 1
    analysis_coarse: int = 3
    synthesis_coarse: int = 3
    synthesis_fine: int = 2
    hidden: int = 192
    up: int = 128
    coarse_books: tuple[Book, ...] = COARSE
    middle_books: tuple[Book, ...] = MIDDLE
    fine_books: tuple[Book, ...] = FINE

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> MixtureConfig:
        """From what `dataclasses.asdict` became in JSON, where codebooks are lists of numbers."""
        books = {
            k: tuple(Book(*numbers) for numbers in values[k])
            for k in ("coarse_books", "middle_books", "fine_books")
            if k in values
        }
        return MixtureConfig(**{**values, **books})


class Mixture(Transforms):
    """See the module's text. Pictures are [B, 3, H, W] in [-0.5, 0.5] with H and W multiples of 16."""

    config: MixtureConfig

    def __init__(self, config: MixtureConfig = MixtureConfig()) -> None:
        super().__init__(config)
        self.hyper_analysis = CascadeAnalysis(config)
        self.prior = Cascade(config)

    def forward(self, x: Tensor, t: Tensor) -> Rates:
        """Rates and reconstruction, differentiable; `t` [B] is quality in [0, 1]."""
        y = self.analyse(x, t)
        middle, coarse = self.hyper_analysis(y)
        y_hat, y_bits, hyper_bits = self.prior(coarse, middle, y, t)
        return Rates(self.synthesise(y_hat, t), y_bits, hyper_bits)

    @property
    def tables(self) -> CodingTables:
        """What the entropy coder needs to know."""
        return self.prior.tables

    def code(self, shape: tuple[int, int, int], quality: Tensor, y: Tensor | None = None) -> Coding:
        """Encode the latent `y`, or decode one of `shape` (B, H, W) if it is None. See `Cascade.code`.

        `quality` [B] int64 in steps of 1/`QUALITY_STEPS`: an integer, because it chooses among integer tables.
        """
        middle, coarse = (None, None) if y is None else self.hyper_analysis(y)
        return self.prior.code(shape, quality_level(quality), coarse, middle, y)


class CascadeAnalysis(nn.Module):
    """Encoder only: from y [B, M, H, W] the coarser latents, at half and at a quarter of its resolution; floats."""

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.enter = nn.Conv2d(config.latent, 192, 1)
        self.down = nn.Conv2d(192, 128, 2, stride=2)
        self.spatial = nn.Conv2d(128, 128, 3, padding=1)
        self.middle = nn.Conv2d(128, channels(config.middle_books), 1)
        self.quarter = nn.Conv2d(128, 128, 2, stride=2)
        self.coarse = nn.Conv2d(128, channels(config.coarse_books), 1)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """[B, M2, ceil(H/2), ceil(W/2)] and [B, M3, ceil(H/4), ceil(W/4)]."""
        f = _even(F.leaky_relu(self.enter(y), 0.1))
        f = F.leaky_relu(self.down(f), 0.1)
        f = F.leaky_relu(self.spatial(f), 0.1)
        coarse = F.leaky_relu(self.quarter(_even(f)), 0.1)
        return self.middle(f).float(), self.coarse(coarse).float()


def _even(x: Tensor) -> Tensor:
    bottom, right = x.shape[2] % 2, x.shape[3] % 2
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


class Level(Codebooks):
    """One latent of the cascade: from the head of a network to what is coded."""

    def head(self, inputs: int, knots: int = 1) -> QuantConv:
        """A layer that gives the means of all channels and the scale indexes of all groups."""
        gain = torch.full((self.channels + self.groups,), float(self.unit))
        gain[self.channels :] = 1 / tables.LOG_SCALE_STEP
        layer = QuantConv(inputs, len(gain), gain=gain, knots=knots)
        nn.init.normal_(layer.weight, std=0.01)
        with torch.no_grad():  # start at a scale of 1 step
            layer.bias[:, self.channels :] = torch.log(torch.tensor(1 / tables.SCALE_MIN))
        return layer

    def split(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """Means [B, C, H, W] in 1/unit and scale indexes [B, G, H, W], integers."""
        mean, index = head[:, : self.channels], head[:, self.channels :]
        return mean.clamp(-tables.MEAN_LIMIT, tables.MEAN_LIMIT), index.clamp(0, tables.SCALES - 1)

    def rate(self, value: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        """Of a latent in quantisation steps: its quantised form, in steps, and its bits [B]; differentiable."""
        mean, index = self.split(head)
        mean, index = mean / self.unit, index[:, self.group_of_channel]
        offset = value - mean
        # Codewords are chosen by rate and distortion, which draws them towards the mean. Training rounds what is left,
        # so that the transforms get used to it; not to `rate_weight`, which they would undo.
        variance = tables.scale_of(index.detach()) ** 2
        coded = index.detach() >= tables.SKIP
        symbol = (torch.floor(offset * shrinkage(variance) + 0.5) * coded).detach()
        if self.training:
            bits = gaussian_bits(offset + torch.rand_like(offset) - 0.5, index)
        else:
            bits = gaussian_bits(symbol, index) * coded
        # Where nothing is coded the latent is the mean, and no gradient may tell the encoder otherwise.
        quantised = torch.where(coded, value + (mean + symbol - value).detach(), mean)
        return quantised, bits.sum((1, 2, 3))


class Cascade(nn.Module):
    """Entropy model of the three latents. After `exact.integerise` the same module codes; before, it trains."""

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        # Table 0 is that of groups which are not coded.
        self.coarse = Level(config.coarse_books, HYPER_UNIT, 1)
        self.middle = Level(config.middle_books, HYPER_UNIT, self.coarse.stop_table)
        self.fine = Level(config.fine_books, tables.MEAN_UNIT, self.middle.stop_table)
        up, hidden, unit = config.up, config.hidden, 1 / HYPER_UNIT
        # Fed with zeros: a bias per quality level is all that the coarsest level has as a prior.
        self.coarse_head = self.coarse.head(1, KNOTS)
        self.coarse_up = QuantConv(self.coarse.channels, 4 * up, leaky=True, in_unit=unit, knots=KNOTS)
        self.coarse_spatial = QuantConv(up, up, 3)
        self.coarse_mix = QuantConv(up, up, leaky=True)
        self.middle_head = self.middle.head(up)
        self.middle_enter = QuantConv(self.middle.channels, up, leaky=True, in_unit=unit)
        self.middle_up = QuantConv(2 * up, 4 * hidden, leaky=True, knots=KNOTS)
        self.spatial = nn.ModuleList(QuantConv(hidden, hidden, side) for side in (5, 3))
        self.mix = nn.ModuleList(QuantConv(hidden, hidden, leaky=True) for _ in self.spatial)
        self.fine_head = self.fine.head(hidden)

    def _from_coarse(self, coarse: Tensor, t: Tensor, like: tuple[int, int]) -> Tensor:
        """Features at the middle level's positions [B, up, *like]."""
        x = shuffle(self.coarse_up(coarse, t))[:, :, : like[0], : like[1]]
        return self.coarse_mix(self.coarse_spatial(x, t), t)

    def _from_middle(self, features: Tensor, middle: Tensor, t: Tensor, like: tuple[int, int]) -> Tensor:
        """Means and scales at the fine level's positions [B, C + G, *like]."""
        x = self.middle_up(torch.cat([features, self.middle_enter(middle, t)], 1), t)
        x = shuffle(x)[:, :, : like[0], : like[1]]
        for spatial, mix in zip(self.spatial, self.mix, strict=True):
            x = mix(spatial(x, t), t)
        return self.fine_head(x, t)

    # Training ---------------------------------------------------------------------------------------------------------

    def forward(self, coarse: Tensor, middle: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rates and the quantised latent, differentiable.

        Args:
            coarse, middle, y: in quantisation steps.
            t: [B], quality in [0, 1].
        Returns:
            y_hat [B, M, H, W], bits of y [B], bits of the coarser levels [B]. In training mode the rates are those of
            uniform noise in place of quantisation, in evaluation mode those of rounding.
        """
        with torch.autocast(y.device.type, enabled=False):
            t = torch.round(t * 64) / 64
            head = self.coarse_head(y.new_zeros(y.shape[0], 1, 1, 1), t).expand(-1, -1, *coarse.shape[2:])
            coarse, coarse_bits = self.coarse.rate(coarse.float(), head)
            features = self._from_coarse(_integers(coarse), t, (middle.shape[2], middle.shape[3]))
            middle, middle_bits = self.middle.rate(middle.float(), self.middle_head(features, t))
            head = self._from_middle(features, _integers(middle), t, (y.shape[2], y.shape[3]))
            y_hat, y_bits = self.fine.rate(y.float(), head)
            return y_hat, y_bits, coarse_bits + middle_bits

    # Coding -----------------------------------------------------------------------------------------------------------

    @property
    def tables(self) -> CodingTables:
        """Table 0, of what is not coded, and those of all codebooks, the coarsest level first."""
        levels = (self.coarse, self.middle, self.fine)
        unused = torch.tensor([2**tables.PRECISION - 2, 2], dtype=torch.int32, device=self.fine.frequencies.device)
        half_widths = [0, *(width for level in levels for width in level.half_widths)]
        return CodingTables(
            torch.cat([unused, *(level.frequencies for level in levels)]), half_widths, skip=1, escapes=False
        )

    def code(
        self,
        shape: tuple[int, int, int],
        level: Tensor,
        coarse: Tensor | None,
        middle: Tensor | None,
        y: Tensor | None,
    ) -> Coding:
        """Encode (latents given, in quantisation steps) or decode (all None): the same steps over the same integers.

        Args:
            shape: (B, H, W) of y.
            level: [B] int64, quality level below `exact.LEVELS`.
        Yields:
            `Request`s, one for each latent; each must be answered with the symbols [B, n] int32.
        Returns:
            The latent [B, M, H, W] as float32 integers in units of 1/64 step.
        """
        batch, *fine_size = shape
        middle_size = [-(-side // 2) for side in fine_size]
        coarse_size = [-(-side // 2) for side in middle_size]
        device = level.device
        with exact_matmul(device):
            head = self.coarse_head(torch.zeros(batch, 1, 1, 1, device=device), level)
            mean, scale = self.coarse.split(head.expand(-1, -1, *coarse_size))
        value = yield from self.coarse.code(mean, scale, level, coarse)
        with exact_matmul(device):
            features = self._from_coarse(value.clamp(-LIMIT, LIMIT), level, (middle_size[0], middle_size[1]))
            mean, scale = self.middle.split(self.middle_head(features, level))
        value = yield from self.middle.code(mean, scale, level, middle)
        with exact_matmul(device):
            head = self._from_middle(features, value.clamp(-LIMIT, LIMIT), level, (fine_size[0], fine_size[1]))
            mean, scale = self.fine.split(head)
        return (yield from self.fine.code(mean, scale, level, y))


def _integers(latent: Tensor) -> Tensor:
    """A quantised latent in steps as input of an integer layer."""
    return (latent * HYPER_UNIT).clamp(-LIMIT, LIMIT)
