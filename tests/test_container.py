"""The chunk file: everything that is written is read back, everything else is refused before memory is allocated."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype import container
from calotype.api import Codec
from calotype.container import MAGIC
from calotype.errors import CalotypeError, ChecksumError, FormatError, LimitError, TruncatedError
from calotype.header import BRIEF_LIMIT, BRIEF_MAGIC, Header
from calotype.limits import MAX_METADATA, MAX_TILES
from calotype.media import Picture

WEIGHTS = bytes(range(8))


def header(width: int = 40, height: int = 30, *, tile: int = 256, alpha: bool = False) -> Header:
    return Header(width, height, 3, alpha, tile, 600, 1, WEIGHTS)


def chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + name + payload + struct.pack("<I", zlib.crc32(name + payload))


def with_header_field(data: bytes, offset: int, value: bytes) -> bytes:
    """`data` with bytes of the header's payload replaced, and its CRC made right."""
    payload = bytearray(data[16:41])
    payload[offset : offset + len(value)] = value
    return MAGIC + chunk(b"HEAD", bytes(payload)) + data[45:]


SMALL = container.write_still(header(), [b"tile"])


@st.composite
def headers(draw: st.DrawFn) -> Header:
    tile = draw(st.sampled_from(container.TILE_SIZES))
    side = st.one_of(st.integers(1, 4 * tile), st.sampled_from([1, tile, tile + 1, 4 * tile]))
    channels: Literal[1, 3] = draw(st.sampled_from([1, 3]))
    return Header(
        draw(side), draw(side), channels, draw(st.booleans()), tile, draw(st.integers(0, 1000)),
        draw(st.integers(0, 65535)), draw(st.binary(min_size=8, max_size=8)), draw(st.sampled_from([1, 1, 2, 5, 32])),
    )  # fmt: skip


@settings(max_examples=200)
@given(
    header=headers(),
    boxes=st.dictionaries(st.sampled_from(["icc", "exif", "xmp"]), st.binary(max_size=300)),
    plane=st.binary(max_size=80),
    data=st.data(),
)
def test_round_trip(header: Header, boxes: dict[str, bytes], plane: bytes, data: st.DataObject) -> None:
    tiles = [data.draw(st.binary(max_size=40)) for _ in range(header.payloads)]
    alpha = plane if header.alpha else None
    file = container.write_still(header, tiles, boxes=boxes, alpha=alpha)
    still = container.read_still(file)
    assert still.header == header == container.read_header(file)
    assert [bytes(t or b"?") if t is not None else None for t in still.tiles] == [t or b"?" for t in tiles]
    version = (1, 1) if header.packets > 1 else (1, 0)
    assert (still.boxes, still.alpha, still.version, list(still.damage)) == (boxes, alpha, version, [])
    info = container.probe(file)
    assert (info.width, info.height, info.channels) == (header.width, header.height, header.channels)
    assert (info.tile, info.tiles, info.packets) == (header.tile, header.tiles, header.packets)
    assert info.weights == header.weights.hex()
    assert info.quality == pytest.approx(header.quality / 10)
    assert (info.icc, info.exif, info.xmp) == tuple(len(boxes.get(k, b"")) for k in ("icc", "exif", "xmp"))
    assert info.bpp == pytest.approx(len(file) * 8 / header.width / header.height)
    listed = container.chunks(file)
    assert all(c.crc_ok for c in listed)
    assert sum(c.length for c in listed) + len(MAGIC) == len(file)


def test_fixed_cost_of_a_single_tile(codec: Codec, synthetic: Callable[..., Picture]) -> None:
    assert len(container.write_still(header(), [b""])) + 4 <= 64  # the tile's symbol check counts as fixed cost
    for size in ((1, 1), (40, 30), (256, 256)):
        data = codec.encode(synthetic(*size), quality=50).data
        (tile,) = container.read_still(data).tiles
        assert tile is not None
        range_coded = len(tile) - 4
        assert len(data) - range_coded <= 64


def test_layout_is_that_of_the_specification() -> None:
    file = container.write_still(Header(513, 2, 1, True, 512, 777, 0x0203, WEIGHTS), [b"ab", b"c"], alpha=b"png")
    assert file[:8] == bytes.fromhex("89434c540d0a1a0a")
    head = bytes([1, 0]) + struct.pack("<IIBBHHB", 513, 2, 1 | 4, 9, 777, 0x0203, 1) + WEIGHTS
    table = struct.pack("<II", 2, 1)
    assert file[8:] == b"".join(
        [
            chunk(b"HEAD", head),
            chunk(b"ALPH", b"png"),
            chunk(b"TIDX", table),
            chunk(b"TILE", b"ab"),
            chunk(b"TILE", b"c"),
        ]
    )


# Other versions and unknown things ------------------------------------------------------------------------------------


def test_unknown_ancillary_chunk_is_skipped() -> None:
    file = SMALL[:45] + chunk(b"noTe", b"whatever") + SMALL[45:]
    still = container.read_still(file)
    assert [bytes(t) for t in still.tiles if t is not None] == [b"tile"]
    assert "noTe" in [c.name for c in container.chunks(file)]


def test_unknown_critical_chunk_is_refused() -> None:
    file = SMALL[:45] + chunk(b"NoTe", b"whatever") + SMALL[45:]
    with pytest.raises(FormatError, match="NoTe"):
        container.read_still(file)


def test_longer_header_of_a_later_minor_version_is_read() -> None:
    later = MAGIC + chunk(b"HEAD", bytes([1, 7]) + SMALL[18:41] + b"more") + SMALL[45:]
    still = container.read_still(later)
    assert still.header == header()
    assert still.version == (1, 7)
    assert container.probe(later).version == "1.7"


@pytest.mark.parametrize("major", [0, 2, 255])
def test_other_major_version_is_refused(major: int) -> None:
    with pytest.raises(FormatError, match=f"version {major}"):
        container.read_still(with_header_field(SMALL, 0, bytes([major])))
    # whatever else its header holds
    with pytest.raises(FormatError, match=f"version {major}"):
        container.read_still(MAGIC + chunk(b"HEAD", bytes([major, 0])) + chunk(b"BODY", bytes(40)))


@pytest.mark.parametrize(
    ("offset", "value", "error"),
    [
        (2, struct.pack("<I", 0), FormatError),
        (6, struct.pack("<I", 0), FormatError),
        (2, struct.pack("<I", 2**20 + 1), FormatError),
        (6, struct.pack("<I", 2**32 - 1), FormatError),
        (2, struct.pack("<II", 2**20, 2**20), LimitError),
        (10, b"\x00", FormatError),
        (10, b"\x02", FormatError),
        (10, b"\x0b", FormatError),
        (11, b"\x07", FormatError),
        (11, b"\x0d", FormatError),
        (11, b"\xff", FormatError),
        (12, struct.pack("<H", 1001), FormatError),
        (16, b"\x02", FormatError),
        (16, b"\x00", FormatError),
    ],
)
def test_header_field_out_of_range_is_refused(offset: int, value: bytes, error: type[CalotypeError]) -> None:
    container.read_still(with_header_field(SMALL, offset, SMALL[16 + offset : 16 + offset + len(value)]))
    with pytest.raises(error):
        container.read_still(with_header_field(SMALL, offset, value))


def test_wrong_magic_is_refused() -> None:
    for data in (b"", b"\x89PNG\r\n\x1a\n" + SMALL[8:], SMALL[1:], b"\0" * 200, SMALL.replace(b"\r\n", b"\n")):
        for read in (container.read_still, container.probe, container.chunks):
            with pytest.raises(FormatError):
                read(data)


def test_missing_parts_are_refused() -> None:
    with pytest.raises(FormatError, match="header"):
        container.read_still(MAGIC + chunk(b"TILE", b"x" * 40))
    with pytest.raises(TruncatedError):
        container.read_still(SMALL[:45])
    with pytest.raises(TruncatedError, match="alpha"):
        container.read_still(container.write_still(header(alpha=True), [b"tile"]))


# Damage ---------------------------------------------------------------------------------------------------------------


def test_truncation_at_every_byte(codec: Codec, synthetic: Callable[..., Picture]) -> None:
    picture = synthetic(20, 24, alpha=True)
    picture = Picture(picture.pixels, picture.alpha, exif=b"Exif\0\0" + bytes(20), xmp=b"<x/>")
    data = codec.encode(picture, quality=20).data
    codec.decode(data)
    for length in range(len(data)):
        cut = data[:length]
        with pytest.raises(FormatError):
            container.read_still(cut)
        with pytest.raises(FormatError):
            codec.decode(cut)
        if length < 45:
            with pytest.raises(FormatError):
                container.probe(cut)
        else:  # the head is whole, so that much can be told
            assert container.probe(cut).width == 24


@pytest.mark.parametrize("place", ["HEAD", "iCCP", "ALPH", "TIDX", "TILE"])
def test_wrong_crc_is_reported(place: str) -> None:
    file = bytearray(
        container.write_still(header(300, alpha=True), [b"one", b"two"], boxes={"icc": b"profile"}, alpha=b"png")
    )
    found = next(c for c in container.chunks(bytes(file)) if c.name == place)
    file[found.offset + found.length - 5] ^= 1  # the last byte of the payload
    assert not next(c for c in container.chunks(bytes(file)) if c.name == place).crc_ok if place != "HEAD" else True
    with pytest.raises(ChecksumError):
        container.read_still(bytes(file))


def damaged(tiles: Sequence[memoryview | None]) -> list[int]:
    return [number for number, tile in enumerate(tiles) if tile is None]


def test_partial_reading_finds_the_whole_tiles() -> None:
    payloads = [bytes([n]) * (n + 3) for n in range(6)]
    file = container.write_still(header(700, 500), payloads)
    tile = [c for c in container.chunks(file) if c.name == "TILE"][2]
    for place in range(tile.length):  # length, name, payload or CRC: the table leads past it
        broken = bytearray(file)
        broken[tile.offset + place] ^= 0x41
        still = container.read_still(bytes(broken), partial=True)
        assert damaged(still.tiles) == [2]
        assert len(still.damage) == 1
        assert [bytes(t) for t in still.tiles if t is not None] == payloads[:2] + payloads[3:]
        with pytest.raises(FormatError):
            container.read_still(bytes(broken))
    cut = container.read_still(file[: tile.offset + 5], partial=True)
    assert damaged(cut.tiles) == [2, 3, 4, 5]


def test_tile_table_that_contradicts_the_header_is_refused() -> None:
    head = SMALL[:45]
    for table in (b"", struct.pack("<II", 4, 4), b"\0\0\0"):
        with pytest.raises(FormatError, match="table"):
            container.read_still(head + chunk(b"TIDX", table) + chunk(b"TILE", b"tile"))
    with pytest.raises(FormatError):
        container.read_still(head + chunk(b"TIDX", struct.pack("<I", 2**32 - 1)) + chunk(b"TILE", b"tile"))


def test_single_tile_with_a_table_and_trailing_bytes_are_read() -> None:
    file = SMALL[:45] + chunk(b"TIDX", struct.pack("<I", 4)) + chunk(b"TILE", b"tile") + b"trailing"
    assert [bytes(t) for t in container.read_still(file).tiles if t is not None] == [b"tile"]


# The brief form -------------------------------------------------------------------------------------------------------

BRIEF = container.write_shortest(header(), [b"tile"])


def brief_with(offset: int, value: bytes, *, shape: bytes = b"\x28\x1e") -> bytes:
    """`BRIEF` with bytes of its head replaced and all checks made right; width and height are `shape`."""
    head = bytearray(BRIEF[:16])
    head[offset : offset + len(value)] = value
    head += shape + b"\x04"
    head += struct.pack("<H", zlib.crc32(head) & 0xFFFF) + b"tile"
    return bytes(head) + struct.pack("<I", zlib.crc32(head))


@settings(max_examples=200)
@given(header=headers(), tile=st.binary(max_size=2000), trailing=st.binary(max_size=5))
def test_round_trip_in_the_shortest_form(header: Header, tile: bytes, trailing: bytes) -> None:
    tiles = [tile] * header.payloads
    alpha = b"png" if header.alpha else None
    file = container.write_shortest(header, tiles, alpha=alpha)
    whole = container.write_still(header, tiles, alpha=alpha)
    brief = header.payloads == 1 and not header.alpha and header.model < 256
    assert container.is_brief(file) == brief
    assert len(file) <= len(whole) - 27 if brief else file == whole
    still = container.read_still(file + trailing)
    assert still.header == header == container.read_header(file)
    assert [bytes(t) if t is not None else None for t in still.tiles] == tiles
    if brief:
        assert (still.version, still.boxes, still.alpha, list(still.damage)) == ((1, 2), {}, None, [])
        assert container.read_header(file[:BRIEF_LIMIT]) == header
        info, expected = container.probe(file), container.probe(whole)
        varies = {"version", "file_bytes", "bpp"}
        assert info.model_dump(exclude=varies) == expected.model_dump(exclude=varies)
        assert info.version == "1.2"
        listed = container.chunks(file)
        assert [(c.name, c.crc_ok) for c in listed] == [("HEAD", True), ("TILE", True)]
        assert sum(c.length for c in listed) + len(BRIEF_MAGIC) == len(file)
    # Metadata needs chunks.
    assert container.write_shortest(header, tiles, boxes={"xmp": b"x"}, alpha=alpha)[:8] == MAGIC


@settings(max_examples=300)
@given(model=st.integers(0, 255), tile=st.sampled_from(container.TILE_SIZES), data=st.data())
def test_every_picture_of_one_tile_fits_the_brief_form(model: int, tile: int, data: st.DataObject) -> None:
    width, height = data.draw(st.integers(1, tile)), data.draw(st.integers(1, tile))
    channels: Literal[1, 3] = data.draw(st.sampled_from([1, 3]))
    one = Header(width, height, channels, False, tile, data.draw(st.integers(0, 1000)), model, WEIGHTS)
    payload = data.draw(st.binary(max_size=300))
    file = container.write_shortest(one, [payload])
    assert container.is_brief(file)
    still = container.read_still(file)
    assert (still.header, [bytes(t) for t in still.tiles if t is not None]) == (one, [payload])


def test_layout_of_the_brief_form_is_that_of_the_specification() -> None:
    file = container.write_shortest(Header(513, 2, 1, False, 1024, 777, 3, WEIGHTS), [b"abc"])
    head = b"\x89clt\x12" + struct.pack("<H", 777 | 1 << 10 | 2 << 11 | 1 << 14) + b"\x03" + WEIGHTS
    head += b"\x81\x04\x02\x03"
    body = head + struct.pack("<H", zlib.crc32(head) & 0xFFFF) + b"abc"
    assert file == body + struct.pack("<I", zlib.crc32(body))


def test_codec_writes_the_brief_form_where_it_can(codec: Codec, synthetic: Callable[..., Picture]) -> None:
    picture = synthetic(40, 300)
    data = codec.encode(picture, quality=30).data
    assert container.is_brief(data)
    (tile,) = container.read_still(data).tiles
    assert tile is not None
    assert len(data) - (len(tile) - 4) <= 33
    chunked = container.write_still(container.read_header(data), [bytes(tile)])
    assert (codec.decode(data).picture.pixels == codec.decode(chunked).picture.pixels).all()
    for other in (
        codec.encode(picture, quality=30, tile=256).data,
        codec.encode(synthetic(16, 16, alpha=True), quality=30).data,
        codec.encode(Picture(picture.pixels, xmp=b"<x/>"), quality=30).data,
    ):
        assert not container.is_brief(other)


def test_every_flipped_bit_of_a_brief_file_is_noticed() -> None:
    head = len(BRIEF) - 8
    for bit in range(8 * len(BRIEF)):
        broken = bytearray(BRIEF)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            container.read_still(bytes(broken))
        if bit // 8 < head:
            with pytest.raises(FormatError):
                container.read_still(bytes(broken), partial=True)
        else:
            still = container.read_still(bytes(broken), partial=True)
            assert (still.header, list(still.tiles)) == (header(), [None])
            assert isinstance(still.damage[0], ChecksumError)
            assert [c.crc_ok for c in container.chunks(bytes(broken))] == [True, False]


def test_truncation_of_a_brief_file_at_every_byte() -> None:
    head = len(BRIEF) - 8
    for length in range(len(BRIEF)):
        cut = BRIEF[:length]
        with pytest.raises(TruncatedError if length >= 4 else FormatError):
            container.read_still(cut)
        if length >= head:
            still = container.read_still(cut, partial=True)
            assert (still.header, list(still.tiles)) == (header(), [None])
            assert [c.name for c in container.chunks(cut)] == ["HEAD"]
            assert container.probe(cut).width == 40
        else:
            with pytest.raises(FormatError):
                container.probe(cut)


@pytest.mark.parametrize("major", [0, 2, 15])
def test_other_major_version_of_a_brief_file_is_refused(major: int) -> None:
    with pytest.raises(FormatError, match=f"version {major}.2"):
        container.read_still(brief_with(4, bytes([major << 4 | 2])))
    assert container.read_still(brief_with(4, b"\x15")).version == (1, 5)


FIELDS = 600 | 1 << 14


@pytest.mark.parametrize(
    ("fields", "shape", "error"),
    [
        (FIELDS | 5 << 11, b"\x28\x1e", FormatError),
        (FIELDS | 7 << 11, b"\x28\x1e", FormatError),
        (1001 | 1 << 14, b"\x28\x1e", FormatError),
        (600, b"\x28\x1e", FormatError),
        (600 | 3 << 14, b"\x28\x1e", FormatError),
        (FIELDS, b"\0\x1e", FormatError),
        (FIELDS, b"\x28\0", FormatError),
        (FIELDS, b"\x81\x02\x1e", FormatError),  # two tiles
        (FIELDS, b"\x28\x81\x80\x40", FormatError),  # 2^20 + 1
        (FIELDS, b"\xff\xff\xff\xff\x0f\x1e", FormatError),
        (FIELDS, b"\xff\xff\xff\xff\x1f\x1e", FormatError),
        (FIELDS, b"\xa8\x80\x80\x80\x80\x00\x1e", FormatError),
        (FIELDS, b"\x80\x80\x40\x80\x80\x40", LimitError),
    ],
)
def test_field_of_a_brief_file_out_of_range_is_refused(fields: int, shape: bytes, error: type[CalotypeError]) -> None:
    assert container.read_still(brief_with(5, struct.pack("<H", FIELDS))).header == header()
    with pytest.raises(error):
        container.read_still(brief_with(5, struct.pack("<H", fields), shape=shape), max_pixels=2**41)


def test_huge_brief_picture_is_refused_before_memory_is_allocated(codec: Codec) -> None:
    file = container.write_shortest(header(4096, 4096, tile=4096), [b"tile"])
    assert container.is_brief(file)
    tracemalloc.start()
    for read in (container.read_still, codec.decode):
        with pytest.raises(LimitError, match="max_pixels"):
            read(file, max_pixels=4096 * 4096 - 1)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(2**20, 2**9), (2**15, 2**15), (2**14 + 1, 2**14)])
def test_huge_picture_is_refused_by_default(codec: Codec, width: int, height: int) -> None:
    file = container.write_still(header(width, height, tile=4096), [b"tile"])
    tracemalloc.start()
    for read in (container.read_still, codec.decode):
        with pytest.raises(LimitError, match="max_pixels"):
            read(file)
    # Allowed, it still needs its tiles, and those are asked for before anything of the picture's size is made.
    for read in (container.read_still, codec.decode):
        with pytest.raises(TruncatedError):
            read(file, max_pixels=2**40)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    assert container.probe(file).width == width


def test_max_pixels_is_inclusive(codec: Codec, synthetic: Callable[..., Picture]) -> None:
    data = codec.encode(synthetic(16, 20), quality=10).data
    codec.decode(data, max_pixels=320)
    with pytest.raises(LimitError):
        codec.decode(data, max_pixels=319)


def test_too_many_tiles_are_refused() -> None:
    side = 256 * 256  # 256 x 256 tiles are just allowed
    assert header(side, side).tiles == MAX_TILES
    with pytest.raises(LimitError, match="tiles"):
        container.probe(with_header_field(SMALL, 2, struct.pack("<II", side + 1, side)))


@pytest.mark.parametrize("length", [2**32 - 1, 2**31, 1000])
def test_chunk_longer_than_the_file_is_refused(length: int) -> None:
    for name in (b"iCCP", b"TILE", b"noTe"):
        file = SMALL[:45] + struct.pack("<I", length) + name + bytes(20)
        with pytest.raises(TruncatedError):
            container.read_still(file)
    with pytest.raises(FormatError):
        container.read_still(MAGIC + struct.pack("<I", length) + SMALL[12:])


def bomb(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


def with_box(payload: bytes) -> bytes:
    return SMALL[:45] + chunk(b"xMPd", payload) + SMALL[45:]


def test_metadata_bomb_is_refused_within_its_limit() -> None:
    file = with_box(bomb(20 * MAX_METADATA))
    assert len(file) < 2**19
    tracemalloc.start()
    with pytest.raises(FormatError, match="limit"):
        container.read_still(file)
    assert tracemalloc.get_traced_memory()[1] < 4 * MAX_METADATA
    tracemalloc.stop()
    assert container.probe(file).xmp == 0


def test_metadata_at_its_limit_is_kept_and_over_it_refused() -> None:
    content = bytes(MAX_METADATA)
    file = container.write_still(header(), [b"tile"], boxes={"exif": content})
    assert container.read_still(file).boxes["exif"] == content
    with pytest.raises(FormatError):
        container.read_still(with_box(bomb(MAX_METADATA + 1)))
    with pytest.raises(LimitError):
        container.write_still(header(), [b"tile"], boxes={"exif": content + b"\0"})


@pytest.mark.parametrize("payload", [b"", b"not zlib", zlib.compress(b"text" * 50)[:-1], zlib.compress(b"x")[:-4]])
def test_metadata_that_does_not_decompress_is_refused(payload: bytes) -> None:
    with pytest.raises(FormatError, match="metadata"):
        container.read_still(with_box(payload))
    # Damage outside of the header does not stop a partial reading.
    still = container.read_still(with_box(payload), partial=True)
    assert len(still.damage) == 1
    assert "xmp" not in still.boxes


@pytest.mark.parametrize("name", [b"iCCP", b"eXIF", b"xMPd", b"ALPH"])
def test_repeated_box_is_refused(name: bytes) -> None:
    """Otherwise a file of megabytes could ask for hours of decompression."""
    box = chunk(name, zlib.compress(b"content"))
    container.read_still(SMALL[:45] + box + SMALL[45:])
    with pytest.raises(FormatError):
        container.read_still(SMALL[:45] + box + box + SMALL[45:])
