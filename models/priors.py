"""The exact entropy model: from symbols already known to the tables of the symbols that come next.

A hyper-latent z (one vector per 4x4 latent positions) is coded first, then the latent y in slices of channels. The
order is a list of passes; a pass may cover only one colour of a checkerboard, so that the other colour can use it as
spatial context. Every network here is made of integer layers (`calotype.models.exact`), and its inputs are decoded
integers, never decoded features: encoder and decoder cannot drift apart.

After Ballé et al., "Variational image compression with a scale hyperprior" (ICLR 2018), Minnen & Singh,
"Channel-wise autoregressive entropy models" (ICIP 2020) and He et al., "Checkerboard context model" (CVPR 2021).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.models import lattice, tables
from calotype.models.exact import LIMIT, QuantConv, exact_matmul, round_clamp, saturate
from calotype.models.quantizers import KNOTS

HYPER_STRIDE = 4
"""Latent positions per hyper-latent position, each way."""
HYPER_UNIT = 8
"""Hyper-latents are integers in units of 1/8 of their quantisation step."""
SYMBOL_LIMIT = 2**17 - 1
"""Largest magnitude of a symbol."""


class Request(NamedTuple):
    """What the entropy coder has to code next.

    tables: [B, n] uint8 or int16, the table of each symbol; symbols of tables below `CodingTables.skip` are zero and
        take no bits.
    symbols: [B, n] int32 when encoding, None when decoding.
    """

    tables: Tensor
    symbols: Tensor | None


Coding = Generator[Request, Tensor, Tensor]
Result = TypeVar("Result")


def drive(coding: Generator[Request, Tensor, Result], answer: Callable[[Request], Tensor]) -> Result:
    """Run a coding to its end; `answer` gives the symbols of each request. Returns the coding's result."""
    try:
        request = next(coding)
        while True:
            request = coding.send(answer(request))
    except StopIteration as end:
        result: Result = end.value
        return result


def own_symbols(request: Request) -> Tensor:
    """What an encoding answers itself with."""
    assert request.symbols is not None
    return request.symbols


class CodingTables(NamedTuple):
    """The tables that requests refer to, for the entropy coder.

    frequencies: int32, of all tables, one after another; each sums to 2 ** `tables.PRECISION`.
    half_widths: table i holds the symbols -half_widths[i] .. half_widths[i], then the escape.
    skip: symbols of tables below this one are zero and are not coded.
    escapes: whether symbols beyond the half-width exist.
    """

    frequencies: Tensor
    half_widths: list[int]
    skip: int
    escapes: bool


class Condition(NamedTuple):
    """Integers known before a latent is coded, made by `models.video`: added to the hyper features [B, hidden, H, W],
    and pooled [B, hidden, ceil(H/4), ceil(W/4)] for the hyper-latent."""

    features: Tensor
    pooled: Tensor


class Pass(NamedTuple):
    """Channels [start, stop) of the latent; parity 0 or 1 names one colour of the checkerboard, None means both."""

    start: int
    stop: int
    parity: int | None


PASSES = (
    Pass(0, 32, 0),
    Pass(0, 32, 1),
    Pass(32, 80, 0),
    Pass(32, 80, 1),
    Pass(80, 160, None),
    Pass(160, 320, None),
)


def as_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] as one row of channels per position, [B, H * W, C]; a view if channels are innermost in memory."""
    return x.flatten(2).transpose(1, 2)


def as_features(rows: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `as_rows`."""
    return rows.transpose(1, 2).unflatten(2, (height, width))


def checkerboard(height: int, width: int, parity: int | None, device: torch.device) -> Tensor:
    """Boolean [H, W]: the positions of a pass. Parity 0 holds the top left corner."""
    if parity is None:
        return torch.ones(height, width, dtype=torch.bool, device=device)
    rows = torch.arange(height, device=device)[:, None]
    columns = torch.arange(width, device=device)[None]
    return (rows + columns) % 2 == parity


@functools.lru_cache(maxsize=64)
def positions(height: int, width: int, parity: int | None, device: torch.device) -> Tensor | slice:
    """Index of the positions of a pass among all, in raster order."""
    if parity is None:
        return slice(None)
    return checkerboard(height, width, parity, device).flatten().nonzero()[:, 0]


class ContextNet(nn.Module):
    """From integer features to the mean and table index of `channels` symbols per position.

    Args:
        features: width of the features that every pass shares; 0 if there are none.
        known: width of the latents already decoded; 0 if there are none.
        known_unit: real value of one integer step of those.
        mean_unit: steps of the predicted mean per quantisation step.
    """

    def __init__(
        self, features: int, known: int, channels: int, *, hidden: int, known_unit: float, mean_unit: int
    ) -> None:
        super().__init__()
        reduced = min(known, 96)
        self.reduce = QuantConv(known, reduced, in_unit=known_unit) if known else None
        self.enter = QuantConv(features + reduced, hidden, leaky=True, knots=KNOTS)
        self.spatial = QuantConv(hidden, hidden, 5)
        self.mix = QuantConv(hidden, hidden, leaky=True)
        gain = torch.cat(
            [torch.full((channels,), float(mean_unit)), torch.full((channels,), 1 / tables.LOG_SCALE_STEP)]
        )
        self.head = QuantConv(hidden, 2 * channels, gain=gain)
        nn.init.normal_(self.head.weight, std=0.01)
        with torch.no_grad():  # start at a scale of 1 step
            self.head.bias[:, channels:] = torch.log(torch.tensor(1 / tables.SCALE_MIN))

    def forward(
        self, features: Tensor | None, known: Tensor | None, t: Tensor, where: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Integers (mean, table index), each [B, channels, H, W] in float32.

        With `where`, an index of positions in raster order, only of those: [B, channels, 1, n].
        """
        inputs = [] if features is None else [features]
        if self.reduce is not None and known is not None:
            inputs.append(self.reduce(known, t))
        x = self.enter(torch.cat(inputs, 1), t)
        x = self.spatial(x, t)
        if isinstance(where, Tensor):
            x = as_rows(x)[:, where].transpose(1, 2)[:, :, None]
        return _parameters(self.head(self.mix(x, t), t))


def _parameters(head: Tensor) -> tuple[Tensor, Tensor]:
    mean, index = head.chunk(2, 1)
    limit = tables.MEAN_LIMIT
    return mean.clamp(-limit, limit), index.clamp(0, tables.SCALES - 1)


def shuffle(x: Tensor) -> Tensor:
    """Pixel shuffle by 2, channels innermost in memory whatever the processor: torch's own is not on all of them."""
    batch, channels, height, width = x.shape
    x = x.view(batch, channels // 4, 2, 2, height, width).permute(0, 4, 2, 5, 3, 1)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4).permute(0, 3, 1, 2)


class _LowerBound(torch.autograd.Function):
    """max(x, bound) whose gradient still passes when it would raise x."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound  # type: ignore[attr-defined]
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = grads[0]
        return grad * ((x >= ctx.bound) | (grad < 0)), None  # type: ignore[attr-defined]


def gaussian_bits(offset: Tensor, index: Tensor) -> Tensor:
    """Bits of a symbol `offset` steps away from its mean under table `index`; differentiable."""
    sigma = tables.scale_of(index)
    offset = offset.abs()
    root = 0.5**0.5
    mass = 0.5 * (torch.erfc((offset - 0.5) / sigma * root) - torch.erfc((offset + 0.5) / sigma * root))
    # Far outside the mass and its gradient vanish in float32; a gentle slope still leads back.
    beyond = F.relu(offset - 0.5 - 6 * sigma)
    return -torch.log2(_LowerBound.apply(mass, 1e-9)) + 2 * beyond


def gaussian_slope(symbols: Tensor, index: Tensor) -> Tensor:
    """Derivative of `gaussian_bits` at integer `symbols` under tables `index` of the same shape."""
    slope = torch.zeros(symbols.shape, device=symbols.device)
    some = symbols != 0  # few, and at zero it vanishes
    with torch.inference_mode(False), torch.enable_grad():
        offset = symbols[some].float().clone().requires_grad_()
        (found,) = torch.autograd.grad(gaussian_bits(offset, index[some].float().clone()).sum(), offset)
    slope[some] = found
    return slope


def rate_slope(symbols: Tensor, error: Tensor, index: Tensor) -> Tensor:
    """How bits grow with a latent, in bits per step between symbols; arguments and result of one shape.

    That is the slope of its symbol's bits. At zero this vanishes, although the next symbols cost much where tables are
    narrow: there it is the slope of the Gaussian's density at the latent, in nats (better than in bits, by trial).

    Args:
        symbols: integers.
        error: from what is decoded to the latent, in steps between symbols.
        index: tables; latents of tables that are not coded have no slope.
    """
    precision = tables.scale_of(torch.arange(tables.SCALES, device=index.device)).pow(-2)
    precision[: tables.SKIP] = 0
    at_zero = error * precision.index_select(0, index.flatten().int()).view(index.shape)
    return torch.where(symbols == 0, at_zero, gaussian_slope(symbols, index))


class Expected(NamedTuple):
    """What the prior expects of a latent [B, M, H, W], and makes of it.

    mean: in quantisation steps, multiples of 1/64.
    table: of each symbol; in blocks, from which its own follows.
    blocks: [m, lattice.BLOCK], those of `calotype.models.lattice`: indices into the flattened `as_rows` of the latent.
    coded: the latent as it is decoded, in quantisation steps.
    """

    mean: Tensor
    table: Tensor
    blocks: Tensor
    coded: Tensor

    def rounded(self, y: Tensor) -> Tensor:
        """Another latent as it would be decoded with these means and tables."""
        mean, step = as_rows(self.mean), lattice.RELATIVE_STEP
        away = (as_rows(y) - mean).contiguous()
        symbols = torch.floor(away + 0.5).mul_(as_rows(self.table) >= tables.SKIP)
        _put(symbols, self.blocks, lattice.nearest(_taken(away, self.blocks) / step) * step)
        return as_features(mean + symbols, *y.shape[2:])

    def slope(self, y: Tensor, y_hat: Tensor) -> Tensor:
        """`rate_slope` of a latent that would be decoded as `y_hat`, in bits per quantisation step."""
        at, step = self.blocks, lattice.RELATIVE_STEP
        symbols, error = (as_rows(v).contiguous() for v in (y_hat - self.mean, y - y_hat))
        table = as_rows(self.table).clone(memory_format=torch.contiguous_format)
        _put(symbols, at, torch.round(_taken(symbols, at) / step))
        _put(error, at, _taken(error, at) / step)
        _put(table, at, lattice.table_of(_taken(table, at)))
        slope = rate_slope(symbols, error, table)
        _put(slope, at, _taken(slope, at) / step)
        return as_features(slope, *y.shape[2:])


def _taken(values: Tensor, places: Tensor) -> Tensor:
    """Of the flattened `values` those at `places`, in their shape."""
    return values.flatten().index_select(0, places.flatten()).view(places.shape)


def _put(values: Tensor, places: Tensor, new: Tensor) -> None:
    """Overwrite contiguous values at places of the flattened tensor."""
    values.view(-1).index_copy_(0, places.flatten(), new.flatten())


class HyperAnalysis(nn.Sequential):
    """Encoder only: the hyper-latent z [B, Z, ceil(H/4), ceil(W/4)] of a latent y [B, M, H, W]; floats."""

    def __init__(self, latent: int, hyper: int) -> None:
        super().__init__(
            nn.Conv2d(latent, 192, 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(192, 128, 2, stride=2),
            nn.LeakyReLU(0.1),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(128, hyper, 2, stride=2),
        )

    def forward(self, y: Tensor) -> Tensor:
        bottom, right = -y.shape[2] % HYPER_STRIDE, -y.shape[3] % HYPER_STRIDE
        if bottom or right:
            y = F.pad(y, (0, right, 0, bottom), mode="replicate")
        # Decoded hyper-latents are no larger, and larger ones cost ever more bits.
        return saturate(super().forward(y).float(), LIMIT / HYPER_UNIT)


class Prior(nn.Module):
    """Entropy model of a latent y [B, M, H, W] and its hyper-latent z [B, Z, ceil(H/4), ceil(W/4)].

    After `exact.integerise` the same module codes; before, it trains.

    Args:
        packed: whether symbols of y that carry much are quantised in blocks (`calotype.models.lattice`).
    """

    compand: Tensor
    frequencies: Tensor

    def __init__(
        self,
        latent: int,
        hyper: int,
        *,
        hidden: int = 160,
        up: int = 128,
        passes: tuple[Pass, ...] = PASSES,
        packed: bool = False,
    ) -> None:
        super().__init__()
        self.latent, self.hyper, self.passes, self.packed = latent, hyper, passes, packed
        self.laws = lattice.LAWS if packed else tables.LAWS
        # Fed with zeros: a bias per quality level is all that the first half of z has as a prior.
        self.hyper_first = QuantConv(
            1,
            2 * hyper,
            knots=KNOTS,
            gain=torch.cat([torch.full((hyper,), float(HYPER_UNIT)), torch.full((hyper,), 1 / tables.LOG_SCALE_STEP)]),
        )
        with torch.no_grad():
            self.hyper_first.bias[:, hyper:] = torch.log(torch.tensor(1 / tables.SCALE_MIN))
        self.hyper_second = ContextNet(0, hyper, hyper, hidden=96, known_unit=1 / HYPER_UNIT, mean_unit=HYPER_UNIT)
        self.up1 = QuantConv(hyper, 4 * up, leaky=True, in_unit=1 / HYPER_UNIT, knots=KNOTS)
        self.up_spatial = QuantConv(up, up, 3)
        self.up_mix = QuantConv(up, up, leaky=True)
        self.up2 = QuantConv(up, 4 * up, leaky=True)
        self.up_out = QuantConv(up, hidden)
        self.contexts = nn.ModuleList(
            ContextNet(
                hidden,
                p.stop if p.parity == 1 else p.start,
                p.stop - p.start,
                hidden=hidden,
                known_unit=1 / tables.COMPAND_GAIN,
                mean_unit=tables.MEAN_UNIT,
            )
            for p in passes
        )
        self.register_buffer("compand", tables.companding())
        self.register_buffer("frequencies", tables.gaussian_frequencies(self.laws))

    @property
    def tables(self) -> CodingTables:
        """Gaussians of all scales."""
        return CodingTables(self.frequencies, [law.half_width for law in self.laws], tables.SKIP, escapes=True)

    def _features(self, z: Tensor, t: Tensor, height: int, width: int) -> Tensor:
        """Hyper-synthesis: integers [B, hidden, height, width] from hyper-latents in 1/8 steps."""
        x = shuffle(self.up1(z, t))
        x = self.up_mix(self.up_spatial(x, t), t)
        x = shuffle(self.up2(x, t))
        return self.up_out(x, t)[:, :, :height, :width]

    def _hyper_first(
        self, z_shape: tuple[int, ...], t: Tensor, like: Tensor, pooled: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if pooled is not None:
            return _parameters(self.hyper_first(pooled, t))
        batch, _, height, width = z_shape
        mean, index = _parameters(self.hyper_first(like.new_zeros(batch, 1, 1, 1), t))
        return mean.expand(-1, -1, height, width), index.expand(-1, -1, height, width)

    # Training ---------------------------------------------------------------------------------------------------------

    def forward(
        self,
        z: Tensor,
        y: Tensor,
        t: Tensor,
        condition: Condition | None = None,
        rounding: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rates and the quantised latent, differentiable.

        Args:
            z, y: hyper-latent and latent in quantisation steps.
            t: [B], quality in [0, 1].
            condition: what is known before, for a prior that was made for it.
            rounding: from differences y - mean to symbols of y, differentiable; replaces rounding in y_hat and the
                bits of y.
        Returns:
            y_hat [B, M, H, W], bits of y [B], bits of z [B]. In training mode the rates are those of uniform noise in
            place of rounding, in evaluation mode those of the symbols, each rounded by itself (no blocks).
        """
        with torch.autocast(z.device.type, enabled=False):
            z, y = z.float(), y.float()
            t = torch.round(t * 64) / 64
            z_hat, z_bits = self._rate_hyper(z, t, None if condition is None else condition.pooled)
            features = self._features(z_hat, t, *y.shape[2:])
            if condition is not None:
                features = round_clamp(features + condition.features, LIMIT)
            y_hat = torch.zeros_like(y)
            y_bits = y.new_zeros(y.shape[0])
            for p, context in zip(self.passes, self.contexts, strict=True):
                mask = checkerboard(y.shape[2], y.shape[3], p.parity, y.device)
                mean, index = _predicted(p, context, features, y_hat, t)
                part = y[:, p.start : p.stop]
                coded = index.detach() >= tables.SKIP
                symbol = (torch.floor(part - mean + 0.5) * coded).detach()
                if rounding is None:
                    y_bits = y_bits + self._bits(part - mean, symbol, index, coded, mask)
                else:
                    soft = rounding(part - mean)
                    y_bits = y_bits + (gaussian_bits(soft, index) * coded * mask).sum((1, 2, 3))
                # Where nothing is coded the latent is the mean, and no gradient may tell the encoder otherwise: it
                # would push the latent on and on without any effect.
                near = part + (mean + symbol - part).detach() if rounding is None else mean + soft
                rounded = torch.where(coded, near, mean)
                filled = torch.where(mask, rounded, y_hat[:, p.start : p.stop])
                y_hat = torch.cat([y_hat[:, : p.start], filled, y_hat[:, p.stop :]], 1)
            return y_hat, y_bits, z_bits

    @torch.no_grad()
    def estimate(self, z: Tensor, y: Tensor, t: Tensor) -> Expected:
        """Before export: nearly what `expect` of the exported prior gives; arguments as in `forward`."""
        with torch.autocast(z.device.type, enabled=False):
            return self.expect(torch.round(t * 64) / 64, z.float(), y.float())

    def context_slope(self, z: Tensor, y_hat: Tensor, t: Tensor) -> Tensor:
        """Before export: derivative, by each decoded latent, of the bits of those that are predicted from it.

        Bits per quantisation step, [B, M, H, W]; rounding in the networks is passed straight through. Arguments as in
        `forward`.
        """
        with torch.inference_mode(False), torch.autocast(z.device.type, enabled=False), torch.enable_grad():
            z, known, t = z.clone(), y_hat.clone().requires_grad_(), torch.round(t * 64) / 64
            height, width = y_hat.shape[2:]
            features = self._features(self._rate_hyper(z, t, None)[0], t, height, width)
            bits = known.new_zeros(())
            for p, context in zip(self.passes, self.contexts, strict=True):
                mask, part = checkerboard(height, width, p.parity, y_hat.device), slice(p.start, p.stop)
                other = torch.where(mask, 0, known[:, part])  # of the slice itself the other colour is known
                mean, index = _predicted(p, context, features, torch.cat([known[:, : p.start], other], 1), t)
                offset = known[:, part].detach() - mean
                bits = bits + (gaussian_bits(offset, index) * (index >= tables.SKIP) * mask).sum()
            return torch.autograd.grad(bits, known)[0]

    def _bits(self, offset: Tensor, symbol: Tensor, index: Tensor, coded: Tensor, mask: Tensor) -> Tensor:
        if self.training:
            bits = gaussian_bits(offset + torch.rand_like(offset) - 0.5, index)
        else:
            bits = gaussian_bits(symbol, index) * coded
        return (bits * mask).sum((1, 2, 3))

    def _rate_hyper(self, z: Tensor, t: Tensor, pooled: Tensor | None) -> tuple[Tensor, Tensor]:
        z_hat = torch.zeros_like(z)
        bits = z.new_zeros(z.shape[0])
        for parity in (0, 1):
            mask = checkerboard(z.shape[2], z.shape[3], parity, z.device)
            if parity == 0:
                mean, index = self._hyper_first(tuple(z.shape), t, z, pooled)
            else:
                mean, index = self.hyper_second(pooled, z_hat, t)
            offset = z - mean / HYPER_UNIT
            coded = index.detach() >= tables.SKIP
            symbol = (torch.floor(offset + 0.5) * coded).detach()
            bits = bits + self._bits(offset, symbol, index, coded, mask)
            value = (mean + HYPER_UNIT * symbol).clamp(-LIMIT, LIMIT)
            rounded = torch.where(coded, HYPER_UNIT * z + (value - HYPER_UNIT * z).detach(), value)
            z_hat = torch.where(mask, rounded, z_hat)
        return z_hat, bits

    # Coding -----------------------------------------------------------------------------------------------------------

    def code(
        self,
        shape: tuple[int, int, int],
        level: Tensor,
        z: Tensor | None,
        y: Tensor | None,
        condition: Condition | None = None,
        note: Callable[[Pass, Tensor, Tensor], None] | None = None,
    ) -> Coding:
        """Encode (z and y given, in quantisation steps) or decode (both None): the same steps over the same integers.

        Args:
            shape: (B, H, W) of the latent.
            level: [B] int64, quality level below `exact.LEVELS`.
            condition: what is known before, for a prior that was made for it.
            note: called with each pass of y and its integer means and tables, [B, n, C] both.
        Yields:
            `Request`s; each must be answered with the symbols [B, n] int32.
        Returns:
            The latent [B, M, H, W] as float32 integers in units of 1/64 step.
        """
        batch, height, width = shape
        device = level.device
        rows, columns = -(-height // HYPER_STRIDE), -(-width // HYPER_STRIDE)
        z_hat = torch.zeros(batch, rows, columns, self.hyper, device=device).permute(0, 3, 1, 2)
        pooled = None if condition is None else condition.pooled
        for parity in (0, 1):
            where = positions(rows, columns, parity, device)
            with exact_matmul(device):
                if parity == 0:
                    first = None if pooled is None else as_rows(pooled)[:, where].transpose(1, 2)[:, :, None]
                    mean, index = self._hyper_first(
                        (batch, self.hyper, 1, as_rows(z_hat)[:, where].shape[1]), level, z_hat, first
                    )
                else:
                    mean, index = self.hyper_second(pooled, z_hat, level, where)
            part = None if z is None else as_rows(z)[:, where]
            value = yield from _code_part(part, as_rows(mean), as_rows(index), HYPER_UNIT)
            as_rows(z_hat)[:, where] = value.clamp(-LIMIT, LIMIT)
        with exact_matmul(device):
            features = self._features(z_hat, level, height, width)
            if condition is not None:
                features = (features + condition.features).clamp_(-LIMIT, LIMIT)
        y_hat = torch.zeros(batch, height, width, self.latent, device=device).permute(0, 3, 1, 2)
        seen = torch.zeros_like(y_hat)
        for p, context in zip(self.passes, self.contexts, strict=True):
            where = positions(height, width, p.parity, device)
            known = seen[:, : p.stop if p.parity == 1 else p.start]
            with exact_matmul(device):
                mean, index = context(features, known, level, where)
            mean, index = as_rows(mean), as_rows(index)
            if note is not None:
                note(p, mean, index)
            part = None if y is None else as_rows(y[:, p.start : p.stop])[:, where]
            coding = _code_blocks if self.packed else _code_part
            value = yield from coding(part, mean, index, tables.MEAN_UNIT)
            as_rows(y_hat)[:, where, p.start : p.stop] = value
            as_rows(seen)[:, where, p.start : p.stop] = self._compand(value)
        return y_hat

    def expect(self, level: Tensor, z: Tensor, y: Tensor) -> Expected:
        """What is expected of the latent y [B, M, H, W], in quantisation steps, when it is coded with `z`."""
        batch, _, height, width = y.shape
        mean, table = (y.new_empty(batch, height * width, self.latent) for _ in range(2))
        number = torch.arange(mean.numel(), device=y.device).view_as(mean)
        blocks = [number.new_empty(0, lattice.BLOCK)]

        def note(p: Pass, means: Tensor, indices: Tensor) -> None:
            where = positions(height, width, p.parity, y.device)
            mean[:, where, p.start : p.stop] = means / tables.MEAN_UNIT
            table[:, where, p.start : p.stop] = indices
            if self.packed:
                found = lattice.blocks(request(indices, torch.uint8))
                blocks.append(request(number[:, where, p.start : p.stop], torch.int64).flatten()[found])

        coded = drive(self.code((batch, height, width), level, z, y, note=note), own_symbols) / tables.MEAN_UNIT
        return Expected(as_features(mean, height, width), as_features(table, height, width), torch.cat(blocks), coded)

    def _compand(self, latent: Tensor) -> Tensor:
        magnitude = latent.abs().clamp_(max=tables.COMPAND_LIMIT).int()
        return self.compand.float().index_select(0, magnitude.flatten()).view_as(latent).mul_(latent.sign())


def _predicted(p: Pass, context: nn.Module, features: Tensor, y_hat: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """In training: means in quantisation steps and table indices of a pass, from the latents decoded before it."""
    known = y_hat[:, : p.stop if p.parity == 1 else p.start]
    mean, index = context(features, tables.compand_ste(known), t)
    return mean / tables.MEAN_UNIT, index


def _code_part(target: Tensor | None, mean: Tensor, index: Tensor, unit: int) -> Generator[Request, Tensor, Tensor]:
    """Code `target` [B, n, C] around integer means in 1/unit [B, n, C]; returns its values [B, n, C] in 1/unit."""
    symbols = None
    if target is not None:
        nearest = torch.floor(target - mean / unit + 0.5).clamp_(-SYMBOL_LIMIT, SYMBOL_LIMIT)
        symbols = request(nearest.mul_(index >= tables.SKIP), torch.int32)
    answer = yield Request(request(index, torch.uint8), symbols)
    return torch.add(mean, _answered(answer, mean), alpha=unit)


def _code_blocks(target: Tensor | None, mean: Tensor, index: Tensor, unit: int) -> Generator[Request, Tensor, Tensor]:
    """The same with blocks (`calotype.models.lattice`), whose other halves are a request of their own."""
    table = request(index, torch.uint8)
    items, n = table.shape
    at = lattice.blocks(table)
    place = lattice.places(at, items, n)
    chosen = lattice.table_of(_taken(table, at))
    first, second = table.clone(), table.new_zeros(items, lattice.room(n))
    _put(first, at, F.pad(chosen[:, : lattice.FREE], (0, lattice.BLOCK - lattice.FREE)))
    free, rest, sent = at[:, : lattice.FREE], None, None
    if target is not None:
        away = request(target - mean / unit, torch.float32)
        symbols = torch.floor(away + 0.5).clamp_(-SYMBOL_LIMIT, SYMBOL_LIMIT).mul_(table >= tables.SKIP).int()
        inside = (_taken(away, at) * (unit / lattice.STEP)).clamp_(2 - SYMBOL_LIMIT, SYMBOL_LIMIT - 2)
        points = lattice.nearest(inside).int()
        rest = points[:, lattice.FREE :]
        _put(symbols, at, F.pad(points[:, : lattice.FREE], (0, lattice.BLOCK - lattice.FREE)))
        sent = symbols
    answer = (yield Request(first, sent)).to(mean.device)
    known = _taken(answer, free)
    parity = lattice.parities(known)
    _put(second, place, lattice.tables_of_rest(chosen[:, lattice.FREE :], parity))
    if rest is not None:
        sent = answer.new_zeros(second.shape)
        _put(sent, place, (rest - parity) >> 1)
    halves = (yield Request(second, sent)).to(mean.device)
    points = torch.cat([known, 2 * _taken(halves, place) + parity], 1)
    values = answer * unit
    _put(values, at, points * lattice.STEP)
    return mean + _answered(values, mean)


def _answered(answer: Tensor, like: Tensor) -> Tensor:
    """From the order of a request to float32 [B, n, C], like another tensor."""
    batch, count, channels = like.shape
    return answer.view(batch, channels, count).to(like.device, torch.float32).transpose(1, 2)


def request(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, n, C] in the order of a request: [B, C * n]."""
    return values.to(dtype).transpose(1, 2).flatten(1)
