"""Training of a second synthesis for the same latents: pictures that look right instead of those of least error."""

from __future__ import annotations

import copy
import random

import torch
from torch import Tensor, nn

from calotype.models import perceptual, shaping, structure
from calotype.models.quantizers import lagrangian
from calotype.models.training.adversary import Adversary
from calotype.models.training.data import RandomCrops, random_part
from calotype.models.training.photos import encoder_of, spread_qualities, validate, validation_photos
from calotype.models.training.recipe import Recipe
from calotype.models.training.tasks import Forward, Losses, Task, Validation
from calotype.models.zoo import SYNTHESIS, describe


class VisualTask(Task):
    """The synthesis of `hyperprior` for features, for structure and against a discriminator; all else stays.

    See `tasks.Task`.
    """

    def __init__(self, recipe: Recipe, device: torch.device, seed: int, step: int) -> None:
        if recipe.start_from is None:
            raise ValueError("a second synthesis needs finished weights: set start_from")
        if describe(recipe.model).architecture != "hyperprior":
            raise ValueError(f"the model {recipe.model} has no second synthesis: only hyperprior has one")
        self.recipe, self.device, self.step = recipe, device, step
        self.encoder = encoder_of(recipe.start_from, device)
        # Its latents are shaped for the synthesis of least error; its own has the same weights at every quality.
        self.model: nn.Module = copy.deepcopy(self.encoder).drop_ends()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith(SYNTHESIS))
        self.crops = RandomCrops(recipe.train, batch=recipe.batch, crop=recipe.crop, seed=seed, device=device)
        self.random = random.Random(seed)
        self.photos = validation_photos(recipe)
        self.adversary = Adversary(device, bf16=recipe.bf16)
        self.stateful = {"discriminator": self.adversary.network, "adversary": self.adversary.optimizer}

    @property
    def phase(self) -> int:
        return int(self.recipe.adversarial_from is not None and self.step > self.recipe.adversarial_from)

    def losses(self, forward: Forward) -> Losses:
        r = self.recipe
        self.step += 1
        x = next(self.crops).float() / 255 - 0.5
        t = spread_qualities(r.batch, self.device)
        self.model.eval()  # rates are not trained, and latents are rounded as in coding
        push = shaping.push(self.encoder, x, t, bf16=r.bf16)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=r.bf16):
            out = forward(x, t, push)
        look = random_part(self.random, r.crop, r.look)
        # The losses are driven back as far as the picture here, so that the discriminator can be weighed against them.
        drawn = out.x_hat.detach().float().requires_grad_()
        mse = (drawn - x).square().mean((1, 2, 3))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=r.bf16):
            with torch.no_grad():
                reference = perceptual.features(x[look])
            seen = perceptual.distance(reference, perceptual.features(drawn[look]))
        built = structure.distance(structure.scales(x[look]), structure.scales(drawn[look]))
        loss = lagrangian(t) ** (1 - r.rate_weighting) * 255**2 / 4 * mse
        loss = (loss + r.feature_weight * seen + r.structure_weight * built).mean()
        (gradient,) = torch.autograd.grad(loss, drawn)
        if r.adversarial_from is not None and self.step > r.adversarial_from:
            part = drawn[look].detach().requires_grad_()
            self.adversary.learn(x[look], part.detach())
            if self.step > r.adversarial_from + r.warmup_steps:
                gradient[look] += self.adversary.push(part, gradient[look])
        pull = (out.x_hat * gradient).sum()
        bpp = (out.latent_bits + out.hyper_bits).mean() / r.crop**2
        return Losses(loss.detach() + pull - pull.detach(), bpp, mse.detach().mean())

    def validate(self) -> Validation:
        """Rate and 8-bit PSNR of the validation photographs; the loss is how far they look apart, as in training."""
        r = self.recipe

        def score(x: Tensor, drawn: Tensor, _bpp: Tensor, _t: Tensor) -> Tensor:
            seen = perceptual.distance(perceptual.features(x), perceptual.features(drawn))
            built = structure.distance(structure.scales(x), structure.scales(drawn))
            return r.feature_weight * seen + r.structure_weight * built

        return validate(self.model, self.photos, self.device, score, self.encoder)
