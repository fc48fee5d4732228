"""Rate control: the quality that ends just below a size or rate, or nearest to a PSNR."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from calotype.errors import TargetError

T = TypeVar("T")
QUALITY_STEPS = 1000
SIZE_TOLERANCE = 0.03
"""A size or rate target is met by a file at most this much smaller, never larger."""
PSNR_TOLERANCE = 0.1
"""dB"""
_AROUND = (4, 9, 15, 25, 40)
"""Steps of quality on both sides of a jump that are tried."""
SPARSE_QUALITIES = range(0, QUALITY_STEPS + 1, 50)
"""Those that `bisect` tries: five trials find any."""
_UNITS = {"size": "bytes", "bpp": "bpp", "psnr": "dB"}


@dataclass(frozen=True)
class Target:
    """What an encoding should end at: file bytes ("size"), bits per pixel of the file ("bpp"), or dB ("psnr")."""

    kind: Literal["size", "bpp", "psnr"]
    value: float

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise TargetError(f"a target must be above 0, got {self.value}")


def search(target: Target, trial: Callable[[int], tuple[float, T]]) -> tuple[int, T]:
    """Find the integer quality in [0, 1000] for `target`.

    Args:
        trial: encodes at a quality; returns the measured value in the target's unit and the result. The value
            should grow with quality, but need not strictly.
    Returns:
        The quality and its result.
    Raises:
        TargetError: the target lies outside of what qualities 0 to 1000 reach.
    """
    tried: dict[int, tuple[float, T]] = {}

    def measure(quality: int) -> float:
        if quality not in tried:
            tried[quality] = trial(quality)
        return tried[quality][0]

    def good(value: float) -> bool:
        if target.kind == "psnr":
            return abs(value - target.value) <= PSNR_TOLERANCE / 2
        return target.value * (1 - SIZE_TOLERANCE / 2) <= value <= target.value

    low, high = 0, QUALITY_STEPS
    guess = 500
    while high - low > 1 and not good(measure(guess)):
        if measure(guess) <= target.value:
            low = guess
            # Far up already: is the target below what the best quality gives at all?
            if high == QUALITY_STEPS and low >= 3 * QUALITY_STEPS // 4 and measure(high) <= target.value:
                break
        else:
            high = guess
            if low == 0 and high <= QUALITY_STEPS // 4 and measure(low) > target.value:
                break
        guess = _interpolate(target.value, low, high, {q: v for q, (v, _) in tried.items()})
    if high - low == 1:
        # The value jumps over the target here; since it does not always grow, it may meet it nearby.
        for offset in _AROUND:
            if any(good(v) for v, _ in tried.values()):
                break
            for quality in (low - offset, high + offset):
                if 0 <= quality <= QUALITY_STEPS:
                    measure(quality)
    return _choose(target, tried)


def bisect(target: Target, trial: Callable[[int], tuple[float, T]]) -> tuple[int, T]:
    """As `search` for models whose values rise in jumps, over `SPARSE_QUALITIES`.

    A size or rate is met by the last quality that is not above it, a PSNR by the first that reaches it.
    """
    values: list[float] = []
    below, above = -1, len(SPARSE_QUALITIES)
    met: tuple[int, T] | None = None
    while above - below > 1:
        middle = (below + above) // 2
        value, result = trial(SPARSE_QUALITIES[middle])
        values.append(value)
        high = value >= target.value if target.kind == "psnr" else value > target.value
        if high == (target.kind == "psnr"):
            met = SPARSE_QUALITIES[middle], result
        if high:
            above = middle
        else:
            below = middle
    if met is None:
        unit = _UNITS[target.kind]
        nearest, bound = (max(values), "most") if target.kind == "psnr" else (min(values), "least")
        raise TargetError(
            f"a target of {target.value:g} {unit} is out of reach for this picture: "
            f"the model gives {nearest:.6g} {unit} at {bound}"
        )
    return met


def _interpolate(value: float, low: int, high: int, tried: dict[int, float]) -> int:
    """Next quality to try, strictly between `low` and `high`: by secant where both ends are known, else by halves."""
    middle = (low + high) // 2
    if low in tried and high in tried and tried[high] > tried[low]:
        fraction = (value - tried[low]) / (tried[high] - tried[low])
        secant = low + round(fraction * (high - low))
        # Keep clear of the ends, so that a curved function cannot make the search creep.
        margin = (high - low) // 8
        middle = min(max(secant, low + margin), high - margin)
    return min(max(middle, low + 1), high - 1)


def _choose(target: Target, tried: dict[int, tuple[float, T]]) -> tuple[int, T]:
    values = {q: v for q, (v, _) in tried.items()}
    unit = _UNITS[target.kind]
    if target.kind == "psnr":
        best = min(values, key=lambda q: abs(values[q] - target.value))
        reached = abs(values[best] - target.value) <= PSNR_TOLERANCE
    else:
        below = [q for q in values if values[q] <= target.value]
        best = max(below, key=lambda q: values[q]) if below else min(values, key=lambda q: values[q])
        reached = bool(below) and values[best] >= target.value * (1 - SIZE_TOLERANCE)
    if not reached:
        raise TargetError(
            f"a target of {target.value:g} {unit} is out of reach for this picture: "
            f"the nearest found is {values[best]:.6g} {unit} at quality {best / 10:g}"
        )
    return best, tried[best][1]
