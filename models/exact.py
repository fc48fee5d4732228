"""Integer layers: the only arithmetic allowed on the entropy path.

Activations are integers in [-127, 127] carried in float32 tensors, weights are int8, so a sum of products stays below
2^24 and is exact in *any* order of summation: every processor, library, thread count and batch size gives the same
integer, and so do products of int8 with sums in int32. The rescaling to the next layer is one float64 multiplication by
a float32 number (24 + 24 bits < 53: exact; a fused addition of 1/2 rounds the same sum once) and a floor. There is no
exp, no division and no convolution algorithm that may transform its inputs (Winograd, FFT).

A layer lives twice with the same call signature, so that a network is written once:

* `QuantConv` holds float weights and fakes the quantisation with straight-through gradients (training);
* `IntConv` holds the exported integers and computes exactly (coding).

The recipe follows Balle et al., "Integer Networks for Data Compression with Latent-Variable Models" (ICLR 2019).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

LIMIT = 127
"""Largest magnitude of an activation and of a weight."""
UNIT = 1.0 / 16.0
"""What one integer step of a hidden activation stands for during training."""
LEVELS = 65
"""Quality levels at which a conditional layer stores a bias: level = round(quality / 100 * 64)."""
MAX_BIAS = 2**22
MAX_FAN_IN = (2**24 - MAX_BIAS) // (LIMIT * LIMIT)
_STRIP = 2**18
"""Elements that a layer computes at a time on a CPU."""


class _Saturate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit  # type: ignore[attr-defined]
        return x.clamp(-limit, limit)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = grads[0]
        # Outside the limit only a gradient that leads back inside passes; otherwise a saturated unit would stay so.
        inside = (x.abs() <= ctx.limit) | (grad * x > 0)  # type: ignore[attr-defined]
        return grad * inside, None


class _RoundClamp(_Saturate):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit  # type: ignore[attr-defined]
        # Not in place: torch.compile would lose the gradient without a word (torch 2.11; not 2.13).
        return torch.floor(x + 0.5).clamp(-limit, limit)


def saturate(x: Tensor, limit: float) -> Tensor:
    """Clamp to ±limit; outside, only a gradient that leads back passes.

    One that pushes on would have no answer, and x would grow without end.
    """
    return _Saturate.apply(x, limit)


def round_clamp(x: Tensor, limit: float = math.inf) -> Tensor:
    """Round half up and clamp to ±limit; the gradient passes straight through where it helps."""
    return _RoundClamp.apply(x, limit)


def interpolate(knots: Tensor, t: Tensor) -> Tensor:
    """Piecewise-linear interpolation of `knots` [K, C] at `t` [B] in [0, 1]; returns [B, C]."""
    count = knots.shape[0]
    if count == 1:
        return knots.expand(t.shape[0], -1)
    position = t.clamp(0, 1) * (count - 1)
    low = position.floor().clamp(max=count - 2)
    weight = (position - low)[:, None]
    low = low.long()
    return knots[low] * (1 - weight) + knots[low + 1] * weight


@contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
    """Keep float32 products in float32 (no autocast, no TF32) while integers flow through them."""
    with torch.autocast(device.type, enabled=False), torch.inference_mode():
        if device.type != "cuda":
            yield
            return
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed


class QuantConv(nn.Module):
    """A 1x1 or depthwise convolution from integers to integers, with fake quantisation for training.

    Args:
        in_channels, out_channels: widths; equal for a depthwise layer.
        kernel: side of a depthwise kernel; 1 for a pointwise layer.
        leaky: apply a leaky ReLU of slope 1/8 before rounding.
        in_unit: real value of one integer step of the input.
        gain: for a head, what the real outputs [C] are multiplied by before rounding; None for a hidden layer,
            whose output is in steps of `UNIT`, clamped to [-127, 127].
        knots: number of bias vectors over the quality range; above 1 the layer is conditional on quality.
    """

    gain: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        *,
        leaky: bool = False,
        in_unit: float = UNIT,
        gain: Tensor | None = None,
        knots: int = 1,
    ) -> None:
        super().__init__()
        self.kernel, self.leaky, self.in_unit = kernel, leaky, in_unit
        self.depthwise = kernel > 1
        fan_in = kernel * kernel if self.depthwise else in_channels
        if fan_in > MAX_FAN_IN:
            raise ValueError(f"fan-in {fan_in} could overflow 2^24: at most {MAX_FAN_IN}")
        if self.depthwise and in_channels != out_channels:
            raise ValueError("a depthwise layer keeps its width")
        shape = (out_channels, 1 if self.depthwise else in_channels, kernel, kernel)
        self.weight = nn.Parameter(torch.randn(shape) / fan_in**0.5)
        self.bias = nn.Parameter(torch.zeros(knots, out_channels))
        self.register_buffer("gain", gain, persistent=False)

    def _quantised_weight(self) -> tuple[Tensor, Tensor]:
        """Integer weights (straight-through) and their step [C]."""
        step = self.weight.detach().abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-8) / LIMIT
        return round_clamp(self.weight / step, LIMIT), step.flatten()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Integers [B, C, H, W] in, integers out; `t` [B] is quality in [0, 1]."""
        if not x.numel():  # a colour of the checkerboard may have no position
            return x.new_zeros(x.shape[0], self.weight.shape[0], *x.shape[2:])
        weight, step = self._quantised_weight()
        groups = weight.shape[0] if self.depthwise else 1
        if self.gain is None and self.training and not self.depthwise:
            # Integers up to 127 are exact in bfloat16; the sums are rounded, a noise that hidden layers tolerate.
            # Depthwise layers stay as they are: their gradient in bfloat16 takes twice as long on a CPU.
            acc = F.conv2d(x.bfloat16(), weight.bfloat16(), padding=self.kernel // 2, groups=groups).float()
        else:
            acc = F.conv2d(x, weight, padding=self.kernel // 2, groups=groups)
        gain = 1 / UNIT if self.gain is None else self.gain
        scale, bias = step * (self.in_unit * gain), interpolate(self.bias, t) * gain
        out = acc * scale[:, None, None] + bias[:, :, None, None]
        if self.leaky:
            out = F.leaky_relu(out, 0.125)
        return round_clamp(out, LIMIT if self.gain is None else math.inf)

    @torch.no_grad()
    def export(self) -> IntConv:
        """The same layer in integers."""
        out = IntConv(
            self.weight.shape[1] if not self.depthwise else self.weight.shape[0],
            self.weight.shape[0],
            self.kernel,
            leaky=self.leaky,
            head=self.gain is not None,
            levels=1 if self.bias.shape[0] == 1 else LEVELS,
        )
        weight, step = self._quantised_weight()
        gain = self.gain if self.gain is not None else torch.full_like(step, 1 / UNIT)
        t = torch.linspace(0, 1, out.bias.shape[0], device=self.bias.device)
        acc_unit = (step * self.in_unit).double()
        bias = torch.round(interpolate(self.bias, t).double() / acc_unit).clamp(-MAX_BIAS, MAX_BIAS)
        out.weight.copy_(weight.reshape(out.weight.shape))
        out.bias.copy_(bias)
        out.multiplier.copy_(acc_unit * gain.double())
        return out

    @torch.no_grad()
    def restore(self, integers: IntConv) -> None:
        """Take over the weights of an exported layer, to go on training from shipped weights."""
        gain = self.gain if self.gain is not None else torch.full_like(integers.multiplier, 1 / UNIT)
        acc_unit = integers.multiplier.double() / gain.double()
        step = acc_unit / self.in_unit
        self.weight.copy_(integers.weight.double().reshape(self.weight.shape) * step[:, None, None, None])
        rows = torch.linspace(0, integers.bias.shape[0] - 1, self.bias.shape[0]).round().long()
        self.bias.copy_(integers.bias[rows].double() * acc_unit)


@functools.cache
def _int8_is_exact(inputs: int, outputs: int) -> bool:
    """Whether int8 products of this size are fast here, and proved exact: they saturate on processors without VNNI."""
    if not (torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.backends.mkldnn.is_available()):
        return False
    x, weight = (
        torch.arange(rows * inputs).mul(7919).remainder(2 * LIMIT + 1).sub(LIMIT).view(rows, inputs)
        for rows in (512, outputs)
    )
    x[::3], x[1::3], weight[::3], weight[1::3] = LIMIT, -LIMIT, LIMIT, -LIMIT
    exact = (x.float() @ weight.float().t()).int()
    x, weight = x.to(torch.int8), weight.to(torch.int8)
    return all(torch.equal(torch._int_mm(x[:n], weight.t()), exact[:n]) for n in (1, 2, 7, 31, 64, 200, 512))


def _products(x: Tensor, weight: Tensor) -> Tensor:
    """[B, n, C] by the transpose of [O, C]: exact sums, in int32 or float32."""
    if x.device.type == "cpu" and _int8_is_exact(weight.shape[1], weight.shape[0]):
        return torch._int_mm(x.flatten(0, 1).to(torch.int8), weight.to(torch.int8).t()).unflatten(0, x.shape[:2])
    return torch.matmul(x, weight.t())


def _convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise sums over [B, H, W, C] by the library's convolution."""
    kernel = weight.shape[1]
    out = F.conv2d(x.permute(0, 3, 1, 2), weight[:, None], padding=kernel // 2, groups=len(weight))
    return out.permute(0, 2, 3, 1)


def _by_taps(x: Tensor, weight: Tensor, rows: int) -> Iterator[Tensor]:
    """The same sums in strips of `rows`, one tap of the kernel at a time."""
    height, width = x.shape[1:3]
    kernel = weight.shape[1]
    padded = F.pad(x, (0, 0, *(kernel // 2,) * 4))
    taps = weight.flatten(1).t().contiguous().unbind()
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        sums = torch.zeros_like(x[:, top:bottom])
        for number, tap in enumerate(taps):
            i, j = divmod(number, kernel)
            sums.addcmul_(padded[:, top + i : bottom + i, j : j + width], tap)
        yield sums


@functools.cache
def _convolution_is_exact(channels: int, kernel: int) -> bool:
    """Whether a depthwise convolution in float32 is fast here, and proved exact.

    It is in oneDNN, which torch asks for direct convolution: sums of products. Algorithms that transform their inputs
    would show in numbers of all sizes.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = (
        torch.arange(math.prod(shape)).mul(7919).remainder(2 * LIMIT + 1).sub(LIMIT).float().view(shape)
        for shape in ((2, 23, 37, channels), (channels, kernel, kernel))
    )
    x[0, ::3], x[0, 1::3], weight[::3], weight[1::3] = LIMIT, -LIMIT, LIMIT, -LIMIT
    (exact,) = _by_taps(x, weight, x.shape[1])
    return torch.equal(_convolution(x, weight), exact) and torch.equal(_convolution(x[:1], weight), exact[:1])


class IntConv(nn.Module):
    """The exported form of `QuantConv`: out = clamp(floor(leaky(W x + b) * m + 1/2)), exact everywhere."""

    weight: Tensor
    bias: Tensor
    multiplier: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, leaky: bool, head: bool, levels: int
    ) -> None:
        super().__init__()
        self.kernel, self.leaky, self.head = kernel, leaky, head
        self.depthwise = kernel > 1
        shape = (out_channels, kernel, kernel) if self.depthwise else (out_channels, in_channels)
        self.register_buffer("weight", torch.zeros(shape))
        self.register_buffer("bias", torch.zeros(levels, out_channels))
        self.register_buffer("multiplier", torch.zeros(out_channels))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Integers [B, C, H, W] in, integers out, channels innermost in memory.

        `t` [B] is the quality level as an integer below `LEVELS`.
        """
        height, width = x.shape[2:]
        bias = (self.bias[t] if self.bias.shape[0] > 1 else self.bias)[:, None]
        multiplier = self.multiplier.double()
        half = multiplier.new_full((), 0.5)
        strips = []
        for sums in self._sums(x.permute(0, 2, 3, 1)):
            out = sums.double().add_(bias)
            if self.leaky:
                F.leaky_relu_(out, 0.125)
            out = torch.addcmul(half, out, multiplier, out=out).floor_().float()
            strips.append(out if self.head else out.clamp_(-LIMIT, LIMIT))
        whole = torch.cat(strips, 1) if len(strips) > 1 else strips[0]
        return whole.unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def _sums(self, x: Tensor) -> Iterator[Tensor]:
        """Sums of products over [B, H, W, C], in strips of positions that stay in a processor's cache: [B, n, C]."""
        room = x.numel() + 1 if x.is_cuda else _STRIP // self.weight.shape[0]
        if not self.depthwise:
            for strip in x.flatten(1, 2).split(room, 1):
                yield _products(strip, self.weight)
        elif not x.is_cuda and _convolution_is_exact(*self.weight.shape[:2]):
            yield from _convolution(x, self.weight).flatten(1, 2).split(room, 1)
        else:
            yield from (strip.flatten(1, 2) for strip in _by_taps(x, self.weight, max(1, room // x.shape[2])))


class QuantEmbedding(nn.Module):
    """A table from symbols to vectors of integers, in steps of `UNIT`, with fake quantisation for training."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, width))

    def forward(self, symbols: Tensor) -> Tensor:
        """[B, H, W] int64 in, integers [B, C, H, W] out."""
        return round_clamp(self.weight / UNIT, LIMIT)[symbols].movedim(-1, 1)

    @torch.no_grad()
    def export(self) -> IntEmbedding:
        """The same table in integers."""
        out = IntEmbedding(*self.weight.shape)
        out.weight.copy_(round_clamp(self.weight / UNIT, LIMIT))
        return out

    @torch.no_grad()
    def restore(self, integers: IntEmbedding) -> None:
        """Take over an exported table, to go on training from shipped weights."""
        self.weight.copy_(integers.weight * UNIT)


class IntEmbedding(nn.Module):
    """The exported form of `QuantEmbedding`."""

    weight: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(size, width))

    def forward(self, symbols: Tensor) -> Tensor:
        """[B, H, W] int64 in, integers [B, C, H, W] out, channels innermost in memory."""
        return self.weight[symbols].movedim(-1, 1)


def integerise(network: M) -> M:
    """A copy of `network` in which every layer of the exact path is replaced by its exported form."""
    result = copy.deepcopy(network)
    for name, layer in network.named_modules():
        if isinstance(layer, QuantConv | QuantEmbedding):
            parent, _, leaf = name.rpartition(".")
            setattr(result.get_submodule(parent), leaf, layer.export())
    return result.eval()


def restore(network: M, integers: nn.Module) -> M:
    """The inverse of `integerise`: fill the layers of `network` from their exported form."""
    for name, layer in network.named_modules():
        if isinstance(layer, QuantConv | QuantEmbedding):
            layer.restore(integers.get_submodule(name))  # type: ignore[arg-type]
    return network
