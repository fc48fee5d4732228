"""Integer probability tables: what the range coder is told about a symbol.

A symbol (a rounded difference from a predicted mean) follows a zero-mean Gaussian of one of `SCALES` standard
deviations, or what was counted in its place. The tables are computed once, when weights are exported, and are shipped
with them: no decoder ever evaluates a Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SCALES = 64
SCALE_MIN = 0.08
SCALE_MAX = 64.0
LOG_SCALE_STEP = math.log(SCALE_MAX / SCALE_MIN) / (SCALES - 1)
SKIP = 5
"""Symbols of a table below this one (σ < 0.13) are zero and are not coded: P(≠ 0) is below 5e-5."""

PRECISION = 24
"""Frequencies of a table sum to 2 ** PRECISION."""
TAIL = 6.5
"""Half-width of a table in standard deviations; what lies outside is coded as an escape."""
ESCAPE = 2**7
FLOOR = 2**4
CERTAINTY = 500
"""So many symbols must be counted to count as much as the Gaussian."""

MEAN_UNIT = 64
"""Means and latents are integers in units of 1/64 of the quantisation step."""
MEAN_LIMIT = 2**15 - 1
"""Means stay within ± this many units."""

COMPAND_LIMIT = 2**15
"""Latents beyond ± this many units are seen by the context networks as if they were at the limit."""
COMPAND_GAIN = 127 / math.log2(1 + 4 * COMPAND_LIMIT / MEAN_UNIT)


def scale_of(index: Tensor) -> Tensor:
    """Standard deviation of table `index` (float, so that gradients pass)."""
    return torch.exp(math.log(SCALE_MIN) + index * LOG_SCALE_STEP)


class Law(NamedTuple):
    """What the symbols of a table follow: a Gaussian of standard deviation `scale`, at every stride-th integer.

    A table's symbol k stands for the integer stride * k + offset.
    """

    scale: float
    stride: int = 1
    offset: int = 0

    @property
    def half_width(self) -> int:
        """The table holds the symbols -half_width .. half_width, then the escape."""
        return max(1, math.ceil(TAIL * self.scale / self.stride))


LAWS = tuple(Law(SCALE_MIN * math.exp(index * LOG_SCALE_STEP)) for index in range(SCALES))
"""By table."""


def half_width(index: int) -> int:
    """Table `index` holds the symbols -half_width .. half_width, then the escape."""
    return LAWS[index].half_width


def gaussian_frequencies(laws: Sequence[Law] = LAWS) -> Tensor:
    """Frequencies of all tables, one after another, as int32; each sums to 2 ** PRECISION, each entry is ≥ 1."""
    rows = []
    total = 2**PRECISION
    for law in laws:
        reach = law.half_width
        points = law.stride * torch.arange(-reach, reach + 1, dtype=torch.float64) + law.offset
        mass = torch.special.ndtr((points + 0.5) / law.scale) - torch.special.ndtr((points - 0.5) / law.scale)
        frequencies = apportion(mass / mass.sum(), total - ESCAPE, floor=FLOOR, rest=reach)
        rows.append(torch.cat([frequencies, torch.tensor([ESCAPE])]))
    return torch.cat(rows).to(torch.int32)


def fitted_frequencies(counts: Sequence[Tensor], laws: Sequence[Law] = LAWS) -> Tensor:
    """Frequencies of all tables from how often each symbol was coded under them; like `gaussian_frequencies`.

    Decoded latents have longer tails than the Gaussians that a model is trained with, the longer the smaller their
    standard deviation.

    Args:
        counts: [2 half-width + 2] each, escapes last.
    """
    total = 2**PRECISION
    rows = []
    gaussians = gaussian_frequencies(laws).split([2 * law.half_width + 2 for law in laws])
    for row, gaussian, law in zip(counts, gaussians, laws, strict=True):
        row = row.double()
        own = row[: len(row) - 1 - law.offset]  # symmetric: odd integers are so without the last one
        mirrored = torch.cat([(own + own.flip(0)) / 2, row[len(own) :]])
        mass = (mirrored + CERTAINTY * gaussian / total) / (mirrored.sum() + CERTAINTY)
        rows.append(apportion(mass, total, floor=FLOOR, rest=len(mass) // 2 - 1))
    return torch.cat(rows).to(torch.int32)


def apportion(mass: Tensor, total: int, *, floor: int, rest: int) -> Tensor:
    """Integers [n] of the sum `total` in proportion to `mass` [n], which sums to 1, each at least `floor`.

    Element `rest` takes what rounding leaves.
    """
    frequencies = torch.floor(mass * (total - floor * len(mass))).long() + floor
    frequencies[rest] += total - frequencies.sum()
    return frequencies


def companding() -> Tensor:
    """Table [COMPAND_LIMIT + 1] from a latent's magnitude in 1/64 to its logarithmic integer in [0, 127]."""
    magnitude = torch.arange(COMPAND_LIMIT + 1, dtype=torch.float64) / MEAN_UNIT
    return torch.round(torch.log2(1 + 4 * magnitude) * COMPAND_GAIN).to(torch.uint8)


def compand_ste(latent: Tensor) -> Tensor:
    """Differentiable companding of a latent in quantisation steps, rounded straight-through."""
    smooth = torch.sign(latent) * torch.log2(1 + 4 * latent.abs()) * COMPAND_GAIN
    smooth = smooth.clamp(-127, 127)
    return smooth + (torch.round(smooth) - smooth).detach()
