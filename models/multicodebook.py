"""Codebooks for groups of neighbouring channels, and the mixture weights with which their codewords are coded.

The channels of a latent are cut into groups of d; each group's difference from its predicted mean is replaced by one
of 2h + 1 codewords, symmetric about zero, which the symbols -h .. h number. The context network gives every group a
scale, and every codebook has a table of integer probabilities for each scale: the weights of a Gaussian mixture whose
means are the codewords. They are counted on photographs (`calotype.models.training.codebooks`) and shipped, as are the
codewords, in integers.

Codewords are a fixed basis, the integer points of smallest norm, times one learned d x d matrix for the whole codebook,
so that none can be left behind (Zhu et al., "Addressing Representation Collapse in Vector Quantized Models with One
Linear Layer", 2024).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calotype.models import tables
from calotype.models.exact import LEVELS
from calotype.models.priors import Request, as_rows, request

DISTORTION = 6 / math.log(2)
"""Bits that a squared quantisation step of distortion is worth: `quantizers.base_step` makes it so at every quality."""
RATE_BELOW, RATE_MORE = 0.06, 1.8
"""Below this quality rate counts for more than that, 1 + `RATE_MORE` times at quality 0, so that it is small."""
ROWS = tables.SCALES - tables.SKIP
"""Tables of a codebook: one for each scale that is coded."""
REACH = 3.0
"""Standard deviations that the farthest codeword must be away from zero."""
_ESCAPE = 2
"""Frequency of the escape, which every table of the coder has; here it never occurs."""


class Book(NamedTuple):
    """A codebook: how many groups share it, the channels d of each, and h: it has 2h + 1 codewords."""

    groups: int
    dimension: int
    half: int

    @property
    def channels(self) -> int:
        return self.groups * self.dimension

    @property
    def size(self) -> int:
        return 2 * self.half + 1


def channels(books: Sequence[Book]) -> int:
    """Channels that a row of codebooks covers, one codebook after another."""
    return sum(book.channels for book in books)


def basis(book: Book) -> Tensor:
    """[size, d] int64: integer points of small norm, of opposite signs in opposite places, zero in the middle."""
    reach = next(r for r in itertools.count(1) if (2 * r + 1) ** book.dimension >= 4 * book.size or book.dimension == 1)
    reach = book.half if book.dimension == 1 else reach
    axis = torch.arange(-reach, reach + 1)
    points = torch.cartesian_prod(*[axis] * book.dimension).view(-1, book.dimension)
    # Of each pair p, -p the one whose first non-zero coordinate is positive: the second half in lexicographic order.
    positive = points[len(points) // 2 + 1 :]
    positive = positive[positive.square().sum(1).argsort(stable=True)][: book.half]
    return torch.cat([-positive.flip(0), torch.zeros_like(positive[:1]), positive])


def stretch(points: Tensor) -> Tensor:
    """[ROWS] int16: the power of two by which codewords near integer points [size, d] are enlarged, by scale.

    A scale for which they would not reach far enough gets larger steps instead.
    """
    reach = points.double().square().sum(1).max().sqrt()
    wanted = REACH * tables.scale_of(torch.arange(tables.SKIP, tables.SCALES).double())
    return torch.exp2(torch.ceil(torch.log2(wanted / reach)).clamp(min=0)).to(torch.int16)


def gaussian_weights(points: Tensor) -> Tensor:
    """[ROWS, size]: probability of the unit cell around each integer point [size, d], by scale."""
    sigma = tables.scale_of(torch.arange(tables.SKIP, tables.SCALES).double()) / stretch(points)
    sigma = sigma[:, None, None]
    edge = points.double()
    cell = torch.special.ndtr((edge + 0.5) / sigma) - torch.special.ndtr((edge - 0.5) / sigma)
    weights = cell.clamp(min=1e-30).prod(2)
    return weights / weights.sum(1, keepdim=True)


def frequencies(weights: Tensor) -> Tensor:
    """Tables for the coder [rows, size + 1] int32 of weights [rows, size]: each sums to 2 ** PRECISION, none is 0.

    The last entry is that of the escape, which is never coded.
    """
    size = weights.shape[1]
    room = 2**tables.PRECISION - _ESCAPE - tables.FLOOR * size
    rounded = torch.floor(weights / weights.sum(1, keepdim=True) * room).long() + tables.FLOOR
    rest = 2**tables.PRECISION - _ESCAPE - rounded.sum(1)
    rounded[torch.arange(len(rounded)), rounded.argmax(1)] += rest
    return torch.cat([rounded, torch.full((len(rounded), 1), _ESCAPE)], 1).to(torch.int32)


def rate_weight(t: Tensor) -> Tensor:
    """How many times what `DISTORTION` says rate counts when codewords are chosen, at qualities `t` [B] in [0, 1]."""
    return 1 + RATE_MORE * (1 - t / RATE_BELOW).clamp(min=0)


def shrinkage(variance: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """What is left of a Gaussian latent's distance from its mean when its codeword is chosen by rate and distortion.

    In nats, `DISTORTION` (r - k)² plus the bits of k is 6 (r - k)² + w k² / 2σ²: least at r σ² / (σ² + w / 12).
    """
    return variance / (variance + weight / 12)


class Codebooks(nn.Module):
    """The codebooks of one latent, one after another over its channels, with their tables.

    Args:
        books: their shapes.
        unit: integer steps of the latent per quantisation step.
        first: number of the first table, among those of all latents of a model.

    `words` are all codewords in 1/unit steps, `frequencies` all tables, `stretch` [books, ROWS] what the codewords are
    multiplied by.
    """

    words: Tensor
    frequencies: Tensor
    stretch: Tensor
    first_table: Tensor
    group_of_channel: Tensor
    """[C]: the number of the group that a channel belongs to."""

    def __init__(self, books: Sequence[Book], unit: int, first: int) -> None:
        super().__init__()
        self.books, self.unit = tuple(books), unit
        self.channels, self.groups = channels(books), sum(book.groups for book in books)
        points = [basis(book) for book in books]
        self.register_buffer("words", torch.cat([p.flatten() for p in points]).mul(unit).to(torch.int16))
        self.register_buffer("frequencies", torch.cat([frequencies(gaussian_weights(p)).flatten() for p in points]))
        self.register_buffer("stretch", torch.stack([stretch(p) for p in points]))
        self.stop_table = first + ROWS * len(books)
        counts = torch.tensor([book.groups for book in books])
        dimensions = torch.tensor([book.dimension for book in books]).repeat_interleave(counts)
        numbers = torch.arange(first, self.stop_table, ROWS).repeat_interleave(counts)
        self.register_buffer("first_table", numbers, persistent=False)
        self.register_buffer(
            "group_of_channel", torch.arange(self.groups).repeat_interleave(dimensions), persistent=False
        )
        self._searches: dict[int, Search] = {}
        self.searched: Callable[[int, Tensor, Tensor, Tensor], None] | None = None
        """Called by `search` with its arguments and the indexes of the codewords, for statistics."""

    @property
    def half_widths(self) -> list[int]:
        """Of every table, as `priors.CodingTables` has them."""
        return [book.half for book in self.books for _ in range(ROWS)]

    def words_of(self, number: int) -> Tensor:
        """[size, d] int16, a view: the codewords of one codebook in 1/unit steps."""
        start = sum(book.size * book.dimension for book in self.books[:number])
        book = self.books[number]
        return self.words[start : start + book.size * book.dimension].view(book.size, book.dimension)

    def frequencies_of(self, number: int) -> Tensor:
        """[ROWS, size + 1] int32, a view: the tables of one codebook."""
        start = ROWS * sum(book.size + 1 for book in self.books[:number])
        columns = self.books[number].size + 1
        return self.frequencies[start : start + ROWS * columns].view(ROWS, columns)

    def table_numbers(self, scale: Tensor) -> Tensor:
        """Tables of groups [B, n, G] of given scales: 0 for what is not coded."""
        return (scale + (self.first_table - tables.SKIP)) * (scale >= tables.SKIP)

    def code(
        self, mean: Tensor, scale: Tensor, level: Tensor, target: Tensor | None
    ) -> Generator[Request, Tensor, Tensor]:
        """Encode a latent in quantisation steps, or decode one if it is None.

        Args:
            mean: [B, C, H, W], integers in 1/unit steps.
            scale: [B, G, H, W], integers.
            level: [B] int64, quality level below `exact.LEVELS`.
            target: [B, C, H, W].
        Returns:
            The quantised latent [B, C, H, W], integers in 1/unit steps, channels innermost.
        """
        height, width = mean.shape[2:]
        value, index = as_rows(mean).contiguous(), as_rows(scale)
        symbols = None
        if target is not None:
            symbols = request(self.nearest(as_rows(target) - value / self.unit, index, level), torch.int32)
        answer = yield Request(request(self.table_numbers(index), torch.int16), symbols)
        answer = answer.view(len(value), self.groups, -1).to(value.device)
        parts = []
        group = 0
        for number, book in enumerate(self.books):
            place = answer[:, group : group + book.groups].transpose(1, 2) + book.half
            words = self.words_of(number)[place]
            factors = self.stretch[number]
            row = index[..., group : group + book.groups] - tables.SKIP
            if row.max() >= (factors == 1).sum():
                words = words.float() * factors[row.clamp_(min=0).long()][..., None]
            parts.append(words.flatten(2).float())
            group += book.groups
        value = value + torch.cat(parts, 2)
        return value.unflatten(1, (height, width)).permute(0, 3, 1, 2)

    # Encoder only: floats ---------------------------------------------------------------------------------------------

    def nearest(self, offset: Tensor, scale: Tensor, level: Tensor) -> Tensor:
        """Symbols [B, n, G], as float32, of offsets [B, n, C] in quantisation steps under scales [B, n, G].

        The codeword nearest to an offset that is drawn towards zero as rate and distortion want it, see `shrinkage`.
        """
        parts = []
        weight = rate_weight(level / (LEVELS - 1))
        group = channel = 0
        for number, book in enumerate(self.books):
            if number not in self._searches:
                self._searches[number] = Search(self.words_of(number) / self.unit, self.stretch[number])
            own = scale[..., group : group + book.groups]
            vectors = offset[..., channel : channel + book.channels].unflatten(-1, (book.groups, book.dimension))
            row = (own - tables.SKIP).clamp_(min=0).long()
            index = self._searches[number].best(vectors, row, weight)
            coded = own >= tables.SKIP
            if self.searched is not None:
                self.searched(number, vectors[coded], row[coded], index[coded])
            parts.append((index - book.half) * coded)
            group, channel = group + book.groups, channel + book.channels
        return torch.cat(parts, -1).float()

    def replace(self, number: int, words: Tensor, weights: Tensor) -> None:
        """Give a codebook other codewords [size, d], in quantisation steps, and weights [ROWS, size]."""
        self.words_of(number).copy_(words.mul(self.unit).round())
        self.frequencies_of(number).copy_(frequencies(weights))
        self._searches.pop(number, None)


class Search:
    """Finds codewords for an encoder: the nearest to what `shrinkage` leaves of a vector.

    It is looked up by the cell of the integer grid that this lies in.

    Args:
        words: [size, d] in quantisation steps.
        stretch: [rows], what the codewords are multiplied by.
    """

    def __init__(self, words: Tensor, stretch: Tensor) -> None:
        dimension = words.shape[1]
        self.reach = math.ceil(words.abs().max().item())
        axis = torch.arange(-self.reach, self.reach + 1, device=words.device)
        centres = torch.cartesian_prod(*[axis] * dimension).view(-1, dimension).float()
        self.cells = torch.cdist(centres, words).argmin(1)
        self.strides = [(2 * self.reach + 1) ** power for power in reversed(range(dimension))]
        self.variance = (
            tables.scale_of(torch.arange(tables.SKIP, tables.SCALES, device=words.device).float()) / stretch
        ) ** 2
        self.stretch = stretch

    def best(self, vectors: Tensor, row: Tensor, weight: Tensor) -> Tensor:
        """Indexes [B, ...] of the codewords for vectors [B, ..., d] in quantisation steps.

        Args:
            row: [B, ...], rows of the tables.
            weight: [B], of `rate_weight`.
        """
        gains = torch.stack([shrinkage(self.variance, w) / self.stretch for w in weight])
        gain = torch.stack([own[rows] for own, rows in zip(gains, row, strict=True)])
        place: Tensor | None = None
        for axis, stride in enumerate(self.strides):
            cell = (vectors[..., axis] * gain).round_().clamp_(-self.reach, self.reach).add_(self.reach).mul_(stride)
            place = cell if place is None else place.add_(cell)
        assert place is not None
        return self.cells[place.int()]
