"""A picture's way through a model: windows of pixels for the float transforms, tiles of latents for the coder.

Two grids cut a picture. *Tiles* are the units of the bitstream: each is entropy-coded alone. *Windows* are the units of
memory: analysis and synthesis run on one window and a halo as wide as the receptive field, so the result equals that
of the whole picture, whatever the tiles are.
"""

from __future__ import annotations

import hashlib
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from calotype.entropy import Decoder, Encoder, SymbolTables
from calotype.errors import DriftError, FormatError
from calotype.models import tables
from calotype.models.hyperprior import STRIDE, Hyperprior
from calotype.models.priors import Coding, Request
from calotype.models.quantizers import QUALITY_STEPS

WINDOW = 2048 // STRIDE
"""Side of a window in latent positions."""
_CRC = struct.Struct("<I")
Progress = Callable[[float], None]


class Box(NamedTuple):
    """Half-open rectangle; in latent positions or pixels, as stated."""

    top: int
    left: int
    bottom: int
    right: int

    def grown(self, margin: int, height: int, width: int) -> Box:
        """Larger by `margin` each way, inside `height` x `width`."""
        return Box(
            max(self.top - margin, 0), max(self.left - margin, 0),
            min(self.bottom + margin, height), min(self.right + margin, width),
        )  # fmt: skip

    def scaled(self, factor: int) -> Box:
        return Box(*(factor * v for v in self))

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


def grid(area: Box, side: int) -> list[Box]:
    """The boxes of a grid of `side`, anchored at the origin, that cover `area`; in raster order, cut at the area."""
    return [
        Box(max(y, area.top), max(x, area.left), min(y + side, area.bottom), min(x + side, area.right))
        for y in range(area.top // side * side, area.bottom, side)
        for x in range(area.left // side * side, area.right, side)
    ]


class Stopwatch:
    """Seconds per stage."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


class PictureCoder:
    """Codes pictures with one network on one device. Holds no state between calls; safe to share between threads.

    Args:
        batch: equal tiles that are coded together; the bytes do not depend on it.
    """

    def __init__(self, network: Hyperprior, device: torch.device, *, batch: int | None = None) -> None:
        self.network, self.device = network, device
        self.batch = batch or (8 if device.type == "cuda" else 1)
        frequencies = network.prior.frequencies.cpu().numpy().astype(np.int32)
        self.tables = SymbolTables(frequencies, [tables.half_width(i) for i in range(tables.SCALES)], tables.SKIP)

    # Encoding ---------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(
        self, pixels: npt.NDArray[np.uint8], quality: int, tile: int, watch: Stopwatch, progress: Progress | None = None
    ) -> list[bytes]:
        """Tile payloads in raster order for pixels [H, W, C] at an integer quality and a tile side in pixels."""
        latent = self._analyse(pixels, quality, watch)
        boxes = grid(Box(0, 0, *latent.shape[2:]), tile // STRIDE)
        payloads: list[bytes] = [b""] * len(boxes)
        done = 0
        for numbers in self._batches([b.shape for b in boxes]):
            y = torch.cat([latent[(..., *boxes[n].slices)] for n in numbers]).to(self.device)
            for n, payload in zip(numbers, self._encode_tiles(y, quality, watch), strict=True):
                payloads[n] = payload
            done += len(numbers)
            if progress:
                progress(done / len(boxes))
        return payloads

    def _batches(self, shapes: Sequence[tuple[int, int]]) -> Iterable[list[int]]:
        """Numbers of tiles to be coded together: equal shapes, at most `batch`."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for number, shape in enumerate(shapes):
            by_shape.setdefault(shape, []).append(number)
        for numbers in by_shape.values():
            for start in range(0, len(numbers), self.batch):
                yield numbers[start : start + self.batch]

    def _quality(self, quality: int) -> tuple[Tensor, Tensor]:
        """Quality as the integer [1] for the exact path and the float [1] for the transforms."""
        integer = torch.tensor([quality], device=self.device)
        return integer, integer.float() / QUALITY_STEPS

    def _analyse(self, pixels: npt.NDArray[np.uint8], quality: int, watch: Stopwatch) -> Tensor:
        """Latent [1, M, ceil(H/16), ceil(W/16)] of the whole picture, on the CPU unless it is one window."""
        height, width = pixels.shape[:2]
        rows, columns = -(-height // STRIDE), -(-width // STRIDE)
        _, t = self._quality(quality)
        windows = grid(Box(0, 0, rows, columns), WINDOW)
        latent = None
        for window in windows:
            with watch("load"):
                outer = window.grown(self.network.halo, rows, columns)
                x = self._to_network(pixels, outer.scaled(STRIDE))
            with watch("transform"):
                y = self.network.analyse(x, t)
                inner = y[:, :, window.top - outer.top :, window.left - outer.left :]
                inner = inner[:, :, : window.shape[0], : window.shape[1]]
                if len(windows) == 1:
                    return inner
                if latent is None:
                    latent = torch.empty(1, y.shape[1], rows, columns)
                latent[(..., *window.slices)] = inner.cpu()
        assert latent is not None
        return latent

    def _to_network(self, pixels: npt.NDArray[np.uint8], box: Box) -> Tensor:
        """[1, 3, H, W] in [-0.5, 0.5] of a box of pixels, edges repeated where the box leaves the picture."""
        part = torch.from_numpy(pixels[box.slices].copy()).to(self.device)
        x = part.permute(2, 0, 1)[None].float() / 255 - 0.5
        bottom, right = box.shape[0] - x.shape[2], box.shape[1] - x.shape[3]
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom), mode="replicate")
        return x.expand(-1, 3, -1, -1)

    def _encode_tiles(self, y: Tensor, quality: int, watch: Stopwatch) -> list[bytes]:
        batch = y.shape[0]
        encoders = [Encoder(self.tables) for _ in range(batch)]
        checks = [0] * batch

        def answer(request: Request) -> Tensor:
            assert request.symbols is not None
            with watch("entropy"):
                indexes = request.tables.cpu().numpy()
                symbols = request.symbols.cpu().numpy()
                for i, encoder in enumerate(encoders):
                    encoder.push(indexes[i], symbols[i])
                    checks[i] = _crc(symbols[i], checks[i])
            return request.symbols

        quality_integers = self._quality(quality)[0].expand(batch)
        _run(self.network.code((batch, *y.shape[2:]), quality_integers, y), answer, watch)
        return [_CRC.pack(check) + encoder.finish() for check, encoder in zip(checks, encoders, strict=True)]

    # Decoding ---------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def decode(
        self,
        payload: Callable[[int], bytes | memoryview | None],
        size: tuple[int, int],
        quality: int,
        tile: int,
        *,
        area: Box,
        scale: int,
        watch: Stopwatch,
        damaged: list[int],
        symbols_seen: Callable[[int, bytes], None] | None = None,
        allow_partial: bool = False,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Pixels [h, w, 3] uint8 of `area` (pixels of the full picture), made smaller by `scale`.

        Only tiles that the area and its halo touch are asked of `payload`; one that is None or damaged is appended to
        `damaged` and filled from its neighbours' mean colour.
        """
        rows, columns = -(-size[0] // STRIDE), -(-size[1] // STRIDE)
        needed = Box(
            area.top // STRIDE, area.left // STRIDE, -(-area.bottom // STRIDE), -(-area.right // STRIDE)
        )
        canvas_box = needed.grown(self.network.halo, rows, columns)
        side = tile // STRIDE
        tiles_across = -(-columns // side)
        boxes = grid(canvas_box, side)
        whole = [
            Box(b.top // side * side, b.left // side * side, min(b.top // side * side + side, rows),
                min(b.left // side * side + side, columns)) for b in boxes
        ]  # fmt: skip
        numbers = [w.top // side * tiles_across + w.left // side for w in whole]
        canvas = torch.zeros(1, self.network.config.latent, *canvas_box.shape)
        lost: list[Box] = []
        done = 0
        for group in self._batches([w.shape for w in whole]):
            payloads = [payload(numbers[i]) for i in group]
            results = self._decode_tiles(payloads, whole[group[0]].shape, quality, watch, numbers, group, symbols_seen, allow_partial)
            for i, latent in zip(group, results, strict=True):
                b, w = boxes[i], whole[i]
                place = (..., slice(b.top - canvas_box.top, b.bottom - canvas_box.top),
                         slice(b.left - canvas_box.left, b.right - canvas_box.left))  # fmt: skip
                if latent is None:
                    damaged.append(numbers[i])
                    lost.append(b)
                    continue
                canvas[place] = latent[:, b.top - w.top : b.bottom - w.top, b.left - w.left : b.right - w.left].cpu()
            done += len(group)
            if progress:
                progress(0.5 * done / len(boxes))
        self._conceal(canvas, canvas_box, lost)
        return self._synthesise(canvas, canvas_box, needed, area, quality, scale, watch, progress)

    def _conceal(self, canvas: Tensor, canvas_box: Box, lost: list[Box]) -> None:
        """Fill lost tiles with the mean latent of what was decoded: a plain patch of the picture's mean colour."""
        if not lost:
            return
        mask = torch.ones(canvas.shape[2:], dtype=torch.bool)
        for b in lost:
            mask[b.top - canvas_box.top : b.bottom - canvas_box.top, b.left - canvas_box.left : b.right - canvas_box.left] = False
        if mask.any():
            canvas[:, :, ~mask] = canvas[:, :, mask].mean(2, keepdim=True)

    def _decode_tiles(
        self,
        payloads: Sequence[bytes | memoryview | None],
        shape: tuple[int, int],
        quality: int,
        watch: Stopwatch,
        numbers: Sequence[int],
        group: Sequence[int],
        symbols_seen: Callable[[int, bytes], None] | None,
        allow_partial: bool,
    ) -> list[Tensor | None]:
        """Latents [M, h, w] of equal tiles in 1/64 steps; None for a tile that could not be decoded."""
        results: list[Tensor | None] = [None] * len(payloads)
        alive = [i for i, p in enumerate(payloads) if p is not None]
        if not alive:
            return results
        try:
            latents = self._decode_together([payloads[i] for i in alive], shape, quality, watch,
                                            [numbers[group[i]] for i in alive], symbols_seen)  # fmt: skip
        except (FormatError, DriftError):
            if not allow_partial:
                raise
            if len(alive) == 1:
                return results
            for i in alive:  # find the culprit: one by one
                results[i] = self._decode_tiles([payloads[i]], shape, quality, watch, numbers, [group[i]], symbols_seen, True)[0]
            return results
        for i, latent in zip(alive, latents, strict=True):
            results[i] = latent
        return results

    def _decode_together(
        self,
        payloads: Sequence[bytes | memoryview | None],
        shape: tuple[int, int],
        quality: int,
        watch: Stopwatch,
        numbers: Sequence[int],
        symbols_seen: Callable[[int, bytes], None] | None,
    ) -> Tensor:
        batch = len(payloads)
        decoders, expected = [], []
        for p in payloads:
            assert p is not None
            if len(p) < _CRC.size:
                raise FormatError("a tile is too short: the file is damaged")
            expected.append(_CRC.unpack_from(p)[0])
            decoders.append(Decoder(self.tables, p[_CRC.size :]))
        checks = [0] * batch

        def answer(request: Request) -> Tensor:
            with watch("entropy"):
                indexes = request.tables.cpu().numpy()
                symbols = np.stack([d.pull(indexes[i]) for i, d in enumerate(decoders)])
                for i in range(batch):
                    checks[i] = _crc(symbols[i], checks[i])
                    if symbols_seen:
                        symbols_seen(numbers[i], symbols[i].astype("<i4").tobytes())
            return torch.from_numpy(symbols).to(self.device)

        quality_integers = self._quality(quality)[0].expand(batch)
        latent = _run(self.network.code((batch, *shape), quality_integers), answer, watch)
        for number, check, wanted in zip(numbers, checks, expected, strict=True):
            if check != wanted:
                raise DriftError(
                    f"tile {number} decoded to other symbols than were encoded although its bytes are intact: "
                    "this device or library computes wrongly; try --device cpu and report it"
                )
        return latent

    def _synthesise(
        self,
        canvas: Tensor,
        canvas_box: Box,
        needed: Box,
        area: Box,
        quality: int,
        scale: int,
        watch: Stopwatch,
        progress: Progress | None,
    ) -> npt.NDArray[np.uint8]:
        _, t = self._quality(quality)
        left, top = area.left // scale, area.top // scale
        out = np.empty((-(-area.bottom // scale) - top, -(-area.right // scale) - left, 3), np.uint8)
        step = STRIDE // scale
        windows = grid(needed, WINDOW)
        for count, window in enumerate(windows):
            with watch("transform"):
                outer = window.grown(self.network.halo, canvas_box.bottom, canvas_box.right)
                outer = Box(max(outer.top, canvas_box.top), max(outer.left, canvas_box.left), outer.bottom, outer.right)
                part = canvas[
                    :, :, outer.top - canvas_box.top : outer.bottom - canvas_box.top,
                    outer.left - canvas_box.left : outer.right - canvas_box.left,
                ].to(self.device)  # fmt: skip
                x = self.network.synthesise(self.network.dequantise(part), t, scale)
                x = x[0, :, (window.top - outer.top) * step :, (window.left - outer.left) * step :]
                x = x[:, : window.shape[0] * step, : window.shape[1] * step]
                x = x.add(0.5).mul(255).round().clamp(0, 255).to(torch.uint8)
            with watch("store"):
                pixels = x.permute(1, 2, 0).cpu().numpy()
                y0, x0 = window.top * step - top, window.left * step - left
                cut_y, cut_x = max(-y0, 0), max(-x0, 0)
                pixels = pixels[cut_y : out.shape[0] - y0, cut_x : out.shape[1] - x0]
                y0, x0 = max(y0, 0), max(x0, 0)
                out[y0 : y0 + pixels.shape[0], x0 : x0 + pixels.shape[1]] = pixels
            if progress:
                progress(0.5 + 0.5 * (count + 1) / len(windows))
        return out


def _run(coding: Coding, answer: Callable[[Request], Tensor], watch: Stopwatch) -> Tensor:
    """Drive a model's coding generator with a coder's answers."""
    try:
        with watch("prior"):
            request = next(coding)
        while True:
            symbols = answer(request)
            with watch("prior"):
                request = coding.send(symbols)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def _crc(symbols: npt.NDArray[np.int32], start: int) -> int:
    return zlib.crc32(np.ascontiguousarray(symbols, "<i4").data, start)


def symbol_digest(parts: dict[int, list[bytes]]) -> str:
    """SHA-256 over the symbols of all tiles in raster order."""
    digest = hashlib.sha256()
    for number in sorted(parts):
        for part in parts[number]:
            digest.update(part)
    return digest.hexdigest()
