"""Muon for the matrices of convolutions, AdamW for everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by its nearest orthogonal matrix (Jordan et al., 2024).

    Five Newton-Schulz steps in bfloat16 orthogonalise the Nesterov momentum of every weight, seen as a matrix
    [out, rest]; the update is scaled by 0.2 sqrt(max(rows, columns)) so that its entries are about as large as Adam's.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            gradients = {p: p.grad for p in group["params"] if p.grad is not None}
            momenta = [self._momentum(p) for p in gradients]
            torch._foreach_lerp_(momenta, list(gradients.values()), 1 - group["momentum"])
            updates = torch._foreach_lerp(list(gradients.values()), momenta, group["momentum"])
            # Matrices of one shape together: a GPU would wait for the host to start products of single ones.
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p, update in zip(gradients, updates, strict=True):
                matrix = update.reshape(p.shape[0], -1)
                alike[matrix.shape].append((p, matrix))
            for shape, members in alike.items():
                directions = orthogonalise(torch.stack([matrix for _, matrix in members]))
                scale = 0.2 * math.sqrt(max(shape))
                for (p, _), direction in zip(members, directions, strict=True):
                    p.add_(direction.reshape(p.shape), alpha=-group["lr"] * scale)

    def _momentum(self, p: Tensor) -> Tensor:
        state: dict[str, Any] = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum: Tensor = state["momentum"]
        return momentum


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximately the nearest (semi-)orthogonal matrices [..., rows, columns]: quintic Newton-Schulz iterations."""
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


def build_optimizers(model: nn.Module, *, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon takes every weight that is a matrix of at least 32 x 32, AdamW the rest."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for p in model.parameters():
        is_matrix = p.ndim == 4 and p.shape[0] >= 32 and p[0].numel() >= 32
        (matrices if is_matrix else others).append(p)
    return [Muon(matrices, muon_lr), torch.optim.AdamW(others, lr=adam_lr, weight_decay=0.0, betas=(0.9, 0.98))]
