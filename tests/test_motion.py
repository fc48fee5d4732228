"""Block motion: search finds real displacements, compensation applies them, coding is exact and cheap where smooth."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calotype.entropy import Decoder, Encoder, SymbolTables
from calotype.errors import FormatError
from calotype.media import Picture
from calotype.models import motion
from calotype.models.motion import HALF_WIDTHS, Planes, Reference, code_field, compensate, search
from calotype.models.priors import Request

COST = 6 / 255


@pytest.fixture(scope="module")
def tables() -> SymbolTables:
    return field_tables([torch.zeros(2 * half + 2) for half in HALF_WIDTHS])


def field_tables(counts: Sequence[Tensor]) -> SymbolTables:
    """The tables of a field behind one that is never coded, as in a model."""
    frequencies = torch.cat([torch.tensor([2**24 - 64, 64], dtype=torch.int32), motion.fit_tables(counts)])
    return SymbolTables(frequencies.numpy(), [0, *HALF_WIDTHS], 1)


@pytest.fixture(scope="module")
def frame(photo: Picture) -> Planes:
    """128 x 192 of a photograph, as luma and chroma planes."""
    x = torch.from_numpy(photo.pixels[:176, :240].copy()).float() / 255 - 0.5
    luma = x.mean(2)[None, None]
    chroma = torch.nn.functional.avg_pool2d((x[..., [2, 0]].permute(2, 0, 1)[None] - luma), 2)
    return Planes(luma, chroma)


def window(frame: Planes, top: int, left: int) -> Planes:
    """128 x 192 at an even place."""
    return Planes(
        frame.luma[..., top : top + 128, left : left + 192],
        frame.chroma[..., top // 2 : top // 2 + 64, left // 2 : left // 2 + 96],
    )


def drive(coding: Generator[Request, Tensor, Tensor], encoder: Encoder | None, decoder: Decoder | None) -> Tensor:
    try:
        request = next(coding)
        while True:
            if encoder is not None:
                assert request.symbols is not None
                encoder.push(request.tables[0].numpy(), request.symbols[0].numpy())
                request = coding.send(request.symbols)
            else:
                assert decoder is not None
                request = coding.send(torch.from_numpy(decoder.pull(request.tables[0].numpy()))[None])
    except StopIteration as stop:
        return stop.value


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 11), st.integers(1, 11), st.integers(0, 2**31), st.sampled_from([0, 3, 40, motion.VECTOR_LIMIT]))
def test_fields_come_back(tables: SymbolTables, rows: int, columns: int, seed: int, reach: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    field, before = (torch.randint(-reach, reach + 1, (1, 2, rows, columns), generator=rng) for _ in range(2))
    encoder = Encoder(tables)
    drive(code_field((1, rows, columns), before, 1, field), encoder, None)
    decoded = drive(code_field((1, rows, columns), before, 1), None, Decoder(tables, encoder.finish()))
    assert torch.equal(decoded, field)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 9), (18, 22)])
def test_each_block_is_coded_once(rows: int, columns: int) -> None:
    seen = torch.zeros(rows, columns)
    for _, _, y, x in motion.coding_order(rows, columns):
        seen.index_put_((y, x), torch.ones(len(y)), accumulate=True)
    assert torch.equal(seen, torch.ones(rows, columns))


def test_a_still_field_costs_almost_nothing() -> None:
    counts = [torch.zeros(2 * half + 2) for half in HALF_WIDTHS]
    for row in counts:
        row[0] = 1000
    tables = field_tables(counts)
    still, moving = torch.zeros(1, 2, 36, 44, dtype=torch.int64), torch.randint(-9, 9, (1, 2, 36, 44))
    sizes = []
    for field in (still, moving):
        encoder = Encoder(tables)
        drive(code_field((1, 36, 44), torch.zeros_like(field), 1, field), encoder, None)
        sizes.append(len(encoder.finish()))
    assert sizes[0] < 16 < 500 < sizes[1]


def test_damage_never_leads_outside(tables: SymbolTables) -> None:
    rng = np.random.default_rng(3)
    outcomes = []
    for _ in range(30):
        decoder = Decoder(tables, rng.integers(0, 256, 400, np.uint8).tobytes())
        try:
            field = drive(code_field((1, 12, 12), torch.zeros(1, 2, 12, 12, dtype=torch.int64), 1), None, decoder)
        except FormatError:
            outcomes.append(False)
            continue
        outcomes.append(True)
        assert field.abs().max() <= motion.VECTOR_LIMIT
    assert any(outcomes)


def test_tables_are_whole() -> None:
    counts = [torch.randint(0, 50, (2 * half + 2,)) for half in HALF_WIDTHS]
    rows = motion.fit_tables(counts).split([2 * half + 2 for half in HALF_WIDTHS])
    assert all(row.sum() == 2**24 and row.min() >= 64 for row in rows)


@pytest.mark.parametrize("shift", [(0, 0), (6, -8), (-22, 12), (4, 14)])
def test_search_finds_a_displacement(frame: Planes, shift: tuple[int, int]) -> None:
    before, now = window(frame, 24, 32), window(frame, 24 + shift[0] // 2 * 2, 32 + shift[1] // 2 * 2)
    source = Reference(before)
    field = search(now, source, COST)
    expected = torch.tensor([shift[0] * 4, shift[1] * 4])[None, :, None, None]
    inner = field[:, :, 3:-3, 4:-4]
    assert (inner == expected).all(1).float().mean() > 0.9
    prediction = compensate(source, field)
    for predicted, actual in zip(prediction, now, strict=True):
        margin = 32 * predicted.shape[2] // 128
        cut = (..., slice(margin, -margin), slice(margin, -margin))
        assert (predicted[cut] - actual[cut]).square().mean().sqrt() < 1.5 / 255


def test_search_finds_quarter_pixels(frame: Planes) -> None:
    """A picture reduced by four from one that is displaced by a pixel is displaced by a quarter."""
    large = torch.nn.functional.interpolate(frame.luma, scale_factor=4, mode="bicubic", antialias=False)
    rows, columns = 128 * 4, 192 * 4
    before, now = (
        torch.nn.functional.avg_pool2d(large[..., 40 + dy : 40 + dy + rows, 40 + dx : 40 + dx + columns], 4)
        for dy, dx in ((0, 0), (1, -2))
    )
    source = Reference(Planes(before, torch.zeros(1, 2, 64, 96)))
    # At a quality at which so small a difference is worth its bits.
    field = search(Planes(now, source.chroma), source, COST / 4)[:, :, 2:-2, 2:-2].float()
    assert field[:, 0].mean().item() == pytest.approx(1, abs=0.4)
    assert field[:, 1].mean().item() == pytest.approx(-2, abs=0.4)


def test_compensation_without_motion_changes_nothing(frame: Planes) -> None:
    before = window(frame, 0, 0)
    still = compensate(Reference(before), torch.zeros(1, 2, 16, 24, dtype=torch.int64))
    for a, b in zip(still, before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_compensation_has_no_seams(frame: Planes) -> None:
    """Where two motions meet, the overlapped prediction steps less than that of separate blocks."""
    before = window(frame, 0, 0)
    field = torch.zeros(1, 2, 16, 24, dtype=torch.int64)
    field[:, 1, :, 12:] = 24
    source = Reference(before)
    blended, separate = compensate(source, field).luma[:, 0], source.sample(field)
    step = [(x[..., 96] - x[..., 95]).abs().mean().item() for x in (blended, separate)]
    assert step[0] < 0.8 * step[1]


def test_edges_are_repeated(frame: Planes) -> None:
    before = window(frame, 0, 0)
    far = torch.full((1, 2, 16, 24), motion.VECTOR_LIMIT, dtype=torch.int64)
    predicted = compensate(Reference(before), far)
    torch.testing.assert_close(predicted.luma, before.luma[..., -1:, -1:].expand_as(predicted.luma), atol=1e-2, rtol=0)


def test_search_sees_colours(frame: Planes) -> None:
    """Where stripes look alike at every eighth pixel, colours tell how far they moved."""
    before = window(frame, 24, 32)
    stripes = (torch.arange(192) % 8 / 16 - 0.25).expand(1, 1, 128, 192)
    now = Planes(stripes, before.chroma.roll(4, 3))
    guess = torch.tensor([0, -32])[None, :, None, None].expand(1, 2, 16, 24)
    for chroma, expected in ((now.chroma, -32), (before.chroma, 0)):
        field = search(Planes(stripes, chroma), Reference(Planes(stripes, before.chroma)), COST / 4, guess)
        assert (field[:, 1, :, 2:] == expected).float().mean() > 0.6
