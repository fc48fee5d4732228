"""Training of what estimates gradients for an encoder (`calotype.models.gradient`): regression on those of pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calotype.models import shaping, tables
from calotype.models.gradient import LearnedGradient
from calotype.models.training.data import RandomCrops
from calotype.models.training.photos import VALIDATION_QUALITIES, encoder_of, spread_qualities, validation_photos
from calotype.models.training.recipe import Recipe
from calotype.models.training.tasks import Forward, Losses, Task, Validation
from calotype.models.zoo import describe


class GradientTask(Task):
    """The gradient at plainly rounded latents of the model in `start_from`; only of symbols that are coded.

    The loss of a sample is the share of the gradient's variance that is not explained. See `tasks.Task`.
    """

    def __init__(self, recipe: Recipe, device: torch.device, seed: int) -> None:
        if recipe.start_from is None:
            raise ValueError("gradients are estimated for finished weights: set start_from")
        spec = describe(recipe.model)
        if (spec.architecture, spec.tune) != ("hyperprior", "psnr"):
            raise ValueError(f"the encoder of {recipe.model} looks at no gradients: only that of hyperprior does")
        self.recipe, self.device = recipe, device
        self.encoder = encoder_of(recipe.start_from, device).eval().requires_grad_(False)
        self.model: nn.Module = LearnedGradient().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.crops = RandomCrops(recipe.train, batch=recipe.batch, crop=recipe.crop, seed=seed, device=device)
        self.photos = validation_photos(recipe)

    def losses(self, forward: Forward) -> Losses:
        r = self.recipe
        x = next(self.crops).float() / 255 - 0.5
        loss, coded = self._unexplained(forward, x, spread_qualities(r.batch, self.device))
        return Losses(loss.mean(), coded, None)

    def _unexplained(self, forward: Forward, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Share of the gradients' variance [B] that is left in pictures [B, 3, H, W]; mean share of coded latents."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            analysed = self.encoder.analyse_with_features(x, t)
            y = analysed.latent
            expected = self.encoder.prior.estimate(self.encoder.hyper_analysis(y), y, t)
            y_hat = expected.coded
            gradient = shaping.error_gradient(self.encoder.synthesise, y_hat, x, t, bf16=self.recipe.bf16)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            estimate = forward(y_hat - y, analysed, t)
        coded = expected.table >= tables.SKIP
        left, all_of_it = (((v * coded).square()).sum((1, 2, 3)) for v in (estimate.float() - gradient, gradient))
        return left / all_of_it.clamp(min=1e-3), coded.float().mean()

    @torch.no_grad()
    def validate(self) -> Validation:
        """Share of the variance that is explained; in place of the rate stands the share of latents that are coded."""
        points, losses = [], []
        for quality in VALIDATION_QUALITIES:
            t = torch.tensor([quality], device=self.device)
            left, coded = zip(*(self._unexplained(self.model, x.to(self.device), t) for x in self.photos), strict=True)
            losses.append(torch.cat(left).mean().item())
            points.append((torch.stack(coded).mean().item(), 1 - losses[-1]))
        return Validation(tuple(points), sum(losses) / len(losses), "R2")
