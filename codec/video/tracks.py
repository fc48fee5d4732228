"""What lies beside the video in a file: sound, subtitles, attachments, chapters, tags; copied, never decoded."""

from __future__ import annotations

import heapq
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

from calotype.errors import InputError

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.stream import Stream

EXACT_TIMES = {"avoid_negative_ts": "disabled"}
"""Options of an output whose times must stay as they are."""
_FILE_TAGS = {"major_brand", "minor_version", "compatible_brands", "encoder", "duration"}
"""Tags that describe the source file and not its content."""


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn errors of PyAV into InputError."""
    import av

    try:
        yield
    except av.error.FFmpegError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class Attachment:
    """A file inside a Matroska file: a font, a cover."""

    name: str
    media_type: str
    data: bytes


@dataclass(frozen=True)
class Surroundings:
    """What a source holds beside its video.

    Attributes:
        tracks: streams whose packets are copied.
        metadata: tags of the whole file.
        video_metadata: tags of the video track.
        chapters: as PyAV gives them.
        dropped: what cannot be kept, named for the user.
    """

    tracks: Sequence[Stream] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    video_metadata: Mapping[str, str] = field(default_factory=dict)
    chapters: Sequence[Any] = ()
    attachments: Sequence[Attachment] = ()
    dropped: Sequence[str] = ()


def surroundings(container: InputContainer, video: Stream | None, *, sound: bool = True, format: str) -> Surroundings:
    """Look through a source for what a file of `format` can hold beside the video track `video`."""
    tracks, attachments, dropped = [], [], []
    chapters = container.chapters()
    for stream in container.streams:
        if stream is video or (stream.type == "data" and chapters and stream.frames == len(chapters)):
            continue  # MP4 keeps the titles of its chapters in such a track, too
        name = f"{stream.type} track {stream.index}"
        if stream.type == "attachment":
            if format == "matroska":
                attachments.append(_attachment(stream))
            else:
                dropped.append(f"{name} ({stream.metadata.get('filename', 'unnamed')})")
        elif stream.type == "audio" and not sound:
            continue
        elif stream.type in ("audio", "subtitle") and _holds(format, stream):
            tracks.append(stream)
        else:
            codec = stream.codec_context.name if stream.codec_context else "unknown codec"
            dropped.append(f"{name} ({codec})")
    return Surroundings(
        tracks, _tags(container.metadata), _tags(video.metadata) if video else {}, chapters,
        attachments, dropped,
    )  # fmt: skip


def _tags(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key.lower() not in _FILE_TAGS}


def _attachment(stream: Stream) -> Attachment:
    tags = stream.metadata
    name = tags.get("filename", "attachment")
    media_type = tags.get("mimetype", "application/octet-stream")
    return Attachment(name, media_type, bytes(cast(Any, stream).data or b""))


def _holds(format: str, stream: Stream) -> bool:
    """Whether a container of this format takes the stream: tried, for FFmpeg has no list of it."""
    import av

    try:
        with av.open(io.BytesIO(), "w", format=format) as trial:
            trial.add_stream_from_template(cast(Any, stream))
            trial.start_encoding()
    except (av.error.FFmpegError, ValueError):
        return False
    return True


class TrackCopier:
    """Copies packets of other tracks into an output container."""

    def __init__(self, output: av.container.OutputContainer, tracks: Sequence[Stream]) -> None:
        self._output = output
        self._copies: dict[int, Stream] = {}
        for track in tracks:
            copy = output.add_stream_from_template(cast(Any, track))
            copy.metadata.update(_tags(track.metadata))
            copy.disposition = track.disposition
            self._copies[track.index] = copy

    def write(self, packet: av.Packet[Any]) -> None:
        """Append a packet of one of the tracks as it is."""
        packet.stream = self._copies[packet.stream_index]
        self._output.mux(packet)


def in_order(*tracks: Iterable[tuple[Fraction, Callable[[], None]]]) -> None:
    """Write the packets of several tracks, each in order, by time: (seconds, what writes it)."""
    for _, write in heapq.merge(*tracks, key=lambda item: item[0]):
        write()


def copied(
    container: InputContainer, beside: Surroundings, offset: Fraction, end: Fraction | None, name: str
) -> Iterator[tuple[Fraction, av.Packet[Any]]]:
    """(time, packet) of the other tracks, moved by `offset` seconds and cut at 0 and `end` where that is not None."""
    if not beside.tracks:
        return
    latest = Fraction(0)
    with readable(name):
        for packet in container.demux(*beside.tracks):
            stamp = packet.dts if packet.dts is not None else packet.pts
            base = packet.time_base
            if not packet.size or base is None:
                continue
            if stamp is not None:
                latest = stamp * base - offset
            if end is not None and not (0 <= latest < end or (latest < 0 and not offset)):
                continue
            if offset:
                moved = round(offset / base)
                packet.pts = None if packet.pts is None else packet.pts - moved
                packet.dts = None if packet.dts is None else packet.dts - moved
            yield latest, packet
