"""What a run trains: one task a kind of model; it draws batches, gives their loss and judges the weights."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calotype.models.quantizers import lagrangian
from calotype.models.training.recipe import Recipe

Forward = Callable[..., Any]
"""The network, or a compiled or parallel wrapper of it."""


class Losses(NamedTuple):
    """Of a batch: the loss to minimise; for the log, mean bpp and mean squared error of samples in [0, 1], if any."""

    loss: Tensor
    bpp: Tensor
    mse: Tensor | None


@dataclass(frozen=True)
class Validation:
    """Means over the validation set: per quality (estimated bpp, `measure`), and the loss.

    The measure is PSNR in dB of 8 bits; where nothing is drawn, for a prior of tokens its share of log2 K bits, for
    estimated gradients what share of their variance is explained.
    """

    points: tuple[tuple[float, float], ...]
    loss: float
    measure: str = "psnr"


class Task(abc.ABC):
    """Batches, loss and validation of one kind of model."""

    model: nn.Module
    stateful: Mapping[str, Any] = {}
    """What else a checkpoint must hold: objects with `state_dict` and `load_state_dict`."""

    @property
    def phase(self) -> int:
        """Changes when the loss begins to mean something else: values of before say nothing of divergence then."""
        return 0

    @abc.abstractmethod
    def losses(self, forward: Forward) -> Losses:
        """Draw a batch and run it through `forward`."""

    @abc.abstractmethod
    def validate(self) -> Validation:
        """Judge `model` as it is."""


def loss_per_sample(bpp: Tensor, mse: Tensor, t: Tensor, weighting: float) -> Tensor:
    """bpp + λ 255² MSE, `evened`; all [B]."""
    return evened(bpp + lagrangian(t) * 255**2 * mse, t, weighting)


def evened(cost: Tensor, t: Tensor, weighting: float) -> Tensor:
    """Bits per pixel, of rate and of distortion, divided by 4 λ^weighting so that all rates count about alike; [B]."""
    return cost / (4 * lagrangian(t) ** weighting)


def make_task(recipe: Recipe, device: torch.device, seed: int, step: int) -> Task:
    """The task of the recipe's model and stage, to go on from `step`.

    Raises WeightsError, FileNotFoundError, ValueError for unusable settings.
    """
    from calotype.models.training.ends import EndsTask
    from calotype.models.training.gradient import GradientTask
    from calotype.models.training.photos import PhotoTask
    from calotype.models.training.video import ClipTask
    from calotype.models.training.visual import VisualTask
    from calotype.models.training.vqgan import PictureTask, TokenTask

    if recipe.model == "vqgan":
        return TokenTask(recipe, device, seed) if recipe.stage == "tokens" else PictureTask(recipe, device, seed, step)
    if recipe.stage == "gradient":
        return GradientTask(recipe, device, seed)
    if recipe.stage == "ends":
        return EndsTask(recipe, device, seed, step)
    if recipe.stage == "visual":
        return VisualTask(recipe, device, seed, step)
    return ClipTask(recipe, device, seed) if recipe.model == "video" else PhotoTask(recipe, device, seed, step)
