"""Blocks of symbols: the code, the search for the nearest point, and what they are worth in files."""

from __future__ import annotations

import numpy as np
import torch
from conftest import unpacked
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype import Codec, Picture
from calotype.models import lattice, tables
from calotype.models.lattice import BLOCK, FREE


def code() -> torch.Tensor:
    """All words [4096, 24]."""
    free = torch.arange(2**FREE)[:, None] >> torch.arange(FREE) & 1
    return torch.cat([free, lattice.parities(free)], 1)


def test_parities_form_the_golay_code() -> None:
    """The weights of its words tell it from every other code of 24 bits and 12 dimensions."""
    weights = torch.bincount(code().sum(1), minlength=25)
    assert {w: n for w, n in enumerate(weights.tolist()) if n} == {0: 1, 8: 759, 12: 2576, 16: 759, 24: 1}


def test_nearest_finds_the_nearest_of_all_points() -> None:
    """Against a search over all words: of each, every symbol's nearest integer of its parity."""
    x = 3 * torch.randn(200, BLOCK, generator=torch.Generator().manual_seed(0))
    found = lattice.nearest(x)
    assert torch.equal(lattice.parities(found[:, :FREE].int()), found[:, FREE:].remainder(2))
    words = code().float()
    for row, own in zip(x, found, strict=True):
        points = 2 * torch.floor((row - words) / 2 + 0.5) + words
        best = (points - row).square().sum(1).min()
        assert torch.isclose((own - row).square().sum(), best, rtol=1e-5)


def test_errors_are_a_fifth_smaller_at_the_same_rate() -> None:
    """Points of blocks are 2^12 times fewer than integers; 1/12 is the error of rounding to integers as rare."""
    x = 50 * torch.randn(20_000, BLOCK, generator=torch.Generator().manual_seed(1))
    error = (lattice.nearest(x) - x).square().mean().item()
    assert abs(error / 2 - 0.0663) < 0.0005  # 0.99 dB below 1/12


@given(
    st.integers(1, 4).flatmap(
        lambda items: st.integers(0, 130).flatmap(
            lambda n: st.lists(st.lists(st.integers(0, 63), min_size=n, max_size=n), min_size=items, max_size=items)
        )
    )
)
@settings(max_examples=200)
def test_blocks_are_of_one_item_each_and_the_same_alone(chosen: list[list[int]]) -> None:
    table = torch.tensor(chosen, dtype=torch.uint8).view(len(chosen), -1)
    items, n = table.shape
    found = lattice.blocks(table)
    places = lattice.places(found, items, n)
    assert found.unique().numel() == found.numel()
    assert places.unique().numel() == places.numel() == found.numel() // 2
    for item, row in enumerate(table):
        taking = (row >= lattice.FIRST).nonzero()[:, 0]
        expected = taking[: len(taking) // BLOCK * BLOCK].view(-1, BLOCK)
        own = found[:, 0] // max(n, 1) == item
        assert torch.equal(found[own], expected + item * n)
        number = torch.arange(expected.numel() // 2) + item * lattice.room(n)
        assert torch.equal(places[own].flatten(), number)
        assert len(number) <= lattice.room(n)


def test_tables_of_halves_are_those_of_even_and_odd_symbols() -> None:
    """What both say of a symbol, and how rare its parity is, is what the table of all symbols says."""
    laws = lattice.LAWS
    rows = tables.gaussian_frequencies(laws).split([2 * law.half_width + 2 for law in laws])
    for index in (lattice.FIRST, 30, 60):
        free = lattice.table_of(torch.tensor(index))
        whole = rows[int(free)][:-1].double()
        middle = len(whole) // 2
        symbols = torch.arange(len(whole)) - middle
        for parity in (0, 1):
            half = rows[int(lattice.tables_of_rest(free, torch.tensor(parity)))][:-1].double()
            own = whole[symbols % 2 == parity] / whole[symbols % 2 == parity].sum()
            number = torch.div(symbols[symbols % 2 == parity] - parity, 2, rounding_mode="floor") + len(half) // 2
            assert torch.allclose(own, half[number] / half.sum(), atol=2e-4)


def test_blocks_give_better_pictures_of_fewer_bytes(codec: Codec, large_photo: Picture) -> None:
    other = unpacked(codec)
    for quality in (30, 70):
        packed, alone = (c.encode(large_photo, quality=quality, effort=3) for c in (codec, other))
        assert len(packed.data) < len(alone.data)
        errors = [
            np.square(c.decode(e.data).picture.pixels.astype(float) - large_photo.pixels).mean()
            for c, e in ((codec, packed), (other, alone))
        ]
        assert errors[0] < 0.985 * errors[1]
