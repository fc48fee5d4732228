"""Encoding groups of pictures in the workers of a cluster."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial

from calotype.cluster.throughput import Throughput
from calotype.cluster.workers import Workers
from calotype.errors import ModelNotFoundError
from calotype.video.bitrate import Budget
from calotype.video.frames import Colour, gray
from calotype.video.gop import GopEncoder, video_format
from calotype.video.groups import EncodedGop, Gop, encode_gop
from calotype.video.packet import StreamConfig, VideoFormat

Unit = tuple[StreamConfig, Gop, Budget | None]


def weights() -> tuple[bytes, bytes]:
    """What new videos are encoded with here: the beginnings of the SHA-256 of both models' weights."""
    format = _smallest()
    return format.intra_weights, format.inter_weights


def _smallest() -> VideoFormat:
    return video_format(16, 16, Colour(), 0)


class GopWorker:
    """Encodes groups; the models stay on their device between them.

    Args:
        wanted: the `weights` that must be used, so that all machines write the same.
        device: "cpu", for one thread, or "cuda".
    Raises:
        ModelNotFoundError if the weights here are others.
    """

    def __init__(self, wanted: tuple[bytes, bytes], device: str) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(1)
        self._device = device
        if weights() != wanted:
            raise ModelNotFoundError("a worker has other weights of the video models: install one Calotype everywhere")
        encoder = GopEncoder(_smallest(), device)
        for key in (True, False):  # loads both models, so that no group waits for it
            encoder.encode(gray(16, 16), key=key)

    def __call__(self, unit: Unit) -> EncodedGop:
        """Encode a group; see `encode_gop`."""
        return encode_gop(*unit, self._device)


class ClusterPool:
    """A `GopPool` of a cluster's workers, which are started with it.

    Args:
        address, device, limit: see `Workers`.
        throughput: learns of each group.
    Raises:
        as `Workers`; futures raise WorkerError for a group whose workers died each time.
    """

    def __init__(self, address: str, throughput: Throughput, *, device: str = "auto", limit: int | None = None) -> None:
        self._throughput = throughput
        self._workers: Workers[Unit, EncodedGop] = Workers(
            address, partial(GopWorker, weights()), device=device, limit=limit
        )
        self._threads = ThreadPoolExecutor(len(self._workers))
        self._closing = threading.Event()

    @property
    def size(self) -> int:
        """Twice the workers: groups are taken back in order, and a slow one must not leave the other workers idle."""
        return 2 * len(self._workers)

    def submit(self, config: StreamConfig, gop: Gop, budget: Budget | None) -> Future[EncodedGop]:
        return self._threads.submit(self._encode, (config, gop, budget))

    def _encode(self, unit: Unit) -> EncodedGop:
        done = self._workers.call(unit, self._check)
        self._throughput.add(done.worker, len(unit[1].frames), done.seconds)
        return done.result

    def _check(self) -> None:
        if self._closing.is_set():
            raise CancelledError

    def close(self) -> None:
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)
        self._workers.__exit__(None, None, None)
