"""The point of contact between models and the coder: a model's coding generator, driven by answers of a coder."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from calotype.models.priors import Request

T = TypeVar("T")


def drive(coding: Generator[Request, Tensor, T], answer: Callable[[Request], Tensor]) -> T:
    """Run a model's coding to its end; `answer` gives the symbols [B, n] of each request."""
    try:
        request = next(coding)
        while True:
            request = coding.send(answer(request))
    except StopIteration as stop:
        return stop.value


def symbols_crc(symbols: npt.NDArray[np.int32], start: int) -> int:
    """CRC-32 of symbols as little-endian int32, continued from `start`."""
    return zlib.crc32(np.ascontiguousarray(symbols, "<i4").data, start)
