"""Vector quantisation: codebooks of latent vectors, and the clustering that makes and shrinks them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_STRIP = 2048
"""Vectors that are compared with all codewords at a time."""


class Codebook(nn.Module):
    """K codewords of width D, reparametrised as a frozen basis times a learned map (SimVQ, arXiv 2411.02038).

    The map moves all codewords together, so none is left behind unused while the latents move.
    """

    basis: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("basis", torch.randn(size, width) / width**0.5)
        self.map = nn.Parameter(torch.eye(width))

    @property
    def codewords(self) -> Tensor:
        """[K, D]"""
        with torch.autocast(self.map.device.type, enabled=False):
            return self.basis @ self.map

    @torch.no_grad()
    def seed(self, codewords: Tensor) -> None:
        """Begin anew from given codewords [K, D]."""
        self.basis.copy_(codewords)
        self.map.copy_(torch.eye(self.map.shape[0]))

    @torch.no_grad()
    def nearest(self, y: Tensor) -> Tensor:
        """Indexes [B, H, W] int64 of the codewords nearest to vectors [B, D, H, W]."""
        with torch.autocast(y.device.type, enabled=False):
            return nearest(y.movedim(1, -1).float(), self.codewords)

    def forward(self, indexes: Tensor) -> Tensor:
        """The codewords [B, D, H, W] of indexes [B, H, W]."""
        return self.codewords[indexes].movedim(-1, 1)


def nearest(vectors: Tensor, codewords: Tensor) -> Tensor:
    """Index [...] of the codeword [K, D] nearest to each vector [..., D]."""
    found = [half_distances(part, codewords).argmin(1) for part in vectors.flatten(0, -2).split(_STRIP)]
    return torch.cat(found).view(vectors.shape[:-1])


def half_distances(vectors: Tensor, codewords: Tensor) -> Tensor:
    """Half the squared distances [N, K] of vectors [N, D] to codewords [K, D], less half the squares of the vector."""
    return torch.addmm(codewords.square().sum(1) / 2, vectors, codewords.t(), alpha=-1)


@torch.no_grad()
def cluster(vectors: Tensor, count: int, *, weights: Tensor | None = None, iterations: int = 8) -> Tensor:
    """`count` centres [count, D] of `vectors` [N, D] by k-means; a centre that loses all its vectors takes a new one.

    `weights` [N] say how often each vector occurs. With N = `count` or fewer the vectors themselves are repeated.
    """
    weights = vectors.new_ones(len(vectors)) if weights is None else weights.float().clamp(min=1e-6)
    centres = vectors[_draw(weights, min(count, len(vectors)))]
    if len(centres) < count:
        return centres[torch.arange(count) % len(centres)]
    for _ in range(iterations):
        owner = nearest(vectors, centres)
        mass = torch.zeros(count, device=vectors.device).index_add_(0, owner, weights)
        sums = torch.zeros_like(centres).index_add_(0, owner, vectors * weights[:, None])
        centres = sums / mass.clamp(min=1e-6)[:, None]
        empty = (mass == 0).nonzero()[:, 0]
        if len(empty):
            centres[empty] = vectors[_draw(weights, len(empty))]
    return centres


def _draw(weights: Tensor, count: int) -> Tensor:
    """Distinct numbers drawn in proportion to weights (exponential races: multinomial has a limit on categories)."""
    return (torch.empty_like(weights).exponential_() / weights).topk(count, largest=False).indices
