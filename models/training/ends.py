"""Training of a synthesis with weights of its own at either end of the quality range, for latents as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calotype.models import shaping
from calotype.models.distortion import squared_error
from calotype.models.hyperprior import Hyperprior, HyperpriorConfig
from calotype.models.training.data import RandomCrops
from calotype.models.training.photos import encoder_of, validate, validation_photos
from calotype.models.training.recipe import Recipe
from calotype.models.training.tasks import Forward, Losses, Task, Validation, evened
from calotype.models.zoo import SYNTHESIS, describe, has_ends, load_parameters

_GOLDEN = (5**0.5 - 1) / 2


class EndsTask(Task):
    """The synthesis of `hyperprior` for least error; all else, and so what is coded, stays as in `start_from`.

    All crops of a batch have one quality, for which the weights are found once; batches in turn fill the range evenly.
    See `tasks.Task`.
    """

    def __init__(self, recipe: Recipe, device: torch.device, seed: int, step: int) -> None:
        if recipe.start_from is None:
            raise ValueError("ends are trained for finished weights: set start_from")
        spec = describe(recipe.model)
        if (spec.architecture, spec.tune) != ("hyperprior", "psnr"):
            raise ValueError(f"the synthesis of {recipe.model} has no ends: only that of hyperprior has")
        self.recipe, self.device, self.step = recipe, device, step
        self.encoder = encoder_of(recipe.start_from, device)
        model = Hyperprior(HyperpriorConfig(synthesis_ends=True))
        load_parameters(model, recipe.start_from)
        if not has_ends(recipe.start_from):
            model.begin_ends()
        self.model: nn.Module = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith(SYNTHESIS))
        self.crops = RandomCrops(recipe.train, batch=recipe.batch, crop=recipe.crop, seed=seed, device=device)
        self.photos = validation_photos(recipe)

    def losses(self, forward: Forward) -> Losses:
        r = self.recipe
        x = next(self.crops).float() / 255 - 0.5
        self.step += 1
        t = torch.full((r.batch,), self.step * _GOLDEN % 1, device=self.device)
        self.model.eval()  # rates are not trained, and latents are rounded as in coding
        push = shaping.push(self.encoder, x, t, bf16=r.bf16)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=r.bf16):
            out = forward(x, t, push)
            worse = squared_error(x, t)(out.x_hat) / r.crop**2
        bpp = (out.latent_bits + out.hyper_bits).mean() / r.crop**2
        return Losses(evened(worse, t, r.rate_weighting).mean(), bpp, (out.x_hat.detach() - x).square().mean())

    def validate(self) -> Validation:
        """Rate and 8-bit PSNR of the validation photographs; the loss is that of training."""

        def score(x: Tensor, drawn: Tensor, _bpp: Tensor, t: Tensor) -> Tensor:
            return evened(squared_error(x, t)(drawn) / (x.shape[2] * x.shape[3]), t, self.recipe.rate_weighting)

        return validate(self.model, self.photos, self.device, score, self.encoder)
