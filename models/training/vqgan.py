"""Training of the token model, in two runs: first pictures through codebooks, then maps of tokens."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor, nn

from calotype.models import perceptual
from calotype.models.codebook import cluster, nearest
from calotype.models.restoration import WINDOW
from calotype.models.tokens import PASSES, bits, interleave, ranks
from calotype.models.training.adversary import Adversary
from calotype.models.training.data import RandomCrops, find_photos, load_rgb, random_part, to_tensor
from calotype.models.training.photos import validation_photos
from calotype.models.training.recipe import Recipe
from calotype.models.training.tasks import Forward, Losses, Task, Validation
from calotype.models.vqgan import STRIDE, Vqgan
from calotype.models.zoo import SYNTHESIS, load_parameters

COMMITMENT = 4.0
LADDER_WEIGHTS = (1.0, 1.5, 2.0, 2.5, 3.0)
"""How often each step of the ladder is drawn: larger codebooks have more to learn."""
SEEDS = 60000
"""Vectors that codebooks are clustered from."""


def _load(recipe: Recipe, device: torch.device) -> Vqgan:
    network = Vqgan().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if recipe.start_from is not None:
        load_parameters(network, recipe.start_from)
    return network


class PictureTask(Task):
    """Transforms and codebooks of `vqgan`: L1, features, commitment, and a discriminator. See `tasks.Task`.

    Codebooks are clustered from latents at the first step and at `recipe.recluster`. In the stage `synthesis` only what
    draws pictures learns; tokens and their prior stay.
    """

    def __init__(self, recipe: Recipe, device: torch.device, seed: int, step: int) -> None:
        self.recipe, self.device, self.step = recipe, device, step
        self.network = _load(recipe, device)
        self.network.prior.requires_grad_(False)
        self.network.restorer.requires_grad_(False)
        if recipe.stage == "synthesis":
            for name, parameter in self.network.named_parameters():
                parameter.requires_grad_(name.startswith(SYNTHESIS))
        self.model: nn.Module = self.network
        self.crops = RandomCrops(recipe.train, batch=recipe.batch, crop=recipe.crop, seed=seed, device=device)
        self.random = random.Random(seed)
        self.photos = validation_photos(recipe)
        self.adversary = Adversary(device, bf16=recipe.bf16)
        self.stateful = {"discriminator": self.adversary.network, "adversary": self.adversary.optimizer}
        self.steps = torch.arange(len(self.network.codebooks), device=device)

    @property
    def phase(self) -> int:
        adversarial_from = self.recipe.adversarial_from
        return (self.step > self.recipe.features_from) + (adversarial_from is not None and self.step > adversarial_from)

    def losses(self, forward: Forward) -> Losses:
        r = self.recipe
        if (self.step == 0 and r.start_from is None) or self.step in r.recluster:
            self._cluster()
        self.step += 1
        x = self._draw()
        steps = torch.multinomial(torch.tensor(LADDER_WEIGHTS), r.batch, replacement=True).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=r.bf16):
            out = forward(x, steps)
        # The losses of the picture are driven back as far as the picture here, so that the discriminator can be
        # weighed against them; the network then gets one gradient.
        drawn = out.x_hat.detach().requires_grad_()
        look = random_part(self.random, r.crop, r.look)
        picture = (drawn - x).abs().mean()
        if self.step > r.features_from:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=r.bf16):
                with torch.no_grad():
                    reference = perceptual.features(x[look])
                picture += r.feature_weight * perceptual.distance(reference, perceptual.features(drawn[look])).mean()
        (gradient,) = torch.autograd.grad(picture, drawn)
        if r.adversarial_from is not None and self.step > r.adversarial_from:
            part = drawn[look].detach().requires_grad_()
            self.adversary.learn(x[look], part.detach())
            if self.step > r.adversarial_from + r.warmup_steps:
                gradient[look] += self.adversary.push(part, gradient[look])
        # Per pixel: the linear start of the latent is orthonormal.
        y, codewords = out.latent, out.codewords
        off, back = ((a - b.detach()).square().sum(1).mean() / STRIDE**2 for a, b in ((y, codewords), (codewords, y)))
        pull = (out.x_hat * gradient).sum()
        loss = picture.detach() + COMMITMENT * (off + back) + pull - pull.detach()
        sizes = torch.tensor([math.log2(s) for s in self.network.config.ladder], device=self.device)
        return Losses(loss, sizes[steps].mean() / STRIDE**2, (drawn.detach() - x).square().mean())

    def _draw(self) -> Tensor:
        return next(self.crops).float() / 255 - 0.5

    @torch.no_grad()
    def _cluster(self) -> None:
        """The largest codebook from latents, each other one from the next larger."""
        largest = len(self.steps) - 1
        vectors: list[Tensor] = []
        while sum(len(v) for v in vectors) < SEEDS:
            x = self._draw()
            y = self.network.latent(x, self.steps[largest:].expand(len(x)))
            vectors.append(y.movedim(1, -1).flatten(0, 2))
        sample = torch.cat(vectors)
        weights = torch.ones(len(sample), device=self.device)
        for number in reversed(range(len(self.steps))):
            book = self.network.codebook(number)
            centres = cluster(sample, len(book.basis), weights=weights)
            book.seed(centres)
            counts = torch.zeros(len(centres), device=self.device)
            weights = counts.index_add_(0, nearest(sample, centres), weights)
            sample = centres

    @torch.no_grad()
    def validate(self) -> Validation:
        """For each step of the ladder (log2 K bits per pixel, PSNR); the loss without discriminator."""
        points, losses = [], []
        for number, size in enumerate(self.network.config.ladder):
            psnrs = []
            for photo in self.photos:
                x = photo.to(self.device)
                out = self.model(x, self.steps[number : number + 1])
                drawn = torch.round((out.x_hat.clamp(-0.5, 0.5) + 0.5) * 255) / 255 - 0.5
                psnrs.append(-10 * math.log10((drawn - x).square().mean().item()))
                seen = perceptual.distance(perceptual.features(x), perceptual.features(drawn))
                losses.append((drawn - x).abs().mean().item() + self.recipe.feature_weight * seen.item())
            points.append((math.log2(size) / STRIDE**2, sum(psnrs) / len(psnrs)))
        return Validation(tuple(points), sum(losses) / len(losses))


class TokenTask(Task):
    """Prior and restorer of `vqgan`, on token maps that its finished transforms make once. See `tasks.Task`."""

    def __init__(self, recipe: Recipe, device: torch.device, seed: int) -> None:
        self.recipe, self.device = recipe, device
        self.network = _load(recipe, device)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name.startswith(("prior.", "restorer.")))
        self.model: nn.Module = self.network
        self.generator = torch.Generator().manual_seed(seed)
        self.random = random.Random(seed)
        self.maps = self._maps([to_tensor(load_rgb(p)) for p in find_photos(recipe.train)])
        self.validation = self._maps(validation_photos(recipe))
        counts = [
            torch.cat([m.flatten() for m in maps]).long().bincount(minlength=size)
            for maps, size in zip(self.maps, self.network.config.ladder, strict=True)
        ]
        books = [self.network.codebook(number).codewords for number in range(len(counts))]
        self.network.prior.begin(books, [c.to(device) for c in counts])

    @torch.inference_mode()
    def _maps(self, photos: list[Tensor]) -> list[list[Tensor]]:
        """For each step of the ladder the maps [H, W] of all photographs."""
        self.network.eval()
        maps: list[list[Tensor]] = [[] for _ in self.network.codebooks]
        for photo in photos:
            x = photo[:, :, : photo.shape[2] // STRIDE * STRIDE, : photo.shape[3] // STRIDE * STRIDE].to(self.device)
            for number, found in enumerate(maps):
                found.append(self.network.analyse(x, number)[0].to(torch.int16))
        self.network.train()
        return maps

    def losses(self, forward: Forward) -> Losses:
        step = self.random.randrange(len(self.maps))
        side = WINDOW
        chosen = self.random.choices([m for m in self.maps[step] if min(m.shape) >= side], k=self.recipe.batch)
        tokens = torch.stack([self._crop(m, side) for m in chosen]).long().to(self.device)
        known, wanted = (torch.stack(m).to(self.device) for m in zip(*(self._pass(side) for _ in chosen), strict=True))
        cost = (bits(self.network.prior(tokens, known, step), tokens) * wanted).sum() / wanted.sum().clamp(min=1)
        # Losses of up to a half are drawn, to learn well what a fifth asks for.
        left = torch.rand(len(tokens), side, side, generator=self.generator) > 0.5 * torch.rand(len(tokens), 1, 1)
        left = left.to(self.device)
        guessed = self._restoration_bits(tokens, left, step)
        size = math.log2(self.network.config.ladder[step])
        loss = (cost + guessed) / size
        return Losses(loss, cost.detach() / STRIDE**2, None)

    def _restoration_bits(self, tokens: Tensor, known: Tensor, step: int) -> Tensor:
        """Mean bits of the lost tokens as the restorer guesses them; maps are one window wide."""
        book = self.network.codebook(step)
        logits = self.network.restorer.window(book(tokens), known, book.codewords)
        lost = ~known
        return bits(logits.transpose(1, 2).unflatten(2, tokens.shape[1:]), tokens)[lost].mean()

    def _crop(self, tokens: Tensor, side: int) -> Tensor:
        top, left = (self.random.randrange(size - side + 1) for size in tokens.shape)
        return tokens[top : top + side, left : left + side]

    def _pass(self, side: int) -> tuple[Tensor, Tensor]:
        """What is known and what is coded [side, side] in a pass of a packet, drawn as often as tokens lie in them."""
        packets = self.random.choice((1, 1, 1, 4, 5, 8))
        # Any corner of a map may be the first of a crop.
        top, left = self.random.randrange(4), self.random.randrange(20)
        box = (slice(top, top + side), slice(left, left + side))
        own = interleave(side + 4, side + 20, packets)[box] == self.random.randrange(packets)
        rank = ranks(side + 4, side + 20)[box]
        number = self.random.choices(range(PASSES), (1, 1, 2, 4, 8))[0]
        return own & (rank < number), own & (rank == number)

    @torch.no_grad()
    def validate(self) -> Validation:
        """For each step of the ladder (bits per pixel in one packet, share of log2 K); the loss is the mean share."""
        points = []
        for step, maps in enumerate(self.validation):
            total, count = 0.0, 0
            for tokens in maps:
                tokens = tokens[None].long()
                rank = ranks(*tokens.shape[1:])
                for number in range(PASSES):
                    logits = self.network.prior(tokens, (rank < number)[None], step)
                    total += bits(logits, tokens)[0][rank == number].sum().item()
                count += tokens.numel()
            mean = total / count
            points.append((mean / STRIDE**2, mean / math.log2(self.network.config.ladder[step])))
        return Validation(tuple(points), sum(p[1] for p in points) / len(points), measure="share")
