"""Bounded work: who may come in, who works, who waits, what is done together, and what is dropped."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from calotype.service.problems import BusyError, TimeLimitError

T = TypeVar("T")
Check = Callable[..., None]
"""To be called between steps, without argument or with the fraction that is done: ends work that nobody waits for."""


class DroppedError(Exception):
    """Raised inside work that nobody waits for any more."""


class ClientGoneError(Exception):
    """The client has closed its connection: there is nobody to answer."""


@dataclass(frozen=True)
class Batch(Generic[T]):
    """How a piece of work is done together with others of an equal `kind`, at most `most` of them.

    `together` takes the items of all and returns a result, or an error, for each.
    """

    kind: Hashable
    item: Any
    most: int
    together: Callable[[Sequence[Any]], Sequence[T | Exception]]


class Job(Generic[T]):
    """One piece of work, and what became of it."""

    def __init__(self, work: Callable[[Check], T], batch: Batch[T] | None) -> None:
        self.work, self.batch = work, batch
        self.result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.started = self.dropped = False
        self.arrived = time.perf_counter()
        self.waited = 0.0
        """Seconds before a worker was free."""

    def check(self, _fraction: float = 0.0) -> None:
        """Raise DroppedError if nobody waits for the result."""
        if self.dropped:
            raise DroppedError


class Workers:
    """A few threads, and a queue before them that has an end.

    A thread cannot be stopped from outside. Work that is too slow or whose client has gone ends at its next
    `Check`; until then it keeps its worker and its place, so that the bounds hold.
    """

    def __init__(self, workers: int, queue: int, timeout: float) -> None:
        self._pool = ThreadPoolExecutor(workers, "calotype-worker")
        self._workers, self._capacity, self._timeout = workers, workers + queue, timeout
        self._queue: list[Job[Any]] = []
        self._groups: set[asyncio.Task[None]] = set()
        """What the threads are at; as many as there are threads, at most."""
        self._present = self._orphans = 0
        self._mean = 0.5
        """Running mean of the seconds that a worker was taken, for Retry-After."""

    @property
    def running(self) -> int:
        """Threads at work."""
        return len(self._groups)

    @property
    def waiting(self) -> int:
        """Jobs for which no thread is free."""
        return len(self._queue)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the house, from before the body is read until the answer is sent. Raises BusyError."""
        if self._present + self._orphans >= self._capacity:
            raise self._busy("the service is full")
        self._present += 1
        try:
            yield
        finally:
            self._present -= 1

    def _busy(self, what: str) -> BusyError:
        seconds = min(max(math.ceil(self._mean * self.waiting / self._workers), 1), math.ceil(self._timeout))
        return BusyError(f"{what}: try again in {seconds} s", seconds)

    async def run(
        self, work: Callable[[Check], T], gone: Awaitable[None], batch: Batch[T] | None = None
    ) -> tuple[T, float]:
        """The result of `work`, done on a thread when one is free, and the seconds until then.

        Args:
            gone: ends when the client goes away.
            batch: how it can be done together with what else is waiting; alone if None.
        Raises:
            BusyError: no worker became free in time.
            TimeLimitError: a worker was at it when the time was over.
            ClientGoneError, and what the work raises.
        """
        job = Job(work, batch)
        self._queue.append(job)
        self._start()
        watch = asyncio.ensure_future(gone)
        try:
            ends: set[asyncio.Future[Any]] = {job.result, watch}
            await asyncio.wait(ends, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            if job.result.done():
                return job.result.result(), job.waited
            if watch.done():
                raise ClientGoneError
            if not job.started:
                raise self._busy(f"no worker became free within {self._timeout:g} s")
            raise TimeLimitError(
                f"this takes longer than the {self._timeout:g} s that a request may take: send a smaller picture"
            )
        finally:
            watch.cancel()
            if not job.result.done():
                self._drop(job)

    def _drop(self, job: Job[Any]) -> None:
        job.dropped = True
        if job.started:
            self._orphans += 1
        else:
            self._queue.remove(job)

    def _start(self) -> None:
        """Give free workers the first job that waits, and what can be done together with it."""
        while self._queue and len(self._groups) < self._workers:
            group = [self._queue.pop(0)]
            if batch := group[0].batch:
                alike = [job for job in self._queue if job.batch and job.batch.kind == batch.kind]
                group += alike[: batch.most - 1]
                self._queue = [job for job in self._queue if job not in group]
            task = asyncio.create_task(self._work(group))
            self._groups.add(task)

    async def _work(self, group: Sequence[Job[Any]]) -> None:
        started = time.perf_counter()
        for job in group:
            job.started, job.waited = True, started - job.arrived
        results = await asyncio.get_running_loop().run_in_executor(self._pool, _results, group)
        self._mean += 0.1 * (time.perf_counter() - started - self._mean)
        for job, result in zip(group, results, strict=True):
            if job.dropped:
                self._orphans -= 1
            elif isinstance(result, Exception):
                job.result.set_exception(result)
            else:
                job.result.set_result(result)
        task = asyncio.current_task()
        assert task is not None
        self._groups.discard(task)
        self._start()

    async def close(self) -> None:
        """Wait for the threads. Nothing may be started afterwards."""
        await asyncio.to_thread(self._pool.shutdown)


def _results(group: Sequence[Job[T]]) -> Sequence[T | Exception]:
    """Do the work of a group, on a worker's thread."""
    first = group[0]
    try:
        if len(group) > 1 and first.batch:
            return first.batch.together([job.batch.item for job in group if job.batch])
        return [first.work(first.check)]
    except Exception as error:
        return [error] * len(group)
