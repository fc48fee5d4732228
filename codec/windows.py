"""Windows: the boxes of pixels and latent positions in which the float transforms run, so that memory is bounded.

A window is transformed with a halo as wide as the receptive field: the result equals that of the whole picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from calotype.models.transforms import STRIDE
from calotype.stopwatch import Stopwatch

WINDOW = 2048 // STRIDE
"""Side of a window in latent positions."""
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

    def within(self, other: Box) -> Box:
        """The common part."""
        return Box(
            max(self.top, other.top), max(self.left, other.left),
            min(self.bottom, other.bottom), min(self.right, other.right),
        )  # fmt: skip

    def relative_to(self, other: Box) -> Box:
        """The same box in the coordinates of `other`'s top left corner."""
        return Box(self.top - other.top, self.left - other.left, self.bottom - other.top, self.right - other.left)

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


def split(area: Box) -> list[Box]:
    """The windows that cover a box of latent positions."""
    return grid(area, WINDOW)


def under(area: Box) -> Box:
    """The latent positions that a box of pixels touches."""
    return Box(area.top // STRIDE, area.left // STRIDE, -(-area.bottom // STRIDE), -(-area.right // STRIDE))


def part(progress: Progress | None, start: float, share: float) -> Progress | None:
    """Progress of a part that begins at `start` and makes up `share` of the whole."""
    return None if progress is None else lambda fraction: progress(start + share * fraction)


def load(pixels: npt.NDArray[np.uint8], box: Box, device: torch.device, layout: torch.memory_format) -> Tensor:
    """[1, 3, H, W] in [-0.5, 0.5] of a box of pixels [H, W, C], edges repeated where the box leaves the picture."""
    inside = torch.from_numpy(pixels[box.slices].copy()).to(device)
    x = inside.permute(2, 0, 1)[None].float().div_(255).sub_(0.5)
    bottom, right = box.shape[0] - x.shape[2], box.shape[1] - x.shape[3]
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom), mode="replicate")
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=layout)


def stack(latent: Tensor, boxes: Sequence[Box], device: torch.device, scale: int = 1) -> Tensor:
    """[B, M, h, w] on the device: boxes of one shape, made larger by `scale`, of [1, M, H, W]."""
    return torch.cat([latent[(..., *box.scaled(scale).slices)] for box in boxes]).to(device)


def analyse(
    transform: Callable[[Tensor, Progress | None], tuple[Tensor, ...]],
    pixels: npt.NDArray[np.uint8],
    *,
    side: int,
    halo: int,
    device: torch.device,
    layout: torch.memory_format,
    watch: Stopwatch,
    stage: str = "transform",
    progress: Progress | None = None,
) -> tuple[Tensor, ...]:
    """What `transform` makes of pixels [H, W, C], window by window: [1, M, n ceil(H/16), n ceil(W/16)] each.

    On the CPU unless it is one window.

    Args:
        transform: from a part [1, 3, H, W] in [-0.5, 0.5] to some [1, M, n H/16, n W/16].
        side: of a window, in latent positions.
        halo: latent positions around a window that its result depends on.
        stage: what the watch calls it.
    """
    whole = Box(0, 0, -(-pixels.shape[0] // STRIDE), -(-pixels.shape[1] // STRIDE))
    windows = grid(whole, side)
    results: list[Tensor] = []
    for count, window in enumerate(windows):
        outer = window.grown(halo, *whole.shape)
        with watch("load"):
            x = load(pixels, outer.scaled(STRIDE), device, layout)
        with watch(stage):
            parts = transform(x, part(progress, count / len(windows), 1 / len(windows)))
            for number, y in enumerate(parts):
                n = y.shape[2] // outer.shape[0]
                inner = y[(..., *window.relative_to(outer).scaled(n).slices)]
                if len(windows) == 1:
                    results.append(inner)
                    continue
                if not count:
                    rows = torch.empty(1, *whole.scaled(n).shape, y.shape[1], dtype=y.dtype)
                    results.append(rows.permute(0, 3, 1, 2))
                results[number][(..., *window.scaled(n).slices)] = inner.cpu()
        if progress:
            progress((count + 1) / len(windows))
    return tuple(results)


def draw(
    synthesise: Callable[[tuple[slice, slice]], Tensor],
    canvas: Box,
    area: Box,
    *,
    halo: int,
    scale: int,
    watch: Stopwatch,
    progress: Progress | None,
) -> npt.NDArray[np.uint8]:
    """Pixels [h, w, 3] of `area` (pixels) at 1/scale, window by window.

    Args:
        synthesise: from the place of latents in the canvas to their pixels [1, 3, H, W] in [-0.5, 0.5], at 1/scale.
        canvas: the latent positions that there are: those under `area` with a halo, as far as the picture goes.
    """
    target = Box(area.top // scale, area.left // scale, -(-area.bottom // scale), -(-area.right // scale))
    out = np.empty((*target.shape, 3), np.uint8)
    step = STRIDE // scale
    windows = split(under(area))
    for count, window in enumerate(windows, 1):
        with watch("transform"):
            outer = window.grown(halo, canvas.bottom, canvas.right).within(canvas)
            x = synthesise(outer.relative_to(canvas).slices)
            seen = window.scaled(step).within(target)
            x = x[(0, slice(None), *seen.relative_to(outer.scaled(step)).slices)]
            x = x.add_(0.5).mul_(255).round_().clamp_(0, 255).to(torch.uint8)
        with watch("store"):
            out[seen.relative_to(target).slices] = x.permute(1, 2, 0).cpu().numpy()
        if progress:
            progress(count / len(windows))
    return out
