"""The fixed fields of a still picture, in the two forms that a file begins with. See docs/FORMAT.md, 1.2 and 1.7."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import ClassVar, Literal

from calotype.errors import ChecksumError, FormatError, LimitError, TruncatedError
from calotype.limits import MAX_SIDE, MAX_TILES

VERSION = (1, 2)
"""Files are marked with the oldest version that describes them."""
PROFILE = 1
"""Arithmetic profile: the integer rules of `calotype.models.exact`."""
BRIEF_MAGIC = b"\x89clt"

_HEADER = struct.Struct("<BBIIBBHHB8s")
_BRIEF = struct.Struct("<4sBHB8s")
_CHECK = struct.Struct("<H")
_LONGEST = 5
"""Bytes of a number in the brief form, at most: 32 bits."""
BRIEF_LIMIT = _BRIEF.size + 3 * _LONGEST + _CHECK.size
"""Bytes of the head of a brief file, at most."""


def payload_name(number: int, packets: int) -> str:
    """What messages call a payload, of tiles of so many packets."""
    tile, packet = divmod(number, packets)
    return f"tile {tile}" if packets == 1 else f"packet {packet} of tile {tile}"


@dataclass(frozen=True)
class Header:
    """The fixed fields of a still picture.

    quality is an integer in [0, 1000]; weights are the first 8 bytes of the SHA-256 of the weights file. Each tile has
    `packets` parts that can be lost one by one: the payloads of TILE chunks are tile after tile, packet after packet.
    """

    width: int
    height: int
    channels: Literal[1, 3]
    alpha: bool
    tile: int
    quality: int
    model: int
    weights: bytes
    packets: int = 1

    SIZE: ClassVar[int] = _HEADER.size
    """Bytes of the payload of `HEAD`."""

    def pack(self) -> bytes:
        """The payload of `HEAD`."""
        flags = self.channels | (4 if self.alpha else 0) | (self.packets - 1) << 3
        return _HEADER.pack(
            VERSION[0], int(self.packets > 1), self.width, self.height, flags, self.tile.bit_length() - 1, self.quality,
            self.model, PROFILE, self.weights,
        )  # fmt: skip

    @classmethod
    def unpack(cls, payload: bytes) -> Header:
        """Raises FormatError for anything that this version could not have written."""
        if len(payload) < 2:
            raise FormatError("the header is too short: the file is damaged")
        if payload[0] != VERSION[0]:
            raise _unreadable(payload[0], payload[1])
        if len(payload) < _HEADER.size:
            raise FormatError("the header is too short: the file is damaged")
        _, _, width, height, flags, tile, quality, model, profile, weights = _HEADER.unpack_from(payload)
        channels = flags & 3
        if profile != PROFILE:
            raise FormatError(f"arithmetic profile {profile} is unknown: use a newer Calotype")
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
            raise FormatError(f"impossible picture size {width}x{height}: the file is damaged")
        if channels not in (1, 3) or not 8 <= tile <= 12 or quality > 1000:
            raise FormatError("a header field is out of range: the file is damaged")
        header = cls(width, height, channels, bool(flags & 4), 1 << tile, quality, model, weights, (flags >> 3) + 1)
        if header.payloads > MAX_TILES:
            raise LimitError(
                f"{header.payloads} tiles, or packets of them, are more than the {MAX_TILES} that this program reads"
            )
        return header

    @property
    def is_brief(self) -> bool:
        """Whether the brief form can say it all: one payload, no alpha."""
        return self.payloads == 1 and not self.alpha and self.model < 2**8

    def pack_brief(self, length: int) -> bytes:
        """The head of a brief file whose payload has so many bytes."""
        gray = int(self.channels == 1)
        fields = self.quality | gray << 10 | (self.tile.bit_length() - 9) << 11 | PROFILE << 14
        head = _BRIEF.pack(BRIEF_MAGIC, VERSION[0] << 4 | VERSION[1], fields, self.model, self.weights)
        head += b"".join(_short(number) for number in (self.width, self.height, length))
        return head + _CHECK.pack(zlib.crc32(head) & 0xFFFF)

    @classmethod
    def unpack_brief(cls, data: memoryview) -> tuple[Header, slice]:
        """Header, and place of the payload, of a brief file that begins like `data`.

        Raises TruncatedError, ChecksumError; FormatError and LimitError as `unpack`.
        """
        if len(data) < _BRIEF.size:
            raise TruncatedError("the file ends inside its header")
        _, version, fields, model, weights = _BRIEF.unpack_from(data)
        if version >> 4 != VERSION[0]:
            raise _unreadable(version >> 4, version & 15)
        width, offset = _read_short(data, _BRIEF.size)
        height, offset = _read_short(data, offset)
        length, offset = _read_short(data, offset)
        start = offset + _CHECK.size
        if start > len(data):
            raise TruncatedError("the file ends inside its header")
        if _CHECK.unpack_from(data, offset)[0] != zlib.crc32(data[:offset]) & 0xFFFF:
            raise ChecksumError("the header's checksum is wrong: the file is damaged")
        header = cls.unpack(
            _HEADER.pack(
                version >> 4, version & 15, width, height, 1 if fields >> 10 & 1 else 3, (fields >> 11 & 7) + 8,
                fields & 1023, model, fields >> 14, weights,
            )
        )  # fmt: skip
        if header.payloads != 1:
            raise FormatError("a brief file has one tile: the file is damaged")
        return header, slice(start, start + length)

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile)

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile)

    @property
    def tiles(self) -> int:
        return self.columns * self.rows

    @property
    def payloads(self) -> int:
        """Number of TILE chunks."""
        return self.tiles * self.packets

    def name(self, number: int) -> str:
        """What messages call the payload of this number."""
        return payload_name(number, self.packets)


def _unreadable(major: int, minor: int) -> FormatError:
    return FormatError(
        f"the file is of format version {major}.{minor}; this program reads {VERSION[0]}.x: use a newer Calotype"
    )


def _short(number: int) -> bytes:
    """Seven bits a byte, the least first; all but the last byte have their highest bit set."""
    out = bytearray()
    while number >= 2**7:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _read_short(data: memoryview, offset: int) -> tuple[int, int]:
    """A number below 2^32 at `offset`, and where it ends."""
    number = 0
    for place, byte in enumerate(data[offset : offset + _LONGEST]):
        number |= (byte & 127) << 7 * place
        if byte < 2**7:
            if number >= 2**32:
                break
            return number, offset + place + 1
    if offset + _LONGEST > len(data):
        raise TruncatedError("the file ends inside its header")
    raise FormatError("a number in the header is out of range: the file is damaged")
