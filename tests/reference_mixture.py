"""The second decoder for the model `mixture`, written from §10 of docs/FORMAT.md; see `reference_decoder`."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from itertools import accumulate
from pathlib import Path

import numpy as np
from reference_decoder import DamageError, Decoder, Ints, RangeDecoder, load_weights, shuffle


class Latent:
    """10.1: codebooks and tables of one latent; `first` is the number of its first table."""

    def __init__(self, books: list[list[int]], words: Ints, frequencies: list[int], stretch: Ints, first: int) -> None:
        self.books, self.words, self.cumulative, self.stretch = books, [], [], stretch
        self.first = []
        for _, d, h in books:
            self.words.append(words[: (2 * h + 1) * d].reshape(-1, d))
            words = words[(2 * h + 1) * d :]
            self.first.append(first)
            for _ in range(59):
                self.cumulative.append([0, *accumulate(frequencies[: 2 * h + 2])])
                frequencies = frequencies[2 * h + 2 :]
                first += 1
        if len(words) or frequencies or any(table[-1] != 2**24 for table in self.cumulative):
            raise DamageError("tables")
        self.stop = first
        self.channels = sum(g * d for g, d, _ in books)

    def tables(self, scale: Ints) -> Ints:
        """Table numbers [G, H, W]."""
        out = np.zeros_like(scale)
        group = 0
        for (g, _, _), first in zip(self.books, self.first, strict=True):
            own = scale[group : group + g]
            out[group : group + g] = np.where(own < 5, 0, first + own - 5)
            group += g
        return out

    def codewords(self, symbols: Ints, scale: Ints) -> Ints:
        """[C, H, W] of symbols and scale indexes [G, H, W]."""
        parts = []
        group = 0
        for (g, _, h), words, factors in zip(self.books, self.words, self.stretch, strict=True):
            factor = factors[np.maximum(scale[group : group + g] - 5, 0)]
            chosen = words[symbols[group : group + g] + h] * factor[..., None]
            parts.append(chosen.transpose(0, 3, 1, 2).reshape(-1, *symbols.shape[1:]))
            group += g
        return np.concatenate(parts)


class MixtureDecoder(Decoder):
    """Everything that a weights file of `mixture` decodes."""

    coarse_blocks, fine_blocks = 3, 2

    def __init__(self, weights: Path) -> None:
        self.weights = load_weights(weights)
        data = weights.read_bytes()
        self.digest = hashlib.sha256(data).digest()
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        config = json.loads(metadata["config"])
        first = 1
        self.latents = {}
        for name in ("coarse", "middle", "fine"):
            words = self.weights[f"prior.{name}.words"].astype(np.int64)
            frequencies = self.weights[f"prior.{name}.frequencies"].tolist()
            stretch = self.weights[f"prior.{name}.stretch"].astype(np.int64)
            self.latents[name] = Latent(config[f"{name}_books"], words, frequencies, stretch, first)
            first = self.latents[name].stop
        self.cumulative = [[0], *(table for latent in self.latents.values() for table in latent.cumulative)]

    def tile(self, payload: bytes, height: int, width: int, quality: int) -> tuple[Ints, bytes]:
        """10.3: the latent [320, height, width] in 1/64, and the tile's symbols as little-endian int32."""
        level = (quality * 64 + 500) // 1000
        decoder = RangeDecoder(payload[4:])
        seen: list[bytes] = []

        def fill(name: str, head: Ints) -> Ints:
            latent = self.latents[name]
            mean = np.clip(head[: latent.channels], -32767, 32767)
            scale = np.clip(head[latent.channels :], 0, 63)
            tables = latent.tables(scale)
            flat = tables.ravel().tolist()
            symbols = np.zeros(len(flat), np.int64)
            for table, place in sorted((table, place) for place, table in enumerate(flat) if table):
                size = len(self.cumulative[table]) - 2
                symbols[place] = decoder.symbol(self.cumulative[table]) - size // 2
                if symbols[place] > size // 2:
                    raise DamageError("escape")
            seen.append(symbols.astype("<i4").tobytes())
            return mean + latent.codewords(symbols.reshape(tables.shape), scale)

        middle_size = -(-height // 2), -(-width // 2)
        coarse_size = -(-middle_size[0] // 2), -(-middle_size[1] // 2)
        head = self.layer("prior.coarse_head", np.zeros((1, *coarse_size), np.int64), level, head=True)
        coarse = np.clip(fill("coarse", head), -127, 127)
        x = shuffle(self.layer("prior.coarse_up", coarse, level, leaky=True), 2)[:, : middle_size[0], : middle_size[1]]
        x = self.layer("prior.coarse_spatial", x, level)
        features = self.layer("prior.coarse_mix", x, level, leaky=True)
        middle = np.clip(fill("middle", self.layer("prior.middle_head", features, level, head=True)), -127, 127)
        entered = self.layer("prior.middle_enter", middle, level, leaky=True)
        x = self.layer("prior.middle_up", np.concatenate([features, entered]), level, leaky=True)
        x = shuffle(x, 2)[:, :height, :width]
        for i in range(2):
            x = self.layer(f"prior.mix.{i}", self.layer(f"prior.spatial.{i}", x, level), level, leaky=True)
        fine = fill("fine", self.layer("prior.fine_head", x, level, head=True))
        symbols = b"".join(seen)
        if struct.unpack_from("<I", payload)[0] != zlib.crc32(symbols):
            raise DamageError("symbol check")
        return fine, symbols
