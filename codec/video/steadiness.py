"""Steady quality in long groups of pictures.

An error too small to be coded is passed on from frame to frame, and such errors add up: at a fixed quality long groups
fade. The encoder sees its own decoded frames, so it can code a little finer as soon as they fall behind. What is due is
judged by what coding the frame alone would give, because scenes get harder and easier, too.
"""

from __future__ import annotations

from collections.abc import Callable

from calotype.models.motion import Planes

SPAN = 32
"""Predicted frames at the start of a group that set the standard, and frames between two looks at the scene."""
PERIOD = 4
"""Frames of one cycle of the encoder's quality offsets."""
GAIN = 15
"""Steps of quality for each dB and period that frames are behind; a dB is worth about 60."""
MOST = 250
"""Steps of quality."""


class Steadiness:
    """Watches the frames of one group.

    Args:
        alone: PSNR in dB of a frame that is coded alone at the group's quality.

    `correction` is what to add to the quality of the next frame, in steps.
    """

    def __init__(self, alone: Callable[[Planes], float], key: Planes) -> None:
        self._alone, self._key = alone, key
        self._count = 0
        self._sum = 0.0
        self._margin = 0.0
        self._due = 0.0
        self.correction = 0

    def note(self, frame: Planes, psnr: float) -> None:
        """The next predicted frame as it was, and its PSNR in dB as decoded."""
        self._count += 1
        self._sum += psnr
        if self._count == SPAN:
            # Few groups get here, so the standard is looked up only now.
            self._margin = self._sum / SPAN - self._alone(self._key)
        elif self._count > SPAN and self._count % PERIOD == 0:
            behind = self._due - self._sum / PERIOD
            self.correction = min(max(self.correction + round(GAIN * behind), 0), MOST)
        if self._count % SPAN == 0:
            self._due = self._alone(frame) + self._margin
        if self._count >= SPAN and self._count % PERIOD == 0:
            self._sum = 0.0
