"""The `.clt` file: header, metadata, tiles or packets; in chunks or, where one payload is all, in the brief form.

No networks, no pixels. See docs/FORMAT.md.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from calotype.errors import ChecksumError, FormatError, LimitError, TruncatedError
from calotype.header import BRIEF_MAGIC, Header, payload_name
from calotype.limits import DEFAULT_MAX_PIXELS, MAX_METADATA

SUFFIX = ".clt"
MAGIC = b"\x89CLT\r\n\x1a\n"
_CHUNK = struct.Struct("<I4s")
_CRC = struct.Struct("<I")
_FIXED = len(MAGIC) + _CHUNK.size + Header.SIZE + _CRC.size

HEADER, TABLE, TILE, ALPHA = b"HEAD", b"TIDX", b"TILE", b"ALPH"
BOXES: Mapping[str, bytes] = {"icc": b"iCCP", "exif": b"eXIF", "xmp": b"xMPd"}
_Report = Callable[[FormatError], None]
MAX_PACKETS = 32
TILE_SIZES = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Chunk:
    """A chunk as it lies in the file, `length` bytes in all; `payload` is a view, not a copy."""

    name: bytes
    offset: int
    payload: memoryview
    crc_ok: bool
    length: int


class ChunkInfo(BaseModel):
    """A line of `calotype info --chunks`."""

    model_config = ConfigDict(frozen=True)
    name: str
    offset: int
    length: int
    crc_ok: bool


class ImageInfo(BaseModel):
    """What a file says about itself without being decoded."""

    model_config = ConfigDict(frozen=True)
    width: int
    height: int
    channels: int
    alpha: bool
    quality: float
    model: str | None
    weights: str
    tile: int
    tiles: int
    packets: int
    codebook: int | None
    version: str
    file_bytes: int
    bpp: float
    icc: int
    exif: int
    xmp: int


@dataclass(frozen=True)
class Still:
    """A parsed file: `tiles` are views of the payloads of TILE chunks, None where one is missing or damaged."""

    header: Header
    version: tuple[int, int]
    tiles: Sequence[memoryview | None]
    boxes: Mapping[str, bytes]
    alpha: bytes | None
    damage: Sequence[FormatError]
    """What was wrong with the parts that are None or absent; empty for an intact file."""


def pack_chunk(name: bytes, payload: bytes) -> bytes:
    """A chunk: length, name, payload, CRC."""
    return b"".join((_CHUNK.pack(len(payload), name), payload, _CRC.pack(zlib.crc32(payload, zlib.crc32(name)))))


def write_still(
    header: Header, tiles: Sequence[bytes], *, boxes: Mapping[str, bytes] | None = None, alpha: bytes | None = None
) -> bytes:
    """The whole file. `boxes` maps "icc", "exif", "xmp" to raw contents; `alpha` is a lossless PNG."""
    parts = [MAGIC, pack_chunk(HEADER, header.pack())]
    for key, content in (boxes or {}).items():
        if len(content) > MAX_METADATA:
            raise LimitError(f"{len(content)} bytes of {key} are over the limit of {MAX_METADATA}: drop it")
        parts.append(pack_chunk(BOXES[key], zlib.compress(content, 9)))
    if alpha is not None:
        parts.append(pack_chunk(ALPHA, alpha))
    if len(tiles) > 1:
        parts.append(pack_chunk(TABLE, struct.pack(f"<{len(tiles)}I", *map(len, tiles))))
    parts.extend(pack_chunk(TILE, tile) for tile in tiles)
    return b"".join(parts)


def write_shortest(
    header: Header, tiles: Sequence[bytes], *, boxes: Mapping[str, bytes] | None = None, alpha: bytes | None = None
) -> bytes:
    """The same in the brief form, where that can say it all; arguments as in `write_still`."""
    if boxes or not header.is_brief:
        return write_still(header, tiles, boxes=boxes, alpha=alpha)
    (tile,) = tiles
    file = header.pack_brief(len(tile)) + tile
    return file + _CRC.pack(zlib.crc32(file))


def is_brief(data: bytes | memoryview) -> bool:
    """Whether a file that begins like this is in the brief form."""
    return bytes(data[: len(BRIEF_MAGIC)]) == BRIEF_MAGIC


def read_header(data: bytes | memoryview, *, max_pixels: int | None = None) -> Header:
    """Check magic and header. Raises FormatError, TruncatedError, ChecksumError, LimitError."""
    view = memoryview(data)
    header = Header.unpack_brief(view)[0] if is_brief(view) else _read_head(view)
    _check_size(header, max_pixels)
    return header


def _check_size(header: Header, max_pixels: int | None) -> None:
    if max_pixels is not None and header.width * header.height > max_pixels:
        raise LimitError(
            f"{header.width}x{header.height} is over the limit of {max_pixels} pixels: raise max_pixels to decode it"
        )


def _read_head(view: memoryview) -> Header:
    """Header of a file of chunks."""
    if bytes(view[: len(MAGIC)]) != MAGIC[: len(view)] or not len(view):
        raise FormatError("this is not a Calotype file (wrong magic bytes)")
    if len(view) < _FIXED:
        raise TruncatedError("the file ends inside its header")
    first = _read_chunk(view, len(MAGIC))
    if first.name != HEADER:
        raise FormatError("the header chunk is missing: the file is damaged")
    if not first.crc_ok:
        raise ChecksumError("the header's checksum is wrong: the file is damaged")
    return Header.unpack(bytes(first.payload))


def _read_chunk(view: memoryview, offset: int) -> Chunk:
    """The chunk at `offset`. Raises TruncatedError if it does not fit."""
    if offset + _CHUNK.size + _CRC.size > len(view):
        raise TruncatedError(f"the file ends inside the chunk at byte {offset}")
    length, name = _CHUNK.unpack_from(view, offset)
    start = offset + _CHUNK.size
    if start + length + _CRC.size > len(view):
        raise TruncatedError(f"the file ends inside the chunk at byte {offset}, or the chunk's length is damaged")
    payload = view[start : start + length]
    (crc,) = _CRC.unpack_from(view, start + length)
    length += _CHUNK.size + _CRC.size
    return Chunk(bytes(name), offset, payload, crc == zlib.crc32(payload, zlib.crc32(name)), length)


def iterate_chunks(data: bytes | memoryview) -> Iterator[Chunk]:
    """All chunks in order; of a brief file, what stands for them. Raises TruncatedError where the chain breaks."""
    view, offset = memoryview(data), len(MAGIC)
    if is_brief(view):
        place, start = Header.unpack_brief(view)[1], len(BRIEF_MAGIC)
        yield Chunk(HEADER, start, view[start : place.start], True, place.start - start)
        yield _brief_tile(view, place)
        return
    while offset < len(view):
        chunk = _read_chunk(view, offset)
        yield chunk
        offset += chunk.length


def chunks(data: bytes) -> list[ChunkInfo]:
    """Name, place and state of every chunk that can be reached."""
    read_header(data)
    found = []
    try:
        for c in iterate_chunks(data):
            found.append(ChunkInfo(name=c.name.decode("latin-1"), offset=c.offset, length=c.length, crc_ok=c.crc_ok))
    except TruncatedError:
        pass
    return found


def read_still(
    data: bytes | memoryview,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    partial: bool = False,
    wanted: Collection[int] | None = None,
) -> Still:
    """Parse a file and check the CRC of all that is read.

    With `partial`, damage outside the header is collected in `Still.damage` instead of raised. With `wanted`, only
    these payloads are read and checked, the others are None; the tile table leads to them.
    Raises FormatError and its kinds, LimitError.
    """
    view = memoryview(data)
    if is_brief(view):
        return _read_brief(view, max_pixels, partial)
    header = read_header(data, max_pixels=max_pixels)
    tiles: list[memoryview | None] = []
    boxes: dict[str, bytes] = {}
    alpha: bytes | None = None
    damage: list[FormatError] = []
    seen: set[bytes] = set()
    names = {code: key for key, code in BOXES.items()}

    def report(error: FormatError) -> None:
        if not partial:
            raise error
        damage.append(error)

    offset = len(MAGIC) + _CHUNK.size + _CHUNK.unpack_from(view, len(MAGIC))[0] + _CRC.size
    while offset < len(view) and len(tiles) < header.payloads:
        try:
            chunk = _read_chunk(view, offset)
        except TruncatedError as error:
            report(error)
            break
        offset += chunk.length
        if chunk.name == TILE:
            if not chunk.crc_ok:
                report(ChecksumError(f"{header.name(len(tiles))} is damaged (checksum)"))
            tiles.append(chunk.payload if chunk.crc_ok else None)
        elif not chunk.crc_ok:
            report(ChecksumError(f"the chunk at byte {chunk.offset} is damaged (checksum)"))
        elif chunk.name == TABLE:
            tiles = _tiles_by_table(view, offset, chunk.payload, header, report, wanted)
            break
        elif chunk.name in seen:
            report(FormatError(f"the chunk {chunk.name.decode('latin-1')} is there twice: the file is damaged"))
        elif chunk.name == ALPHA:
            alpha = bytes(chunk.payload)
        elif chunk.name in names:
            try:
                boxes[names[chunk.name]] = _inflate(bytes(chunk.payload))
            except FormatError as error:
                report(error)
        elif chunk.name[:1].isupper():
            report(FormatError(f"unknown critical chunk {chunk.name.decode('latin-1')!r}: use a newer Calotype"))
        seen.add(chunk.name)
    if len(tiles) < header.payloads:
        missing, kind = header.payloads - len(tiles), "tiles" if header.packets == 1 else "packets"
        report(TruncatedError(f"{missing} of {header.payloads} {kind} are missing"))
        tiles += [None] * missing
    if header.alpha and alpha is None:
        report(TruncatedError("the alpha plane is missing"))
    return Still(header, _version(view), tiles, boxes, alpha if header.alpha else None, damage)


def _brief_tile(view: memoryview, place: slice) -> Chunk:
    """What stands for the `TILE` chunk of a brief file. Raises TruncatedError."""
    end = place.stop + _CRC.size
    if end > len(view):
        raise TruncatedError(f"the file ends before the end of {payload_name(0, 1)}")
    (crc,) = _CRC.unpack_from(view, place.stop)
    return Chunk(TILE, place.start, view[place], crc == zlib.crc32(view[: place.stop]), end - place.start)


def _read_brief(view: memoryview, max_pixels: int, partial: bool) -> Still:
    """`read_still` of a brief file."""
    header, place = Header.unpack_brief(view)
    _check_size(header, max_pixels)
    tile, damage = None, []
    try:
        found = _brief_tile(view, place)
        if not found.crc_ok:
            raise ChecksumError(f"{header.name(0)} is damaged (checksum)")
        tile = found.payload
    except FormatError as error:
        if not partial:
            raise
        damage.append(error)
    return Still(header, _version(view), [tile], {}, None, damage)


def _version(view: memoryview) -> tuple[int, int]:
    """Major and minor version of a file whose header can be read."""
    if is_brief(view):
        return divmod(view[len(BRIEF_MAGIC)], 16)
    start = len(MAGIC) + _CHUNK.size
    return view[start], view[start + 1]


def _tiles_by_table(
    view: memoryview,
    offset: int,
    table: memoryview,
    header: Header,
    report: _Report,
    wanted: Collection[int] | None,
) -> list[memoryview | None]:
    """Tiles at the places that the table gives: a damaged chunk header does not lose the tiles behind it."""
    if len(table) != 4 * header.payloads:
        raise FormatError("the tile table does not match the header: the file is damaged")
    tiles: list[memoryview | None] = []
    for number, length in enumerate(struct.unpack(f"<{header.payloads}I", table)):
        tile = None
        start, offset = offset, offset + _CHUNK.size + length + _CRC.size
        if wanted is not None and number not in wanted:
            tiles.append(None)
            continue
        try:
            chunk = _read_chunk(view[:offset], start)
            if chunk.name == TILE and chunk.crc_ok and len(chunk.payload) == length:
                tile = chunk.payload
            else:
                report(ChecksumError(f"{header.name(number)} is damaged (checksum)"))
        except TruncatedError:
            report(TruncatedError(f"the file ends before the end of {header.name(number)}"))
        tiles.append(tile)
    return tiles


def _inflate(payload: bytes) -> bytes:
    """Decompress a metadata box within its limit."""
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(payload, MAX_METADATA)
    except zlib.error as error:
        raise FormatError("a metadata box cannot be decompressed: the file is damaged") from error
    if inflater.unconsumed_tail or not inflater.eof:
        raise FormatError(f"a metadata box is damaged or over the limit of {MAX_METADATA} bytes")
    return content


def probe(data: bytes) -> ImageInfo:
    """What the file says about itself; reads no weights and decodes no tile. Raises FormatError and its kinds."""
    from calotype.models.zoo import codebook_size, name_of

    header = read_header(data)
    sizes = dict.fromkeys(BOXES, 0)
    names = {code: key for key, code in BOXES.items()}
    try:
        for chunk in iterate_chunks(data):
            # Only the first of a kind: a hostile file may repeat a box that inflates to megabytes.
            if chunk.crc_ok and names.get(chunk.name) and not sizes[names[chunk.name]]:
                sizes[names[chunk.name]] = len(_inflate(bytes(chunk.payload)))
    except FormatError:
        pass  # a damaged tail does not hide what the head says
    model = name_of(header.weights)
    return ImageInfo(
        width=header.width,
        height=header.height,
        channels=header.channels,
        alpha=header.alpha,
        quality=header.quality / 10,
        model=model,
        weights=header.weights.hex(),
        tile=header.tile,
        tiles=header.tiles,
        packets=header.packets,
        codebook=None if model is None else codebook_size(model, header.quality),
        version="{}.{}".format(*_version(memoryview(data))),
        file_bytes=len(data),
        bpp=len(data) * 8 / (header.width * header.height),
        **sizes,
    )
