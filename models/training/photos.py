"""Training of the image models: random crops of photographs at random qualities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from calotype.models import shaping, tables
from calotype.models.distortion import DISTORTIONS
from calotype.models.exact import integerise
from calotype.models.hyperprior import Hyperprior, HyperpriorConfig
from calotype.models.quantizers import QUALITY_STEPS
from calotype.models.training.counting import SymbolCounts
from calotype.models.training.data import RandomCrops, find_photos, load_rgb, to_tensor
from calotype.models.training.equalising import equalise
from calotype.models.training.recipe import Recipe
from calotype.models.training.tasks import Forward, Losses, Task, Validation, evened
from calotype.models.zoo import architecture, describe, has_ends, load_parameters

FITTED_CROPS, FITTED_SIDE = 800, 448
"""To count symbols on: how many crops, of so many pixels each way."""
EQUALISED_CROPS = 100
"""To see on what hidden features hold."""
VALIDATION_QUALITIES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)


def validation_photos(recipe: Recipe) -> list[Tensor]:
    """[1, 3, H, W] each, with sides cut to multiples of 64."""
    photos = find_photos(recipe.validation)
    stride = max(1, len(photos) // recipe.validation_items)
    tensors = [to_tensor(load_rgb(p)) for p in photos[::stride][: recipe.validation_items]]
    return [x[:, :, : x.shape[2] // 64 * 64, : x.shape[3] // 64 * 64] for x in tensors]


def encoder_of(path: Path, device: torch.device) -> Hyperprior:
    """`hyperprior` with the parameters of a checkpoint or of shipped weights, before export, for others to train by."""
    network = Hyperprior(HyperpriorConfig(synthesis_ends=has_ends(path), packed=True))
    load_parameters(network, path)
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def spread_qualities(batch: int, device: torch.device) -> Tensor:
    """[B] in [0, 1), one from each of B equal ranges, so that their mix varies little from step to step."""
    return (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch


@torch.no_grad()
def validate(
    model: nn.Module,
    photos: Sequence[Tensor],
    device: torch.device,
    score: Callable[..., Tensor],
    encoder: Hyperprior | None = None,
) -> Validation:
    """Estimated rate and 8-bit PSNR by quality; the loss is the mean of `score` of (x, decoded, bpp [1], t [1]).

    Latents are shaped for `encoder`, if there is one.
    """
    points, losses = [], []
    for quality in VALIDATION_QUALITIES:
        t = torch.tensor([quality], device=device)
        rates, psnrs = [], []
        for photo in photos:
            x = photo.to(device)
            out = model(x, t) if encoder is None else model(x, t, shaping.push(encoder, x, t, bf16=False))
            drawn = torch.round((out.x_hat.clamp(-0.5, 0.5) + 0.5) * 255) / 255 - 0.5
            bpp = (out.latent_bits + out.hyper_bits) / (x.shape[2] * x.shape[3])
            rates.append(bpp.item())
            psnrs.append(-10 * math.log10(max((drawn - x).square().mean().item(), 1e-10)))
            losses.append(score(x, drawn, bpp, t).item())
        points.append((sum(rates) / len(rates), sum(psnrs) / len(psnrs)))
    return Validation(tuple(points), sum(losses) / len(losses))


@torch.no_grad()
def fit_image_prior(model: Hyperprior, folder: Path, *, shaped: bool) -> None:
    """Fit the integers and the tables of `model.prior` to crops of the photographs below `folder`.

    Hidden features are spread over their range (`equalising`). Then what is coded takes the place of Gaussians. The
    crops' qualities fill their range evenly. `shaped` is whether an encoder shapes the latents (`models.shaping`).
    """

    def use() -> None:
        for x, quality in _crops(folder, EQUALISED_CROPS):
            t = quality.float() / QUALITY_STEPS
            y = model.analyse(x, t)
            model.prior.estimate(model.hyper_analysis(y), y, t)

    equalise(model.prior, use)
    network = integerise(model)
    counts = SymbolCounts(model.tables.half_widths, 0)
    for x, quality in _crops(folder, FITTED_CROPS):
        t = quality.float() / QUALITY_STEPS
        y = network.analyse(x, t)
        z = network.hyper_analysis(y)
        if shaped:
            expected = network.expect(quality, z, y)
            slope = expected.slope(y, expected.coded)
            y = shaping.shaped_once(network.synthesise, y, expected.coded, slope, x, t, bf16=False)
        counts.of(network.code((1, *y.shape[2:]), quality, y, z))
    model.prior.frequencies.copy_(tables.fitted_frequencies(counts.rows, model.prior.laws))


def _crops(folder: Path, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Crops [1, 3, H, W] in [-0.5, 0.5], and qualities [1] as integers, which rise evenly from crop to crop."""
    crops = RandomCrops(folder, batch=1, crop=FITTED_SIDE, seed=0)
    for number in range(count):
        yield next(crops).float() / 255 - 0.5, torch.tensor([QUALITY_STEPS * (2 * number + 1) // (2 * count)])


class PhotoTask(Task):
    """Photographs for `hyperprior` and its like, for least error or for how pictures look. See `tasks.Task`."""

    def __init__(self, recipe: Recipe, device: torch.device, seed: int, step: int) -> None:
        self.recipe, self.device, self.step = recipe, device, step
        spec = describe(recipe.model)
        self.distortion = DISTORTIONS[spec.tune]
        self.model: nn.Module = architecture(spec.architecture).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if recipe.shaped_from is not None and not isinstance(self.model, Hyperprior):
            raise ValueError("only latents of hyperprior are shaped: leave out shaped_from")
        if recipe.start_from is not None:
            load_parameters(self.model, recipe.start_from)
        self.crops = RandomCrops(recipe.train, batch=recipe.batch, crop=recipe.crop, seed=seed, device=device)
        self.photos = validation_photos(recipe)

    @property
    def phase(self) -> int:
        return int(self.recipe.shaped_from is not None and self.step > self.recipe.shaped_from)

    def losses(self, forward: Forward) -> Losses:
        r = self.recipe
        self.step += 1
        x = next(self.crops).float() / 255 - 0.5
        t = spread_qualities(r.batch, self.device)
        # Beside the network that learns, so that this may be compiled, or wrapped for several devices.
        encoder = self._encoder()
        push = None if encoder is None else shaping.push(encoder, x, t, bf16=r.bf16)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=r.bf16):
            out = forward(x, t) if push is None else forward(x, t, push)
            worse = self.distortion(x, t)(out.x_hat) / r.crop**2
        bpp = (out.latent_bits + out.hyper_bits) / r.crop**2
        mse = (out.x_hat.detach() - x).square().mean()
        return Losses(evened(bpp + worse, t, r.rate_weighting).mean(), bpp.mean(), mse)

    def validate(self) -> Validation:
        """Estimated rate and 8-bit PSNR of the validation photographs."""

        def score(x: Tensor, drawn: Tensor, bpp: Tensor, t: Tensor) -> Tensor:
            worse = self.distortion(x, t)(drawn) / (x.shape[2] * x.shape[3])
            return evened(bpp + worse, t, self.recipe.rate_weighting)

        return validate(self.model, self.photos, self.device, score, self._encoder())

    def _encoder(self) -> Hyperprior | None:
        """What latents are shaped for, if they are."""
        return self.model if self.phase and isinstance(self.model, Hyperprior) else None
