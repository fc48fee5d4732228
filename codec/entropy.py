"""The range coder: symbols and their table indexes to bytes and back.

Built on constriction's range coder (32-bit words, 64-bit state, 24-bit frequencies). The symbols of one request are
coded grouped by table, tables in ascending order, so that each group is one vectorised call; rare large symbols are
escaped and follow the groups. Symbols with a table each are coded one after another. The order is part of the
format: docs/FORMAT.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import constriction
import numpy as np
import numpy.typing as npt

from calotype.errors import FormatError
from calotype.models.priors import SYMBOL_LIMIT

Symbols = npt.NDArray[np.int32]
Tables = npt.NDArray[np.uint8] | npt.NDArray[np.int16]

ESCAPE_LENGTHS = 18
"""An escaped magnitude has at most this many bits."""

_queue = constriction.stream.queue
_models = constriction.stream.model


_each = _models.Categorical(perfect=False)
"""A model for each symbol, given by its probabilities."""


def _probabilities(frequencies: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Probabilities of which a model has exactly the given integer frequencies [..., n].

    constriction turns probabilities p into cumulative frequencies floor(sum p * free / total) + i, where each of n
    symbols has 1 for sure and `free` is 2^24 - n. With p = frequency - 1, shifted by a quarter so that the floor is
    never near an integer, all of that is exact. The last frequency must be above 1.
    """
    probabilities = frequencies.astype(np.float64, order="C") - 1
    probabilities[..., 0] += 0.25
    probabilities[..., -1] -= 0.25
    return probabilities


class SymbolTables:
    """The tables of a model, ready for the coder.

    Args:
        frequencies: of all tables, one after another; each sums to 2^24 and ends with the escape. The table of index
            i holds the symbols -half_widths[i] .. half_widths[i] before it.
        half_widths: one per table.
        skip: symbols of tables below this one are zero and are not coded.
        escapes: whether symbols beyond the half-width exist; if not, a stream that has one is damaged.
    """

    def __init__(
        self, frequencies: npt.NDArray[np.int32], half_widths: Sequence[int], skip: int, *, escapes: bool = True
    ) -> None:
        self.half_widths = np.asarray(half_widths, np.int32)
        self.skip, self.escapes = skip, escapes
        bounds = np.concatenate([[0], np.cumsum(2 * self.half_widths + 2)])
        if bounds[-1] != len(frequencies):
            raise ValueError("frequencies and half-widths do not match")
        self.models = [
            _models.Categorical(_probabilities(frequencies[a:b]), perfect=False) for a, b in itertools.pairwise(bounds)
        ]

    def order(self, tables: Tables) -> tuple[npt.NDArray[np.intp], list[tuple[int, slice]], Symbols]:
        """Coding order: positions of the coded symbols, the run of each table in it, and each position's half-width."""
        coded = np.flatnonzero(tables >= self.skip)
        chosen = tables[coded]
        order = np.argsort(chosen, kind="stable")
        bounds = np.searchsorted(chosen[order], np.arange(self.skip, len(self.models) + 1))
        runs = [
            (table, slice(start, stop))
            for table, (start, stop) in enumerate(itertools.pairwise(bounds.tolist()), self.skip)
            if start < stop
        ]
        return coded[order], runs, np.repeat(self.half_widths[self.skip :], np.diff(bounds))


NO_TABLES = SymbolTables(np.zeros(0, np.int32), (), 0)
"""For streams of symbols that come with tables of their own."""


class Encoder:
    """Appends requests to one range-coded stream."""

    def __init__(self, tables: SymbolTables) -> None:
        self.tables = tables
        self._coder = _queue.RangeEncoder()

    def push(self, tables: Tables, symbols: Symbols) -> None:
        """Code `symbols` [n] under `tables` [n]."""
        order, runs, reach = self.tables.order(tables)
        values = symbols[order]
        index = values + reach
        # As an unsigned number what lies below the table is large, too.
        escaped = np.flatnonzero(index.view(np.uint32) > (2 * reach).view(np.uint32))
        index[escaped] = 2 * reach[escaped] + 1
        for table, run in runs:
            self._coder.encode(index[run], self.tables.models[table])
        if len(escaped):
            over = values[escaped]
            self._push_escaped(np.sign(over) * (np.abs(over) - reach[escaped]))

    def push_each(self, frequencies: npt.NDArray[np.int32], symbols: Symbols) -> None:
        """Code `symbols` [n], each in [0, K) under its own `frequencies` [n, K], which sum to 2^24."""
        self._coder.encode(symbols, _each, _probabilities(frequencies))

    def _push_escaped(self, values: Symbols) -> None:
        """Exponential Golomb of magnitudes ≥ 1: all lengths, then the low bits by ascending length, then all signs."""
        magnitude = np.abs(values)
        lengths = np.floor(np.log2(magnitude)).astype(np.int32) + 1
        self._coder.encode(lengths - 1, _models.Uniform(ESCAPE_LENGTHS))
        for length in np.unique(lengths[lengths > 1]):
            low = magnitude[lengths == length] - (1 << (length - 1))
            self._coder.encode(low.astype(np.int32), _models.Uniform(1 << (int(length) - 1)))
        self._coder.encode((values < 0).astype(np.int32), _models.Uniform(2))

    def finish(self) -> bytes:
        """The stream, little-endian words without trailing zero bytes."""
        return bytes(self._coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0"))


class Decoder:
    """Reads requests back. Raises FormatError on a stream that no encoder can have written."""

    def __init__(self, tables: SymbolTables, data: bytes | memoryview) -> None:
        self.tables = tables
        padded = bytes(data) + b"\0" * (-len(data) % 4)
        self._coder = _queue.RangeDecoder(np.frombuffer(padded, "<u4").astype(np.uint32))

    def pull(self, tables: Tables) -> Symbols:
        """The symbols [n] that were coded under `tables` [n]."""
        order, runs, reach = self.tables.order(tables)
        values = np.empty(len(order), np.int32)
        try:
            for table, run in runs:
                values[run] = self._coder.decode(self.tables.models[table], run.stop - run.start)
            values -= reach
            escaped = np.flatnonzero(values > reach)
            if len(escaped):
                if not self.tables.escapes:
                    raise FormatError("a symbol stands for no codeword: the file is damaged")
                beyond = self._pull_escaped(len(escaped))
                beyond += np.sign(beyond) * reach[escaped]
                if np.abs(beyond).max() > SYMBOL_LIMIT:
                    raise FormatError("an escaped symbol is out of range: the file is damaged")
                values[escaped] = beyond
        except AssertionError as error:
            raise FormatError("the entropy-coded data is damaged") from error
        symbols = np.zeros(len(tables), np.int32)
        symbols[order] = values
        return symbols

    def pull_each(self, frequencies: npt.NDArray[np.int32]) -> Symbols:
        """The symbols [n] that were coded under `frequencies` [n, K]."""
        try:
            return self._coder.decode(_each, _probabilities(frequencies))
        except AssertionError as error:
            raise FormatError("the entropy-coded data is damaged") from error

    def _pull_escaped(self, count: int) -> Symbols:
        lengths = self._coder.decode(_models.Uniform(ESCAPE_LENGTHS), count) + 1
        magnitude = np.left_shift(1, lengths - 1).astype(np.int32)
        for length in np.unique(lengths[lengths > 1]):
            chosen = lengths == length
            magnitude[chosen] += self._coder.decode(_models.Uniform(1 << (int(length) - 1)), int(chosen.sum()))
        signs = self._coder.decode(_models.Uniform(2), count)
        return np.where(signs == 1, -magnitude, magnitude)
