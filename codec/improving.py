"""Better symbols for a picture than those next to its latent: what an encoder's effort buys. Files stay as they are.

For least error, symbols are chosen so that their rounding errors cancel (`calotype.models.shaping`); for how a picture
looks, the latent is refined by gradient descent (`calotype.models.refinement`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calotype import windows
from calotype.errors import InputError
from calotype.models import shaping
from calotype.models.blocks import bfloat16_is_fast
from calotype.models.gradient import LearnedGradient
from calotype.models.hyperprior import Hyperprior
from calotype.models.quantizers import QUALITY_STEPS
from calotype.models.refinement import Scene, Schedule, differentiable, refine
from calotype.models.transforms import STRIDE, Analysed
from calotype.models.zoo import Tune, layout
from calotype.windows import Box, Progress, grid

SHAPING: dict[int, shaping.Schedule] = {
    4: shaping.ESTIMATED,
    5: shaping.GUESSED,
    7: shaping.Schedule(6, (0.75, 0.85), (0.017, 0.008), guess=shaping.GUESSED.guess, bits=0.6),
    9: shaping.Schedule(20, (0.82, 0.92), (0.0145, 0.004), contexts=True, bits=0.6),
}
"""How symbols of least error are chosen, by effort; at other efforts they are those next to the latent."""
REFINEMENT: dict[int, Schedule] = {7: Schedule(6, 0.08, 1.5, 0.02), 9: Schedule(20, 0.04, 3.0, 0.01)}
"""How latents are refined for how pictures look, by effort; at other efforts they are those of the analysis."""
WINDOW = 1024 // STRIDE
"""Side of a window of shaping, in latent positions."""


class Improved(NamedTuple):
    """A latent [1, M, H, W] of a whole picture, and the hyper-latents [B, Z, h, w] of each group of its tiles.

    These are of the latent before, and must be coded with it.
    """

    network: Hyperprior
    latent: Tensor
    hyper: list[Tensor]


class _Picture(NamedTuple):
    """Pixels [H, W, C], their latent, the features of its analysis if they help, the tiles of each group, their
    hyper-latents, and the quality as an integer."""

    pixels: npt.NDArray[np.uint8]
    latent: Tensor
    features: tuple[Tensor, ...]
    groups: Sequence[Sequence[Box]]
    hyper: list[Tensor]
    quality: int


class Improver:
    """Improves latents for one network on one device; for what the network was trained for. Holds no state.

    `gradient` estimates what the network's synthesis makes of rounding errors, if there is such an estimate.
    """

    def __init__(
        self, network: Hyperprior, device: torch.device, tune: Tune, gradient: LearnedGradient | None = None
    ) -> None:
        self.network, self.device, self.tune, self.layout = network, device, tune, layout(device)
        self.gradient = gradient
        self.bf16 = device.type == "cuda" or bfloat16_is_fast(device)

    def estimates(self, effort: int) -> bool:
        """Whether a latent is improved with the help of features of its analysis at this effort."""
        schedule = self._schedule(effort)
        return isinstance(schedule, shaping.Schedule) and schedule.guess is not None

    def _schedule(self, effort: int) -> shaping.Schedule | Schedule | None:
        if self.tune != "psnr":
            return REFINEMENT.get(effort)
        schedule = SHAPING.get(effort)
        if schedule is None or schedule.guess is None or self.gradient is not None:
            return schedule
        if schedule.steps > 1:
            return replace(schedule, guess=None)
        return shaping.ONCE if schedule.steps else None

    def improve(
        self,
        pixels: npt.NDArray[np.uint8],
        analysed: tuple[Tensor, ...],
        groups: Sequence[Sequence[Box]],
        quality: int,
        effort: int,
        progress: Progress | None,
    ) -> Improved | None:
        """A better latent for pixels [H, W, C], or None if none is looked for. Raises InputError.

        Args:
            analysed: the latent of the whole picture, in quantisation steps, which may be overwritten, and the features
                of `Analysed` where `estimates` says so.
            groups: the tiles, as boxes of the latent; those of a group, which are alike in shape, are coded together.
        """
        schedule = self._schedule(effort)
        if schedule is None:
            return None
        latent, *features = analysed
        hyper = [self.network.hyper_analysis(windows.stack(latent, boxes, self.device)) for boxes in groups]
        picture = _Picture(pixels, latent, tuple(features), groups, hyper, quality)
        if isinstance(schedule, shaping.Schedule):
            better = self._shape(picture, schedule, progress)
        else:
            better = self._refine(picture, schedule, progress)
        return Improved(self.network, better, hyper)

    @functools.cached_property
    def _differentiable(self) -> Hyperprior:
        return differentiable(self.network).to(memory_format=self.layout)  # type: ignore[call-overload]

    # For least error --------------------------------------------------------------------------------------------------

    def _shape(self, picture: _Picture, schedule: shaping.Schedule, progress: Progress | None) -> Tensor:
        pixels, latent, features, groups, hyper, quality = picture
        seen, whole = Box(0, 0, *pixels.shape[:2]), Box(0, 0, *latent.shape[2:])
        integer = torch.tensor([quality], device=self.device)
        t = integer.float() / QUALITY_STEPS
        drawing = self.network.at(t.item())
        rounded = torch.empty_like(latent)
        for step in range(max(1, schedule.steps)):
            keep, rate = schedule.at(step)
            for boxes, z in zip(groups, hyper, strict=True):
                y = windows.stack(latent, boxes, self.device)
                expected = self.network.expect(integer.expand(len(boxes)), z, y)
                y_hat = expected.coded
                slope = expected.slope(y, y_hat)
                if schedule.guess is not None and step == 0:
                    y = self._guessed(y, y_hat, slope, features, boxes, t, schedule.guess)
                    y_hat = expected.rounded(y)  # as if the means didn't move
                    slope = expected.slope(y, y_hat)
                if schedule.contexts:
                    slope += self._differentiable.prior.context_slope(z, y_hat, t.expand(len(boxes)))
                if schedule.steps:
                    y = shaping.cheaper(y, y_hat, slope, keep, rate, schedule.bits)
                for box, decoded, moved in zip(boxes, y_hat, y, strict=True):
                    rounded[(0, slice(None), *box.slices)] = decoded
                    latent[(0, slice(None), *box.slices)] = moved
            if not schedule.steps:
                break
            report = windows.part(progress, step / schedule.steps, 1 / schedule.steps)
            parts = grid(whole, WINDOW)
            for count, window in enumerate(parts, 1):
                # Half the halo: what lies farther away hardly matters.
                outer = window.grown(self.network.halo // 2, *whole.shape)
                y_hat = rounded[(..., *outer.slices)].to(self.device).contiguous(memory_format=self.layout)
                x = windows.load(pixels, outer.scaled(STRIDE).within(seen), self.device, self.layout)
                gradient = shaping.error_gradient(
                    drawing.synthesise, y_hat, x, t, bf16=self.bf16, straight=schedule.straight
                )[(..., *window.relative_to(outer).slices)]
                latent[(..., *window.slices)] -= shaping.far(gradient, t, rate).to(latent.device)
                if report:
                    report(count / len(parts))
        return latent

    def _guessed(
        self,
        y: Tensor,
        y_hat: Tensor,
        slope: Tensor,
        features: tuple[Tensor, ...],
        boxes: Sequence[Box],
        t: Tensor,
        guess: tuple[float, float],
    ) -> Tensor:
        """The latents y [B, M, h, w] of tiles, moved by the gradient as it is estimated."""
        assert self.gradient is not None
        keep, rate = guess
        fine, coarse = (windows.stack(f, boxes, self.device, n) for f, n in zip(features, (2, 1), strict=True))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            gradient = self.gradient(y_hat - y, Analysed(y, fine, coarse), t)
        return shaping.cheaper(y, y_hat, slope, keep, rate) - shaping.far(gradient, t, rate)

    # For how pictures look --------------------------------------------------------------------------------------------

    def _refine(self, picture: _Picture, schedule: Schedule, progress: Progress | None) -> Tensor:
        latent, groups = picture.latent, picture.groups
        refined, done, share = torch.empty_like(latent), 0, 1 / sum(map(len, groups))
        for boxes, zs in zip(groups, picture.hyper, strict=True):
            for box, z in zip(boxes, zs.split(1), strict=True):
                report = windows.part(progress, done * share, share)
                y = windows.stack(latent, [box], self.device)
                refined[(..., *box.slices)] = self._refine_tile(self._scene(picture, box, z), y, schedule, report)
                done += 1
        return refined

    def _scene(self, picture: _Picture, box: Box, z: Tensor) -> Scene:
        outer = box.grown(self.network.halo, *picture.latent.shape[2:])
        inner = box.relative_to(outer)
        own = box.scaled(STRIDE).within(Box(0, 0, *picture.pixels.shape[:2]))
        around = picture.latent[(..., *outer.slices)].to(self.device)
        t = torch.tensor([picture.quality / QUALITY_STEPS], device=self.device)
        return Scene(windows.load(picture.pixels, own, self.device, self.layout), around, inner.top, inner.left, z, t)

    def _refine_tile(self, scene: Scene, y: Tensor, schedule: Schedule, progress: Progress | None) -> Tensor:
        with torch.inference_mode(False):
            # What was computed in inference mode has no place in a graph: copies have.
            tensors = {name: getattr(scene, name).clone() for name in ("pixels", "around", "z", "t")}
            scene = replace(scene, **tensors)
            try:
                return refine(self._differentiable, scene, y.clone(), schedule, progress)
            except ImportError as error:
                raise InputError(
                    f"refinement for looks needs {error.name}: pip install 'calotype[eval]', or use effort 5"
                ) from error
