"""What a run trains: one task a kind of model; it draws batches, gives their loss and judges the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from calotype.models.quantizers import lagrangian
from calotype.models.training.recipe import Recipe

Forward = Callable[..., Any]
"""The network, or a compiled or parallel wrapper of it."""


class Losses(NamedTuple):
    """Of a batch: the loss to minimise; for the log, mean bpp and mean squared error of samples in [0, 1]."""

    loss: Tensor
    bpp: Tensor
    mse: Tensor


@dataclass(frozen=True)
class Validation:
    """Means over the validation set: per quality (estimated bpp, PSNR in dB of 8 bits), and the loss."""

    points: tuple[tuple[float, float], ...]
    loss: float


class Task(Protocol):
    """Batches, loss and validation of one kind of model."""

    model: nn.Module

    def losses(self, forward: Forward) -> Losses:
        """Draw a batch and run it through `forward`."""

    def validate(self) -> Validation:
        """Judge `model` as it is."""


def loss_per_sample(bpp: Tensor, mse: Tensor, t: Tensor, weighting: float) -> Tensor:
    """bpp + λ 255² MSE, divided by 4 λ^weighting so that all rates count about alike; all [B]."""
    lam = lagrangian(t)
    return (bpp + lam * 255**2 * mse) / (4 * lam**weighting)


def make_task(recipe: Recipe, device: torch.device, seed: int) -> Task:
    """The task of the recipe's model. Raises WeightsError, FileNotFoundError, ValueError for unusable settings."""
    from calotype.models.training.photos import PhotoTask
    from calotype.models.training.video import ClipTask

    tasks: dict[str, type[PhotoTask] | type[ClipTask]] = {"video": ClipTask}
    return tasks.get(recipe.model, PhotoTask)(recipe, device, seed)
