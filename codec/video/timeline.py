"""Where the frames of a video are: its packets in order, and the gaps between them. Decodes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from calotype.errors import FormatError, InputError, TruncatedError
from calotype.video import matroska, stream
from calotype.video.packet import FramePacket, Packet, StreamConfig

MAX_GAP = 1 << 16
"""Frames in a row that may be missing."""


class PacketSource(Protocol):
    """Where a decoder gets packets from."""

    def packets(self, start: int | None = None) -> Iterator[tuple[int, bytes]]:
        """(place, packet) in order, from the place `start` of a packet or from the beginning."""


@dataclass(frozen=True)
class ListedPackets:
    """Packets in memory; the place of one is its index."""

    data: Sequence[bytes | Packet]

    def packets(self, start: int | None = None) -> Iterator[tuple[int, bytes]]:
        for place in range(start or 0, len(self.data)):
            packet = self.data[place]
            yield place, packet.data if isinstance(packet, Packet) else packet


def open_source(source: Path | str | bytes | BinaryIO | Sequence[bytes | Packet]) -> PacketSource:
    """The reader for a Matroska file, a raw stream, or packets. Raises FormatError, InputError."""
    if isinstance(source, str | Path):
        source = Path(source)
        head = read_head(source)
    elif isinstance(source, bytes):
        head = source[: matroska.HEAD_BYTES]
    elif isinstance(source, Sequence):
        return ListedPackets(cast(Sequence[bytes | Packet], source))
    else:
        return stream.StreamReader(source)
    return matroska.MatroskaReader(source) if matroska.is_matroska(head) else stream.StreamReader(source)


def read_head(path: Path) -> bytes:
    """As many bytes of a file as tell its kind. Raises InputError."""
    try:
        with path.open("rb") as file:
            return file.read(matroska.HEAD_BYTES)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def is_video(head: bytes) -> bool:
    """Whether a file that begins with these bytes (up to `matroska.HEAD_BYTES`) is a Calotype video."""
    return stream.is_stream(head) or matroska.is_matroska(head)


@dataclass(frozen=True)
class Entry:
    """A frame's place in time; `packet` is None if it is lost, `place` is where the source has it."""

    number: int
    pts: int
    duration: int
    config: StreamConfig
    packet: FramePacket | None
    place: int


def timeline(
    source: PacketSource, start: int | None, report: Callable[[FormatError], None], max_pixels: int
) -> Iterator[Entry]:
    """Every frame in order, the lost ones too, as far as the packets around them tell.

    Args:
        report: called with each error before the entries that it concerns; what it raises ends the timeline.
    """
    config: StreamConfig | None = None
    before: Entry | None = None
    leading, first_number = 0, None  # packets before the first key packet that can be read
    unreadable, ended = 0, False
    try:
        for place, data in source.packets(start):
            try:
                packet = FramePacket.unpack(data, max_pixels)
            except FormatError as error:
                report(error)
                unreadable += 1
                continue
            if packet.config is not None:
                if config is not None and packet.config.time_base != config.time_base:
                    raise FormatError("the time base changes inside the video: the video is damaged")
                config = packet.config
            elif config is None:
                leading += 1
                first_number = packet.number if first_number is None else first_number
                continue
            entry = Entry(packet.number, packet.pts, packet.duration, config, packet, place)
            if before is None:
                lost = unreadable + leading
                if lost:
                    # A packet that is no key packet needs the one before it.
                    first = packet.number if first_number is None else first_number - 1
                    report(FormatError("the beginning of the video is missing or damaged"))
                    yield from _before(entry, max(min(first, packet.number - lost), 0))
            elif packet.number <= before.number:
                report(FormatError(f"frame {packet.number} comes again: the video is damaged"))
                continue
            elif packet.number > before.number + 1:
                report(FormatError(f"frames {before.number + 1} to {packet.number - 1} are missing or damaged"))
                yield from _between(before, entry)
            unreadable = 0
            yield entry
            before, ended = entry, packet.last
    except TruncatedError as error:
        report(error)
        ended = True
    if before is None:
        raise FormatError("no frame can be read: there is no intact key packet")
    yield from _after(before, unreadable)
    if not ended and not unreadable:
        report(TruncatedError(f"the video ends early, after frame {before.number}"))


def _check_gap(count: int) -> None:
    """Numbers may be anything: do not show millions of frames that never were."""
    if count > MAX_GAP:
        raise FormatError(f"{count} frames are missing, more than {MAX_GAP} in a row: the video is damaged")


def _before(entry: Entry, first: int) -> Iterator[Entry]:
    _check_gap(entry.number - first)
    for number in range(first, entry.number):
        pts = entry.pts - (entry.number - number) * entry.duration
        yield replace(entry, number=number, pts=pts, packet=None)


def _between(before: Entry, after: Entry) -> Iterator[Entry]:
    """Lost frames at even distances from the end of the frame before to the frame after."""
    count = after.number - before.number - 1
    _check_gap(count)
    start = before.pts + before.duration
    times = [start + (after.pts - start) * i // count for i in range(count + 1)]
    for i in range(count):
        duration = times[i + 1] - times[i]
        yield replace(before, number=before.number + 1 + i, pts=times[i], duration=duration, packet=None)


def _after(before: Entry, count: int) -> Iterator[Entry]:
    for i in range(1, count + 1):
        yield replace(before, number=before.number + i, pts=before.pts + i * before.duration, packet=None)
