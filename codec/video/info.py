"""What a video file says about itself, without being decoded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from calotype.errors import FormatError
from calotype.limits import MAX_SIDE
from calotype.models.zoo import name_of
from calotype.video.matroska import MatroskaReader
from calotype.video.packet import NO_WEIGHTS
from calotype.video.timeline import PacketSource, open_source, timeline

if TYPE_CHECKING:
    from av.stream import Stream


class TrackInfo(BaseModel):
    """A track beside the video."""

    model_config = ConfigDict(frozen=True)
    type: str
    codec: str
    language: str | None


class VideoInfo(BaseModel):
    """Facts about a video.

    `start` is that of the video and `duration` that of the whole file, in seconds; `fps` and `kbps` are of the video
    track; `lost_frames` counts those whose packets are missing or damaged; `turned` says that a display matrix turns or
    mirrors the picture.
    """

    model_config = ConfigDict(frozen=True)
    width: int
    height: int
    frames: int
    lost_frames: int
    start: float
    duration: float
    fps: float
    gops: int
    quality: float
    kbps: float
    model: str | None
    weights: str
    inter_model: str | None
    inter_weights: str | None
    matrix: str
    full_range: bool
    primaries: int
    transfer: int
    matrix_code: int
    turned: bool
    container: str
    file_bytes: int
    tracks: list[TrackInfo]


def probe_video(source: Path | bytes) -> VideoInfo:
    """Read the packets' heads; damaged packets are passed over. Raises FormatError if none is intact, InputError."""
    reader = _Counter(open_source(source))
    entries = list(timeline(reader, None, lambda error: None, MAX_SIDE**2))
    first, last = entries[0], entries[-1]
    base, format = first.config.time_base, first.config.format
    start, end = first.pts * base, (last.pts + last.duration) * base
    length = end - start
    tracks: list[TrackInfo] = []
    duration = float(length)
    if isinstance(reader.source, MatroskaReader):
        with reader.source.open() as (container, video):
            duration = container.duration / 1e6 if container.duration else duration
            tracks = [_describe(s) for s in container.streams if s is not video]
    has_inter = format.inter_weights != NO_WEIGHTS
    return VideoInfo(
        width=format.width, height=format.height, frames=len(entries),
        lost_frames=sum(e.packet is None for e in entries), start=float(start), duration=duration,
        fps=float(len(entries) / length) if length else 0.0,
        gops=sum(e.packet is not None and e.packet.key for e in entries),
        quality=format.quality / 10, kbps=reader.bytes * 8 / float(length) / 1000 if length else 0.0,
        model=name_of(format.intra_weights), weights=format.intra_weights.hex(),
        inter_model=name_of(format.inter_weights) if has_inter else None,
        inter_weights=format.inter_weights.hex() if has_inter else None,
        matrix=format.colour.matrix, full_range=format.colour.full_range, primaries=format.colour.primaries,
        transfer=format.colour.transfer, matrix_code=format.colour.matrix_code,
        turned=first.config.display_matrix is not None,
        container="matroska" if isinstance(reader.source, MatroskaReader) else "clt",
        file_bytes=len(source) if isinstance(source, bytes) else source.stat().st_size,
        tracks=tracks,
    )  # fmt: skip


class _Counter:
    """Counts the bytes of the packets that pass."""

    def __init__(self, source: PacketSource) -> None:
        self.source = source
        self.bytes = 0

    def packets(self, start: int | None = None) -> Iterator[tuple[int, bytes]]:
        for place, data in self.source.packets(start):
            self.bytes += len(data)
            yield place, data


def _describe(stream: Stream) -> TrackInfo:
    codec = stream.codec_context.name if stream.codec_context else stream.metadata.get("filename", "unknown")
    return TrackInfo(type=stream.type, codec=codec, language=stream.metadata.get("language"))


def verify_video(source: Path | bytes, *, deep: bool = False, device: str = "auto") -> int:
    """Check every packet; with `deep` also decode every frame. Returns the number of frames.

    Raises FormatError and its kinds; with `deep` also ModelNotFoundError, DriftError.
    """
    if deep:
        from calotype.video.decoder import VideoDecoder

        return sum(1 for _ in VideoDecoder(source, device=device, max_pixels=MAX_SIDE**2).frames())

    def complain(error: FormatError) -> None:
        raise error

    return sum(1 for _ in timeline(open_source(source), None, complain, MAX_SIDE**2))
