"""Block motion: search, overlapped compensation, and the exact order in which vectors are coded.

A field holds one vector (dy, dx), in quarter pixels, per block of 8x8 luma pixels. Search and compensation draw pixels
and may use floats; prediction and contexts of the vectors are integers, because they choose probability tables.

Compensation blends the predictions of the four nearest blocks with bilinear weights (overlapped block motion
compensation: Orchard & Sullivan, 1994), so that a field without steps gives a prediction without seams.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calotype.models import tables
from calotype.models.priors import Request

BLOCK = 8
"""Luma pixels of a block's side."""
PEL = 4
"""Vectors are in 1/PEL of a luma pixel."""
VECTOR_LIMIT = 1023
"""Largest component of a vector."""

# Interpolation at quarters, as in HEVC (ITU-T H.265, table 8-11): an even frequency response up to the half band.
_TAPS = (
    (0, 0, 0, 64, 0, 0, 0, 0),
    (-1, 4, -10, 58, 17, -5, 1, 0),
    (-1, 4, -11, 40, 40, -11, 4, -1),
    (0, 1, -5, 17, 58, -10, 4, -1),
)


class Planes(NamedTuple):
    """A frame in Y'CbCr 4:2:0 as floats in [-0.5, 0.5]: luma [B, 1, H, W], chroma [B, 2, H/2, W/2]; sides are even."""

    luma: Tensor
    chroma: Tensor


class Reference:
    """A frame to predict from, with its luma interpolated at all quarter-pixel phases."""

    def __init__(self, frame: Planes) -> None:
        self.chroma = frame.chroma
        self.luma = frame.luma
        taps = torch.tensor(_TAPS, device=frame.luma.device, dtype=torch.float32) / 64
        batch, _, height, width = frame.luma.shape
        padded = F.pad(frame.luma, (3, 4, 3, 4), mode="replicate")
        rows = F.conv2d(padded, taps[:, None, :, None])
        columns = F.conv2d(rows.flatten(0, 1)[:, None], taps[:, None, None, :])
        self.phases = columns.reshape(batch, 16, height, width)
        """[B, 16, H, W]: phase 4 y + x is displaced by (y, x) quarter pixels."""

    def sample(self, vectors: Tensor) -> Tensor:
        """Luma [B, H, W] displaced by `vectors` [B, 2, H/k, W/k] int64, each for k x k pixels; edges are repeated."""
        batch, _, height, width = self.phases.shape
        block = height // vectors.shape[2]
        phase = (vectors[:, 0] % PEL) * PEL + vectors[:, 1] % PEL
        whole = torch.div(vectors, PEL, rounding_mode="floor")
        y = _expand(whole[:, 0], block, 1).add_(_ramp(height, whole.device)[:, None]).clamp_(0, height - 1)
        x = _expand(whole[:, 1], block, block).add_(_ramp(width, whole.device)).clamp_(0, width - 1)
        # Row offsets vary with the block column too, so both are needed at full width.
        index = y.repeat_interleave(block, 2).mul_(width).add_(x).add_(_expand(phase, block, block) * (height * width))
        return self.phases.flatten(1).gather(1, index.flatten(1)).view(batch, height, width)

    def sample_chroma(self, vectors: Tensor) -> Tensor:
        """Chroma [B, 2, H/2, W/2] displaced by luma `vectors`, bilinear at eighths of a chroma pixel."""
        batch, _, height, width = self.chroma.shape
        block = height // vectors.shape[2]
        unit = 2 * PEL
        whole = torch.div(vectors, unit, rounding_mode="floor")
        part = (vectors % unit).float() / unit
        fy, fx = _expand(part[:, 0], block, block)[:, None], _expand(part[:, 1], block, block)[:, None]
        y = _expand(whole[:, 0], block, block) + _ramp(height, whole.device)[:, None]
        x = _expand(whole[:, 1], block, block) + _ramp(width, whole.device)
        plane = self.chroma.flatten(2)
        corners = []
        for dy in (0, 1):
            row = (y + dy).clamp_(0, height - 1) * width
            for dx in (0, 1):
                index = (row + (x + dx).clamp_(0, width - 1)).flatten(1)
                corners.append(plane.gather(2, index[:, None].expand(-1, 2, -1)).view(batch, 2, height, width))
        upper, lower = torch.lerp(corners[0], corners[1], fx), torch.lerp(corners[2], corners[3], fx)
        return torch.lerp(upper, lower, fy)


def _ramp(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def _expand(x: Tensor, rows: int, columns: int) -> Tensor:
    """Repeat each element of [B, h, w] over rows x columns."""
    x = x.repeat_interleave(rows, 1)
    return x.repeat_interleave(columns, 2) if columns > 1 else x.clone()


def compensate(reference: Reference, field: Tensor) -> Planes:
    """The prediction of a frame from `reference` by a `field` [B, 2, H/8, W/8] int64 in quarter pixels."""
    luma, chroma = reference.phases.shape[2:], reference.chroma.shape[2:]
    rows, columns = field.shape[2:]
    halves = [_halves(field, axis) for axis in (2, 3)]
    own = field.repeat_interleave(2, 2).repeat_interleave(2, 3)
    vertical = halves[0].repeat_interleave(2, 3)
    horizontal = halves[1].repeat_interleave(2, 2)
    diagonal = _halves(halves[0], 3)
    # Weight of the own block along an axis: 1 at its centre, falling to 1/2 at its edge.
    weights = []
    for side, count in ((luma, BLOCK), (chroma, BLOCK // 2)):
        offset = (torch.arange(count, device=field.device) + 0.5) / count
        own_weight = 1 - (offset - 0.5).abs()
        weights.append((own_weight.repeat(rows)[:, None], own_weight.repeat(columns)[None]))
        assert (side[0], side[1]) == (count * rows, count * columns)
    out = []
    for sample, (wy, wx) in zip((reference.sample, reference.sample_chroma), weights, strict=True):
        upper = torch.lerp(sample(horizontal), sample(own), wx)
        lower = torch.lerp(sample(diagonal), sample(vertical), wx)
        out.append(torch.lerp(lower, upper, wy))
    return Planes(out[0][:, None], out[1])


def _halves(field: Tensor, axis: int) -> Tensor:
    """Per half block along `axis`: the vector of the neighbour on that side (the own one at the frame's edge)."""
    first, last = field.narrow(axis, 0, 1), field.narrow(axis, field.shape[axis] - 1, 1)
    before = torch.cat([first, field.narrow(axis, 0, field.shape[axis] - 1)], axis)
    after = torch.cat([field.narrow(axis, 1, field.shape[axis] - 1), last], axis)
    return torch.stack([before, after], axis + 1).flatten(axis, axis + 1)


# Coding: integers only ------------------------------------------------------------------------------------------------

CANDIDATES = 5
"""A vector is one of its neighbours' (the most frequent first), or the one at its place in the frame before, or new."""
_KINDS, _BASE = 5, 4
_SPREADS, _FIRSTS = (1, 2, 3, 5, 9, 17, 33, 65, 129), (1, 3, 9, 33)
"""Where the next class begins of how far the neighbours differ, and of how far dy was from its prediction."""
_CHOICES, _ROWS = _KINDS * 4 * 2 * 5, 2 * (len(_SPREADS) + 1)
HALF_WIDTHS = (3,) * _CHOICES + (127,) * (_ROWS + (len(_SPREADS) + 1) * (len(_FIRSTS) + 1))
"""Tables of a field: which candidate (200 contexts), then dy (20) and dx (50) of new vectors.

Table i holds the symbols -HALF_WIDTHS[i] .. HALF_WIDTHS[i], then an escape. The candidate's number, 5 for a new vector,
is coded minus 3; a component of a new vector as its difference from the prediction in quarter pixels.
"""


def coding_order(rows: int, columns: int) -> list[tuple[int, int, Tensor, Tensor]]:
    """The passes of a field of rows x columns blocks: (kind, distance of its neighbours, rows [n], columns [n]).

    First every fourth block each way; then, twice, the centres of the squares that are known, and the points between.
    """
    passes = [(0, 0, *_lattice(rows, columns, (0, 0), _BASE))]
    for kind, step in ((1, 2), (3, 1)):
        passes.append((kind, step, *_lattice(rows, columns, (step, step), 2 * step)))
        between = [_lattice(rows, columns, start, 2 * step) for start in ((0, step), (step, 0))]
        y, x = (torch.cat(parts) for parts in zip(*between, strict=True))
        passes.append((kind + 1, step, y, x))
    return [p for p in passes if len(p[2])]


def _lattice(rows: int, columns: int, start: tuple[int, int], step: int) -> tuple[Tensor, Tensor]:
    y, x = (torch.arange(count)[first::step] for count, first in ((rows, start[0]), (columns, start[1])))
    y, x = torch.meshgrid(y, x, indexing="ij")
    return y.flatten(), x.flatten()


class Surroundings(NamedTuple):
    """What is known of the vectors of a pass, int64.

    candidates: [5, B, 2, n]; prediction: [B, 2, n], of a new vector; spread: [B, 2, n], of the neighbours;
    votes: [B, n], how many of the four neighbours (1 to 4) have the first candidate;
    still: [B, n], whether that is zero (0 or 1);
    calm: [B, n], at how many of the four places (0 to 4) the frame before had the vector that it had here.
    """

    candidates: Tensor
    prediction: Tensor
    spread: Tensor
    votes: Tensor
    still: Tensor
    calm: Tensor


def look_around(field: Tensor, previous: Tensor, kind: int, distance: int, y: Tensor, x: Tensor) -> Surroundings:
    """Candidates and prediction for the blocks (y, x) of a pass, from integers that are known.

    The prediction is the mean, rounded down, of the two middle ones of four neighbours. The base pass has no
    neighbours in its own field yet and takes those of the frame before.
    """
    rows, columns = field.shape[2:]
    known, step = (previous, 1) if kind == 0 else (field, distance)
    offsets = ((-1, -1), (-1, 1), (1, -1), (1, 1)) if kind in (1, 3) else ((-1, 0), (0, -1), (0, 1), (1, 0))
    before = previous[:, :, y, x]
    values, valid, calm = [], [], torch.zeros_like(before[:, 0])
    for dy, dx in offsets:
        ny, nx = y + dy * step, x + dx * step
        valid.append((ny >= 0) & (ny < rows) & (nx >= 0) & (nx < columns))
        ny, nx = ny.clamp(0, rows - 1), nx.clamp(0, columns - 1)
        values.append(known[:, :, ny, nx])
        calm += (previous[:, :, ny, nx] == before).all(1)
    # A neighbour outside of the frame counts as the first that is inside.
    inside = values[0]
    for value, ok in zip(values[::-1], valid[::-1], strict=True):
        inside = torch.where(ok, value, inside)
    around = torch.stack([torch.where(ok, value, inside) for value, ok in zip(values, valid, strict=True)])
    most, least = around.amax(0), around.amin(0)
    votes = (around[:, None] == around[None]).all(3).sum(1)
    # By votes, then in the order above; a sort of distinct keys has one result everywhere.
    order = (votes * 4 - torch.arange(4, device=votes.device)[:, None, None]).argsort(0, descending=True)
    ranked = around.gather(0, order[:, :, None].expand_as(around))
    return Surroundings(
        torch.cat([ranked, before[None]]),
        torch.div(around.sum(0) - most - least, 2, rounding_mode="floor"),
        most - least,
        votes.amax(0),
        (ranked[0] == 0).all(1).long(),
        calm,
    )


def _class(magnitude: Tensor, limits: Sequence[int]) -> Tensor:
    """How many of the limits are not above it."""
    return torch.bucketize(magnitude, torch.tensor(limits, device=magnitude.device), right=True)


def code_field(
    shape: tuple[int, int, int], previous: Tensor, first_table: int, field: Tensor | None = None
) -> Generator[Request, Tensor, Tensor]:
    """Encode a `field`, or decode one of `shape` (B, H/8, W/8) if it is None: the same steps over the same integers.

    Args:
        previous: field of the frame before (zeros after a key frame).
        first_table: index of the first of the field's tables; above `tables.SKIP`.
    Returns:
        The field [B, 2, H/8, W/8] int64.
    """
    batch, rows, columns = shape
    known = torch.zeros(batch, 2, rows, columns, dtype=torch.int64, device=previous.device)
    for kind, distance, y, x in coding_order(rows, columns):
        around = look_around(known, previous, kind, distance, y, x)
        vectors = None if field is None else field[:, :, y, x]
        number = None
        if vectors is not None:
            same = torch.cat(
                [(around.candidates == vectors).all(2), torch.ones_like(around.votes[None], dtype=torch.bool)]
            )
            number = same.int().argmax(0)
        context = first_table + ((kind * 4 + around.votes - 1) * 2 + around.still) * 5 + around.calm
        answer = yield Request(context.to(torch.int16), None if number is None else (number - 3).to(torch.int32))
        number = answer.to(previous.device, torch.int64) + 3
        new = number >= CANDIDATES
        chosen = around.candidates.gather(0, number.clamp(0, CANDIDATES - 1)[None, :, None].expand(1, -1, 2, -1))[0]
        spread = _class(around.spread, _SPREADS)
        difference = torch.zeros_like(chosen)
        for component in (0, 1):
            if component == 0:
                context = _CHOICES + spread[:, 0] + (kind > 0) * (len(_SPREADS) + 1)
            else:
                far = _class(difference[:, 0].abs(), _FIRSTS)
                context = _CHOICES + _ROWS + spread[:, 1] * (len(_FIRSTS) + 1) + far
            # Table 0 is among those that are not coded.
            table = torch.where(new, first_table + context, 0).to(torch.int16)
            symbols = None
            if vectors is not None:
                symbols = ((vectors - around.prediction)[:, component] * new).to(torch.int32)
            difference[:, component] = (yield Request(table, symbols)).to(previous.device, torch.int64)
        # A damaged stream must not lead outside of what compensation can address.
        result = torch.where(new[:, None], around.prediction + difference, chosen)
        known[:, :, y, x] = result.clamp(-VECTOR_LIMIT, VECTOR_LIMIT)
    return known


def fit_tables(counts: Sequence[Tensor]) -> Tensor:
    """Frequencies of all tables, one after another, from counts [2 HALF_WIDTHS[i] + 2], escapes last; int32.

    Contexts are smoothed towards a general law, so that what was rarely seen still has a fair price: uniform for the
    number of a candidate, that of all contexts for a component.
    """
    total = 2**tables.PRECISION
    counted = [row.double() for row in counts]
    choice = torch.cat([torch.ones(CANDIDATES + 1), torch.full((2,), 1e-3)]).double()
    half = HALF_WIDTHS[-1]
    distance = (torch.arange(2 * half + 1) - half).abs()
    component = torch.cat([(1.0 + distance) ** -1.5, torch.tensor([0.01])]).double()
    component = component / component.sum() + torch.stack(counted[_CHOICES:]).sum(0)
    rows = []
    for row, law in zip(counted, [choice] * _CHOICES + [component] * (len(counts) - _CHOICES), strict=True):
        mass = (row + 20 * law / law.sum()) / (row.sum() + 20)
        rows.append(tables.apportion(mass, total, floor=64, rest=int(mass.argmax())))
    return torch.cat(rows).to(torch.int32)


# Search: encoder only -------------------------------------------------------------------------------------------------

COARSE = 4
"""The first, exhaustive search runs on a picture this many times smaller, ..."""
COARSE_RANGE = 10
"""... over this many of its pixels each way."""
THRESHOLD = 2
"""Times the cost of a bit: differences below that are mostly not coded, and only their squares count."""
COLOURS = 4
"""Weight of a sample of a chroma plane against one of luma, of which there are four times as many."""


def search(current: Planes, reference: Reference, bit_cost: float, previous: Tensor | None = None) -> Tensor:
    """Find a smooth field that predicts `current`, by block matching.

    Coarse exhaustive search, then rounds in which each block tries its neighbours' vectors and small changes of its
    own, at last with an eye on colours. The cost is the sum of absolute differences (of squares where they are small)
    plus `bit_cost` times a logarithmic roughness of the field.

    Args:
        current: luma sides are multiples of 16.
        bit_cost: what a bit of motion may save in absolute differences (sum over pixels, in [0, 1] units).
        previous: field of the frame before, a candidate everywhere.
    Returns:
        [B, 2, H/8, W/8] int64 in quarter pixels.
    """
    coarse = _coarse(current.luma, reference.luma) * (COARSE * PEL)
    field = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    state = _State(current, reference, bit_cost, torch.zeros_like(field))
    state.attempt(field)
    if previous is not None:
        state.attempt(previous)
    state.propagate()
    for step, rings in ((4 * PEL, 1), (2 * PEL, 1), (PEL, 1), (2, 1), (1, 1)):
        for _ in range(rings):
            state.perturb(step)
        state.propagate()
    state.see_colours()
    for side in (2, 4, 8, 4, 2):
        state.merge(side)
    state.propagate()
    state.attempt(torch.zeros_like(field))
    if previous is not None:
        state.attempt(previous)
    state.propagate()
    return state.field


def _coarse(current: Tensor, reference: Tensor) -> Tensor:
    """Whole vectors [B, 2, H/16, W/16] in coarse pixels from an exhaustive search."""
    small, target = F.avg_pool2d(reference, COARSE), F.avg_pool2d(current, COARSE)
    height, width = small.shape[2:]
    r = COARSE_RANGE
    padded = F.pad(small, (r, r, r, r), mode="replicate")
    best: Tensor | None = None
    vectors = torch.zeros(small.shape[0], 2, height // 4, width // 4, dtype=torch.int64, device=small.device)
    for dy in sorted(range(-r, r + 1), key=abs):
        # One row of displacements at a time: [B, 2 r + 1, h, w]
        rows = padded[:, 0, r + dy : r + dy + height].unfold(2, width, 1).permute(0, 2, 1, 3)
        difference = (rows - target).abs_()
        # A window of twice the block's side makes the match robust.
        cost = F.avg_pool2d(F.pad(difference, (2, 2, 2, 2), mode="replicate"), 8, 4)
        cost = cost + 0.0005 * (abs(dy) + _ramp(2 * r + 1, small.device).sub(r).abs())[None, :, None, None]
        least, column = cost.min(1)
        if best is None:
            best, better = least, torch.ones_like(least, dtype=torch.bool)
        else:
            better = least < best
            best = torch.where(better, least, best)
        vectors[:, 0] = torch.where(better, torch.full_like(column, dy), vectors[:, 0])
        vectors[:, 1] = torch.where(better, column - r, vectors[:, 1])
    return vectors


class _State:
    """A field under improvement, with the matching cost of each block."""

    def __init__(self, current: Planes, reference: Reference, bit_cost: float, field: Tensor) -> None:
        self.current, self.reference, self.bit_cost = current, reference, bit_cost
        self.field, self.colours = field, False
        self.cost = self._match(field)

    def see_colours(self) -> None:
        """From here on differences of chroma count, too."""
        self.colours = True
        self.cost = self._match(self.field)

    def _match(self, field: Tensor) -> Tensor:
        limit = THRESHOLD * self.bit_cost
        loss = F.huber_loss(self.reference.sample(field), self.current.luma[:, 0], reduction="none", delta=limit)
        # Of slope 1 above the limit.
        cost = F.avg_pool2d(loss[:, None], BLOCK)[:, 0] * (BLOCK**2 / limit)
        if self.colours:
            chroma = self.reference.sample_chroma(field)
            loss = F.huber_loss(chroma, self.current.chroma, reduction="none", delta=limit)
            cost = cost + F.avg_pool2d(loss, BLOCK // 2).sum(1) * (COLOURS * (BLOCK // 2) ** 2 / limit)
        return cost

    def _roughness(self, field: Tensor, around: Tensor) -> Tensor:
        """Bits that the four neighbours in `around` make of a vector, about: [B, h, w].

        Little where it equals one of them, else more the farther it is from the nearest; each one that differs adds
        some, because the vector is their neighbour too.
        """
        padded = F.pad(around.float(), (1, 1, 1, 1), mode="replicate")
        height, width = field.shape[2:]
        nearest = torch.full_like(self.cost, 64.0)
        different = torch.zeros_like(self.cost)
        for y, x in ((0, 1), (2, 1), (1, 0), (1, 2)):
            distance = (field - padded[:, :, y : y + height, x : x + width]).abs()
            unequal = (distance > 0).any(1).float()
            different += unequal
            nearest = torch.minimum(nearest, torch.log2(1 + distance).sum(1).mul_(1.5).add_(4).mul_(unequal))
        return nearest + different

    def attempt(self, candidate: Tensor) -> None:
        """Take the candidate's vectors where they are better."""
        candidate = candidate.clamp(-VECTOR_LIMIT, VECTOR_LIMIT)
        match = self._match(candidate)
        gain = (
            self.cost
            - match
            + self.bit_cost * (self._roughness(self.field, self.field) - self._roughness(candidate, self.field))
        )
        better = gain > 0
        self.field = torch.where(better[:, None], candidate, self.field)
        self.cost = torch.where(better, match, self.cost)

    def propagate(self) -> None:
        for shift in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            self.attempt(torch.roll(self.field, shift, (2, 3)))

    def merge(self, side: int) -> None:
        """Give all of side x side blocks the vector of one of them where that is better for the group."""
        rows, columns = self.field.shape[2:]
        across, down = -(-columns // side), -(-rows // side)
        last = side - 1
        for oy, ox in ((0, 0), (last, last), (0, last), (last, 0)):
            # At the frame's edge a group may lack the block that is asked for; its last one stands in.
            y = (_ramp(down, self.field.device) * side + oy).clamp_(max=rows - 1)
            x = (_ramp(across, self.field.device) * side + ox).clamp_(max=columns - 1)
            chosen = self.field[:, :, y[:, None], x]
            candidate = chosen.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :rows, :columns]
            match = self._match(candidate)
            gain = (
                self.cost
                - match
                + self.bit_cost * (self._roughness(self.field, self.field) - self._roughness(candidate, candidate))
            )
            gain = F.avg_pool2d(gain[:, None], side, ceil_mode=True)[:, 0]
            better = _expand(gain > 0, side, side)[:, :rows, :columns]
            self.field = torch.where(better[:, None], candidate, self.field)
            self.cost = torch.where(better, match, self.cost)

    def perturb(self, step: int) -> None:
        for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1), (-1, 1), (1, -1)):
            offset = torch.tensor([dy * step, dx * step], device=self.field.device)
            self.attempt(self.field + offset[:, None, None])
