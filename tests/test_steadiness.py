"""The encoder's watch over long groups: when it looks, what it asks for, and what it leaves alone."""

from __future__ import annotations

import torch

from calotype.models.motion import Planes
from calotype.video.steadiness import GAIN, MOST, PERIOD, SPAN, Steadiness


def frame(brightness: float = 0.0) -> Planes:
    return Planes(torch.full((1, 1, 2, 2), brightness), torch.zeros(1, 2, 1, 1))


class Scene:
    """Frames of which the one of brightness b would have 40 + 10 b dB if it were coded alone."""

    def __init__(self) -> None:
        self.looks = 0
        self.steadiness = Steadiness(self.alone, frame())

    def alone(self, shown: Planes) -> float:
        self.looks += 1
        return 40 + 10 * shown.luma.mean().item()

    def play(self, psnr: float, count: int, brightness: float = 0.0) -> int:
        for _ in range(count):
            self.steadiness.note(frame(brightness), psnr)
        return self.steadiness.correction


def test_a_usual_group_is_left_alone() -> None:
    scene = Scene()
    assert scene.play(38.0, SPAN // 2) == 0
    assert scene.play(30.0, SPAN // 2 - 1) == 0
    assert scene.looks == 0, "which costs no time either"


def test_frames_that_fall_behind_are_coded_finer_until_they_catch_up() -> None:
    scene = Scene()
    scene.play(38.0, SPAN)
    assert scene.play(37.0, PERIOD) == GAIN
    assert scene.play(36.0, PERIOD) == 3 * GAIN
    assert scene.play(38.0, PERIOD) == 3 * GAIN
    assert scene.play(39.0, PERIOD) == 2 * GAIN
    assert scene.play(50.0, PERIOD) == 0


def test_the_correction_is_bounded() -> None:
    scene = Scene()
    scene.play(38.0, SPAN)
    assert scene.play(10.0, 4 * SPAN) == MOST


def test_a_harder_scene_is_no_reason() -> None:
    scene = Scene()
    scene.play(38.0, SPAN)
    scene.play(38.0, SPAN - 1)
    # The next look falls on a frame that would be 5 dB worse by itself.
    before = scene.play(33.0, 1, brightness=-0.5)
    assert scene.play(33.0, 4 * PERIOD, brightness=-0.5) == before


def test_single_frames_of_a_period_do_not_count() -> None:
    scene = Scene()
    scene.play(38.0, SPAN)
    for _ in range(10):
        for offset in (1.0, -1.0, 0.5, -0.5):
            assert scene.play(38.0 + offset, 1) == 0
