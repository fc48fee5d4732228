"""Speed and memory of codecs, against an anchor in the same run.

Each case (codec, device, threads) lives in a process of its own, so that memory is its own; the cases take turns, so
that a slow minute of the machine hits all alike. Times are of whole calls on a file, models loaded, after warm-up.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np

from calotype.errors import CalotypeError, InputError
from calotype.evaluation.codecs import CodecSpec
from calotype.evaluation.run import processor, set_threads, thread_environment, versions
from calotype.media import Pixels

SCHEMA = "calotype.bench/1"


@dataclass(frozen=True)
class Case:
    """What one process measures. Settings are tried for the one nearest to the wanted bpp if there are several."""

    spec: CodecSpec
    device: str
    threads: int

    @property
    def name(self) -> str:
        where = f" {self.device}" if self.spec.learned else ""
        return f"{self.spec.name}{where} ×{self.threads}"


_Worker = tuple[Case, Connection, SpawnProcess]


@dataclass(frozen=True)
class Result:
    """Times in seconds by repetition; memory in bytes, of the process (and ffmpeg) at its peak and before encoding."""

    case: Case
    setting: float
    description: str
    bpp: float
    megapixels: float
    load: float
    encode: tuple[float, ...]
    decode: tuple[float, ...]
    stages: Mapping[str, float]
    memory_before: int
    memory_peak: int
    device_memory_peak: int | None

    def speed(self, way: str) -> float:
        """Median megapixels per second of "encode" or "decode"."""
        return self.megapixels / statistics.median(self.encode if way == "encode" else self.decode)


def photograph(width: int, height: int, seed: int = 0) -> Pixels:
    """A synthetic picture with the 1/f spectrum of photographs: reproducible, of any size, neither flat nor noise."""
    random = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = 1 / np.maximum(np.hypot(fy, fx), 1 / max(width, height)) ** 1.3
    planes = [
        np.fft.irfft2(np.fft.rfft2(random.standard_normal((height, width))) * falloff, (height, width)) for _ in "lab"
    ]
    light, a, b = ((p - p.mean()) / p.std() for p in planes)
    rgb = np.stack([light + 0.35 * a, light - 0.2 * a - 0.1 * b, light + 0.35 * b], 2)
    return np.clip(np.rint(rgb * 45 + 118), 0, 255).astype(np.uint8)


def _peak_memory() -> int:
    """Peak resident bytes of this process or of the largest child that it waited for (ffmpeg)."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit


def _bpp(codec: Any, pixels: Pixels, setting: float, path: Path) -> float:
    codec.encode(pixels, setting, path)
    return path.stat().st_size * 8 / (pixels.shape[0] * pixels.shape[1])


def _choose(codec: Any, settings: Sequence[float], pixels: Pixels, path: Path, bpp: float) -> float:
    """The setting nearest in rate, by bisection: rate is monotone in any codec's setting."""
    ordered = sorted(settings)
    if len(ordered) == 1:
        return ordered[0]
    low, high = 0, len(ordered) - 1
    rates = {i: _bpp(codec, pixels, ordered[i], path) for i in (low, high)}
    rising = rates[high] > rates[low]
    while high - low > 1:
        middle = (low + high) // 2
        rates[middle] = _bpp(codec, pixels, ordered[middle], path)
        if (rates[middle] < bpp) == rising:
            low = middle
        else:
            high = middle
    return ordered[min(rates, key=lambda i: abs(np.log(rates[i] / bpp)))]


def _work(channel: Connection, case: Case, pixels: Pixels, bpp: float) -> None:
    """Body of a case's process: sends a dict for each request until told to stop; errors as {"error": text}."""
    try:
        if case.spec.learned:  # it imports torch, whose memory the others do not need
            set_threads(case.threads)
        started = time.perf_counter()
        codec = case.spec.open(case.device, case.threads)
        load = time.perf_counter() - started
        before = _peak_memory()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "picture" + codec.suffix)
            setting = _choose(codec, case.spec.settings, pixels, path, bpp)
            rate = _bpp(codec, pixels, setting, path)
            channel.send({
                "load": load, "memory_before": before, "setting": setting, "bpp": rate,
                "description": codec.describe(setting),
            })  # fmt: skip
            while channel.recv() == "run":
                started = time.perf_counter()
                stages = codec.encode(pixels, setting, path)
                encoded = time.perf_counter()
                _, decode_stages = codec.decode(path, (pixels.shape[0], pixels.shape[1]))
                decoded = time.perf_counter()
                named = {f"encode {k}": v for k, v in stages.items()} | {
                    f"decode {k}": v for k, v in decode_stages.items()
                }
                channel.send({"encode": encoded - started, "decode": decoded - encoded, "stages": named})
        device_peak = None
        if case.spec.learned and case.device.startswith("cuda"):
            import torch

            device_peak = int(torch.cuda.max_memory_allocated(case.device))
        channel.send({"memory_peak": _peak_memory(), "device_memory_peak": device_peak})
    except (CalotypeError, OSError, ValueError, RuntimeError) as error:
        channel.send({"error": f"{type(error).__name__}: {error}"})


def _ask(worker: _Worker, request: str | None) -> dict[str, Any]:
    """The answer of a case's process. Raises InputError if it failed or died."""
    case, channel, process = worker
    try:
        if request is not None:
            channel.send(request)
        while not channel.poll(0.5):
            if not process.is_alive() and not channel.poll(0):
                raise EOFError
        answer: dict[str, Any] = channel.recv()
    except (EOFError, OSError) as error:
        raise InputError(f"{case.name}: its process died, perhaps out of memory") from error
    if "error" in answer:
        raise InputError(f"{case.name}: {answer['error']}")
    return answer


def bench(
    cases: Sequence[Case],
    pixels: Pixels,
    *,
    repetitions: int = 10,
    warmup: int = 3,
    bpp: float = 0.5,
    progress: Callable[[str], None] | None = None,
) -> list[Result]:
    """Measure all cases in turns. Raises InputError if one cannot run."""
    context = multiprocessing.get_context("spawn")
    running: list[_Worker] = []
    ready: list[dict[str, Any]] = []
    times: list[list[dict[str, Any]]] = [[] for _ in cases]
    try:
        for case in cases:
            here, there = context.Pipe()
            with thread_environment(case.threads):
                process = context.Process(target=_work, args=(there, case, pixels, bpp), daemon=True)
                process.start()
            there.close()
            running.append((case, here, process))
            ready.append(_ask(running[-1], None))  # one at a time: loading must not be measured in a crowd
        for turn in range(warmup + repetitions):
            for number, worker in enumerate(running):
                answer = _ask(worker, "run")
                if turn >= warmup:
                    times[number].append(answer)
            if progress is not None:
                progress(f"{turn + 1} of {warmup + repetitions} turns")
        ends = [_ask(worker, "stop") for worker in running]
    finally:
        for _, channel, process in running:
            channel.close()
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()
    results = []
    for case, first, runs, end in zip(cases, ready, times, ends, strict=True):
        names = dict.fromkeys(name for run in runs for name in run["stages"])
        results.append(
            Result(
                case, first["setting"], first["description"], first["bpp"],
                pixels.shape[0] * pixels.shape[1] / 1e6, first["load"],
                tuple(run["encode"] for run in runs), tuple(run["decode"] for run in runs),
                {name: statistics.median(run["stages"].get(name, 0.0) for run in runs) for name in names},
                first["memory_before"], end["memory_peak"], end["device_memory_peak"],
            )
        )  # fmt: skip
    return results


def _latency(seconds: Sequence[float]) -> dict[str, float]:
    middle, most, worst = np.percentile(seconds, (50, 90, 99))
    return {"p50": float(middle), "p90": float(most), "p99": float(worst)}


def rows(results: Sequence[Result], anchor: Result) -> list[dict[str, Any]]:
    """For JSON and tables. Ratios, over 1 if faster than the anchor, come first: they hold best elsewhere."""
    return [
        {
            "case": result.case.name,
            "encode_ratio": result.speed("encode") / anchor.speed("encode"),
            "decode_ratio": result.speed("decode") / anchor.speed("decode"),
            "encode_mpx_per_second": result.speed("encode"),
            "decode_mpx_per_second": result.speed("decode"),
            "encode_seconds": _latency(result.encode),
            "decode_seconds": _latency(result.decode),
            "stages_seconds": dict(result.stages),
            "load_seconds": result.load,
            "memory_before_bytes": result.memory_before,
            "memory_peak_bytes": result.memory_peak,
            "device_memory_peak_bytes": result.device_memory_peak,
            "setting": result.setting,
            "bpp": result.bpp,
            "description": result.description,
            "repetitions": len(result.encode),
        }
        for result in results
    ]


def machine() -> dict[str, Any]:
    """Where it was measured."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": processor(), "processors": count, "versions": versions()}
