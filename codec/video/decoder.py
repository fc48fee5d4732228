"""Packets in, frames with times out: in order, from anywhere, or around parts that are lost."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, overload

import torch

from calotype.device import pick_device
from calotype.errors import DriftError, FormatError, InputError
from calotype.limits import DEFAULT_MAX_PIXELS
from calotype.video import frames, planes
from calotype.video.frames import Frame
from calotype.video.gop import GopDecoder
from calotype.video.packet import Packet, StreamConfig
from calotype.video.stream import StreamReader
from calotype.video.timeline import Entry, open_source, timeline

if TYPE_CHECKING:
    import av


@dataclass
class Damage:
    """What was found on the way: errors, and the numbers of frames that were concealed."""

    errors: list[FormatError | DriftError] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Shown:
    """A decoded frame."""

    number: int
    frame: Frame
    pts: int
    duration: int
    config: StreamConfig
    concealed: bool


@dataclass(frozen=True)
class FrameBatch:
    """Frames with their times: data uint8 [N, 3, H, W]; pts_seconds and duration_seconds float64 [N]."""

    data: torch.Tensor
    pts_seconds: torch.Tensor
    duration_seconds: torch.Tensor

    def __len__(self) -> int:
        return self.data.shape[0]


class VideoDecoder:
    """Reads a video. Index it for RGB tensors, iterate over it for PyAV frames.

    Args:
        source: path of a Matroska file or raw stream, the bytes of one, a binary file with a raw stream (which can be
            read through once), or a sequence of packets.
        allow_partial: conceal frames that are lost or damaged instead of raising; see `damage`.
        max_pixels: refuse larger frames before allocating memory for them.
    Raises:
        InputError if it cannot be read, FormatError and its kinds, LimitError, ModelNotFoundError, DriftError; while
        reading, too.
    """

    def __init__(
        self,
        source: Path | str | bytes | BinaryIO | Sequence[bytes | Packet],
        *,
        device: str = "auto",
        allow_partial: bool = False,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        self.source = open_source(source)
        self._device, self._allow_partial, self._max_pixels = device, allow_partial, max_pixels
        self.damage = Damage()
        self._listed: list[Entry] | None = None
        self._ahead: Iterator[Shown] = iter(())
        self._next: int | None = None
        self._latest: Shown | None = None

    # In order ---------------------------------------------------------------------------------------------------------

    def frames(self) -> Iterator[Shown]:
        """All frames from the beginning, in constant memory."""
        return self._play(None, self.damage)

    def __iter__(self) -> Iterator[av.VideoFrame]:
        """All frames as PyAV frames with times and colour tags."""
        for shown in self.frames():
            yield as_av(shown)

    def _play(self, start: int | None, damage: Damage) -> Iterator[Shown]:
        decoder: GopDecoder | None = None
        config: StreamConfig | None = None
        whole = False
        for entry in timeline(self.source, start, self._reporter(damage), self._max_pixels):
            format = entry.config.format
            if decoder is None or config is None or _demands(config) != _demands(entry.config):
                if config is not None and (config.format.width, config.format.height) != (format.width, format.height):
                    raise FormatError("the size changes inside the video: the video is damaged")
                decoder, config = GopDecoder(format, self._device), entry.config
            frame = None
            if entry.packet is not None and (entry.packet.key or whole):
                try:
                    frame = decoder.decode(entry.packet.payload, key=entry.packet.key)
                except (FormatError, DriftError) as error:
                    self._reporter(damage)(error)
            whole = frame is not None
            if frame is None:
                damage.frames.append(entry.number)
            yield Shown(
                entry.number, frame or decoder.conceal(), entry.pts, entry.duration, entry.config, frame is None
            )

    def _reporter(self, damage: Damage) -> Callable[[FormatError | DriftError], None]:
        def report(error: FormatError | DriftError) -> None:
            if not self._allow_partial:
                raise type(error)(f"{error}; allow_partial decodes what is intact") from error
            damage.errors.append(error)

        return report

    # Anywhere ---------------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> Sequence[Entry]:
        """Where each frame is; found by reading the packets once, without decoding them."""
        if self._listed is None:
            report = self._reporter(Damage())
            found = timeline(self.source, None, report, self._max_pixels)
            self._listed = [replace(e, packet=e.packet and replace(e.packet, payload=b"")) for e in found]
        return self._listed

    @property
    def config(self) -> StreamConfig:
        """What the first key packet says."""
        return next(timeline(self.source, None, self._reporter(Damage()), self._max_pixels)).config

    @property
    def average_rate(self) -> Fraction | None:
        """Frames per second; None for a source that can be read only once."""
        if isinstance(self.source, StreamReader) and not self.source.rewinds:
            return None
        seconds = sum(entry.duration for entry in self.entries) * self.entries[0].config.time_base
        return (len(self) / seconds).limit_denominator(1001) if seconds else Fraction(25)

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> torch.Tensor: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor:
        """RGB uint8 [3, H, W] of a frame or [N, 3, H, W] of several, on the device; not turned by a display matrix."""
        if isinstance(index, slice):
            return self._batch(range(len(self))[index])
        return self.as_rgb(self.frame_at(range(len(self))[index]))

    def _batch(self, places: Sequence[int]) -> torch.Tensor:
        format = self.entries[0].config.format
        out = None
        # Each group is decoded once, whatever the order that was asked for.
        for at, place in sorted(enumerate(places), key=lambda pair: pair[1]):
            rgb = self.as_rgb(self.frame_at(place))
            out = rgb.new_empty(len(places), *rgb.shape) if out is None else out
            out[at] = rgb
        return torch.empty(0, 3, format.height, format.width, dtype=torch.uint8) if out is None else out

    def get_frames_played_at(self, seconds: Iterable[float]) -> FrameBatch:
        """The frames on screen at these times. Raises InputError for a time outside of the video."""
        base = self.entries[0].config.time_base
        starts = [entry.pts for entry in self.entries]
        end = self.entries[-1].pts + self.entries[-1].duration
        places = []
        for second in seconds:
            if not starts[0] * base <= second < end * base:
                raise InputError(
                    f"no frame plays at {second:g} s: the video goes from {float(starts[0] * base):g} s to "
                    f"{float(end * base):g} s"
                )
            # Times that were rounded down to floats still mean the frame that begins there.
            places.append(bisect.bisect_right(starts, second / base + Fraction(1, 10**6)) - 1)
        chosen = [self.entries[place] for place in places]
        return FrameBatch(
            self._batch(places),
            torch.tensor([float(e.pts * base) for e in chosen], dtype=torch.float64),
            torch.tensor([float(e.duration * base) for e in chosen], dtype=torch.float64),
        )

    def frame_at(self, place: int) -> Shown:
        """The frame at an index; decodes from the key frame before it, or goes on from the last one asked for."""
        if self._latest is not None and self._next == place + 1:
            return self._latest
        key = place
        while key > 0 and not self._starts(key):
            key -= 1
        if self._next is None or not key <= self._next <= place:
            entry = self.entries[key]
            start = entry.place if entry.packet else None
            self._ahead = self._play(start, self.damage)
            self._next = key
        for shown in itertools.islice(self._ahead, place - self._next + 1):
            self._latest = shown
        self._next = place + 1
        assert self._latest is not None
        return self._latest

    def _starts(self, place: int) -> bool:
        packet = self.entries[place].packet
        return packet is not None and packet.key

    def as_rgb(self, shown: Shown) -> torch.Tensor:
        """RGB uint8 [3, H, W] on the decoder's device."""
        x = planes.frame_rgb(shown.frame, shown.config.format.colour, pick_device(self._device))[0]
        return x.add_(0.5).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _demands(config: StreamConfig) -> object:
    """What makes a new decoder necessary: all but the quality."""
    return replace(config.format, quality=0)


def as_av(shown: Shown) -> av.VideoFrame:
    """A decoded frame as a PyAV frame with its time and colour tags."""
    picture = frames.to_av(shown.frame, shown.config.format.colour)
    picture.pts, picture.time_base, picture.duration = shown.pts, shown.config.time_base, shown.duration
    return picture
