"""A second decoder, written from docs/FORMAT.md alone: numpy and integers, no torch, no calotype, no constriction.

It is slow and plain on purpose. What it computes must equal what the codec computes: symbols and latents exactly,
pixels within 1/255. The section numbers are those of docs/FORMAT.md.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Tensors = Mapping[str, npt.NDArray[Any]]

MASK = 2**64 - 1
TOTAL = 2**24
# fmt: off
HALF_WIDTHS = (
    1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 5, 5, 6, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20, 22,
    24, 27, 30, 33, 37, 41, 45, 50, 56, 62, 69, 77, 85, 95, 105, 117, 130, 144, 161, 179, 198, 221, 245, 273, 303, 337,
    375, 416,
)
BOUND_HALF_WIDTHS = (
    2, 3, 3, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9, 10, 11, 12, 14, 15, 17, 19, 21, 23, 25, 28, 31, 35, 39, 43, 48, 53, 59,
    65, 72, 81, 90, 99, 111, 123, 137, 152, 169, 188, 208,
)
PASSES = ((0, 32, 0), (0, 32, 1), (32, 80, 0), (32, 80, 1), (80, 160, None), (160, 320, None))
PARITY = np.array([[int(bit) for bit in row] for row in (
    "111001100101", "101100110011", "111110010100", "110101111000", "110011001110", "101011011001",
    "100110101101", "011011110010", "001111000111", "011100101110", "010110011011", "000001111111",
)])
# fmt: on
KNOWN = (0, 32, 32, 80, 80, 160)


class DamageError(ValueError):
    """The file is not one that an encoder wrote."""


# 1. Container ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """What the container says: header fields, metadata, and the payloads of tiles in raster order."""

    width: int
    height: int
    channels: int
    tile: int
    quality: int
    weights: bytes
    boxes: dict[str, bytes]
    alpha: bytes | None
    tiles: list[bytes]
    packets: int

    @property
    def latent_shape(self) -> tuple[int, int]:
        return -(-self.height // 16), -(-self.width // 16)


def chunks(data: bytes) -> Iterator[tuple[str, bytes]]:
    if data[:8] != b"\x89CLT\r\n\x1a\n":
        raise DamageError("magic")
    offset = 8
    while offset < len(data):
        length, name = struct.unpack_from("<I4s", data, offset)
        payload = data[offset + 8 : offset + 8 + length]
        (crc,) = struct.unpack_from("<I", data, offset + 8 + length)
        if crc != zlib.crc32(name + payload):
            raise DamageError(f"CRC of {name!r}")
        yield name.decode("ascii"), payload
        offset += 12 + length


def number(data: bytes, offset: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends (1.7)."""
    value, shift = 0, 0
    while True:
        value |= (data[offset] & 127) << shift
        shift, offset = shift + 7, offset + 1
        if data[offset - 1] < 128:
            return value, offset


def parse_brief(data: bytes) -> File:
    """1.7."""
    version, fields, _, weights = struct.unpack_from("<BHB8s", data, 4)
    width, offset = number(data, 16)
    height, offset = number(data, offset)
    length, offset = number(data, offset)
    start, end = offset + 2, offset + 2 + length
    if struct.unpack_from("<H", data, offset)[0] != zlib.crc32(data[:offset]) & 0xFFFF:
        raise DamageError("head check")
    if struct.unpack_from("<I", data, end)[0] != zlib.crc32(data[:end]):
        raise DamageError("file check")
    if (version >> 4, fields >> 14) != (1, 1):
        raise DamageError("header")
    tile = 1 << (fields >> 11 & 7) + 8
    if max(width, height) > tile:
        raise DamageError("tiles")
    channels = 1 if fields >> 10 & 1 else 3
    return File(width, height, channels, tile, fields & 1023, weights, {}, None, [data[start:end]], 1)


def parse(data: bytes) -> File:
    if data[:4] == b"\x89clt":
        return parse_brief(data)
    reader = chunks(data)
    name, head = next(reader)
    major, _, width, height, flags, log_tile, quality, _, profile, weights = struct.unpack_from("<BBIIBBHHB8s", head)
    if (name, major, profile) != ("HEAD", 1, 1):
        raise DamageError("header")
    boxes: dict[str, bytes] = {}
    alpha, table = None, None
    tiles: list[bytes] = []
    tile = 1 << log_tile
    packets = (flags >> 3) + 1
    count = -(-width // tile) * -(-height // tile) * packets
    for name, payload in reader:
        if name == "TILE":
            tiles.append(payload)
        elif name == "TIDX":
            table = struct.unpack(f"<{count}I", payload)
        elif name == "ALPH":
            alpha = payload
        elif name in ("iCCP", "eXIF", "xMPd"):
            boxes[name] = zlib.decompress(payload)
        elif name[0].isupper():
            raise DamageError(f"unknown chunk {name}")
    if len(tiles) != count or (table is not None and list(table) != [len(t) for t in tiles]):
        raise DamageError("tiles")
    return File(width, height, flags & 3, tile, quality, weights, boxes, alpha if flags & 4 else None, tiles, packets)


def tile_boxes(file: File) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of latent positions of every tile (2)."""
    rows, columns = file.latent_shape
    side = file.tile // 16
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            yield slice(top, min(top + side, rows)), slice(left, min(left + side, columns))


# 3. Entropy coding ----------------------------------------------------------------------------------------------------


class RangeDecoder:
    """3.1, in Python's integers."""

    def __init__(self, data: bytes) -> None:
        self._words = iter([w for (w,) in struct.iter_unpack("<I", data + b"\0" * (-len(data) % 4))])
        self._point = self._word() << 32 | self._word()
        self._lower, self._range = 0, MASK

    def _word(self) -> int:
        return next(self._words, 0)

    def _quantile(self) -> tuple[int, int]:
        scale = self._range >> 24
        quantile = ((self._point - self._lower) & MASK) // scale
        if quantile >= TOTAL:
            raise DamageError("range coder")
        return scale, quantile

    def _narrow(self, scale: int, low: int, high: int) -> None:
        self._lower = (self._lower + scale * low) & MASK
        self._range = scale * (high - low)
        if self._range < 1 << 32:
            self._lower = (self._lower << 32) & MASK
            self._range <<= 32
            self._point = (self._point << 32) & MASK | self._word()

    def symbol(self, cumulative: Sequence[int]) -> int:
        scale, quantile = self._quantile()
        symbol = bisect_right(cumulative, quantile) - 1
        self._narrow(scale, cumulative[symbol], cumulative[symbol + 1])
        return symbol

    def uniform(self, size: int) -> int:
        scale, quantile = self._quantile()
        step = TOTAL // size
        symbol = min(quantile // step, size - 1)
        self._narrow(scale, symbol * step, TOTAL if symbol == size - 1 else (symbol + 1) * step)
        return symbol


def cumulative_tables(frequencies: Sequence[int]) -> list[list[int]]:
    """3.2 and 3.5."""
    widths = list(HALF_WIDTHS)
    if len(frequencies) > sum(2 * w + 2 for w in widths):
        widths += [w for width in BOUND_HALF_WIDTHS for w in (width, width)]
    bounds = [0, *accumulate(2 * w + 2 for w in widths)]
    tables = [[0, *accumulate(frequencies[a:b])] for a, b in pairwise(bounds)]
    if bounds[-1] != len(frequencies) or any(t[-1] != TOTAL for t in tables):
        raise DamageError("tables")
    return tables


def read_request(decoder: RangeDecoder, tables: Sequence[Sequence[int]], indexes: Sequence[int]) -> list[int]:
    """3.3: the symbols of one pass, in the order of `indexes`."""
    symbols = [0] * len(indexes)
    order = sorted((table, place) for place, table in enumerate(indexes) if table >= 5)
    escapes: list[tuple[int, int]] = []
    for table, place in order:
        width = (len(tables[table]) - 3) // 2
        symbols[place] = decoder.symbol(tables[table]) - width
        if symbols[place] > width:
            escapes.append((place, width))
    lengths = [decoder.uniform(18) + 1 for _ in escapes]
    magnitudes = [1 << (length - 1) for length in lengths]
    for length in sorted(set(lengths) - {1}):
        for i, own in enumerate(lengths):
            if own == length:
                magnitudes[i] += decoder.uniform(1 << (length - 1))
    for (place, width), magnitude in zip(escapes, magnitudes, strict=True):
        symbols[place] = -(width + magnitude) if decoder.uniform(2) else width + magnitude
    return symbols


# 4. Integer networks --------------------------------------------------------------------------------------------------


def rescale(acc: Ints, multiplier: npt.NDArray[np.float32], leaky: bool) -> Ints:
    """floor(acc * multiplier + 1/2) with the multiplier as mantissa / 2^shift; acc / 8 first where leaky."""
    fraction, exponent = np.frexp(multiplier.astype(np.float64))
    mantissa = (fraction * 2**24).astype(np.int64)[:, None, None]
    shift = (24 - exponent.astype(np.int64))[:, None, None]
    if leaky:
        shift = shift + np.where(acc < 0, 3, 0)
    if (shift < 1).any():
        raise DamageError("a multiplier of 2^23 or more")
    shift = np.minimum(shift, 62)  # below 2^-14 all products round to zero
    return (acc * mantissa + (np.int64(1) << (shift - 1))) >> shift


def shuffle(x: npt.NDArray[Any], r: int) -> npt.NDArray[Any]:
    channels, height, width = x.shape
    split = x.reshape(channels // (r * r), r, r, height, width)
    return split.transpose(0, 3, 1, 4, 2).reshape(channels // (r * r), height * r, width * r)


def compand(table: Ints, latent: Ints) -> Ints:
    return np.sign(latent) * table[np.minimum(np.abs(latent), 32768)]


def load_weights(path: Path) -> Tensors:
    """The tensors of a safetensors file; those of bfloat16, the upper halves of float32, as float32."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    kinds = {
        "I8": "i1",
        "U8": "u1",
        "I16": "<i2",
        "I32": "<i4",
        "I64": "<i8",
        "F16": "<f2",
        "F32": "<f4",
        "BF16": "<u2",
    }
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = (start + offset for offset in entry["data_offsets"])
        values = np.frombuffer(data[first:last], kinds[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = (values.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else values
    return tensors


class Decoder:
    """Everything that a weights file decodes."""

    coarse_blocks, fine_blocks = 4, 4

    def __init__(self, weights: Path) -> None:
        self.weights = load_weights(weights)
        self.digest = hashlib.sha256(weights.read_bytes()).digest()
        self.tables = cumulative_tables(self.weights["prior.frequencies"].tolist())
        self.compand = self.weights["prior.compand"].astype(np.int64)

    def layer(self, name: str, x: Ints, level: int, *, leaky: bool = False, head: bool = False) -> Ints:
        """4.2."""
        weight = self.weights[f"{name}.weight"].astype(np.int64)
        bias = self.weights[f"{name}.bias"].astype(np.int64)
        if weight.ndim == 3:
            pad = weight.shape[1] // 2
            padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
            acc = np.zeros_like(x)
            for (u, v), _ in np.ndenumerate(weight[0]):
                acc += weight[:, u, v, None, None] * padded[:, u : u + x.shape[1], v : v + x.shape[2]]
        else:
            acc = (weight @ x.reshape(x.shape[0], -1)).reshape(-1, *x.shape[1:])
        acc += bias[level if len(bias) == 65 else 0][:, None, None]
        out = rescale(acc, self.weights[f"{name}.multiplier"], leaky)
        return out if head else np.clip(out, -127, 127)

    def context(self, name: str, features: Ints | None, known: Ints | None, level: int) -> tuple[Ints, Ints]:
        """4.3: means and table indexes."""
        inputs = [] if features is None else [features]
        if known is not None:
            inputs.append(self.layer(f"{name}.reduce", known, level))
        x = self.layer(f"{name}.enter", np.concatenate(inputs), level, leaky=True)
        x = self.layer(f"{name}.spatial", x, level)
        x = self.layer(f"{name}.mix", x, level, leaky=True)
        return parameters(self.layer(f"{name}.head", x, level, head=True))

    def features(self, z: Ints, level: int, height: int, width: int) -> Ints:
        x = shuffle(self.layer("prior.up1", z, level, leaky=True), 2)
        x = self.layer("prior.up_spatial", x, level)
        x = self.layer("prior.up_mix", x, level, leaky=True)
        x = shuffle(self.layer("prior.up2", x, level, leaky=True), 2)
        return self.layer("prior.up_out", x, level)[:, :height, :width]

    def tile(self, payload: bytes, height: int, width: int, quality: int) -> tuple[Ints, bytes]:
        """4.4: the latent [320, height, width] in 1/64, and the tile's symbols as little-endian int32."""
        level = (quality * 64 + 500) // 1000
        decoder = RangeDecoder(payload[4:])
        seen: list[bytes] = []

        def fill(target: Ints, mean: Ints, index: Ints, parity: int | None, unit: int) -> None:
            positions = np.add.outer(np.arange(target.shape[1]), np.arange(target.shape[2])) % 2
            mask = np.ones_like(positions, bool) if parity is None else positions == parity
            symbols = read(index[:, mask].ravel())
            target[:, mask] = mean[:, mask] + unit * symbols.reshape(len(mean), -1)

        def read(index: Ints) -> Ints:
            symbols = np.array(read_request(decoder, self.tables, index.tolist()), np.int64)
            seen.append(symbols.astype("<i4").tobytes())
            return symbols

        def fill_packed(target: Ints, mean: Ints, index: Ints, parity: int | None) -> None:
            """3.5."""
            positions = np.add.outer(np.arange(target.shape[1]), np.arange(target.shape[2])) % 2
            mask = np.ones_like(positions, bool) if parity is None else positions == parity
            indexes = index[:, mask].ravel()
            taking = np.flatnonzero(indexes >= 16)
            blocks = taking[: len(taking) // 24 * 24].reshape(-1, 24)
            free, bound = blocks[:, :12], blocks[:, 12:]
            first, wide = indexes.copy(), np.minimum(indexes + 3, 63)
            first[free], first[bound] = wide[free], 0
            symbols = read(first)
            odd = symbols[free] @ PARITY % 2
            second = np.zeros(len(indexes) // 24 * 12, np.int64)
            second[: bound.size] = (64 + 2 * (wide[bound] - 19) + odd).ravel()
            symbols[bound] = 2 * read(second)[: bound.size].reshape(-1, 12) + odd
            step = np.full(len(indexes), 64)
            step[blocks] = 47
            target[:, mask] = mean[:, mask] + (step * symbols).reshape(len(mean), -1)

        z = np.zeros((96, -(-height // 4), -(-width // 4)), np.int64)
        for colour in (0, 1):
            if colour == 0:
                nothing = np.zeros((1, *z.shape[1:]), np.int64)
                mean, index = parameters(self.layer("prior.hyper_first", nothing, level, head=True))
            else:
                mean, index = self.context("prior.hyper_second", None, z, level)
            fill(z, mean, index, colour, 8)
            np.clip(z, -127, 127, out=z)
        features = self.features(z, level, height, width)
        y = np.zeros((320, height, width), np.int64)
        for number, ((start, stop, parity), known) in enumerate(zip(PASSES, KNOWN, strict=True)):
            before = compand(self.compand, y[:known]) if known else None
            mean, index = self.context(f"prior.contexts.{number}", features, before, level)
            if len(self.tables) > 64:
                fill_packed(y[start:stop], mean, index, parity)
            else:
                fill(y[start:stop], mean, index, parity, 64)
        symbols = b"".join(seen)
        if struct.unpack_from("<I", payload)[0] != zlib.crc32(symbols):
            raise DamageError("symbol check")
        return y, symbols

    def latent(self, file: File) -> tuple[Ints, str]:
        """The latent of the whole picture, and the symbol hash (7)."""
        if self.digest[:8] != file.weights:
            raise DamageError("other weights")
        latent = np.zeros((320, *file.latent_shape), np.int64)
        digest = hashlib.sha256()
        for payload, (rows, columns) in zip(file.tiles, tile_boxes(file), strict=True):
            shape = rows.stop - rows.start, columns.stop - columns.start
            latent[:, rows, columns], symbols = self.tile(payload, *shape, file.quality)
            digest.update(symbols)
        return latent, digest.hexdigest()

    # 5. Synthesis -----------------------------------------------------------------------------------------------------

    def synthesis_at(self, t: float) -> None:
        """Make `drawing` the weights of the synthesis at one quality."""
        end, u = (0 if t < 0.5 else 1), abs(2 * t - 1)
        self.drawing = {name: v.astype(np.float64) for name, v in self.weights.items() if name.startswith("dec_")}
        for name, v in self.drawing.items():
            other = self.drawing.get(f"dec_ends.{end}.{name}")
            if other is not None:
                moved = v + u * (other - v)
                in_block = name.startswith(("dec_coarse", "dec_fine"))
                self.drawing[name] = nearest_bfloat16(moved) if in_block else moved

    def convolution(self, name: str, x: Floats) -> Floats:
        weight = self.drawing[f"{name}.weight"]
        if weight.shape[2] == 3:
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
            out = np.zeros_like(x)
            for (u, v), _ in np.ndenumerate(weight[0, 0]):
                out += weight[:, 0, u, v, None, None] * padded[:, u : u + x.shape[1], v : v + x.shape[2]]
        else:
            out = np.einsum("oc,chw->ohw", weight[:, :, 0, 0], x)
        if f"{name}.bias" in self.drawing:
            out += self.drawing[f"{name}.bias"][:, None, None]
        return out

    def block(self, name: str, x: Floats) -> Floats:
        wide = self.convolution(f"{name}.expand", self.convolution(f"{name}.depthwise", x))
        return x + self.convolution(f"{name}.project", np.where(wide >= 0, wide, wide / 10))

    def factor(self, name: str, t: float) -> Floats:
        knots = self.weights[f"{name}.log"].astype(np.float64)
        k = min(int(4 * t), 3)
        u = 4 * t - k
        return np.exp(knots[k] * (1 - u) + knots[k + 1] * u)[:, None, None]

    def pixels(self, file: File, latent: Ints) -> npt.NDArray[np.uint8]:
        """[height, width, channels]."""
        t = file.quality / 1000
        self.synthesis_at(t)
        step = np.sqrt(6 / (np.log(2) * 0.0003 * 800**t * 255**2))
        y = latent / 64 * step * self.factor("dec_step", t)
        f = self.convolution("dec_in", y)
        for i in range(self.coarse_blocks):
            f = self.block(f"dec_coarse.{i}", f)
        f = shuffle(self.convolution("dec_up", f), 2) * self.factor("dec_modulation", t)
        for i in range(self.fine_blocks):
            f = self.block(f"dec_fine.{i}", f)
        x = shuffle(self.convolution("dec_out", f), 8) + shuffle(self.convolution("dec_linear", y), 16)
        samples = np.clip(np.rint(255 * (x + 0.5)), 0, 255)[:, : file.height, : file.width].transpose(1, 2, 0)
        if file.channels == 1:
            samples = np.rint(samples.mean(2, keepdims=True))
        return samples.astype(np.uint8)


def nearest_bfloat16(x: Floats) -> Floats:
    """The numbers of 8 significant bits next to x, halves to even."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.rint(fraction * 256), exponent - 8)


def parameters(head: Ints) -> tuple[Ints, Ints]:
    mean, index = np.split(head, 2)
    return np.clip(mean, -32767, 32767), np.clip(index, 0, 63)
