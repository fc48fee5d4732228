"""Before export: hidden features of the entropy networks are spread over the range of their integers.

Rounding costs most where a channel uses few of its 255 values. Each hidden channel is enlarged until what it was seen
to hold fills the range, and the weights that the next layer has for it are reduced as much: without rounding nothing
would change. After Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019),
with ranges that are seen instead of guessed from weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from calotype.models.exact import LIMIT, QuantConv
from calotype.models.priors import Prior

FULL = 0.95 * LIMIT
"""Of what is seen: a little more may come."""
MOST = 4.0
"""Largest factor; what is seen of a channel that is hardly used says little."""


@torch.no_grad()
def equalise(prior: Prior, run: Callable[[], object]) -> None:
    """Enlarge the hidden channels of `prior`, which is not exported yet; `run` uses it on what is typical."""
    seen: dict[nn.Module, Tensor] = {}

    def look(layer: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> None:
        largest = out.abs().amax((0, 2, 3))
        seen[layer] = torch.maximum(seen.get(layer, largest), largest)

    pairs = list(_pairs(prior))
    hooks = [layer.register_forward_hook(look) for layer, _, _ in pairs]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for layer, following, together in pairs:
        largest = seen[layer].view(-1, together).amax(1)
        factor = (FULL / largest).clamp(1, MOST)
        own = factor.repeat_interleave(together)
        layer.weight.mul_(own[:, None, None, None])
        layer.bias.mul_(own)
        following.weight.div_(factor[None, :, None, None])


def _pairs(prior: Prior) -> Iterator[tuple[QuantConv, QuantConv, int]]:
    """Layers, what alone reads their outputs, and how many channels a pixel shuffle makes one in between."""
    for network in (prior.hyper_second, *prior.contexts):
        yield network.spatial, network.mix, 1
        yield network.mix, network.head, 1
    yield prior.up_spatial, prior.up_mix, 1
    yield prior.up_mix, prior.up2, 1
    yield prior.up2, prior.up_out, 4
