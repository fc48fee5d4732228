"""The service under mixed load: are all answers right, does its memory stay flat, how long do they take?

    python benchmarks/service.py FOLDER [--requests 200] [--concurrency 16] [--workers 2] [--pictures 4]

Starts `calotype serve`, sends pictures of FOLDER to be encoded and decoded, and between them damaged files, files over
the limits, slow clients, and clients that go away. Every valid answer is compared with that of the Python interface in
this process. Then comes a burst of more requests than the service takes. Prints a table by kind of request, then the
resident memory of the service after a warm-up, after the load, and after the burst.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import math
import os
import random
import signal
import statistics
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

from calotype.api import Codec
from calotype.container import probe
from calotype.media import Picture, read_picture, write_picture

MAX_PIXELS, MAX_BODY, TRANSFER_TIMEOUT = 2_000_000, 8_000_000, 1.0
QUEUE = 24
CANCELLED = 0
"""Stands for a status where the client did not wait for one."""


@dataclass(frozen=True)
class Case:
    """A request, and what its answer must be.

    Manners: "slow" sends its body in pieces with pauses, "stalled" stops in the middle of it, "cancelled" goes away
    before the answer.
    """

    kind: str
    path: str
    body: bytes
    status: int
    right: Callable[[bytes], bool] = bool
    manner: Literal["plain", "slow", "stalled", "cancelled"] = "plain"


@dataclass(frozen=True)
class Outcome:
    """What became of a request; `right` if status and body are as they must be."""

    kind: str
    status: int
    seconds: float
    right: bool
    retry_after: str | None


def pixels_of(data: bytes) -> np.ndarray:
    """Pixels of a picture file."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def differs_by(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference of two pictures. Files decoded together may differ by 1, as floats draw the pixels."""
    return float(np.abs(a.astype(int) - b).max()) if a.shape == b.shape else math.inf


def claims_to_be_huge() -> bytes:
    """A PNG of a few bytes whose header says 60000 x 60000 pixels."""
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def cases(pictures: Sequence[Picture], codec: Codec) -> list[Case]:
    """A mix of requests with the answers that the Python interface gives, for a service with the limits above."""
    found = []
    for number, picture in enumerate(pictures):
        source, quality = write_picture(picture, "png"), (35, 60, 80)[number % 3]
        stream = codec.encode(picture, quality=quality).data
        pixels = codec.decode(stream).picture.pixels
        box = (8, 8, picture.width // 2, picture.height // 2)
        part = codec.decode(stream, region=box).picture.pixels
        small = codec.decode(stream, scale=4).picture.pixels
        info = probe(stream).model_dump_json().encode()
        budget = len(source) // 4

        def same(expected: np.ndarray) -> Callable[[bytes], bool]:
            return lambda body: differs_by(pixels_of(body), expected) <= 1

        def equal(expected: bytes) -> Callable[[bytes], bool]:
            return lambda body: body == expected

        damaged = bytearray(stream)
        damaged[len(stream) // 2] ^= 0xFF
        region = ",".join(map(str, box))
        found += [
            Case("encode", f"/encode?quality={quality}", source, 200, equal(stream)),
            Case("encode, slow client", f"/encode?quality={quality}", source, 200, equal(stream), "slow"),
            Case("encode, client goes", f"/encode?quality={quality}", source, CANCELLED, manner="cancelled"),
            Case("decode", "/decode", stream, 200, same(pixels)),
            Case("decode", "/decode?format=webp", stream, 200, same(pixels)),
            Case("decode a region", f"/decode?region={region}", stream, 200, same(part)),
            Case("decode at 1/4", "/decode?scale=4&format=bmp", stream, 200, same(small)),
            Case("decode, client goes", "/decode", stream, CANCELLED, manner="cancelled"),
            Case("decode, stalled client", "/decode", stream, 408, manner="stalled"),
            Case("decode, damaged", "/decode", bytes(damaged), 422),
            Case("decode, damaged, partial", "/decode?allow_partial=true", bytes(damaged), 200),
            Case("decode, cut short", "/decode", stream[: len(stream) * 2 // 3], 422),
            Case("info", "/info", stream, 200, equal(info)),
            Case("compare", f"/compare?format=jpeg&size={budget}", source, 200, lambda b, n=budget: 0 < len(b) <= n),
        ]
    noise = random.Random(1).randbytes(20_000)
    found += [
        Case("not a picture", "/encode", noise, 422),
        Case("not a stream", "/decode", noise, 422),
        Case("bad parameter", "/encode?quality=101", noise, 400),
        Case("unknown model", "/encode?model=none", noise, 404),
        Case("huge picture", "/encode", claims_to_be_huge(), 413),
        Case("huge body", "/decode", bytes(MAX_BODY + 1), 413),
    ]
    return found


async def send(client: httpx.AsyncClient, case: Case) -> Outcome:
    """Send one request in its manner."""
    started = time.perf_counter()
    status, body, retry_after = CANCELLED, b"", None
    if case.manner == "stalled":
        status, body = await _stall(client.base_url.host, client.base_url.port or 80, case)
    else:
        content = _in_pieces(case.body) if case.manner == "slow" else case.body
        patience = random.Random(len(case.body)).uniform(0.005, 0.1) if case.manner == "cancelled" else None
        try:
            async with asyncio.timeout(patience):
                response = await client.post(case.path, content=content)
            status, body, retry_after = response.status_code, response.content, response.headers.get("retry-after")
        except TimeoutError:
            pass
    seconds = time.perf_counter() - started
    # A client that meant to go may have been served before.
    expected = status in (CANCELLED, 200) if case.manner == "cancelled" else status == case.status
    right = expected and (status != 200 or case.right(body))
    return Outcome(case.kind, status, seconds, right, retry_after)


async def _in_pieces(body: bytes):
    step = -(-len(body) // 5)
    for start in range(0, len(body), step):
        yield body[start : start + step]
        await asyncio.sleep(0.02)


async def _stall(host: str, port: int, case: Case) -> tuple[int, bytes]:
    """Send half of the body and wait for what the service says to that."""
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST {case.path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(case.body)}\r\n\r\n"
    writer.write(head.encode() + case.body[: len(case.body) // 2])
    await writer.drain()
    answer = await reader.read()
    writer.close()
    head_bytes, _, body = answer.partition(b"\r\n\r\n")
    return int(head_bytes.split(b" ", 2)[1]), body


async def load(url: str, requests: Sequence[Case], concurrency: int) -> list[Outcome]:
    """Send requests, `concurrency` at a time."""
    waiting = list(reversed(requests))
    outcomes: list[Outcome] = []

    async def sender() -> None:
        # A connection of its own for each, so that one that is given up harms no other.
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            while waiting:
                outcomes.append(await send(client, waiting.pop()))

    await asyncio.gather(*(sender() for _ in range(concurrency)))
    return outcomes


def mixture(available: Sequence[Case], count: int, seed: int) -> list[Case]:
    """`count` requests: every case equally often, in an order of chance."""
    repeated = [available[i % len(available)] for i in range(count)]
    random.Random(seed).shuffle(repeated)
    return repeated


def table(outcomes: Sequence[Outcome]) -> str:
    """Count, statuses and percentiles of the time for each kind of request, and for the answered ones together."""
    lines = [f"{'request':26} {'n':>4} {'right':>5} {'p50 ms':>8} {'p99 ms':>8}  statuses"]
    groups = {kind: [o for o in outcomes if o.kind == kind] for kind in sorted({o.kind for o in outcomes})}
    groups["all that got an answer"] = [o for o in outcomes if o.status]
    for kind, group in groups.items():
        times = sorted(1000 * o.seconds for o in group)
        last = times[min(len(times) - 1, int(0.99 * len(times)))]
        statuses = ", ".join(f"{s or 'gone'}: {n}" for s, n in sorted(Counter(o.status for o in group).items()))
        right = sum(o.right for o in group)
        lines.append(f"{kind:26} {len(group):4} {right:5} {statistics.median(times):8.0f} {last:8.0f}  {statuses}")
    return "\n".join(lines)


def resident(url: str) -> float:
    """Resident memory of the service in MB, as it reports itself."""
    text = httpx.get(f"{url}/metrics").text
    line = next(line for line in text.splitlines() if line.startswith("process_resident_memory_bytes "))
    return float(line.split()[1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=4)
    options = parser.parse_args()
    import torch

    # One thread a worker here and there: the last bits of the float transforms depend on the number.
    torch.set_num_threads(1)
    paths = sorted(p for p in options.folder.iterdir() if p.suffix in (".png", ".jpg", ".webp"))[: options.pictures]
    available = cases([read_picture(path) for path in paths], Codec.load(device="cpu"))
    limits = ["--max-pixels", str(MAX_PIXELS), "--max-body", str(MAX_BODY), "--transfer-timeout", str(TRANSFER_TIMEOUT)]
    service = subprocess.Popen(
        [sys.executable, "-m", "calotype.cli", "serve", "--port", "0", "--device", "cpu",
         "--workers", str(options.workers), "--queue", str(QUEUE), *limits],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert service.stdout is not None
    try:
        address = urlsplit(service.stdout.readline().split()[3])
        url = f"http://{address.netloc}"
        asyncio.run(load(url, mixture(available, options.requests, 0), options.concurrency))
        warm = resident(url)
        started = time.perf_counter()
        outcomes = asyncio.run(load(url, mixture(available, options.requests, 1), options.concurrency))
        elapsed = time.perf_counter() - started
        loaded = resident(url)
        plain = [case for case in available if case.kind in ("encode", "decode")]
        burst = asyncio.run(load(url, mixture(plain, 4 * QUEUE, 2), 4 * QUEUE))
        after = resident(url)
        alive = httpx.get(f"{url}/health").status_code == 200 and service.poll() is None
    finally:
        service.send_signal(signal.SIGINT)
        code = service.wait(120)
    refused = [o for o in burst if o.status == 503]
    print(table(outcomes))
    print(f"{len(outcomes)} requests in {elapsed:.1f} s, {sum(not o.right for o in outcomes)} wrong")
    print(f"resident memory: warm {warm:.0f} MB, after the load {loaded:.0f} MB ({loaded / warm - 1:+.1%}), "
          f"after the burst {after:.0f} MB ({after / warm - 1:+.1%})")  # fmt: skip
    print(f"burst of {len(burst)} at once: {len(refused)} refused with 503, "
          f"{sum(o.retry_after is not None for o in refused)} of them with Retry-After; "
          f"{sum(o.right for o in burst)} answered rightly")  # fmt: skip
    print(f"alive at the end: {alive}; exit code {code}")


if __name__ == "__main__":
    main()
