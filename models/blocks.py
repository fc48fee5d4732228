"""Float building blocks of the analysis and synthesis transforms."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.1
"""Of the leaky ReLU."""
_STRIP = 768
"""Positions that a block computes at a time on a CPU, twice as many in bfloat16."""


def works_in_strips(x: Tensor) -> bool:
    """Whether features are computed some positions at a time, which stay in the cache: in inference on a CPU."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and x.device.type == "cpu"


class Block(nn.Module):
    """Residual block: depthwise 3x3, 1x1 to twice the width, leaky ReLU, 1x1 back. No norm. [B, C, H, W] both ways.

    The last layer starts near zero, so a deeper network starts as the shallower one.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.project = nn.Conv2d(2 * channels, channels, 1)
        nn.init.normal_(self.project.weight, std=0.014)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if works_in_strips(x):
            return self._in_strips(x)
        return x + self.project(F.leaky_relu(self.expand(self.depthwise(x)), SLOPE))

    def _in_strips(self, x: Tensor) -> Tensor:
        """The same with the wide features of some positions at a time, which stay in a processor's cache."""
        assert self.expand.bias is not None
        assert self.project.bias is not None
        expand, project = (layer.weight.flatten(1).t() for layer in (self.expand, self.project))
        source, out, result = _rows(x, self.depthwise(x))
        for before, row in zip(source.split(_STRIP), out.split(_STRIP), strict=True):
            wide = F.leaky_relu_(torch.addmm(self.expand.bias, row, expand), SLOPE)
            torch.addmm(before, wide, project, out=row).add_(self.project.bias)
        return result


class Bfloat16Block(nn.Module):
    """A block for inference that multiplies in bfloat16; what it adds to stays in float32.

    Twice as fast where the processor has such products. The weights are bfloat16 numbers from the start
    (`calotype.models.zoo.save`), so that only the features between the layers are rounded: good for eight bits of what
    the block contributes.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.depthwise = block.depthwise
        layers = (block.expand, block.project)
        self.weights = [layer.weight.detach().flatten(1).bfloat16() for layer in layers]
        self.biases = [layer.bias.detach().bfloat16() for layer in layers if layer.bias is not None]

    def forward(self, x: Tensor) -> Tensor:
        source, out, result = _rows(x, self.depthwise(x))
        for before, row in zip(source.split(2 * _STRIP), out.split(2 * _STRIP), strict=True):
            wide = torch.ops.mkldnn._linear_pointwise(
                row.bfloat16(), self.weights[0], self.biases[0], "leaky_relu", [SLOPE], ""
            )
            torch.add(before, F.linear(wide, self.weights[1], self.biases[1]), out=row)
        return result


def _rows(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, C, H, W] as rows of channels, of `x` and of `out`, and the memory of the latter rows as features."""
    batch, channels, height, width = out.shape
    source, rows = (v.permute(0, 2, 3, 1).reshape(-1, channels) for v in (x, out))
    return source, rows, rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def in_bfloat16(blocks: nn.Sequential) -> nn.Sequential:
    """The same blocks as `Bfloat16Block`s."""
    return nn.Sequential(*(Bfloat16Block(block) for block in blocks if isinstance(block, Block)))


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether this processor multiplies bfloat16 itself; what the environment asks of torch and oneDNN counts."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def between(a: nn.Module, b: nn.Module, weight: float, *, rounded: bool = False) -> nn.Module:
    """A copy of a module whose parameters lie on the line to those of another one like it.

    Those of blocks are `rounded` to bfloat16 numbers, as they are stored, so that both precisions multiply the same.
    """
    rounded = rounded or isinstance(a, Block)
    own = {name: torch.lerp(p, getattr(b, name), weight) for name, p in a.named_parameters(recurse=False)}
    twin = copy.copy(a)
    twin._parameters = {name: p.bfloat16().to(p.dtype) if rounded else p for name, p in own.items()}  # type: ignore[misc]
    twin._modules = {
        name: between(child, b.get_submodule(name), weight, rounded=rounded) for name, child in a.named_children()
    }
    return twin


def blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(Block(channels) for _ in range(count)))


@torch.no_grad()
def start_as_dct(analysis: nn.Conv2d, synthesis: nn.Conv2d, side: int, *learned: nn.Conv2d) -> None:
    """Make a linear shortcut the DCT on `side` x `side` pixels and back, and the layers beside it start near zero."""
    basis = dct_basis(side, analysis.out_channels)
    analysis.weight.copy_(basis[:, :, None, None])
    synthesis.weight.copy_(basis.t()[:, :, None, None])
    for layer in learned:
        nn.init.normal_(layer.weight, std=0.002)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)


def dct_basis(side: int, count: int) -> Tensor:
    """The `count` lowest frequencies of the orthonormal DCT on `side` x `side` pixels in an opponent colour space.

    Returns [count, 3 * side * side], columns in the order of `pixel_unshuffle` (colour, row, column). As a fixed start
    of the linear shortcut it makes a new model a transform codec, from which training departs.
    """
    k = torch.arange(side).float()
    cosine = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / side) * math.sqrt(2 / side)
    cosine[0] /= math.sqrt(2)
    colour = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]])
    colour = colour / colour.norm(dim=1, keepdim=True)
    basis = torch.einsum("uy,vx,kc->kuvcyx", cosine, cosine, colour).reshape(3 * side * side, -1)
    frequency = (k[:, None] ** 2 + k[None] ** 2).sqrt()
    # Chroma ranks behind luma of the same frequency: it carries less energy.
    rank = torch.stack([frequency, frequency * 2.2 + 2, frequency * 2.6 + 3]).flatten()
    return basis[rank.argsort()[:count]]
