"""Clips as measurements see them: their first frames in 8-bit 4:2:0, as a raw file that all encoders are given."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calotype.errors import InputError
from calotype.video.frames import Colour, Frame, colour_of, from_av

if TYPE_CHECKING:
    import av

SUFFIXES = frozenset({".y4m", ".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".mpg", ".ts"})


@dataclass(frozen=True)
class RawVideo:
    """A file of frames and nothing else: of each the planes Y, U and V, rows without gaps (ffmpeg's yuv420p)."""

    path: Path
    width: int
    height: int

    @property
    def frame_bytes(self) -> int:
        return self.width * self.height + 2 * (-(-self.width // 2) * -(-self.height // 2))

    def __len__(self) -> int:
        """Frames in the file."""
        return self.path.stat().st_size // self.frame_bytes

    def __iter__(self) -> Iterator[Frame]:
        luma, chroma = (self.height, self.width), (-(-self.height // 2), -(-self.width // 2))
        pixels = self.width * self.height
        with self.path.open("rb") as file:
            while (samples := np.fromfile(file, np.uint8, self.frame_bytes)).size:
                y, u, v = np.split(samples, (pixels, pixels + chroma[0] * chroma[1]))
                yield Frame(y.reshape(luma), u.reshape(chroma), v.reshape(chroma))

    def write(self, frames: Iterable[Frame]) -> None:
        """Replace the file. Raises InputError for a frame of another size."""
        with self.path.open("wb") as file:
            for frame in frames:
                if (frame.width, frame.height) != (self.width, self.height):
                    raise InputError(f"a frame is {frame.width}x{frame.height}, not {self.width}x{self.height}")
                for plane in (frame.y, frame.u, frame.v):
                    file.write(np.ascontiguousarray(plane).tobytes())


@dataclass(frozen=True)
class Clip:
    """What is coded: the frames, how many there are in a second, and what their numbers mean."""

    frames: RawVideo
    rate: Fraction
    colour: Colour
    folder: tempfile.TemporaryDirectory[str] = field(repr=False, compare=False)
    """Holds the raw file, and scratch files beside it; it goes with the clip."""

    @property
    def width(self) -> int:
        return self.frames.width

    @property
    def height(self) -> int:
        return self.frames.height

    def scratch(self, name: str) -> Path:
        return Path(self.folder.name, name)

    def beginning(self, count: int) -> Clip:
        """The first frames as a clip of its own."""
        folder = tempfile.TemporaryDirectory(prefix="calotype-clip-")
        frames = RawVideo(Path(folder.name, "clip.yuv"), self.width, self.height)
        frames.write(frame for frame, _ in zip(self.frames, range(count), strict=False))
        return Clip(frames, self.rate, self.colour, folder)


@functools.lru_cache(maxsize=1)
def read_clip(source: Path, limit: int | None = None) -> Clip:
    """The first `limit` frames of a video file, all if None. The last clip stays on disk. Raises InputError."""
    import av

    folder = tempfile.TemporaryDirectory(prefix="calotype-clip-")
    try:
        with av.open(str(source)) as container:
            if not container.streams.video:
                raise InputError(f"{source} has no video track")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise InputError(f"{source} does not say how many frames it has in a second")
            pictures = iter(container.decode(stream))
            first = next(pictures, None)
            if first is None:
                raise InputError(f"{source} has no frames")
            frames = RawVideo(Path(folder.name, "clip.yuv"), first.width, first.height)

            def chosen() -> Iterator[Frame]:
                yield from_av(first)
                for number, picture in enumerate(pictures, 1):
                    if number == limit:
                        return
                    yield from_av(picture)

            frames.write(chosen())
    except av.FFmpegError as error:
        raise InputError(f"{source} cannot be read as a video: {error.strerror}") from error
    return Clip(frames, Fraction(rate), colour_of(first), folder)


def decode_file(path: Path) -> Iterator[Frame]:
    """Frames of an encoded file in order of presentation, decoded on one thread; 10-bit samples are rounded to 8."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for picture in container.decode(stream):
            yield _rounded(picture) if picture.format.name == "yuv420p10le" else from_av(picture)


def _rounded(picture: av.VideoFrame) -> Frame:
    """swscale would dither, which is noise to a metric."""
    planes = []
    for number, plane in enumerate(picture.planes):
        halves = 1 if number == 0 else 2
        height, width = -(-picture.height // halves), -(-picture.width // halves)
        samples = np.frombuffer(bytes(plane), np.uint16).reshape(-1, plane.line_size // 2)[:height, :width]
        planes.append(np.minimum((samples + 2) >> 2, 255).astype(np.uint8))
    return Frame(*planes)


def payload_bytes(path: Path) -> int:
    """Bytes of the packets of the video track: the file without what its container adds."""
    import av

    with av.open(str(path)) as container:
        return sum(packet.size for packet in container.demux(container.streams.video[0]))
