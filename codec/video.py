"""Videos: frames with times in, packets out, and back; whole, from the middle, or with parts that are lost."""

from __future__ import annotations

import bisect
import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from fractions import Fraction
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, overload

import torch

from calotype import frames
from calotype.bitrate import DELAY, BitrateControl, Budget, meet
from calotype.errors import CalotypeError, DriftError, FormatError, InputError, TargetError
from calotype.frames import Colour, Frame
from calotype.gop import GopDecoder, GopEncoder, video_format
from calotype.limits import DEFAULT_MAX_PIXELS, MAX_SIDE
from calotype.packet import FramePacket, Packet, StreamConfig
from calotype.rate import QUALITY_STEPS
from calotype.scenes import SceneCuts
from calotype.stream import StreamReader
from calotype.timeline import Entry, open_source, timeline

if TYPE_CHECKING:
    import av

DEFAULT_QUALITY = 60.0
DEFAULT_KEYINT = 32
MAX_KEYINT = 512
RATE_TOLERANCE = 0.05
"""A bitrate target is missed if the video is off it by more than this part."""


# Encoding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimedFrame:
    """A frame with its time and duration, in units of its stream's time base."""

    frame: Frame
    pts: int
    duration: int


@dataclass(frozen=True)
class Gop:
    """A group of pictures before it is encoded; `first` is the number of its first frame."""

    number: int
    first: int
    frames: Sequence[TimedFrame]
    last: bool

    @property
    def duration(self) -> int:
        return sum(f.duration for f in self.frames)


class GopStore(Protocol):
    """Keeps encoded groups, so that an interrupted encoding can go on."""

    def get(self, gop: Gop) -> list[Packet] | None:
        """The packets of a group that was finished before."""

    def put(self, gop: Gop, packets: list[Packet]) -> None:
        """Keep the packets of a group."""


@dataclass(frozen=True)
class EncodedGop:
    """Packets of a group, and the quality 0..1000 they were made at."""

    packets: list[Packet]
    quality: int

    @property
    def size(self) -> int:
        return sum(len(p.data) for p in self.packets)


def encode_gop(config: StreamConfig, gop: Gop, budget: Budget | None, device: str, threads: int | None) -> EncodedGop:
    """Encode a group at the quality of the format, or to a budget. Runs in processes of its own."""
    if threads is not None:
        torch.set_num_threads(threads)
    if budget is None:
        return EncodedGop(_packets(config, gop, device), config.format.quality)

    def trial(quality: int) -> tuple[int, EncodedGop]:
        tried = EncodedGop(
            _packets(replace(config, format=replace(config.format, quality=quality)), gop, device), quality
        )
        return tried.size, tried

    return meet(budget, trial)[2]


def _begin_worker() -> None:
    """An interrupt is for the main process, and if that dies, nobody wants the results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _packets(config: StreamConfig, gop: Gop, device: str) -> list[Packet]:
    encoder = GopEncoder(config.format, device)
    packets = []
    for place, timed in enumerate(gop.frames):
        key = place == 0
        payload = encoder.encode(timed.frame, key=key)
        last = gop.last and place == len(gop.frames) - 1
        fields = FramePacket(gop.first + place, timed.pts, timed.duration, last, config if key else None, payload)
        packets.append(Packet(fields.pack(), timed.pts, timed.duration, key, config.time_base))
    return packets


class VideoEncoder:
    """Frames in, packets out, with a delay of some groups of pictures; all of it in order.

    Args:
        width, height: of every frame, in pixels.
        time_base: seconds per unit of the packets' times.
        quality: 0 (smallest) to 100 (best), in steps of 0.1.
        keyint: most frames of a group; each group can be decoded alone.
        scene_cuts: start a group at a scene cut too.
        target_bitrate: bits per second to end at, instead of a quality.
        jobs: groups encoded at the same time, each by a process of its own. The bytes do not depend on it.
        colour: what the samples of `Frame`s mean; PyAV frames say it themselves.
        sample_aspect, display_matrix: see `StreamConfig`.
        store: groups found there are not encoded again.
        progress: called with the number of frames that are done.
    Raises:
        InputError for arguments out of range, ModelNotFoundError.
    """

    def __init__(
        self,
        width: int,
        height: int,
        *,
        time_base: Fraction,
        quality: float = DEFAULT_QUALITY,
        keyint: int = DEFAULT_KEYINT,
        scene_cuts: bool = True,
        target_bitrate: float | None = None,
        jobs: int = 1,
        device: str = "auto",
        colour: Colour | None = None,
        sample_aspect: Fraction = Fraction(0),
        display_matrix: tuple[int, ...] | None = None,
        store: GopStore | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        if not 0 <= quality <= 100:
            raise InputError(f"quality must be 0 to 100, got {quality:g}")
        if not 1 <= keyint <= MAX_KEYINT:
            raise InputError(f"keyint must be 1 to {MAX_KEYINT}, got {keyint}")
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
            raise InputError(f"frames of {width}x{height} cannot be encoded")
        if not time_base > 0 or max(time_base.as_integer_ratio()) >= 1 << 32:
            raise InputError(f"a time base of {time_base} s is out of range")
        if target_bitrate is not None and not target_bitrate > 0:
            raise TargetError(f"a target must be above 0, got {target_bitrate:g}")
        if jobs < 1:
            raise InputError(f"jobs must be at least 1, got {jobs}")
        self._size = (width, height)
        self._time_base = time_base
        self._quality = round(quality * QUALITY_STEPS / 100)
        self._keyint = keyint
        self._cuts = SceneCuts() if scene_cuts and keyint > 1 else None
        self._control = BitrateControl(target_bitrate) if target_bitrate else None
        self._jobs, self._device = jobs, device
        self._colour = colour
        self._sample_aspect, self._display_matrix = sample_aspect, display_matrix
        self._store, self._progress = store, progress
        self._config: StreamConfig | None = None
        self._pool: ProcessPoolExecutor | None = None
        self._running: deque[tuple[Gop, Future[EncodedGop] | EncodedGop, bool]] = deque()
        self._gathered: list[TimedFrame] = []
        self._ahead: tuple[Frame, int, int] | None = None
        self._groups = self._first = self._finished = 0
        self._closed = False

    @property
    def config(self) -> StreamConfig | None:
        """What the key packets say; known from the first frame on."""
        return self._config

    def encode(self, frame: av.VideoFrame | Frame | None) -> list[Packet]:
        """Take the next frame, or None after the last, and give the packets that are finished.

        A `Frame`, and a PyAV frame without pts, is taken to follow the one before at one unit of the time base.
        Raises InputError for a frame of another size or a time that does not grow, and after the end; TargetError at
        the end if the bitrate is out of reach.
        """
        if self._closed:
            raise InputError("the encoder has ended: make a new one")
        try:
            return self._encode(frame)
        except BaseException:
            self.close()
            raise

    def _encode(self, frame: av.VideoFrame | Frame | None) -> list[Packet]:
        packets: list[Packet] = []
        if frame is None:
            if self._ahead is not None:
                planes, pts, duration = self._ahead
                self._gathered.append(TimedFrame(planes, pts, duration or self._usual_duration()))
                packets += self._start(last=True)
            packets += self._finish(0)
            self.close()
            if self._control and self._control.deviation > RATE_TOLERANCE:
                raise TargetError(
                    f"the bitrate is out of reach: the smallest quality gives {self._control.deviation:+.0%} of it; "
                    "raise the target or make the frames smaller"
                )
            return packets
        planes, pts, duration = self._take(frame)
        if self._ahead is not None:
            before, start, _ = self._ahead
            if pts <= start:
                raise InputError(f"the times of frames must grow: {pts} comes after {start}")
            self._gathered.append(TimedFrame(before, start, pts - start))
            cut = self._cuts.is_cut(planes) if self._cuts else False
            if cut or len(self._gathered) >= self._keyint:
                packets += self._start(last=False)
        elif self._cuts:
            self._cuts.is_cut(planes)
        self._ahead = (planes, pts, duration)
        return packets

    def _take(self, frame: av.VideoFrame | Frame) -> tuple[Frame, int, int]:
        """The frame, its pts, and its own duration (0 if unknown), in our time base."""
        follows = 0 if self._ahead is None else self._ahead[1] + 1
        pts, duration = follows, 0
        if isinstance(frame, Frame):
            planes, colour = frame, self._colour or Colour()
        else:
            planes, colour = frames.from_av(frame), self._colour or frames.colour_of(frame)
            base = frame.time_base or self._time_base
            if frame.pts is not None:
                pts = round(frame.pts * base / self._time_base)
            duration = round((frame.duration or 0) * base / self._time_base)
        if (planes.width, planes.height) != self._size:
            raise InputError(
                f"a frame of {planes.width}x{planes.height} in a video of {self._size[0]}x{self._size[1]}: "
                "all frames must have one size"
            )
        if self._config is None:
            format = video_format(*self._size, colour, self._quality)
            self._config = StreamConfig(format, self._time_base, self._sample_aspect, self._display_matrix)
        return planes, pts, duration

    def _usual_duration(self) -> int:
        return self._gathered[-1].duration if self._gathered else 1

    def _start(self, *, last: bool) -> list[Packet]:
        """Hand the gathered frames over for encoding; gives the packets of groups that are finished meanwhile."""
        assert self._config is not None
        gop = Gop(self._groups, self._first, self._gathered, last)
        self._gathered = []
        self._groups += 1
        self._first += len(gop.frames)
        # Before a budget is asked for, the results that it rests on must be in.
        room = self._jobs - 1 if self._control is None else min(self._jobs, DELAY) - 1
        packets = self._finish(room)
        budget = None
        if self._control:
            budget = self._control.budget(float(gop.duration * self._time_base))
        stored = self._store.get(gop) if self._store else None
        if stored is not None:
            key = FramePacket.unpack(stored[0].data)
            assert key.config is not None
            self._running.append((gop, EncodedGop(stored, key.config.format.quality), False))
        elif self._jobs == 1:
            self._running.append((gop, encode_gop(self._config, gop, budget, self._device, None), True))
        else:
            self._running.append((gop, self._submit(gop, budget), True))
        return packets + (self._finish(0) if self._jobs == 1 else [])

    def _submit(self, gop: Gop, budget: Budget | None) -> Future[EncodedGop]:
        if self._pool is None:
            # Processes started anew: forked ones would inherit threads in an unknown state.
            self._pool = ProcessPoolExecutor(self._jobs, get_context("spawn"), _begin_worker)
        assert self._config is not None
        threads = max(1, torch.get_num_threads() // self._jobs)
        return self._pool.submit(encode_gop, self._config, gop, budget, self._device, threads)

    def _finish(self, room: int) -> list[Packet]:
        """The packets of the oldest groups, until no more than `room` are left."""
        packets: list[Packet] = []
        while len(self._running) > room:
            gop, result, fresh = self._running.popleft()
            try:
                encoded = result if isinstance(result, EncodedGop) else result.result()
            except BrokenProcessPool as error:
                raise CalotypeError(
                    "an encoding process was ended from outside, perhaps for lack of memory: use fewer jobs"
                ) from error
            if self._control:
                self._control.settle(encoded.size, encoded.quality)
            if self._store and fresh:
                self._store.put(gop, encoded.packets)
            packets += encoded.packets
            self._finished += len(gop.frames)
            if self._progress:
                self._progress(self._finished)
        return packets

    def close(self) -> None:
        """Give up what is not finished and end the processes; `encode(None)` does it at the end."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> VideoEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# Decoding ---------------------------------------------------------------------------------------------------------


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
        from calotype.api import pick_device

        x = frames.to_rgb(shown.frame, shown.config.format.colour, pick_device(self._device))[0]
        return x.add_(0.5).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _demands(config: StreamConfig) -> object:
    """What makes a new decoder necessary: all but the quality."""
    return replace(config.format, quality=0)


def as_av(shown: Shown) -> av.VideoFrame:
    """A decoded frame as a PyAV frame with its time and colour tags."""
    picture = frames.to_av(shown.frame, shown.config.format.colour)
    picture.pts, picture.time_base, picture.duration = shown.pts, shown.config.time_base, shown.duration
    return picture
