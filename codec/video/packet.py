"""The packet syntax of a video: one frame a packet, checked on its own. No containers. See docs/FORMAT.md."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from fractions import Fraction

from calotype.errors import ChecksumError, FormatError, LimitError, TruncatedError
from calotype.header import PROFILE
from calotype.limits import DEFAULT_MAX_PIXELS, MAX_SIDE
from calotype.rate import QUALITY_STEPS
from calotype.video.frames import MATRICES, Colour

VERSION = (1, 0)
MAX_PACKET = 2**26
"""Bytes."""
NO_WEIGHTS = bytes(8)
_KEY, _LAST = 1, 2
_CONFIG = struct.Struct("<BBIIIIIIHBBBBH8sH8s")
_CONFIG_LENGTH = struct.Struct("<H")
_MATRIX = struct.Struct("<9i")
_CRC = struct.Struct("<I")
_FULL_RANGE, _DISPLAY_MATRIX = 4, 8


@dataclass(frozen=True)
class VideoFormat:
    """What a decoder must know before the first frame.

    Attributes:
        width, height: in pixels.
        quality: 0..1000, the default of its frames.
        intra_model, inter_model: model numbers, for messages.
        intra_weights, inter_weights: first 8 bytes of the SHA-256 of the weights; zeros if there are none.
    """

    width: int
    height: int
    colour: Colour
    quality: int
    intra_model: int
    intra_weights: bytes
    inter_model: int = 0
    inter_weights: bytes = NO_WEIGHTS

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Rows and columns of the latents, one for each 16x16 pixels."""
        return -(-self.height // 16), -(-self.width // 16)


@dataclass(frozen=True)
class StreamConfig:
    """What every key packet repeats.

    Attributes:
        time_base: seconds per unit of pts and duration.
        sample_aspect: width of a pixel over its height; 0 if unknown.
        display_matrix: how a player turns and mirrors the picture: 9 integers, row by row, in 16.16 fixed point
            (the last column in 2.30), as in MP4 files; None for upright.
    """

    format: VideoFormat
    time_base: Fraction
    sample_aspect: Fraction = Fraction(0)
    display_matrix: tuple[int, ...] | None = None

    def pack(self) -> bytes:
        f, c = self.format, self.format.colour
        flags = MATRICES.index(c.matrix) | (_FULL_RANGE if c.full_range else 0)
        flags |= _DISPLAY_MATRIX if self.display_matrix else 0
        return _CONFIG.pack(
            VERSION[1], PROFILE, f.width, f.height, *self.time_base.as_integer_ratio(),
            *self.sample_aspect.as_integer_ratio(), f.quality, flags, c.primaries, c.transfer, c.matrix_code,
            f.intra_model, f.intra_weights, f.inter_model, f.inter_weights,
        ) + (_MATRIX.pack(*self.display_matrix) if self.display_matrix else b"")  # fmt: skip

    @classmethod
    def unpack(cls, data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> StreamConfig:
        """Raises FormatError for anything that this version could not have written, LimitError."""
        if len(data) < _CONFIG.size:
            raise FormatError("a key packet's configuration is too short: the video is damaged")
        (
            _, profile, width, height, num, den, aspect_num, aspect_den, quality, flags, primaries, transfer, code,
            intra, intra_weights, inter, inter_weights,
        ) = _CONFIG.unpack_from(data)  # fmt: skip
        if profile != PROFILE:
            raise FormatError(f"arithmetic profile {profile} is unknown: use a newer Calotype")
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
            raise FormatError(f"impossible frame size {width}x{height}: the video is damaged")
        if width * height > max_pixels:
            raise LimitError(f"frames of {width}x{height} are over the limit of {max_pixels} pixels: raise max_pixels")
        if not (num and den and aspect_den) or quality > QUALITY_STEPS or flags & 3 == 3 or flags & ~15:
            raise FormatError("a field of a key packet is out of range: the video is damaged")
        matrix = None
        if flags & _DISPLAY_MATRIX:
            if len(data) < _CONFIG.size + _MATRIX.size:
                raise FormatError("a key packet's configuration is too short: the video is damaged")
            matrix = _MATRIX.unpack_from(data, _CONFIG.size)
        colour = Colour(MATRICES[flags & 3], bool(flags & _FULL_RANGE), primaries, transfer, code)
        format = VideoFormat(width, height, colour, quality, intra, intra_weights, inter, inter_weights)
        return cls(format, Fraction(num, den), Fraction(aspect_num, aspect_den), matrix)


@dataclass(frozen=True)
class Packet:
    """One encoded frame as it goes into a container; pts and duration in units of `time_base` seconds."""

    data: bytes
    pts: int
    duration: int
    is_keyframe: bool
    time_base: Fraction


@dataclass(frozen=True)
class FramePacket:
    """A packet's fields.

    Attributes:
        number: of the frame in its stream, from 0.
        last: no frame follows; so the end of a stream that was cut is known.
        config: in key packets only.
        payload: what `calotype.video.gop` reads.
    """

    number: int
    pts: int
    duration: int
    last: bool
    config: StreamConfig | None
    payload: bytes

    @property
    def key(self) -> bool:
        return self.config is not None

    def pack(self) -> bytes:
        """The bytes of the packet."""
        flags = (_KEY if self.config else 0) | (_LAST if self.last else 0)
        config = b""
        if self.config:
            packed = self.config.pack()
            config = _CONFIG_LENGTH.pack(len(packed)) + packed
        zigzag = self.pts << 1 if self.pts >= 0 else (-self.pts << 1) - 1
        fields = _varint(self.number) + _varint(zigzag) + _varint(self.duration)
        body = b"".join((bytes([VERSION[0] << 4 | flags]), fields, config, self.payload))
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes | memoryview, max_pixels: int = DEFAULT_MAX_PIXELS) -> FramePacket:
        """Raises ChecksumError, TruncatedError, FormatError, LimitError."""
        data = bytes(data)
        if len(data) < 1 + 3 + _CRC.size:
            raise TruncatedError("a packet is too short: the video is damaged")
        if zlib.crc32(data[: -_CRC.size]) != _CRC.unpack_from(data, len(data) - _CRC.size)[0]:
            raise ChecksumError("a packet's checksum is wrong: the video is damaged")
        major, flags = data[0] >> 4, data[0] & 15
        if major != VERSION[0] or flags & ~(_KEY | _LAST):
            raise FormatError(f"a packet of version {major}; this program reads {VERSION[0]}: use a newer Calotype")
        body = data[: -_CRC.size]
        number, at = _read_varint(body, 1)
        zigzag, at = _read_varint(body, at)
        duration, at = _read_varint(body, at)
        config = None
        if flags & _KEY:
            if at + _CONFIG_LENGTH.size > len(body):
                raise FormatError("a key packet is too short: the video is damaged")
            (length,) = _CONFIG_LENGTH.unpack_from(body, at)
            at += _CONFIG_LENGTH.size
            config = StreamConfig.unpack(body[at : at + length], max_pixels)
            at += length
        pts = zigzag >> 1 if not zigzag & 1 else -(zigzag + 1 >> 1)
        return cls(number, pts, duration, bool(flags & _LAST), config, body[at:])


def _varint(value: int) -> bytes:
    """Groups of 7 bits, least significant first; the high bit says that another follows."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number below 2^64 and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 127) << shift
        at += 1
        if not data[at - 1] & 128:
            if value >> 64:
                break
            return value, at
    raise FormatError("a number in a packet is damaged")
