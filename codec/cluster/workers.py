"""A pool of actors on one or many machines: each keeps its model on its device, one that dies is replaced."""

from __future__ import annotations

import importlib
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

from calotype.errors import CalotypeError, InputError

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Make = Callable[[str], Callable[[Unit], Result]]

RETRIES = 3
_POLL = 0.5
"""Seconds between two looks at whether the user interrupted."""


class WorkerError(CalotypeError):
    """The cluster cannot be reached, or its workers die."""


@dataclass(frozen=True)
class Done(Generic[Result]):
    """A result, the worker that made it (host/process number), and the seconds it took there."""

    result: Result
    worker: str
    seconds: float


class _Actor(Generic[Unit, Result]):
    """What runs in a worker's process. The function is made on first use: errors of a constructor would get lost."""

    def __init__(self, make: Make[Unit, Result], device: str) -> None:
        self._make, self._device = make, device
        self._function: Callable[[Unit], Result] | None = None

    def start(self) -> None:
        if self._function is None:
            self._function = self._make(self._device)

    def work(self, unit: Unit) -> Done[Result]:
        started = time.perf_counter()
        self.start()
        assert self._function is not None
        result = self._function(unit)
        return Done(result, f"{socket.gethostname()}/{os.getpid()}", time.perf_counter() - started)


class Workers(Generic[Unit, Result]):
    """Calls a function in worker processes; threads may share a pool. Use it in a `with` statement.

    Args:
        address: "local" starts workers on this machine, "auto" joins the cluster that it belongs to, ray://HOST:PORT
            another one. Every machine needs the same Calotype.
        make: called in each worker with its device, "cpu" or "cuda"; gives the function that does a unit of work.
            It, units and results are pickled.
        device: "auto" takes the GPUs of the cluster, one for each worker, if it has some; else, as with "cpu", each
            worker has one processor. "cuda" insists on GPUs.
        limit: the most workers; None takes all that are free.
        retries: how often a unit is tried again whose worker died.
    Raises:
        InputError for an address of another form, if Ray is not installed or there is no such device; WorkerError if
        the cluster cannot be reached; whatever `make` raises.
    """

    def __init__(
        self,
        address: str,
        make: Make[Unit, Result],
        *,
        device: str = "auto",
        limit: int | None = None,
        retries: int = RETRIES,
    ) -> None:
        if address not in ("local", "auto") and not address.startswith("ray://"):
            raise InputError(f"unknown cluster {address!r}: use local, auto or ray://HOST:PORT")
        self._ray = _import_ray()
        _connect(self._ray, address, limit)
        try:
            device, count = _share(self._ray.available_resources(), device)
            count = min(count, limit or count)
            resources = {"num_cpus": 1} if device == "cpu" else {"num_cpus": 0, "num_gpus": 1}
            remote = self._ray.remote(_Actor).options(max_restarts=-1, max_task_retries=retries, **resources)
            self._actors = [remote.remote(make, device) for _ in range(count)]
            for actor in self._actors:
                self._result(actor.start.remote(), None)
        except BaseException:
            self._ray.shutdown()
            raise
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for actor in self._actors:
            self._idle.put(actor)

    def __len__(self) -> int:
        return len(self._actors)

    def __enter__(self) -> Workers[Unit, Result]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()

    def call(self, unit: Unit, waiting: Callable[[], object] | None = None) -> Done[Result]:
        """Have a worker do `unit`, as soon as one is free.

        Args:
            waiting: called now and then; what it raises ends the wait.
        Raises:
            WorkerError if the workers that tried it died, `retries` + 1 in all; whatever the function raises.
        """
        actor = self._idle.get()
        try:
            done: Done[Result] = self._result(actor.work.remote(unit), waiting)
            return done
        finally:
            self._idle.put(actor)

    def _result(self, reference: Any, waiting: Callable[[], object] | None) -> Any:
        errors = self._ray.exceptions
        try:
            while not self._ray.wait([reference], timeout=_POLL)[0]:
                if waiting is not None:
                    waiting()
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayError as error:
            raise WorkerError(
                "the workers that tried it died, perhaps for want of memory: use fewer workers or machines with more "
                f"memory ({str(error).splitlines()[0]})"
            ) from error


def _import_ray() -> Any:
    # Ray would report its use over the network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise InputError("a cluster needs Ray: pip install 'calotype[cluster]'") from error


def _connect(ray: Any, address: str, limit: int | None) -> None:
    # It prints news of dead workers to standard output, where results go, and has no public switch for that.
    importlib.import_module("ray._private.worker")._worker_logs_enabled = False  # type: ignore[attr-defined]
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options |= {"num_cpus": limit, "include_dashboard": False}
        # By default workers give way to everything else on the machine, and on a busy one get nowhere.
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(address=address, **options)
    # Ray raises ConnectionError, its own errors, gRPC's, RuntimeError and ValueError here.
    except Exception as error:
        raise WorkerError(f"the cluster {address} cannot be reached: {str(error).splitlines()[0]}") from error
    finally:
        if main:
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own in place, which would not clean up


def _share(resources: dict[str, float], device: str) -> tuple[str, int]:
    """The kind of device that workers use, and how many workers there can be. Raises InputError, WorkerError."""
    gpus = int(resources.get("GPU", 0))
    if device.startswith("cuda") and not gpus:
        raise InputError("the cluster has no free GPU: use --device cpu")
    if gpus and device != "cpu":
        return "cuda", gpus
    processors = int(resources.get("CPU", 0))
    if not processors:
        raise WorkerError("the cluster has no free processor: try again later")
    return "cpu", processors
