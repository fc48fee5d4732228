"""The second decoder for models of tokens, written from §11 of docs/FORMAT.md; see `reference_decoder`."""

from __future__ import annotations

import hashlib
import struct
import zlib
from itertools import accumulate
from pathlib import Path

import numpy as np
from reference_decoder import TOTAL, DamageError, Decoder, File, Ints, RangeDecoder, load_weights, tile_boxes


def packet_of(height: int, width: int, packets: int) -> Ints:
    """11.1: the packet of each token."""
    slope = (382 * packets + 500) // 1000
    return np.add.outer(slope * np.arange(height), np.arange(width)) % packets


def pass_of(row: int, column: int) -> int:
    """11.2."""
    if row % 2 == 0 and column % 2 == 0:
        return 2 if row % 4 != column % 4 else row % 4 // 2
    return 3 if row % 2 == 1 and column % 2 == 1 else 4


class TokenDecoder(Decoder):
    """Everything that the weights file of a model of tokens decodes, up to the tokens."""

    def __init__(self, weights: Path) -> None:
        self.weights = load_weights(weights)
        self.digest = hashlib.sha256(weights.read_bytes()).digest()
        self.steps = len({name.split(".")[2] for name in self.weights if name.startswith("prior.heads.")})
        self.exponentials: list[int] = self.weights["prior.exponentials"].tolist()

    def frequencies(self, logits: list[int]) -> list[int]:
        """11.4."""
        top, size = max(logits), len(logits)
        weights = [self.exponentials[min(top - logit, 511)] for logit in logits]
        whole = sum(weights)
        found = [weight * (TOTAL - size - 1) // whole + 1 for weight in weights]
        found[-1] += TOTAL - sum(found)
        return found

    def logits(self, tokens: Ints, known: Ints, step: int) -> Ints:
        """11.3: [K, height, width]."""
        level = 64 * step // (self.steps - 1)
        vectors = self.weights[f"prior.embeddings.{step}.weight"].astype(np.int64)[tokens].transpose(2, 0, 1)
        x = np.concatenate([vectors * known, 64 * known[None]])
        x = self.layer("prior.enter", x, level, leaky=True)
        for number in (0, 1):
            x = self.layer(f"prior.spatial.{number}", x, level)
            x = self.layer(f"prior.mix.{number}", x, level, leaky=True)
        return self.layer(f"prior.heads.{step}", x, level, head=True)

    def packet(
        self, payload: bytes, shape: tuple[int, int], step: int, packet: int, packets: int
    ) -> tuple[Ints, bytes]:
        """Tokens [height, width], zero outside of the packet, and its symbols as little-endian int32."""
        decoder = RangeDecoder(payload[4:])
        tokens, known = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        own = packet_of(*shape, packets) == packet
        symbols: list[int] = []
        for number in range(5):
            places = [(int(i), int(j)) for i, j in zip(*np.nonzero(own), strict=True) if pass_of(i, j) == number]
            logits = self.logits(tokens, known, step)
            for i, j in places:
                tokens[i, j] = decoder.symbol([0, *accumulate(self.frequencies(logits[:, i, j].tolist()))])
                symbols.append(int(tokens[i, j]))
            for place in places:
                known[place] = 1
        run = np.array(symbols, "<i4").tobytes()
        if struct.unpack_from("<I", payload)[0] != zlib.crc32(run):
            raise DamageError("symbol check")
        return tokens, run

    def tokens(self, file: File) -> tuple[Ints, str]:
        """The tokens of the whole picture, and the symbol hash (7)."""
        if self.digest[:8] != file.weights:
            raise DamageError("other weights")
        step = min(file.quality * self.steps // 1000, self.steps - 1)
        tokens, digest = np.zeros(file.latent_shape, np.int64), hashlib.sha256()
        payloads = iter(file.tiles)
        for rows, columns in tile_boxes(file):
            for packet in range(file.packets):
                shape = rows.stop - rows.start, columns.stop - columns.start
                found, symbols = self.packet(next(payloads), shape, step, packet, file.packets)
                tokens[rows, columns] += found
                digest.update(symbols)
        return tokens, digest.hexdigest()
