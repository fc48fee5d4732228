"""Damaged files: always our own error, in bounded time, and with `allow_partial` no more is lost than was damaged."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest

from calotype import container
from calotype.api import Codec
from calotype.errors import CalotypeError, ChecksumError, DriftError, FormatError
from calotype.media import Picture
from calotype.models.transforms import STRIDE

Make = Callable[..., Picture]
MAX_PIXELS = 2**18
"""Of the damaged files: a header may come to announce a large picture, which is legal and slow."""
SECONDS = 4.0
"""Generous for one decoding of these small pictures on a busy machine."""


def corrupted(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` with one to three wounds: flipped bits, overwritten, inserted, deleted, moved or repeated bytes."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(out))) if out else 0
        length = int(rng.integers(1, 17))
        kind = rng.integers(7)
        if kind == 0 and out:
            out[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[place : place + length] = rng.bytes(len(out[place : place + length]))
        elif kind == 2:
            out[place : place + length] = bytes([rng.choice([0, 255])]) * len(out[place : place + length])
        elif kind == 3:
            out[place:place] = rng.bytes(length)
        elif kind == 4:
            del out[place : place + length]
        elif kind == 5:
            other = int(rng.integers(len(out) + 1))
            out[other:other] = out[place : place + 4 * length]
        else:
            del out[place:]
    return bytes(out)


@contextmanager
def only_our_errors(outcomes: dict[str, int]) -> Iterator[None]:
    """Counts how a decoding ended; lets anything but success and `CalotypeError` through to the test."""
    started, failure = time.perf_counter(), None
    try:
        yield
    except CalotypeError as error:
        failure = error
    outcome = "success" if failure is None else type(failure).__name__
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert failure is None or (str(failure) and failure.exit_code in range(1, 9))
    assert time.perf_counter() - started < SECONDS


@pytest.fixture(scope="module")
def files(codec: Codec, synthetic: Make) -> list[bytes]:
    """Small files that use every kind of chunk."""
    plain = synthetic(20, 24)
    full = synthetic(18, 21, 1, alpha=True)
    rich = Picture(full.pixels, full.alpha, icc=b"profile" * 9, exif=b"Exif\0\0MM\0*" + bytes(12), xmp=b"<x/>")
    return [
        codec.encode(plain, quality=30).data,
        codec.encode(rich, quality=50).data,
        codec.encode(synthetic(20, 530), quality=20, tile=256).data,
    ]


def test_ten_thousand_corruptions(codec: Codec, files: list[bytes]) -> None:
    rng = np.random.default_rng(11)
    outcomes: dict[str, int] = {}
    for trial in range(10_000):
        data = corrupted(files[trial % len(files)], rng)
        with only_our_errors(outcomes):
            container.read_still(data, max_pixels=MAX_PIXELS)
            codec.decode(data, max_pixels=MAX_PIXELS)
    assert sum(outcomes.values()) == 10_000
    assert {"FormatError", "ChecksumError", "TruncatedError"} <= set(outcomes)
    # What succeeds is damage behind the last tile, or none after all.
    assert outcomes.get("success", 0) < 800


def test_corruptions_with_allow_partial(codec: Codec, files: list[bytes]) -> None:
    rng = np.random.default_rng(12)
    outcomes: dict[str, int] = {}
    for trial in range(300):
        data = corrupted(files[trial % len(files)], rng)
        with only_our_errors(outcomes):
            decoded = codec.decode(data, allow_partial=True, max_pixels=MAX_PIXELS)
            header = container.read_header(data)
            assert decoded.picture.pixels.shape == (header.height, header.width, header.channels)
            assert set(decoded.damaged) <= set(range(header.tiles))
    assert outcomes["success"] > 50


def test_corruptions_of_probe_and_chunks(files: list[bytes]) -> None:
    rng = np.random.default_rng(13)
    outcomes: dict[str, int] = {}
    for trial in range(3000):
        data = corrupted(files[trial % len(files)], rng)
        with only_our_errors(outcomes):
            info = container.probe(data)
            assert info.tiles >= 1
            listed = container.chunks(data)
            assert listed[0].name == "HEAD"
    assert outcomes["success"] > 300


# With the CRCs made right, the decoders behind them see the damage ------------------------------------------------


def parts_of(data: bytes) -> list[tuple[bytes, bytes]]:
    """Names and payloads of the chunks; those of a brief file are what stands for them in a file of chunks."""
    if container.is_brief(data):
        still = container.read_still(data)
        data = container.write_still(still.header, [bytes(t) for t in still.tiles if t is not None])
    return [(c.name, bytes(c.payload)) for c in container.iterate_chunks(data)]


def joined(parts: list[tuple[bytes, bytes]]) -> bytes:
    """A file whose CRCs, and tile table, are right."""
    lengths = [len(payload) for name, payload in parts if name == b"TILE"]
    out = [container.MAGIC]
    for name, payload in parts:
        if name == b"TIDX":
            payload = struct.pack(f"<{len(lengths)}I", *lengths)
        out += [struct.pack("<I", len(payload)), name, payload, struct.pack("<I", zlib.crc32(name + payload))]
    return b"".join(out)


def test_corruptions_under_a_right_crc(codec: Codec, files: list[bytes]) -> None:
    rng = np.random.default_rng(14)
    outcomes: dict[str, int] = {}
    for trial in range(400):
        parts = parts_of(files[trial % len(files)])
        chosen = int(rng.integers(len(parts)))
        parts[chosen] = (parts[chosen][0], corrupted(parts[chosen][1], rng))
        data = joined(parts)
        with only_our_errors(outcomes):
            codec.decode(data, max_pixels=MAX_PIXELS)
    assert outcomes.get("DriftError", 0) > 20
    assert outcomes.get("ChecksumError", 0) == 0


@pytest.mark.parametrize("name", [b"HEAD", b"TILE", b"ALPH", b"iCCP"])
def test_corruptions_of_one_kind_of_chunk(codec: Codec, files: list[bytes], name: bytes) -> None:
    rng = np.random.default_rng(15)
    outcomes: dict[str, int] = {}
    for trial in range(120):
        data = joined([(n, corrupted(p, rng) if n == name else p) for n, p in parts_of(files[1])])
        with only_our_errors(outcomes):
            codec.decode(data, max_pixels=MAX_PIXELS, allow_partial=trial % 2 == 0)
    assert len(outcomes) > 1


def test_random_tiles_are_never_a_picture(codec: Codec, files: list[bytes]) -> None:
    """Pure noise under a right CRC: the range coder or the symbol check notices."""
    rng = np.random.default_rng(16)
    header = container.read_header(files[0])
    for trial in range(150):
        noise = [rng.bytes(int(rng.integers(0, 400))), b"\xff" * trial, b"\0" * trial][trial % 3]
        with pytest.raises((FormatError, DriftError)):
            codec.decode(container.write_still(header, [noise]))


def png_chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def png(width: int, height: int, *, depth: int = 8, colour: int = 0, rows: bytes | None = None) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(bytes((width + 1) * height) if rows is None else rows)
    parts = [(b"IHDR", head), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(n, p) for n, p in parts)


@pytest.mark.parametrize(
    "alpha",
    [
        b"",
        b"not a png",
        png(24, 21),
        png(2**20, 2**20, rows=b""),
        png(24, 20, colour=2, rows=bytes(73 * 20)),
        png(24, 20, depth=1, rows=bytes(4 * 20)),
        png(24, 20, rows=b"\0" * 5),
        png(24, 20)[:40],
        png(24, 20, rows=bytes([9]) + bytes(25 * 20 - 1)),
        b"P5 24 20 255\n" + bytes(480),
    ],
)
def test_alpha_that_does_not_fit_is_refused(codec: Codec, files: list[bytes], alpha: bytes) -> None:
    head, tile = parts_of(files[0])
    flagged = bytearray(head[1])
    flagged[10] |= 4
    fitting = joined([(b"HEAD", bytes(flagged)), (b"ALPH", png(24, 20)), tile])
    decoded = codec.decode(fitting).picture.alpha
    assert decoded is not None
    assert not decoded.any()
    with pytest.raises(CalotypeError):
        codec.decode(joined([(b"HEAD", bytes(flagged)), (b"ALPH", alpha), tile]))


def test_other_weights_are_an_error_not_noise(codec: Codec, files: list[bytes]) -> None:
    head, *rest = parts_of(files[0])
    with pytest.raises(CalotypeError, match="weights") as caught:
        codec.decode(joined([(head[0], head[1][:17] + b"\1" * 8), *rest]))
    assert caught.value.exit_code == 5


# Partial decoding -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiled(codec: Codec, synthetic: Make) -> tuple[bytes, npt.NDArray[np.uint8]]:
    """A file of 3 x 4 tiles, and its pixels."""
    data = codec.encode(synthetic(700, 900), quality=35, tile=256).data
    return data, codec.decode(data).picture.pixels


def tile_chunks(data: bytes) -> list[container.ChunkInfo]:
    return [c for c in container.chunks(data) if c.name == "TILE"]


def outside(shape: tuple[int, ...], number: int, halo: int) -> npt.NDArray[np.bool_]:
    """Mask of the pixels that a lost tile cannot touch."""
    row, column = divmod(number, 4)
    mask = np.ones(shape[:2], bool)
    top, left = max(row * 256 - halo, 0), max(column * 256 - halo, 0)
    mask[top : row * 256 + 256 + halo, left : column * 256 + 256 + halo] = False
    return mask


@pytest.mark.parametrize("number", [0, 5, 11])
@pytest.mark.parametrize("place", [0, 4, 40, -1])
def test_damaged_tile_costs_only_itself(
    codec: Codec, tiled: tuple[bytes, npt.NDArray[np.uint8]], number: int, place: int
) -> None:
    """Damage of a chunk's length, name, payload or CRC."""
    data, full = tiled
    chunk = tile_chunks(data)[number]
    broken = bytearray(data)
    broken[chunk.offset + place % chunk.length] ^= 0x10
    with pytest.raises(FormatError):
        codec.decode(bytes(broken))
    decoded = codec.decode(bytes(broken), allow_partial=True)
    assert decoded.damaged == (number,)
    mask = outside(full.shape, number, codec.coder.network.halo * STRIDE)
    assert mask.mean() > 0.5
    assert (decoded.picture.pixels[mask] == full[mask]).all()
    # What was put in its place is a plain patch, not noise: no wilder than the picture.
    assert decoded.picture.pixels[~mask].std() < 1.5 * full[~mask].std() + 5


def test_tile_damaged_under_its_crc_costs_only_itself(
    codec: Codec, tiled: tuple[bytes, npt.NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when several tiles are decoded together."""
    data, full = tiled
    still = container.read_still(data)
    payloads = [bytes(t) for t in still.tiles if t is not None]
    payloads[6] = payloads[6][:20] + bytes([payloads[6][20] ^ 255]) + payloads[6][21:]
    broken = container.write_still(still.header, payloads)
    mask = outside(full.shape, 6, codec.coder.network.halo * STRIDE)
    for batch in (1, 8):
        monkeypatch.setattr(codec.coder, "batch", batch)
        with pytest.raises((FormatError, DriftError)):
            codec.decode(broken)
        decoded = codec.decode(broken, allow_partial=True)
        assert decoded.damaged == (6,)
        assert (decoded.picture.pixels[mask] == full[mask]).all()


def test_truncated_file_keeps_its_first_tiles(codec: Codec, tiled: tuple[bytes, npt.NDArray[np.uint8]]) -> None:
    data, full = tiled
    cut = data[: tile_chunks(data)[8].offset + 30]
    decoded = codec.decode(cut, allow_partial=True)
    assert decoded.damaged == (8, 9, 10, 11)
    rows = 2 * 256 - codec.coder.network.halo * STRIDE
    assert (decoded.picture.pixels[:rows] == full[:rows]).all()


def test_all_tiles_lost_still_gives_a_picture(codec: Codec, files: list[bytes]) -> None:
    data = files[0][:-1]
    decoded = codec.decode(data, allow_partial=True)
    assert decoded.damaged == (0,)
    assert decoded.picture.pixels.shape == (20, 24, 3)


def test_lost_alpha_does_not_lose_the_picture(codec: Codec, files: list[bytes]) -> None:
    whole = codec.decode(files[1]).picture
    chunk = next(c for c in container.chunks(files[1]) if c.name == "ALPH")
    broken = bytearray(files[1])
    broken[chunk.offset + 20] ^= 1
    with pytest.raises(ChecksumError):
        codec.decode(bytes(broken))
    decoded = codec.decode(bytes(broken), allow_partial=True)
    assert decoded.picture.alpha is None
    assert (decoded.picture.pixels == whole.pixels).all()


def test_deep_verification_finds_what_crcs_do_not(codec: Codec, files: list[bytes]) -> None:
    codec.verify(files[0])
    codec.verify(files[0], deep=True)
    *front, (name, tile) = parts_of(files[0])
    damaged = joined([*front, (name, tile[:4] + bytes([tile[4] ^ 64]) + tile[5:])])
    codec.verify(damaged)
    with pytest.raises((FormatError, DriftError)):
        codec.verify(damaged, deep=True)
    with pytest.raises(FormatError):
        codec.verify(files[0][:-3])
