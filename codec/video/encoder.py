"""Frames with times in, packets out: groups of pictures are encoded in parallel, in constant memory."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from fractions import Fraction
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Protocol

import torch

from calotype.errors import CalotypeError, InputError, TargetError
from calotype.limits import MAX_SIDE
from calotype.rate import QUALITY_STEPS
from calotype.video import frames
from calotype.video.bitrate import DELAY, BitrateControl, Budget, meet
from calotype.video.frames import Colour, Frame
from calotype.video.gop import GopEncoder, video_format
from calotype.video.packet import FramePacket, Packet, StreamConfig
from calotype.video.scenes import SceneCuts

if TYPE_CHECKING:
    import av

DEFAULT_QUALITY = 60.0
DEFAULT_KEYINT = 32
MAX_KEYINT = 512
RATE_TOLERANCE = 0.05
"""A bitrate target is missed if the video is off it by more than this part."""


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
