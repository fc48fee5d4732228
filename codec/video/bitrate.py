"""Rate control of a video: each group of pictures gets a number of bytes, and the quality that meets it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from calotype.rate import QUALITY_STEPS

T = TypeVar("T")
DELAY = 4
"""Groups that may be encoded before the result of the first of them is known, so that many can be at the same time."""
TOLERANCE = 0.02
"""A group's bytes may be off its budget by this part; the groups after it make up for it."""
MOST_TRIALS = 6
MOST_CORRECTION = 0.5
"""No group's budget is changed by more than this part."""
_SLOPE = math.log(55) / QUALITY_STEPS
"""Growth of the logarithm of the rate for a step of quality: the shipped image model on photographs."""


@dataclass(frozen=True)
class Budget:
    """What a group may cost, and the quality to try first."""

    size: int
    guess: int


@dataclass
class BitrateControl:
    """A running account of bytes. Budgets depend only on groups at least `DELAY` before, never on how many run at once.

    Args:
        rate: bits per second.
    """

    rate: float
    _budgets: list[float] = field(default_factory=list)
    _spent: list[int] = field(default_factory=list)
    _qualities: list[int] = field(default_factory=list)
    _seconds: float = 0.0

    def budget(self, seconds: float) -> Budget:
        """For the next group, which plays for so long; the results of all up to `DELAY` before it must be in."""
        number = len(self._budgets)
        known = max(0, number - DELAY + 1)
        plain = self.rate / 8 * seconds
        self._seconds += seconds
        due = self.rate / 8 * self._seconds - sum(self._spent[:known]) - sum(self._budgets[known:])
        size = min(max(due, plain * (1 - MOST_CORRECTION)), plain * (1 + MOST_CORRECTION))
        self._budgets.append(size)
        return Budget(round(size), self._qualities[known - 1] if known else QUALITY_STEPS // 2)

    def settle(self, size: int, quality: int) -> None:
        """The result of the next group, in order."""
        self._spent.append(size)
        self._qualities.append(quality)

    @property
    def deviation(self) -> float:
        """How far the bytes spent are above (+) or below (-) the rate, as a part of it."""
        return sum(self._spent) * 8 / (self.rate * self._seconds) - 1 if self._seconds else 0.0


def meet(budget: Budget, encode: Callable[[int], tuple[int, T]]) -> tuple[int, int, T]:
    """Search the quality whose size is nearest to a budget.

    Args:
        encode: gives the bytes and the result at a quality 0..1000.
    Returns:
        Quality, bytes and result of the best trial.
    """
    tried: dict[int, tuple[int, T]] = {}
    wanted = math.log(max(budget.size, 1))
    guess = budget.guess
    while guess not in tried and len(tried) < MOST_TRIALS:
        tried[guess] = encode(guess)
        if abs(tried[guess][0] / max(budget.size, 1) - 1) <= TOLERANCE:
            break
        guess = _next(wanted, {q: math.log(max(size, 1)) for q, (size, _) in tried.items()})
    best = min(tried, key=lambda q: abs(math.log(max(tried[q][0], 1)) - wanted))
    return best, *tried[best]


def _next(wanted: float, tried: dict[int, float]) -> int:
    """The quality where a line through the nearest trials meets the wanted logarithm of bytes."""
    below = [q for q in tried if tried[q] <= wanted]
    above = [q for q in tried if tried[q] > wanted]
    if below and above and max(below) < min(above):
        low, high = max(below), min(above)
        if high - low < 2:
            return low
        place = low + (wanted - tried[low]) / (tried[high] - tried[low]) * (high - low)
        return min(max(round(place), low + 1), high - 1)
    nearest = min(tried, key=lambda q: abs(tried[q] - wanted))
    return min(max(round(nearest + (wanted - tried[nearest]) / _SLOPE), 0), QUALITY_STEPS)
