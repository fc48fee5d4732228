"""How often symbols were coded under each table: what tables are fitted to when training is over."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from calotype.models.priors import Request, Result, drive, own_symbols


class SymbolCounts:
    """Counts of the tables `first`, `first` + 1, …, of so many half-widths: [2 half + 2] each, escapes last."""

    def __init__(self, half_widths: Sequence[int], first: int) -> None:
        self.half_widths, self.first = half_widths, first
        self.rows = [torch.zeros(2 * half + 2) for half in half_widths]

    def of(self, coding: Generator[Request, Tensor, Result]) -> Result:
        """Drive an encoding to its end, counting what it asks to be coded under these tables; its result."""

        def answer(request: Request) -> Tensor:
            symbols = own_symbols(request)
            self._add(request.tables.flatten().long() - self.first, symbols.flatten().long())
            return symbols

        return drive(coding, answer)

    def _add(self, numbers: Tensor, symbols: Tensor) -> None:
        for number in numbers.unique().tolist():
            if 0 <= number < len(self.rows):
                half, seen = self.half_widths[number], symbols[numbers == number]
                column = torch.where(seen.abs() > half, 2 * half + 1, seen + half)
                self.rows[number] += torch.bincount(column, minlength=2 * half + 2)
