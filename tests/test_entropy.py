"""The range coder: any symbols under any tables come back, and an independent decoder reads the same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference_decoder import DamageError, RangeDecoder, cumulative_tables, read_request

from calotype.entropy import Decoder, Encoder, SymbolTables
from calotype.errors import FormatError
from calotype.models import tables as shipped

TOTAL = 2**24
SYMBOL_LIMIT = 2**17 - 1
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Tables:
    """Tables for both coders."""

    codec: SymbolTables
    cumulative: list[list[int]]

    @classmethod
    def of(cls, frequencies: list[npt.NDArray[np.int64]]) -> Tables:
        widths = [len(f) // 2 - 1 for f in frequencies]
        joined = np.concatenate(frequencies).astype(np.int32)
        return cls(SymbolTables(joined, widths, shipped.SKIP), [[0, *accumulate(f.tolist())] for f in frequencies])


GAUSSIAN = shipped.gaussian_frequencies().numpy().astype(np.int64)
BOUNDS = [0, *accumulate(2 * shipped.half_width(i) + 2 for i in range(shipped.SCALES))]
SHIPPED = Tables.of([GAUSSIAN[a:b] for a, b in pairwise(BOUNDS)])


def test_shipped_tables_are_whole() -> None:
    assert cumulative_tables(GAUSSIAN.tolist()) == SHIPPED.cumulative
    assert GAUSSIAN.min() >= 1


@st.composite
def any_tables(draw: st.DrawFn) -> Tables:
    """Six tables above the skipped ones: flat, peaked and random, narrow and wide."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    frequencies = []
    for _ in range(shipped.SKIP + 6):
        entries = 2 * draw(st.sampled_from([1, 2, 5, 60, 416])) + 2
        weights = rng.random(entries) ** draw(st.sampled_from([1, 8, 60]))
        row = 1 + np.floor(weights / weights.sum() * (TOTAL - entries - 1)).astype(np.int64)
        row[-1] += 1  # an escape has a frequency of two at least
        row[rng.integers(entries)] += TOTAL - row.sum()
        frequencies.append(row)
    return Tables.of(frequencies)


@st.composite
def requests(draw: st.DrawFn, count: int) -> list[tuple[Bytes, Ints]]:
    """Some requests of (table indexes below `count`, symbols); symbols of skipped tables are zero."""
    symbol = st.one_of(
        st.integers(-3, 3),
        st.integers(-500, 500),
        st.integers(-SYMBOL_LIMIT, SYMBOL_LIMIT),
        st.sampled_from([SYMBOL_LIMIT, -SYMBOL_LIMIT]),
    )
    made = []
    for _ in range(draw(st.integers(1, 3))):
        pairs = draw(st.lists(st.tuples(st.integers(0, count - 1), symbol), max_size=60))
        indexes = np.array([i for i, _ in pairs], np.uint8)
        symbols = np.array([s for _, s in pairs], np.int32)
        made.append((indexes, np.where(indexes >= shipped.SKIP, symbols, 0).astype(np.int32)))
    return made


def encode(tables: Tables, asked: list[tuple[Bytes, Ints]]) -> bytes:
    encoder = Encoder(tables.codec)
    for indexes, symbols in asked:
        encoder.push(indexes, symbols)
    return encoder.finish()


def check_both_decoders(tables: Tables, asked: list[tuple[Bytes, Ints]]) -> bytes:
    data = encode(tables, asked)
    decoder, reference = Decoder(tables.codec, data), RangeDecoder(data)
    for indexes, symbols in asked:
        got = decoder.pull(indexes)
        assert got.dtype == np.int32
        assert (got == symbols).all()
        assert read_request(reference, tables.cumulative, indexes.tolist()) == symbols.tolist()
    return data


@settings(max_examples=150)
@given(asked=requests(shipped.SCALES))
@example(asked=[(np.array([], np.uint8), np.array([], np.int32))])
@example(asked=[(np.arange(5, dtype=np.uint8), np.zeros(5, np.int32))] * 2)
def test_round_trip_with_the_shipped_tables(asked: list[tuple[Bytes, Ints]]) -> None:
    check_both_decoders(SHIPPED, asked)


@settings(max_examples=80)
@given(tables=any_tables(), data=st.data())
def test_round_trip_with_any_tables(tables: Tables, data: st.DataObject) -> None:
    check_both_decoders(tables, data.draw(requests(len(tables.cumulative))))


def test_every_escape_length_and_sign() -> None:
    """Magnitudes at both ends of every bit length, in several tables, in one request."""
    edges = sorted({s for k in range(18) for s in (2**k - 1, 2**k, 2**k + 1) if s <= SYMBOL_LIMIT} | {SYMBOL_LIMIT})
    for table in (5, 30, 63):
        width = shipped.half_width(table)
        chosen = sorted({0, width, width + 1, *edges, *(min(e + width, SYMBOL_LIMIT) for e in edges)})
        symbols = np.array(chosen + [-s for s in chosen], np.int32)
        np.random.default_rng(table).shuffle(symbols)
        check_both_decoders(SHIPPED, [(np.full(len(symbols), table, np.uint8), symbols)] * 2)


@pytest.mark.parametrize("seed", range(3))
def test_long_streams_match_the_reference_and_the_entropy(seed: int) -> None:
    """Many symbols drawn from their tables: both decoders agree, and the bytes are what information theory says."""
    rng = np.random.default_rng(seed)
    indexes = rng.integers(0, shipped.SCALES, 30000).astype(np.uint8)
    symbols, bits = np.zeros(len(indexes), np.int32), 0.0
    for table in range(shipped.SKIP, shipped.SCALES):
        row = np.diff(SHIPPED.cumulative[table])[:-1]
        places = np.flatnonzero(indexes == table)
        drawn = rng.choice(len(row), len(places), p=row / row.sum())
        symbols[places] = drawn - shipped.half_width(table)
        bits -= np.log2(row[drawn] / TOTAL).sum()
    data = check_both_decoders(SHIPPED, [(indexes[:11], symbols[:11]), (indexes[11:], symbols[11:])])
    assert -64 <= len(data) * 8 - bits <= 96


def test_uniform_symbols_match_constriction() -> None:
    """The reference's `uniform` against the library, for sizes that do not divide 2^24 too."""
    import constriction

    rng = np.random.default_rng(1)
    sizes = [2, 3, 7, 18, 1024, 1000, 2**17]
    symbols = [rng.integers(0, size, 50).astype(np.int32) for size in sizes]
    encoder = constriction.stream.queue.RangeEncoder()
    for size, row in zip(sizes, symbols, strict=True):
        encoder.encode(row, constriction.stream.model.Uniform(size))
    reference = RangeDecoder(encoder.get_compressed().astype("<u4").tobytes())
    for size, row in zip(sizes, symbols, strict=True):
        assert [reference.uniform(size) for _ in row] == row.tolist()


def test_missing_zero_bytes_are_read_as_zeros() -> None:
    """A stream may end in any number of zero bytes without changing its meaning."""
    rng = np.random.default_rng(4)
    stripped = 0
    for _ in range(300):
        indexes = rng.integers(5, 64, rng.integers(1, 9)).astype(np.uint8)
        symbols = rng.integers(-2, 3, len(indexes)).astype(np.int32)
        data = check_both_decoders(SHIPPED, [(indexes, symbols)])
        assert not data.endswith(b"\0")
        stripped += len(data) % 4 != 0
        for zeros in (1, 2, 3, 4, 9):
            assert (Decoder(SHIPPED.codec, data + bytes(zeros)).pull(indexes) == symbols).all()
    assert stripped > 0


@settings(max_examples=150)
@given(data=st.binary(max_size=200), asked=requests(shipped.SCALES))
def test_garbage_gives_symbols_or_our_error(data: bytes, asked: list[tuple[Bytes, Ints]]) -> None:
    """And the reference decoder agrees on which, and on the symbols."""
    decoder, reference = Decoder(SHIPPED.codec, data), RangeDecoder(data)
    for indexes, _ in asked:
        try:
            expected = read_request(reference, SHIPPED.cumulative, indexes.tolist())
        except DamageError:
            with pytest.raises(FormatError):
                decoder.pull(indexes)
            return
        assert decoder.pull(indexes).tolist() == expected


def test_impossible_stream_is_reported() -> None:
    """A point at the very end of the range lies beyond every symbol."""
    with pytest.raises(FormatError):
        Decoder(SHIPPED.codec, b"\xff" * 12).pull(np.full(200, 40, np.uint8))


def test_order_inside_a_request_does_not_leak_between_tables() -> None:
    """Only the order within a table matters to the bytes: tables are grouped."""
    rng = np.random.default_rng(5)
    indexes = rng.integers(5, 64, 500).astype(np.uint8)
    symbols = rng.integers(-1, 2, 500).astype(np.int32)
    by_table = np.argsort(indexes, kind="stable")
    assert encode(SHIPPED, [(indexes, symbols)]) == encode(SHIPPED, [(indexes[by_table], symbols[by_table])])
    assert encode(SHIPPED, [(indexes, symbols)]) != encode(SHIPPED, [(indexes, symbols[::-1])])


def test_mismatched_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="do not match"):
        SymbolTables(GAUSSIAN.astype(np.int32)[:-1], [shipped.half_width(i) for i in range(64)], 5)
