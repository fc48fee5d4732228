"""A group of pictures as a unit of work, and who does it: this process, processes beside it, or others like them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from typing import Protocol

import torch

from calotype.video.bitrate import Budget, meet
from calotype.video.frames import Frame
from calotype.video.gop import GopEncoder
from calotype.video.packet import FramePacket, Packet, StreamConfig


@dataclass(frozen=True)
class TimedFrame:
    """A frame with its time and duration, in units of its stream's time base."""

    frame: Frame
    pts: int
    duration: int


@dataclass(frozen=True)
class Gop:
    """A group of pictures before it is encoded; `first` is the number of its first frame."""

    number: int
    first: int
    frames: Sequence[TimedFrame]
    last: bool

    @property
    def duration(self) -> int:
        return sum(f.duration for f in self.frames)


@dataclass(frozen=True)
class EncodedGop:
    """Packets of a group, and the quality 0..1000 they were made at."""

    packets: list[Packet]
    quality: int

    @property
    def size(self) -> int:
        return sum(len(p.data) for p in self.packets)


def encode_gop(config: StreamConfig, gop: Gop, budget: Budget | None, device: str) -> EncodedGop:
    """Encode a group at the quality of the format, or to a budget."""
    if budget is None:
        return EncodedGop(_packets(config, gop, device), config.format.quality)

    def trial(quality: int) -> tuple[int, EncodedGop]:
        tried = EncodedGop(
            _packets(replace(config, format=replace(config.format, quality=quality)), gop, device), quality
        )
        return tried.size, tried

    return meet(budget, trial)[2]


def _packets(config: StreamConfig, gop: Gop, device: str) -> list[Packet]:
    encoder = GopEncoder(config.format, device)
    packets = []
    for place, timed in enumerate(gop.frames):
        key = place == 0
        payload = encoder.encode(timed.frame, key=key)
        last = gop.last and place == len(gop.frames) - 1
        fields = FramePacket(gop.first + place, timed.pts, timed.duration, last, config if key else None, payload)
        packets.append(Packet(fields.pack(), timed.pts, timed.duration, key, config.time_base))
    return packets


class GopPool(Protocol):
    """Does `encode_gop`, perhaps for several groups at the same time. All pools give the same bytes."""

    @property
    def size(self) -> int:
        """How many groups may be under way or waiting, so that nobody in the pool is idle."""

    def submit(self, config: StreamConfig, gop: Gop, budget: Budget | None) -> Future[EncodedGop]:
        """Have a group encoded. The future raises BrokenExecutor if who worked on it is gone."""

    def close(self) -> None:
        """Give up what is not finished, and end."""


class OwnProcess:
    """Encodes at once, in this process."""

    size = 1

    def __init__(self, device: str) -> None:
        self._device = device

    def submit(self, config: StreamConfig, gop: Gop, budget: Budget | None) -> Future[EncodedGop]:
        done: Future[EncodedGop] = Future()
        done.set_result(encode_gop(config, gop, budget, self._device))
        return done

    def close(self) -> None:
        pass


class Processes:
    """Encodes in `size` processes of this machine, which share its processors."""

    def __init__(self, size: int, device: str) -> None:
        self.size, self._device = size, device
        threads = max(1, torch.get_num_threads() // size)
        # Processes started anew: forked ones would inherit threads in an unknown state.
        self._executor = ProcessPoolExecutor(size, get_context("spawn"), _begin_process, (threads,))

    def submit(self, config: StreamConfig, gop: Gop, budget: Budget | None) -> Future[EncodedGop]:
        return self._executor.submit(encode_gop, config, gop, budget, self._device)

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


def _begin_process(threads: int) -> None:
    """An interrupt is for the main process, and if that dies, nobody wants the results."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
