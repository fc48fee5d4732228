"""Scene cuts: the frames at which a new group of pictures should start."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from calotype.video.frames import Frame

CELLS = 24
"""Cells of the shorter side of the small pictures that are compared."""
LEAST_CHANGE = 12.0
"""A cut changes the cells by this at least, of 255 ..."""
JUMP = 3.0
"""... and by this many times as much as the frames before it."""
MEMORY = 0.8
"""Weight of the past in the running level of change."""


class SceneCuts:
    """Compares each frame with the one before: mean absolute difference of cell means of luma, against its level."""

    def __init__(self) -> None:
        self._before: npt.NDArray[np.float32] | None = None
        self._level = LEAST_CHANGE / 2

    def is_cut(self, frame: Frame) -> bool:
        """Whether this frame begins another scene than the frame of the call before; False for the first."""
        cells = _cells(frame.y)
        before, self._before = self._before, cells
        if before is None:
            return False
        change = float(np.abs(cells - before).mean())
        cut = change > LEAST_CHANGE and change > JUMP * self._level
        # The jump itself says nothing about the motion in either scene.
        if not cut:
            self._level = MEMORY * self._level + (1 - MEMORY) * change
        return cut


def _cells(luma: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    side = max(1, min(luma.shape) // CELLS)
    rows, columns = luma.shape[0] // side, luma.shape[1] // side
    cut = luma[: rows * side, : columns * side].reshape(rows, side, columns, side)
    return cut.mean((1, 3), dtype=np.float32)
