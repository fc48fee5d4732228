"""One picture of a video: its Y'CbCr planes, what their numbers mean, and the way to PyAV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from calotype.errors import InputError

if TYPE_CHECKING:
    import av
    from av.video.plane import VideoPlane

Plane = npt.NDArray[np.uint8]
Matrix = Literal["bt601", "bt709", "bt2020"]

UNSPECIFIED = 2
"""The H.273 code point of colours that nobody stated."""
MATRICES: tuple[Matrix, ...] = ("bt601", "bt709", "bt2020")
LUMA_WEIGHTS: dict[Matrix, tuple[float, float]] = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
}
"""Weights of red and blue in luma."""
_MATRIX_OF_CODE: dict[int, Matrix] = {
    1: "bt709", 4: "bt601", 5: "bt601", 6: "bt601", 7: "bt709", 9: "bt2020", 10: "bt2020"
}  # fmt: skip
_HD_HEIGHT = 576
"""Untagged pictures up to this height are taken as BT.601, larger ones as BT.709, as players do."""
_FULL_RANGE, _LIMITED_RANGE = 2, 1


@dataclass(frozen=True)
class Colour:
    """What the numbers of a frame mean.

    Attributes:
        matrix: the conversion between Y'CbCr and RGB that is used.
        full_range: samples use 0..255; else luma uses 16..235 and chroma 16..240.
        primaries, transfer, matrix_code: H.273 code points as the source stated them; they are passed on, and 2 means
            that the source said nothing.
    """

    matrix: Matrix = "bt709"
    full_range: bool = False
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    matrix_code: int = UNSPECIFIED


@dataclass(frozen=True)
class Frame:
    """One picture in Y'CbCr 4:2:0: y uint8 [H, W], u (Cb) and v (Cr) uint8 [ceil(H/2), ceil(W/2)]."""

    y: Plane
    u: Plane
    v: Plane

    def __post_init__(self) -> None:
        height, width = self.y.shape
        chroma = (-(-height // 2), -(-width // 2))
        if 0 in self.y.shape or self.u.shape != chroma or self.v.shape != chroma:
            raise InputError(f"chroma planes of a {width}x{height} frame must be {chroma[1]}x{chroma[0]}")
        if any(plane.dtype != np.uint8 for plane in (self.y, self.u, self.v)):
            raise InputError("the planes of a frame must be uint8")

    @property
    def width(self) -> int:
        return self.y.shape[1]

    @property
    def height(self) -> int:
        return self.y.shape[0]


def gray(width: int, height: int) -> Frame:
    """A frame of mid-gray, which stands for a picture that was lost."""
    chroma = (-(-height // 2), -(-width // 2))
    return Frame(
        np.full((height, width), 128, np.uint8), np.full(chroma, 128, np.uint8), np.full(chroma, 128, np.uint8)
    )


def sample_ranges(colour: Colour) -> tuple[float, float, float]:
    """Luma offset, luma span and chroma span in code values."""
    return (0.0, 255.0, 255.0) if colour.full_range else (16.0, 219.0, 224.0)


# PyAV -------------------------------------------------------------------------------------------------------------


def colour_of(picture: av.VideoFrame) -> Colour:
    """What a PyAV frame's tags say, with the usual guess where they say nothing."""
    code = int(picture.colorspace)
    if picture.format.is_rgb:
        return Colour("bt709", False, int(picture.color_primaries), int(picture.color_trc), 1)
    matrix = _MATRIX_OF_CODE.get(code, "bt601" if picture.height <= _HD_HEIGHT else "bt709")
    full = int(picture.color_range) == _FULL_RANGE or picture.format.name.startswith("yuvj")
    return Colour(matrix, full, int(picture.color_primaries), int(picture.color_trc), code)


def _samples(plane: VideoPlane) -> Plane:
    """A view of a PyAV plane, with the unused bytes at the end of its lines."""
    return np.frombuffer(memoryview(cast(Any, plane)), np.uint8).reshape(-1, plane.line_size)


def from_av(picture: av.VideoFrame) -> Frame:
    """The planes of a PyAV frame of any pixel format; other formats than 8-bit 4:2:0 go through swscale."""
    if picture.format.name not in ("yuv420p", "yuvj420p"):
        colour = colour_of(picture)
        levels = _FULL_RANGE if colour.full_range else _LIMITED_RANGE
        space = {"bt601": 5, "bt709": 1, "bt2020": 9}[colour.matrix]
        source = (None, None) if picture.format.is_rgb else (space, levels)
        # One thread: with several, swscale gave other samples now and then, and the same input must give one file.
        picture = picture.reformat(
            format="yuv420p", src_colorspace=source[0], dst_colorspace=space,
            src_color_range=source[1], dst_color_range=levels, threads=1,
        )  # fmt: skip
    width, height = picture.width, picture.height
    sizes = ((height, width), *2 * ((-(-height // 2), -(-width // 2)),))
    return Frame(*(_samples(plane)[:h, :w].copy() for plane, (h, w) in zip(picture.planes, sizes, strict=True)))


def to_av(frame: Frame, colour: Colour) -> av.VideoFrame:
    """A yuv420p PyAV frame with the colour tags."""
    import av

    picture = av.VideoFrame(frame.width, frame.height, "yuv420p")
    for plane, samples in zip(picture.planes, (frame.y, frame.u, frame.v), strict=True):
        _samples(plane)[: samples.shape[0], : samples.shape[1]] = samples
    picture.color_range = _FULL_RANGE if colour.full_range else _LIMITED_RANGE
    picture.colorspace = colour.matrix_code
    picture.color_primaries = colour.primaries
    picture.color_trc = colour.transfer
    return picture
