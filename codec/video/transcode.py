"""From ordinary videos to Calotype, with sound, subtitles, chapters and tags."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from calotype.errors import InputError, TargetError
from calotype.models import zoo
from calotype.publish import publish, refuse_existing
from calotype.video.encoder import DEFAULT_KEYINT, DEFAULT_QUALITY, RATE_TOLERANCE, VideoEncoder
from calotype.video.groups import GopPool
from calotype.video.matroska import MatroskaWriter
from calotype.video.packet import Packet, StreamConfig
from calotype.video.parts import PartStore, fingerprint
from calotype.video.stream import StreamWriter
from calotype.video.tracks import Surroundings, copied, in_order, readable, surroundings

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

Progress = Callable[[int, int | None], None]
"""Called with the frames done and, if it is known, their number in all."""
_DISPLAY_MATRIX = "DISPLAYMATRIX"


@dataclass(frozen=True)
class RawVideo:
    """What must be known about frames of 8-bit 4:2:0 planes without any header (FFmpeg's rawvideo, yuv420p).

    Attributes:
        width, height: in pixels.
        rate: frames per second, a number or a fraction: "25", "30000/1001".
    """

    width: int
    height: int
    rate: str


@dataclass(frozen=True)
class Settings:
    """How a video is encoded.

    Attributes:
        quality, target_bitrate, keyint, scene_cuts: see `VideoEncoder`.
        start: seconds of the source to leave out; what follows begins at 0.
        frames: most frames to take.
        sound: keep the sound tracks.
        raw: the source has frames only, and this tells what they are.
    """

    quality: float = DEFAULT_QUALITY
    target_bitrate: float | None = None
    keyint: int = DEFAULT_KEYINT
    scene_cuts: bool = True
    start: float = 0.0
    frames: int | None = None
    sound: bool = True
    raw: RawVideo | None = None


@dataclass
class Summary:
    """What was written. `notes` are warnings for the user."""

    width: int = 0
    height: int = 0
    frames: int = 0
    gops: int = 0
    seconds: float = 0.0
    video_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, packet: Packet) -> None:
        self.frames += 1
        self.gops += packet.is_keyframe
        self.seconds += float(packet.duration * packet.time_base)
        self.video_bytes += len(packet.data)

    @property
    def kbps(self) -> float:
        """Kilobits per second of the video track."""
        return self.video_bytes * 8 / self.seconds / 1000 if self.seconds else 0.0


class Footage:
    """The video track of an ordinary file, or of a stream that is read once."""

    def __init__(self, container: InputContainer, settings: Settings, name: str) -> None:
        self.container, self._settings, self._name = container, settings, name
        if not container.streams.video:
            raise InputError(f"{name} has no video track")
        self.stream = cast("VideoStream", container.streams.best("video"))
        if self.stream.codec_context is None:
            raise InputError(f"{name}: the video codec is unknown to FFmpeg")
        self.stream.thread_type = "AUTO"
        self._start: Fraction | None = None
        self._frames = self._read()
        try:
            self.first = next(self._frames)
        except StopIteration:
            raise InputError(f"{name} has no frame" + (" after the start" if settings.start else "")) from None

    @property
    def offset(self) -> Fraction:
        """Seconds that were taken off the times, because the beginning was left out."""
        return self._start or Fraction(0)

    @property
    def total(self) -> int | None:
        """About how many frames there are."""
        stream, wanted = self.stream, self._settings.frames
        count = stream.frames
        if not count and stream.average_rate:
            if stream.duration and stream.time_base:
                count = round(stream.duration * stream.time_base * stream.average_rate)
            elif self.container.duration:
                count = round(Fraction(self.container.duration, 1_000_000) * stream.average_rate)
        if count and self._settings.start and stream.average_rate:
            count = max(1, count - round(self._settings.start * float(stream.average_rate)))
        return min(count, wanted) if count and wanted else count or wanted

    def frames(self) -> Iterator[av.VideoFrame]:
        """All frames; times that do not grow are put right."""
        yield self.first
        yield from self._frames

    def _read(self) -> Iterator[av.VideoFrame]:
        settings, stream = self._settings, self.stream
        base = cast(Fraction, stream.time_base)
        start = Fraction(settings.start).limit_denominator(1_000_000)
        if start and self.container.file is None:
            self.container.seek(int(start / base) + (stream.start_time or 0), stream=stream)
        begin = start + (stream.start_time or 0) * base
        count, before, shift = 0, None, 0
        for frame in self._decode():
            pts = (0 if before is None else before + 1) if frame.pts is None else frame.pts
            if start and (frame.pts is None or pts * base < begin):
                continue
            if start and not count:
                shift, self._start = pts, pts * base
            pts = pts - shift
            frame.pts = pts if before is None else max(pts, before + 1)
            before = frame.pts
            yield frame
            count += 1
            if count == settings.frames:
                return

    def _decode(self) -> Iterator[av.VideoFrame]:
        try:
            with readable(self._name):
                yield from self.container.decode(self.stream)
        except InputError as error:
            if self._settings.raw is None:
                raise
            size = f"{self._settings.raw.width}x{self._settings.raw.height}"
            raise InputError(f"{error}; it must hold whole frames of {size} in yuv420p") from error

    def display_matrix(self) -> tuple[int, ...] | None:
        """How the picture is to be turned; None if it is upright."""
        data = self.first.side_data.get(_DISPLAY_MATRIX)
        if data is None:
            return None
        return tuple(memoryview(bytes(cast(Any, data))).cast("i"))


def _open(source: Path | BinaryIO, name: str, raw: RawVideo | None) -> InputContainer:
    import av

    options = {"video_size": f"{raw.width}x{raw.height}", "framerate": raw.rate} if raw else {}
    with readable(name):
        return av.open(
            str(source) if isinstance(source, Path) else _ReadOnly(source), "r",
            format="rawvideo" if raw else None, options=options,
        )  # fmt: skip


class _ReadOnly:
    """A pipe for PyAV, which would otherwise try to seek."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read


def encode_video(
    source: Path | BinaryIO,
    target: Path | BinaryIO,
    settings: Settings = Settings(),
    *,
    resume: bool = False,
    overwrite: bool = False,
    jobs: int = 1,
    pool: Callable[[], GopPool] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Summary:
    """Encode a video to a Matroska file (`.mkv`) or a raw stream (`.clt`, or a binary file to write to).

    Finished groups of pictures are kept in a folder beside the output until it is complete, and the output appears at
    once, when it is.

    Args:
        source: a file that FFmpeg reads, or a binary file that need not be seekable; of that the video is kept only.
        resume: go on with the folder that an interrupted call with the same source and settings left.
        overwrite: replace an output that is there.
        jobs, pool, device: see `VideoEncoder`.
        warn: called with a sentence about each track that cannot be kept, before the encoding begins, and about a
            bitrate that was not used up.
    Raises:
        InputError, OutputExistsError, LimitError, ModelNotFoundError, TargetError.
    """
    name = str(source) if isinstance(source, Path) else "standard input"
    if isinstance(target, Path):
        refuse_existing(target, overwrite)
    if resume and not (isinstance(source, Path) and isinstance(target, Path)):
        raise InputError("only an encoding from a file to a file can be resumed")
    summary = Summary()

    def tell(note: str) -> None:
        summary.notes.append(note)
        if warn:
            warn(note)

    with _open(source, name, settings.raw) as container:
        footage = Footage(container, settings, name)
        beside = surroundings(container, footage.stream, sound=settings.sound, format="matroska")
        for note in _losses(beside, source, target):
            tell(note)
        summary.width, summary.height = footage.first.width, footage.first.height
        store = PartStore(target, _job(source, settings), resume=resume) if isinstance(target, Path) else None
        writer = None if isinstance(target, Path) else StreamWriter(target)
        total = footage.total
        encoder = VideoEncoder(
            summary.width, summary.height,
            time_base=cast(Fraction, footage.stream.time_base),
            quality=settings.quality, keyint=settings.keyint, scene_cuts=settings.scene_cuts,
            target_bitrate=settings.target_bitrate, jobs=jobs, pool=pool, device=device,
            sample_aspect=footage.stream.sample_aspect_ratio or Fraction(0),
            display_matrix=footage.display_matrix(), store=store,
            progress=(lambda done: progress(done, total)) if progress else None,
        )  # fmt: skip
        try:
            with encoder:
                for frame in itertools.chain(footage.frames(), [None]):
                    for packet in encoder.encode(frame):
                        summary.add(packet)
                        if writer:
                            writer.write(packet.data)
        except BaseException as error:
            # The same settings would end here again, or it cannot be resumed.
            if store and (isinstance(error, TargetError) or not isinstance(source, Path)):
                store.remove()
            raise
        if writer:
            writer.close()
        rate, offset = footage.stream.average_rate, footage.offset
    if settings.target_bitrate and summary.kbps * 1000 < settings.target_bitrate * (1 - RATE_TOLERANCE):
        tell(f"the best quality gives {summary.kbps:.1f} kbit/s only, which is below the target")
    if store and isinstance(target, Path):
        assert encoder.config is not None
        finished = store.folder / f"output{target.suffix}"
        if _is_matroska(target):
            _mux(finished, store, encoder.config, rate, source if isinstance(source, Path) else None, settings, offset)
        else:
            _join(finished, store)
        publish(finished, target, overwrite=overwrite)
        store.remove()
    return summary


def _is_matroska(target: Path | BinaryIO) -> bool:
    return isinstance(target, Path) and target.suffix.lower() != ".clt"


def _losses(beside: Surroundings, source: Path | BinaryIO, target: Path | BinaryIO) -> list[str]:
    """A sentence about each thing that lies beside the video and cannot be kept."""
    if _is_matroska(target) and isinstance(source, Path):
        return [f"{what} is left out: Matroska cannot hold it" for what in beside.dropped]
    kept = [f"{track.type} track {track.index}" for track in beside.tracks]
    kept += [f"attachment {attachment.name}" for attachment in beside.attachments]
    return [f"{what} is left out: a raw stream and a pipe carry the video only" for what in (*beside.dropped, *kept)]


def _job(source: Path | BinaryIO, settings: Settings) -> dict[str, Any]:
    """All that decides about the bytes of the encoded groups."""
    return {
        "calotype": version("calotype"),
        "weights": {name: zoo.describe(name).sha256 for name in zoo.names()},
        "source": fingerprint(source) if isinstance(source, Path) else None,
        "settings": asdict(settings),
    }


def _join(path: Path, store: PartStore) -> None:
    """Write the parts as one raw stream."""
    with path.open("wb") as file:
        writer = StreamWriter(file)
        for packet in store.packets():
            writer.write(packet.data)
        writer.close()


def _mux(
    path: Path,
    store: PartStore,
    config: StreamConfig,
    rate: Fraction | None,
    source: Path | None,
    settings: Settings,
    offset: Fraction,
) -> None:
    """Write the parts, and the other tracks of the source, in the order of their times."""
    if source is None:
        writer = MatroskaWriter(path, config, rate)
        for packet in store.packets():
            writer.write(packet)
        writer.close()
        return
    with _open(source, str(source), settings.raw) as container:
        video = container.streams.best("video")
        beside = surroundings(container, video, sound=settings.sound, format="matroska")
        excerpt = bool(settings.start or settings.frames)
        end = max((p.pts + p.duration) * p.time_base for p in store.packets()) if excerpt else None
        if excerpt:
            beside = replace(beside, chapters=_excerpt_chapters(beside.chapters, offset, end))
        writer = MatroskaWriter(path, config, rate, beside)
        try:
            ours = ((p.pts * p.time_base, partial(writer.write, p)) for p in store.packets())
            others = ((t, partial(writer.copy, p)) for t, p in copied(container, beside, offset, end, str(source)))
            in_order(ours, others)
        except BaseException:
            writer.abort()
            raise
        writer.close()


def _excerpt_chapters(chapters: Any, offset: Fraction, end: Fraction | None) -> list[Any]:
    """Chapters of an excerpt: moved with it, and cut at its ends."""
    kept = []
    for chapter in chapters:
        base = chapter["time_base"]
        limits = [max(Fraction(0), t * base - offset) for t in (chapter["start"], chapter["end"])]
        if end is not None:
            limits = [min(end, t) for t in limits]
        if limits[0] < limits[1]:
            kept.append({**chapter, "start": round(limits[0] / base), "end": round(limits[1] / base)})
    return kept
