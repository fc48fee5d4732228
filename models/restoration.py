"""Restoration of lost tokens: a bidirectional transformer that fills the gaps from what is left around them.

After Mao et al., "Extreme Image Compression using Fine-tuned VQGANs" (DCC 2024), and Chang et al., "MaskGIT" (CVPR
2022), with one step of prediction. It runs in float after entropy decoding: what it guesses is never coded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 16
"""Side of the square of tokens that see each other."""
HALO = 4
"""Tokens around the part of a window whose predictions are used."""


class Attention(nn.Module):
    """Pre-norm attention and a feed-forward layer, [B, N, C] both ways."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_in = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mid = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_in(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.project(F.gelu(self.expand(self.norm_mid(x))))


class Restorer(nn.Module):
    """From codewords with gaps to logits over a codebook.

    Args:
        width: of a codeword.
    """

    def __init__(self, width: int, *, hidden: int = 192, layers: int = 4, heads: int = 6) -> None:
        super().__init__()
        self.enter = nn.Linear(width, hidden)
        self.lost = nn.Parameter(torch.zeros(hidden))
        self.places = nn.Parameter(0.02 * torch.randn(WINDOW * WINDOW, hidden))
        self.layers = nn.ModuleList(Attention(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.leave = nn.Linear(hidden, width)
        self.bias = nn.Linear(hidden, 1)

    def window(self, codewords: Tensor, known: Tensor, codebook: Tensor) -> Tensor:
        """Logits [B, WINDOW², K] of windows of codewords [B, D, WINDOW, WINDOW] where `known` [B, WINDOW, WINDOW]."""
        x = torch.where(known.flatten(1)[:, :, None], self.enter(codewords.flatten(2).transpose(1, 2)), self.lost)
        x = x + self.places
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        # A codeword is as likely as the predicted vector is near to it, on a learned scale.
        guess, sharpness = self.leave(x).float(), F.softplus(self.bias(x).float() + 1)
        return sharpness * (guess @ codebook.t() - codebook.square().sum(1) / 2)

    def forward(self, codewords: Tensor, known: Tensor, codebook: Tensor) -> Tensor:
        """The codewords [B, D, H, W] with each that is not `known` [B, H, W] replaced by its expectation.

        `codebook` is [K, D]. What was known stays as it is.
        """
        height, width = known.shape[1:]
        core = WINDOW - 2 * HALO
        bottom, right = -height % core + HALO, -width % core + HALO
        padded = F.pad(codewords, (HALO, right, HALO, bottom))
        seen = F.pad(known, (HALO, right, HALO, bottom))
        out = codewords.clone()
        for top in range(0, height, core):
            for left in range(0, width, core):
                lost = ~known[:, top : top + core, left : left + core]
                if not lost.any():
                    continue
                box = (..., slice(top, top + WINDOW), slice(left, left + WINDOW))
                logits = self.window(padded[box], seen[box], codebook)
                guess = (logits.softmax(2) @ codebook).transpose(1, 2).unflatten(2, (WINDOW, WINDOW))
                guess = guess[:, :, HALO : HALO + lost.shape[1], HALO : HALO + lost.shape[2]]
                part = out[:, :, top : top + core, left : left + core]
                part.copy_(torch.where(lost[:, None], guess.to(out.dtype), part))
        return out
