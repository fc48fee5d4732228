"""How fast a cluster was, as a whole and by worker."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass


@dataclass
class _Share:
    pictures: int = 0
    megapixels: float = 0.0
    seconds: float = 0.0


class Throughput:
    """Counts pictures, from the start of the first to the end of the last; threads may share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shares: dict[str, _Share] = {}
        self._first = float("inf")
        self._last = 0.0

    def add(self, worker: str, megapixels: float, seconds: float) -> None:
        """A picture was done just now by `worker`, in `seconds`."""
        with self._lock:
            self._last = time.perf_counter()
            self._first = min(self._first, self._last - seconds)
            share = self._shares.setdefault(worker, _Share())
            share.pictures += 1
            share.megapixels += megapixels
            share.seconds += seconds

    def lines(self) -> list[str]:
        """The report for people: first the whole, then each worker; empty if nothing was done."""
        if not self._shares:
            return []
        wall = self._last - self._first
        pictures = sum(share.pictures for share in self._shares.values())
        megapixels = sum(share.megapixels for share in self._shares.values())
        return [
            f"{pictures} pictures, {megapixels:.2f} Mpx in {wall:.1f} s: "
            f"{pictures / wall:.2f} pictures/s, {megapixels / wall:.2f} Mpx/s",
            *(
                f"  worker {name}: {share.pictures} pictures, {share.megapixels:.2f} Mpx, "
                f"{share.megapixels / share.seconds:.2f} Mpx/s, busy {share.seconds / wall:.0%}"
                for name, share in sorted(self._shares.items())
            ),
        ]
