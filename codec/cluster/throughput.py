"""How fast a cluster was, as a whole and by worker."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any


@dataclass
class _Share:
    units: int = 0
    amount: float = 0
    seconds: float = 0.0


class Throughput:
    """Counts units of work, from the start of the first to the end of the last; threads may share one.

    Args:
        units: what they are called: "pictures".
        amounts: what is in them, such as "Mpx", and
        digits: how many digits behind the point people see of it.
    """

    def __init__(self, units: str, amounts: str, digits: int) -> None:
        self._units, self._amounts, self._digits = units, amounts, digits
        self._lock = threading.Lock()
        self._shares: dict[str, _Share] = {}
        self._first = float("inf")
        self._last = 0.0

    def add(self, worker: str, amount: float, seconds: float) -> None:
        """A unit was done just now by `worker`, in `seconds`."""
        with self._lock:
            self._last = time.perf_counter()
            self._first = min(self._first, self._last - seconds)
            share = self._shares.setdefault(worker, _Share())
            share.units += 1
            share.amount += amount
            share.seconds += seconds

    def record(self) -> dict[str, Any]:
        """The report in JSON: seconds in all, units and amounts a second, and the share of each worker."""
        wall, whole = self._whole()
        return {
            "seconds": wall,
            f"{self._units}_per_second": whole.units / wall if wall else 0.0,
            f"{self._amounts}_per_second": whole.amount / wall if wall else 0.0,
            "workers": [
                {"worker": name, self._units: share.units, self._amounts: share.amount, "seconds": share.seconds}
                for name, share in sorted(self._shares.items())
            ],
        }

    def lines(self) -> list[str]:
        """The report for people: first the whole, then each worker; empty if nothing was done."""
        if not self._shares:
            return []
        wall, whole = self._whole()
        return [
            f"{self._counts(whole)} in {wall:.1f} s: "
            f"{whole.units / wall:.2f} {self._units}/s, {whole.amount / wall:.2f} {self._amounts}/s",
            *(
                f"  worker {name}: {self._counts(share)}, {share.amount / share.seconds:.2f} {self._amounts}/s, "
                f"busy {share.seconds / wall:.0%}"
                for name, share in sorted(self._shares.items())
            ),
        ]

    def _counts(self, share: _Share) -> str:
        return f"{share.units} {self._units}, {share.amount:.{self._digits}f} {self._amounts}"

    def _whole(self) -> tuple[float, _Share]:
        shares = self._shares.values()
        whole = _Share(sum(s.units for s in shares), sum(s.amount for s in shares), sum(s.seconds for s in shares))
        return (self._last - self._first if self._shares else 0.0), whole
