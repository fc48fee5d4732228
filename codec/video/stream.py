"""The raw video stream: packets in chunks, for pipes and for parts of a video. The chunk syntax is that of stills."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from calotype.container import MAGIC, pack_chunk
from calotype.errors import ChecksumError, FormatError, InputError, TruncatedError
from calotype.video.packet import MAX_PACKET, VERSION

HEADER, FRAME, END = b"VHED", b"FRAM", b"VEND"
_NAMES = (FRAME, END)
_PREFIX = struct.Struct("<I4s")
_CRC = struct.Struct("<I")
_VERSION = struct.Struct("<BB")
_COUNT = struct.Struct("<I")


class StreamWriter:
    """Writes packets to a binary file as they come; nothing is sought, so a pipe will do."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._count = 0
        file.write(MAGIC + pack_chunk(HEADER, _VERSION.pack(*VERSION)))

    def write(self, packet: bytes) -> None:
        """Append a packet."""
        self._file.write(pack_chunk(FRAME, packet))
        self._count += 1

    def close(self) -> None:
        """End the stream; the file stays open."""
        self._file.write(pack_chunk(END, _COUNT.pack(self._count)))
        self._file.flush()


def is_stream(head: bytes) -> bool:
    """Whether a file that begins with these 16 bytes is a raw video stream."""
    return head[: len(MAGIC)] == MAGIC and head[len(MAGIC) + 4 : len(MAGIC) + 8] == HEADER


class StreamReader:
    """Reads packets of a raw video stream from a path, bytes, or a file that need not be seekable."""

    def __init__(self, source: Path | bytes | BinaryIO) -> None:
        self._source = source

    @property
    def rewinds(self) -> bool:
        """Whether the packets can be read more than once."""
        return isinstance(self._source, Path | bytes)

    def packets(self, start: int | None = None) -> Iterator[tuple[int, bytes]]:
        """(place, packet) in order, from the place `start` of a packet or from the beginning.

        A damaged chunk is given as it is, or passed over: packets have checks and numbers of their own. Raises
        FormatError if this is not a stream, TruncatedError where it ends without an end chunk, InputError.
        """
        file = self._open()
        try:
            if start is None:
                start = _read_header(file)
            else:
                file.seek(start)
            yield from _chunks(_Window(file, start))
        finally:
            if isinstance(self._source, Path):
                file.close()

    def _open(self) -> BinaryIO:
        if isinstance(self._source, Path):
            try:
                return self._source.open("rb")
            except OSError as error:
                raise InputError(f"{self._source}: {error.strerror or error}") from error
        return io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source


_HEADER_BYTES = len(MAGIC) + _PREFIX.size + _VERSION.size + _CRC.size


def _read_header(file: BinaryIO) -> int:
    """Check magic and header chunk, and give their length. Raises FormatError, TruncatedError, ChecksumError."""
    head = file.read(_HEADER_BYTES)
    if not head or head[: len(MAGIC)] != MAGIC[: len(head)]:
        raise FormatError("this is not a Calotype video stream (wrong magic bytes)")
    if len(head) < _HEADER_BYTES:
        raise TruncatedError("the stream ends inside its header")
    length, name = _PREFIX.unpack_from(head, len(MAGIC))
    if name != HEADER:
        raise FormatError("this is not a Calotype video stream (no video header)")
    major, minor = _VERSION.unpack_from(head, len(MAGIC) + _PREFIX.size)
    if major != VERSION[0]:
        raise FormatError(
            f"the stream is of format version {major}.{minor}; this program reads {VERSION[0]}.x: use a newer Calotype"
        )
    if not _VERSION.size <= length <= 1 << 16:
        raise FormatError("the stream's header is damaged")
    head += file.read(length - _VERSION.size)
    body = head[len(MAGIC) + 4 : len(head) - _CRC.size]
    if len(body) != 4 + length:
        raise TruncatedError("the stream ends inside its header")
    if zlib.crc32(body) != _CRC.unpack(head[-_CRC.size :])[0]:
        raise ChecksumError("the stream header's checksum is wrong: the stream is damaged")
    return len(head)


class _Window:
    """Bytes of a file from a place on, read as they are needed."""

    def __init__(self, file: BinaryIO, place: int) -> None:
        self._file = file
        self._bytes = bytearray()
        self.place = place

    def peek(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end."""
        while len(self._bytes) < count:
            more = self._file.read(min(count - len(self._bytes), 1 << 20))
            if not more:
                break
            self._bytes += more
        return bytes(self._bytes[:count])

    def skip(self, count: int) -> None:
        del self._bytes[:count]
        self.place += count


def _chunks(window: _Window) -> Iterator[tuple[int, bytes]]:
    while True:
        prefix = window.peek(_PREFIX.size)
        if len(prefix) < _PREFIX.size:
            raise TruncatedError("the stream ends before its end chunk")
        length, name = _PREFIX.unpack(prefix)
        size = _PREFIX.size + length + _CRC.size
        whole = window.peek(size) if length <= MAX_PACKET else b""
        intact = len(whole) == size and zlib.crc32(whole[4:-4]) == _CRC.unpack(whole[-4:])[0]
        if not intact:
            yield from _resume(window, whole, size)
            continue
        place = window.place
        window.skip(size)
        if name == END:
            return
        if name == FRAME:
            yield place, whole[_PREFIX.size : -_CRC.size]
        elif name[:1].isupper():
            raise FormatError(f"chunk {name.decode('latin-1')!r} is unknown: use a newer Calotype")


def _resume(window: _Window, whole: bytes, size: int) -> Iterator[tuple[int, bytes]]:
    """Go to the next chunk behind damage; the packet of a chunk that only has a wrong checksum is given as it is."""
    following = window.peek(size + _PREFIX.size)[size:] if whole else b""
    if len(whole) == size and (following[4:] in _NAMES):
        yield window.place, whole[_PREFIX.size : -_CRC.size]
        window.skip(size)
        return
    window.skip(_PREFIX.size)
    while True:
        data = window.peek(1 << 16)
        places = [at for name in _NAMES if (at := data.find(name, 4)) >= 0]
        if places:
            window.skip(min(places) - 4)
            return
        if len(data) < 1 << 16:
            raise TruncatedError("the stream ends before its end chunk")
        window.skip(len(data) - 8)
