"""Bjontegaard deltas (VCEG-M33; JVET-style piecewise cubic): average difference of two curves in rate or quality.

The interpolation is that of the package `bjontegaard`; log rate. Here are the conventions around it: which points
count, when there is no number, and how sure it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from calotype.evaluation.curves import Curve

Method = Literal["pchip", "akima", "cubic"]
METHODS: tuple[Method, ...] = ("pchip", "akima", "cubic")
MIN_POINTS = 4
Series = Sequence[tuple[float, float]]
Range = tuple[float, float]


@dataclass(frozen=True)
class BdResult:
    """rate: per cent of file size at equal quality, negative is smaller. quality: difference at equal rate.

    overlap: the shared part of the two quality intervals, 0-1. `reason` says why rate and quality are NaN.
    """

    rate: float
    quality: float
    overlap: float
    interval: Range
    anchor_points: int
    test_points: int
    reason: str = ""


@dataclass(frozen=True)
class BdSummary:
    """A codec against an anchor on one metric: per picture, their mean, and of the mean curves.

    low and high: 95 per cent interval of `mean_rate` by bootstrap over pictures; NaN under 3 pictures.
    """

    test: str
    anchor: str
    metric: str
    method: Method
    mean_rate: float
    mean_quality: float
    low: float
    high: float
    curve: BdResult
    pictures: dict[str, BdResult]

    @property
    def counted(self) -> int:
        """Pictures that have a number."""
        return sum(not math.isnan(result.rate) for result in self.pictures.values())

    @property
    def rate(self) -> float:
        """The mean over pictures where there is one, else of the mean curves (published curves)."""
        return self.curve.rate if math.isnan(self.mean_rate) else self.mean_rate


def usable(series: Series, bpp_range: Range | None = None) -> list[tuple[float, float]]:
    """The points that a BD-rate uses: inside the bpp range, and each better than all cheaper ones.

    A setting that costs more and gives less is one nobody would choose, and would make the inverse ambiguous.
    """
    low, high = bpp_range or (0.0, math.inf)
    kept: list[tuple[float, float]] = []
    for rate, quality in sorted(series):
        if low <= rate <= high and rate > 0 and (not kept or (rate > kept[-1][0] and quality > kept[-1][1])):
            kept.append((rate, quality))
    return kept


def bd(anchor: Series, test: Series, method: Method = "pchip", bpp_range: Range | None = None) -> BdResult:
    """Deltas of `test` against `anchor`: NaN with under 4 points on either or without common quality."""
    from bjontegaard import bd_psnr, bd_rate  # type: ignore[import-untyped]

    a, t = usable(anchor, bpp_range), usable(test, bpp_range)

    def none(reason: str, interval: Range = (math.nan, math.nan)) -> BdResult:
        return BdResult(math.nan, math.nan, 0.0, interval, len(a), len(t), reason)

    if min(len(a), len(t)) < MIN_POINTS:
        return none(f"{len(a)} and {len(t)} points: at least {MIN_POINTS} on each are needed")
    (rate_a, quality_a), (rate_t, quality_t) = (np.asarray(x).T for x in (a, t))
    low, high = max(quality_a.min(), quality_t.min()), min(quality_a.max(), quality_t.max())
    if low >= high:
        return none("no common quality")
    common = (high - low) / (max(quality_a.max(), quality_t.max()) - min(quality_a.min(), quality_t.min()))
    options = {"method": method, "require_matching_points": False, "min_overlap": 0}
    rate = float(bd_rate(rate_a, quality_a, rate_t, quality_t, **options))
    meets = max(rate_a.min(), rate_t.min()) < min(rate_a.max(), rate_t.max())
    quality = float(bd_psnr(rate_a, quality_a, rate_t, quality_t, **options)) if meets else math.nan
    return BdResult(rate, quality, float(common), (float(low), float(high)), len(a), len(t))


def bootstrap(values: Sequence[float], draws: int = 2000, seed: int = 0) -> Range:
    """95 per cent interval of the mean by resampling (percentile bootstrap); the same numbers every time."""
    if len(values) < 3:
        return math.nan, math.nan
    array = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(0, len(array), (draws, len(array)))
    low, high = np.percentile(array[chosen].mean(1), (2.5, 97.5))
    return float(low), float(high)


def compare_curves(
    anchor: Curve, test: Curve, metric: str, method: Method = "pchip", bpp_range: Range | None = None
) -> BdSummary:
    """All that is said of a codec against an anchor; `bpp_range` bounds the points of both curves."""
    shared = [picture for picture in anchor.pictures if picture in test.pictures]
    pictures = {
        picture: bd(anchor.series(metric, picture), test.series(metric, picture), method, bpp_range)
        for picture in shared
    }
    rates = [result.rate for result in pictures.values() if not math.isnan(result.rate)]
    qualities = [result.quality for result in pictures.values() if not math.isnan(result.quality)]
    low, high = bootstrap(rates)
    return BdSummary(
        test.name, anchor.name, metric, method,
        float(np.mean(rates)) if rates else math.nan,
        float(np.mean(qualities)) if qualities else math.nan,
        low, high, bd(anchor.series(metric), test.series(metric), method, bpp_range), pictures,
    )  # fmt: skip
