"""Frames with times in, packets out: groups of pictures are encoded in parallel, in constant memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Protocol

from calotype.errors import CalotypeError, InputError, TargetError
from calotype.limits import MAX_SIDE
from calotype.rate import QUALITY_STEPS
from calotype.video import frames
from calotype.video.bitrate import DELAY, BitrateControl
from calotype.video.frames import Colour, Frame
from calotype.video.gop import video_format
from calotype.video.groups import EncodedGop, Gop, GopPool, OwnProcess, Processes, TimedFrame
from calotype.video.packet import FramePacket, Packet, StreamConfig
from calotype.video.scenes import SceneCuts

if TYPE_CHECKING:
    import av

DEFAULT_QUALITY = 60.0
DEFAULT_KEYINT = 32
MAX_KEYINT = 512
RATE_TOLERANCE = 0.05
"""A bitrate target is missed if the video is off it by more than this part."""


class GopStore(Protocol):
    """Keeps encoded groups, so that an interrupted encoding can go on."""

    def get(self, gop: Gop) -> list[Packet] | None:
        """The packets of a group that was finished before."""

    def put(self, gop: Gop, packets: list[Packet]) -> None:
        """Keep the packets of a group."""


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
        pool: makes what encodes the groups instead, when the first is whole; it is closed with the encoder.
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
        pool: Callable[[], GopPool] | None = None,
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
        self._make_pool = pool or (partial(Processes, jobs, device) if jobs > 1 else partial(OwnProcess, device))
        self._colour = colour
        self._sample_aspect, self._display_matrix = sample_aspect, display_matrix
        self._store, self._progress = store, progress
        self._config: StreamConfig | None = None
        self._pool: GopPool | None = None
        self._running: deque[tuple[Gop, Future[EncodedGop], bool]] = deque()
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
        stored = self._store.get(gop) if self._store else None
        if stored is None and self._pool is None:
            self._pool = self._make_pool()
        size = 1 if self._pool is None else self._pool.size
        # Before a budget is asked for, the results that it rests on must be in.
        packets = self._finish((size if self._control is None else min(size, DELAY)) - 1)
        budget = self._control.budget(float(gop.duration * self._time_base)) if self._control else None
        if stored is None:
            assert self._pool is not None
            self._running.append((gop, self._pool.submit(self._config, gop, budget), True))
        else:
            key = FramePacket.unpack(stored[0].data)
            assert key.config is not None
            found: Future[EncodedGop] = Future()
            found.set_result(EncodedGop(stored, key.config.format.quality))
            self._running.append((gop, found, False))
        return packets + self._finish(len(self._running))

    def _finish(self, room: int) -> list[Packet]:
        """The packets of the oldest groups that are finished; waits until no more than `room` are left."""
        packets: list[Packet] = []
        while self._running and (len(self._running) > room or self._running[0][1].done()):
            gop, result, fresh = self._running.popleft()
            try:
                encoded = result.result()
            except BrokenExecutor as error:
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
        """Give up what is not finished and end the pool; `encode(None)` does it at the end."""
        self._closed = True
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> VideoEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
