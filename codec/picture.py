"""A picture's way through a model: windows of pixels for the float transforms, tiles of latents for the coder.

Two grids cut a picture. *Tiles* are the units of the bitstream: each is entropy-coded alone. *Windows* are the units of
memory: analysis and synthesis run on one window and a halo as wide as the receptive field, so the result equals that
of the whole picture, whatever the tiles are.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from calotype import symbols, windows
from calotype.entropy import SymbolTables
from calotype.errors import DriftError, FormatError, InputError
from calotype.improving import Improver
from calotype.models.blocks import bfloat16_is_fast
from calotype.models.gradient import LearnedGradient
from calotype.models.hyperprior import Hyperprior
from calotype.models.priors import Coding, CodingTables
from calotype.models.quantizers import QUALITY_STEPS
from calotype.models.transforms import STRIDE
from calotype.models.zoo import Tune, layout
from calotype.stopwatch import Stopwatch
from calotype.windows import Box, Progress, grid

IMPROVING = 0.9
"""Share of the progress that is told of improving a latent, where it is improved at all."""


@dataclass
class DecodeJob:
    """What one decoding is about: where payloads come from, and what is to be noted on the way.

    Attributes:
        payload: from the number of a tile, or of a packet (packets are counted tile after tile), to its bytes, or None
            if it is lost.
        size: (height, width) of the full picture in pixels.
        quality, tile: as in the header.
        watch: seconds per stage are added here.
        packets: of each tile.
        allow_partial: what cannot be decoded is filled in and its number appended to `damaged`.
        symbols_seen: called with the number of a tile or packet and each run of its symbols, as little-endian int32.
    """

    payload: Callable[[int], bytes | memoryview | None]
    size: tuple[int, int]
    quality: int
    tile: int
    watch: Stopwatch
    allow_partial: bool = False
    symbols_seen: Callable[[int, bytes], None] | None = None
    packets: int = 1
    damaged: list[int] = field(default_factory=list)

    @property
    def latent_shape(self) -> tuple[int, int]:
        return -(-self.size[0] // STRIDE), -(-self.size[1] // STRIDE)

    def tiles_touching(self, area: Box) -> list[tuple[int, Box]]:
        """(number, box in latent positions) of every tile that has a part in `area`."""
        side = self.tile // STRIDE
        rows, columns = self.latent_shape
        across = -(-columns // side)
        return [
            (y * across + x, Box(y * side, x * side, min(y * side + side, rows), min(x * side + side, columns)))
            for y in range(area.top // side, -(-area.bottom // side))
            for x in range(area.left // side, -(-area.right // side))
        ]


@runtime_checkable
class StillModel(Protocol):
    """What a network offers that codes pictures by a latent at 1/16."""

    @property
    def halo(self) -> int:
        """Latent positions around a tile that its transforms depend on."""

    @property
    def latent_channels(self) -> int:
        """Width M of the latent."""

    @property
    def tables(self) -> CodingTables:
        """What `code` refers to in its requests."""

    def economical(self) -> Self:
        """The same network with products of less precision where that moves pixels by at most 1/255."""

    def at(self, quality: float) -> Self:
        """What draws the same as this network at one quality in [0, 1]."""

    def analyse(self, x: Tensor, t: Tensor) -> Tensor:
        """Latent [B, M, H/16, W/16] of pictures [B, 3, H, W] in [-0.5, 0.5] at quality `t` [B] in [0, 1]."""

    def code(self, shape: tuple[int, int, int], quality: Tensor, y: Tensor | None = None) -> Coding:
        """Encode a latent, or decode one of `shape` (B, H, W); returns its integers [B, M, H, W]."""

    def dequantise(self, latent: Tensor) -> Tensor:
        """From the integers of `code` to the input of `synthesise`."""

    def synthesise(self, y_hat: Tensor, t: Tensor, scale: int = 1) -> Tensor:
        """Pictures [B, 3, 16 H / scale, 16 W / scale]."""


class PictureCoder:
    """Codes pictures with one network on one device. Holds no state between calls; safe to share between threads.

    Args:
        tune: what the network was trained for; latents are improved for the same.
        encoder: gives the network whose synthesis latents are improved for, if it is not the one that draws.
        gradient: gives the network that estimates the gradient of the error, if there is one.
        batch: equal tiles that are coded together; the bytes do not depend on it.
    """

    def __init__(
        self,
        network: StillModel,
        device: torch.device,
        *,
        tune: Tune = "psnr",
        encoder: Callable[[], nn.Module] | None = None,
        gradient: Callable[[], LearnedGradient | None] | None = None,
        batch: int | None = None,
    ) -> None:
        self.network, self.device, self.tune, self.layout = network, device, tune, layout(device)
        self.transforms = network.economical() if bfloat16_is_fast(device) else network
        self._encoder, self._gradient = encoder, gradient
        self.batch = batch or (8 if device.type == "cuda" else 1)
        frequencies, half_widths, skip, escapes = network.tables
        self.tables = SymbolTables(frequencies.cpu().numpy(), half_widths, skip, escapes=escapes)

    # Encoding ---------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _improver(self) -> Improver | None:
        encoder = self.network if self._encoder is None else self._encoder()
        if not isinstance(encoder, Hyperprior):
            return None
        return Improver(encoder, self.device, self.tune, None if self._gradient is None else self._gradient())

    @torch.inference_mode()
    def encode(
        self,
        pixels: npt.NDArray[np.uint8],
        quality: int,
        tile: int,
        watch: Stopwatch,
        progress: Progress | None = None,
        effort: int = 5,
    ) -> list[bytes]:
        """Tile payloads in raster order for pixels [H, W, C] at an integer quality and a tile side in pixels.

        From effort 7 on, memory grows with the tile where looks count: 4 kB per pixel of it.
        Raises InputError for these efforts if the model's latents cannot be improved.
        """
        if effort > 5 and self._improver is None:
            raise InputError(f"effort {effort} improves latents of the model hyperprior only: use effort 5")
        analysed = self._analyse(pixels, quality, watch, effort)
        latent = analysed[0]
        boxes = grid(Box(0, 0, *latent.shape[2:]), tile // STRIDE)
        groups = list(self._batches([b.shape for b in boxes]))
        better = None
        if self._improver is not None:
            tiles, before = [[boxes[n] for n in numbers] for numbers in groups], windows.part(progress, 0, IMPROVING)
            with watch("improve"):
                better = self._improver.improve(pixels, analysed, tiles, quality, effort, before)
        if better is not None:
            latent, progress = better.latent, windows.part(progress, IMPROVING, 1 - IMPROVING)
        payloads: list[bytes] = [b""] * len(boxes)
        done = 0
        for place, numbers in enumerate(groups):
            y = windows.stack(latent, [boxes[n] for n in numbers], self.device)
            size, quality_integers = (len(numbers), *y.shape[2:]), self._quality(quality)[0].expand(len(numbers))
            if better is None:
                coding = self.network.code(size, quality_integers, y)
            else:
                coding = better.network.code(size, quality_integers, y, better.hyper[place])
            coded, _ = symbols.write(coding, self.tables, len(numbers), watch)
            for n, payload in zip(numbers, coded, strict=True):
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

    def _analyse(
        self, pixels: npt.NDArray[np.uint8], quality: int, watch: Stopwatch, effort: int
    ) -> tuple[Tensor, ...]:
        """Latent [1, M, ceil(H/16), ceil(W/16)] of the whole picture, on the CPU unless it is one window.

        With it the features of `Analysed`, if they help to improve it.
        """
        _, t = self._quality(quality)
        estimated = self._improver is not None and self._improver.estimates(effort)

        def transform(x: Tensor, _: Progress | None) -> tuple[Tensor, ...]:
            if not estimated:
                return (self.transforms.analyse(x, t),)
            assert isinstance(self.transforms, Hyperprior)
            y, *features = self.transforms.analyse_with_features(x, t)
            return y, *(f.bfloat16() for f in features)  # those of a large picture take much memory

        return windows.analyse(
            transform, pixels, side=windows.WINDOW, halo=self.network.halo,
            device=self.device, layout=self.layout, watch=watch,
        )  # fmt: skip

    # Decoding ---------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def decode(self, job: DecodeJob, area: Box, scale: int, progress: Progress | None = None) -> npt.NDArray[np.uint8]:
        """Pixels [h, w, 3] uint8 of `area` (pixels of the full picture), made smaller by `scale`.

        Only tiles that the area and its halo touch are asked of `job.payload`.
        """
        canvas_box = self._canvas(job, area)
        tiles = job.tiles_touching(canvas_box)
        canvas = torch.zeros(1, *canvas_box.shape, self.network.latent_channels).permute(0, 3, 1, 2)
        lost: list[Box] = []
        done = 0
        for group in self._batches([box.shape for _, box in tiles]):
            chosen = [tiles[i] for i in group]
            for (number, box), latent in zip(chosen, self._decode_tiles(job, chosen), strict=True):
                seen = box.within(canvas_box)
                if latent is None:
                    job.damaged.append(number)
                    lost.append(seen.relative_to(canvas_box))
                else:
                    canvas[(0, slice(None), *seen.relative_to(canvas_box).slices)] = latent[
                        (slice(None), *seen.relative_to(box).slices)
                    ].cpu()
            done += len(group)
            if progress:
                progress(0.5 * done / len(tiles))
        _conceal(canvas, lost)
        _, t = self._quality(job.quality)
        transforms = self.transforms.at(t.item())

        def synthesise(place: tuple[slice, slice]) -> Tensor:
            part = canvas[(..., *place)].to(self.device).contiguous(memory_format=self.layout)
            return transforms.synthesise(self.network.dequantise(part), t, scale)

        return windows.draw(
            synthesise, canvas_box, area, halo=self.network.halo, scale=scale, watch=job.watch,
            progress=windows.part(progress, 0.5, 0.5),
        )  # fmt: skip

    def _canvas(self, job: DecodeJob, area: Box) -> Box:
        """Latent positions under `area` (pixels) with the halo of the synthesis."""
        return windows.under(area).grown(self.network.halo, *job.latent_shape)

    def tiles_for(self, job: DecodeJob, area: Box) -> set[int]:
        """Numbers of the tiles that decoding `area` (pixels) reads."""
        return {number for number, _ in job.tiles_touching(self._canvas(job, area))}

    def _decode_tiles(self, job: DecodeJob, tiles: Sequence[tuple[int, Box]]) -> list[Tensor | None]:
        """Latents [M, h, w] in 1/64 steps of equal tiles (number, box); None for one that cannot be decoded."""
        payloads = {number: p for number, _ in tiles if (p := job.payload(number)) is not None}
        latents: dict[int, Tensor] = {}
        try:
            if payloads:
                latents = self._decode_together(job, payloads, tiles[0][1].shape)
        except (FormatError, DriftError):
            if not job.allow_partial:
                raise
            if len(tiles) > 1:  # one of them is at fault: separately
                return [self._decode_tiles(job, [tile])[0] for tile in tiles]
        return [latents.get(number) for number, _ in tiles]

    def _decode_together(
        self, job: DecodeJob, payloads: dict[int, bytes | memoryview], shape: tuple[int, int]
    ) -> dict[int, Tensor]:
        numbers = list(payloads)

        def seen(place: int, run: bytes) -> None:
            if job.symbols_seen:
                job.symbols_seen(numbers[place], run)

        latent = self.decode_together(
            list(payloads.values()), [f"tile {number}" for number in numbers], [job.quality] * len(numbers), shape,
            job.watch, seen if job.symbols_seen else None,
        )  # fmt: skip
        return dict(zip(numbers, latent, strict=True))

    @torch.inference_mode()
    def decode_together(
        self,
        payloads: Sequence[bytes | memoryview],
        names: Sequence[str],
        qualities: Sequence[int],
        shape: tuple[int, int],
        watch: Stopwatch,
        seen: Callable[[int, bytes], None] | None = None,
    ) -> Tensor:
        """Latents [B, M, h, w] in 1/64 steps of tiles of one `shape`; see `symbols.read`."""
        quality = torch.tensor(qualities, device=self.device)
        coding = self.network.code((len(payloads), *shape), quality)
        return symbols.read(coding, self.tables, payloads, names, watch, device=self.device, seen=seen)


def _conceal(canvas: Tensor, lost: Sequence[Box]) -> None:
    """Fill lost boxes of a canvas [1, M, H, W] with the mean latent of the rest: a patch of its mean colour."""
    if not lost:
        return
    good = torch.ones(canvas.shape[2:], dtype=torch.bool)
    for box in lost:
        good[box.slices] = False
    if good.any():
        canvas[:, :, ~good] = canvas[:, :, good].mean(2, keepdim=True)


def symbol_digest(parts: dict[int, list[bytes]]) -> str:
    """SHA-256 over the symbols of all tiles in raster order."""
    digest = hashlib.sha256()
    for number in sorted(parts):
        for part in parts[number]:
            digest.update(part)
    return digest.hexdigest()
