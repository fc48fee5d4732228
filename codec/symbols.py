"""Payloads of symbols: where a model's coding meets the range coder. The same for tiles, batches and video frames.

A payload is the CRC-32 of its symbols, as little-endian int32, and the range-coded data. The check tells damage of
bytes (found by the container's CRC) from a decoder that computes other integers than the encoder did.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calotype.entropy import Decoder, Encoder, SymbolTables
from calotype.errors import DriftError, FormatError
from calotype.models.priors import Request
from calotype.models.tokens import Categorical
from calotype.stopwatch import Stopwatch

T = TypeVar("T")
Coding = Generator[Request | Categorical, Tensor, T]
_CRC = struct.Struct("<I")


def write(coding: Coding[T], tables: SymbolTables, batch: int, watch: Stopwatch) -> tuple[list[bytes], T]:
    """Drive an encoding of `batch` items to its end; returns a payload for each, and the coding's result."""
    encoders = [Encoder(tables) for _ in range(batch)]
    checks = [0] * batch

    def answer(request: Request | Categorical) -> Tensor:
        assert request.symbols is not None
        given, symbols = request[0].cpu().numpy(), request.symbols.cpu().numpy()
        for i, encoder in enumerate(encoders):
            push = encoder.push_each if isinstance(request, Categorical) else encoder.push
            push(given[i], symbols[i])
            checks[i] = _crc(symbols[i], checks[i])
        return request.symbols

    result = _drive(coding, answer, watch)
    return [_CRC.pack(check) + encoder.finish() for check, encoder in zip(checks, encoders, strict=True)], result


def read(
    coding: Coding[T],
    tables: SymbolTables,
    payloads: Sequence[bytes | memoryview],
    names: Sequence[str],
    watch: Stopwatch,
    *,
    device: torch.device,
    seen: Callable[[int, bytes], None] | None = None,
) -> T:
    """Drive a decoding of as many items as there are payloads; returns the coding's result.

    Args:
        names: what messages call each payload.
        device: where the model is.
        seen: called with an item's place in the batch and each run of its symbols, as little-endian int32.
    Raises:
        FormatError for data that no encoder can have written, DriftError for symbols that were not encoded.
    """
    for name, payload in zip(names, payloads, strict=True):
        if len(payload) < _CRC.size:
            raise FormatError(f"{name} is too short: the file is damaged")
    decoders = [Decoder(tables, p[_CRC.size :]) for p in payloads]
    checks = [0] * len(payloads)

    def answer(request: Request | Categorical) -> Tensor:
        given = request[0].cpu().numpy()
        symbols = np.empty(given.shape[:2], np.int32)
        for i, decoder in enumerate(decoders):
            pull = decoder.pull_each if isinstance(request, Categorical) else decoder.pull
            try:
                symbols[i] = pull(given[i])
            except FormatError as error:
                raise FormatError(f"{names[i]}: {error}") from error
            checks[i] = _crc(symbols[i], checks[i])
            if seen:
                seen(i, symbols[i].astype("<i4").tobytes())
        return torch.from_numpy(symbols).to(device)

    result = _drive(coding, answer, watch)
    for name, check, payload in zip(names, checks, payloads, strict=True):
        if check != _CRC.unpack_from(payload)[0]:
            raise DriftError(
                f"{name} decoded to other symbols than were encoded although its bytes are intact: this device or "
                "library computes wrongly; try --device cpu and report it"
            )
    return result


def _drive(coding: Coding[T], answer: Callable[[Request | Categorical], Tensor], watch: Stopwatch) -> T:
    """Run a model's coding to its end; `answer` gives the symbols [B, n] of each request."""
    try:
        with watch("prior"):
            request = next(coding)
        while True:
            with watch("entropy"):
                symbols = answer(request)
            with watch("prior"):
                request = coding.send(symbols)
    except StopIteration as stop:
        return stop.value


def _crc(symbols: npt.NDArray[np.int32], start: int) -> int:
    return zlib.crc32(np.ascontiguousarray(symbols, "<i4").data, start)
