"""The HTTP service: its answers against the Python interface, its limits, its description, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
import uvicorn
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from schemathesis.generation import GenerationMode
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import positive_data_acceptance

from calotype.api import Codec, Target, psnr
from calotype.cli.console import Settings as Cli
from calotype.cli.serve import serve as serve_command
from calotype.container import probe
from calotype.errors import CalotypeError, InputError
from calotype.media import Picture, write_picture
from calotype.service import Settings, create_app, openapi, operations
from calotype.service.problems import BusyError, TimeLimitError
from calotype.service.workers import Batch, Check, ClientGoneError, DroppedError, Workers

Make = Callable[..., Picture]


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[str]:
    """The address of a service on the loopback interface, ready to work, with these settings."""
    listener = socket.create_server(("127.0.0.1", 0))
    # Connections inherit it: the system is not to take in whole answers that nobody reads.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
    app = create_app(Settings(device="cpu", **options))
    config = uvicorn.Config(app, http="h11", ws="none", log_level="critical", timeout_graceful_shutdown=30)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        while (answer := httpx.get(f"{url}/health/ready")).status_code != 200:
            assert "being loaded" in answer.json()["detail"], answer.text
            time.sleep(0.05)
        yield url
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A service with small limits."""
    with serving(workers=2, max_body=300_000, max_pixels=100_000) as address:
        yield address


@pytest.fixture(scope="module")
def picture(synthetic: Make) -> Picture:
    return synthetic(96, 80)


@pytest.fixture(scope="module")
def png(picture: Picture) -> bytes:
    return write_picture(picture, "png")


@pytest.fixture(scope="module")
def stream(codec: Codec, synthetic: Make) -> bytes:
    """Four tiles."""
    return codec.encode(synthetic(300, 280), quality=50, tile=256).data


def opened(body: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(body)) as image:
        return np.asarray(image)


# Answers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ("", {}),
        ("?quality=35.5&tile=256", {"quality": 35.5, "tile": 256}),
        ("?target_size=700", {"target": Target("size", 700)}),
        ("?target_bpp=0.5", {"target": Target("bpp", 0.5)}),
        ("?target_psnr=34", {"target": Target("psnr", 34)}),
    ],
)
def test_encoding_is_that_of_the_python_interface(
    url: str, codec: Codec, picture: Picture, png: bytes, query: str, options: dict[str, Any]
) -> None:
    answer = httpx.post(f"{url}/encode{query}", content=png)
    expected = codec.encode(picture, **options)
    assert answer.status_code == 200
    assert answer.content == expected.data
    assert answer.headers["content-type"] == "image/x-calotype"
    assert float(answer.headers["calotype-quality"]) == expected.quality
    assert float(answer.headers["calotype-bpp"]) == pytest.approx(expected.bpp, rel=1e-5)
    assert ("calotype-psnr" in answer.headers) == (expected.psnr is not None)
    assert "transform;dur=" in answer.headers["server-timing"]


def test_alpha_goes_through(url: str, codec: Codec, synthetic: Make) -> None:
    picture = synthetic(40, 56, alpha=True)
    encoded = httpx.post(f"{url}/encode", content=write_picture(picture, "png"))
    assert encoded.content == codec.encode(picture).data
    decoded = opened(httpx.post(f"{url}/decode", content=encoded.content).content)
    assert np.array_equal(decoded[:, :, 3], picture.alpha)


def test_measured_psnr_is_that_of_the_decoded_file(url: str, codec: Codec, picture: Picture, png: bytes) -> None:
    answer = httpx.post(f"{url}/encode?quality=50&measure=true", content=png)
    decoded = codec.decode(answer.content).picture.pixels
    assert float(answer.headers["calotype-psnr"]) == pytest.approx(psnr(picture.pixels, decoded), abs=1e-3)


def test_metadata_is_kept_as_asked(url: str, photo: Picture) -> None:
    small = Picture(np.ascontiguousarray(photo.pixels[:64, :64]), None, photo.icc, photo.exif, photo.xmp)
    body = write_picture(small, "png")
    kept = {
        kinds: probe(httpx.post(f"{url}/encode?metadata={kinds}", content=body).content)
        for kinds in ("all", "none", "xmp")
    }
    assert kept["all"].icc == len(photo.icc or b"") > 0
    assert kept["all"].xmp == len(photo.xmp or b"") > 0
    assert (kept["none"].icc, kept["none"].xmp) == (0, 0)
    assert (kept["xmp"].icc, kept["xmp"].xmp) == (0, kept["all"].xmp)


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ("format=png", {}),
        ("format=webp&scale=4", {"scale": 4}),
        ("format=tiff&region=10,20,200,31", {"region": (10, 20, 200, 31)}),
        ("format=bmp&region=10,20,200,31&scale=2", {"region": (10, 20, 200, 31), "scale": 2}),
        ("format=ppm", {}),
    ],
)
def test_decoding_is_that_of_the_python_interface(
    url: str, codec: Codec, stream: bytes, query: str, options: dict[str, Any]
) -> None:
    answer = httpx.post(f"{url}/decode?{query}", content=stream)
    expected = codec.decode(stream, **options).picture
    assert answer.status_code == 200
    assert np.array_equal(opened(answer.content), expected.pixels)
    assert (int(answer.headers["calotype-width"]), int(answer.headers["calotype-height"])) == (
        expected.width,
        expected.height,
    )


@pytest.mark.parametrize("kind", ["jpeg", "avif"])
def test_decoding_to_a_lossy_format(url: str, codec: Codec, stream: bytes, kind: str) -> None:
    answer = httpx.post(f"{url}/decode?format={kind}", content=stream)
    assert answer.headers["content-type"] == f"image/{kind}"
    assert psnr(opened(answer.content), codec.decode(stream).picture.pixels) > 35


def test_decoding_to_an_array(url: str, codec: Codec, stream: bytes) -> None:
    answer = httpx.post(f"{url}/decode?format=npy", content=stream)
    assert np.array_equal(np.load(io.BytesIO(answer.content)), codec.decode(stream).picture.pixels)


def test_a_damaged_tile_is_refused_or_filled_in(url: str, codec: Codec, stream: bytes) -> None:
    damaged = bytearray(stream)
    damaged[-20] ^= 0xFF
    refused = httpx.post(f"{url}/decode", content=bytes(damaged))
    assert refused.status_code == 422
    assert refused.json()["error"] == "ChecksumError"
    assert "tile 3" in refused.json()["detail"]
    filled = httpx.post(f"{url}/decode?allow_partial=true", content=bytes(damaged))
    assert filled.status_code == 200
    assert filled.headers["calotype-damaged-tiles"] == "3"
    expected = codec.decode(bytes(damaged), allow_partial=True).picture.pixels
    assert np.array_equal(opened(filled.content), expected)


@pytest.mark.parametrize("kind", ["jpeg", "webp", "avif"])
def test_an_older_format_gets_the_best_quality_within_the_size(
    url: str, picture: Picture, png: bytes, kind: str
) -> None:
    answer = httpx.post(f"{url}/compare?format={kind}&size=2000", content=png)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == f"image/{kind}"
    assert len(answer.content) <= 2000
    assert float(answer.headers["calotype-psnr"]) == pytest.approx(
        psnr(opened(answer.content), picture.pixels), abs=1e-3
    )
    quality = int(answer.headers["calotype-quality"])
    room = httpx.post(f"{url}/compare?format={kind}&size={len(answer.content) - 1}", content=png)
    assert int(room.headers["calotype-quality"]) < quality
    # One more step of quality would not have fitted: allow that step its size, and it is taken.
    larger = httpx.post(f"{url}/compare?format={kind}&size=2400", content=png)
    assert int(larger.headers["calotype-quality"]) > quality
    assert len(larger.content) > 2000


def test_gray_pictures_are_compared_as_gray(url: str, synthetic: Make) -> None:
    gray = synthetic(64, 64, 1)
    answer = httpx.post(f"{url}/compare?format=jpeg&size=1500", content=write_picture(gray, "png"))
    assert float(answer.headers["calotype-psnr"]) == pytest.approx(
        psnr(opened(answer.content)[:, :, None], gray.pixels), abs=1e-3
    )


def test_info_and_models(url: str, stream: bytes, codec: Codec) -> None:
    assert httpx.post(f"{url}/info", content=stream).json() == probe(stream).model_dump()
    models = httpx.get(f"{url}/models").json()
    assert models["default"] == "hyperprior"
    assert {"name": "hyperprior", "sha256": codec.spec.sha256}.items() <= models["models"][0].items()
    assert not any("/" in str(value) and "weights" in str(value) for value in models["models"][0].values())


def test_what_happened_is_counted(stream: bytes) -> None:
    with serving() as url:
        httpx.post(f"{url}/decode", content=stream)
        httpx.post(f"{url}/decode", content=stream[:100])
        httpx.get(f"{url}/no/such/path")
        lines = dict(
            line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")
        )
    assert float(lines['calotype_requests_total{path="/decode",status="200"}']) == 1
    assert float(lines['calotype_requests_total{path="/decode",status="422"}']) == 1
    assert float(lines['calotype_requests_total{path="other",status="404"}']) == 1
    assert float(lines['calotype_pixels_total{path="/decode"}']) == 300 * 280
    assert float(lines['calotype_received_bytes_total{path="/decode"}']) == len(stream) + 100
    assert float(lines['calotype_rejected_total{error="TruncatedError"}']) == 1
    assert float(lines['calotype_request_seconds_count{path="/decode"}']) == 2
    assert float(lines["calotype_queue_depth"]) == 0
    assert float(lines["process_resident_memory_bytes"]) > 1e7


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "error", "words"),
    [
        ("/encode?quality=101", 400, "ParameterError", "quality"),
        ("/encode?quality=nan", 400, "ParameterError", "quality"),
        ("/encode?quality=1&target_bpp=1", 400, "ParameterError", "exclude each other"),
        ("/encode?quality=1&quality=2", 400, "ParameterError", "twice"),
        ("/encode?tile=300", 400, "ParameterError", "tile"),
        ("/encode?metadata=gps", 400, "ParameterError", "metadata"),
        ("/encode?colour=red", 400, "ParameterError", "colour: is not a parameter of /encode"),
        ("/decode?region=1,2,3", 400, "ParameterError", "region"),
        ("/decode?scale=3", 400, "ParameterError", "scale"),
        ("/compare?format=jpeg", 400, "ParameterError", "size"),
        ("/encode?model=none", 404, "ModelNotFoundError", "hyperprior"),
        ("/encode", 422, "InputError", "not a picture"),
        ("/decode", 422, "FormatError", "not a Calotype file"),
        ("/nothing", 404, "HTTPException", "/openapi.json"),
        ("/models", 405, "HTTPException", "/openapi.json"),
    ],
)
def test_refusals_are_problems_in_words(url: str, path: str, status: int, error: str, words: str) -> None:
    answer = httpx.post(f"{url}{path}", content=b"neither a picture nor a stream")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (problem["status"], problem["error"]) == (status, error)
    assert words in problem["detail"]


def test_a_region_outside_and_a_size_out_of_reach(url: str, stream: bytes, png: bytes) -> None:
    outside = httpx.post(f"{url}/decode?region=0,0,281,10", content=stream)
    assert (outside.status_code, outside.json()["error"]) == (422, "InputError")
    for path in ("/encode?target_size=60", "/compare?format=jpeg&size=60"):
        small = httpx.post(f"{url}{path}", content=png)
        assert (small.status_code, small.json()["error"]) == (422, "TargetError")


def test_bodies_and_pictures_over_the_limits(url: str, codec: Codec, synthetic: Make) -> None:
    declared = httpx.post(f"{url}/encode", content=bytes(300_001))
    assert (declared.status_code, declared.json()["error"]) == (413, "LimitError")

    def undeclared() -> Iterator[bytes]:
        for _ in range(40):
            yield bytes(10_000)

    assert httpx.post(f"{url}/encode", content=undeclared()).status_code == 413
    wide = synthetic(8, 12_600)
    for path, body in (("/encode", write_picture(wide, "webp")), ("/decode", codec.encode(wide, quality=0).data)):
        answer = httpx.post(f"{url}{path}", content=body)
        assert (answer.status_code, answer.json()["error"]) == (413, "LimitError")
        assert "100000" in answer.json()["detail"]


def test_the_token_opens_all_but_the_health_checks_and_the_page(stream: bytes) -> None:
    with serving(token="secret ñ") as url:
        for path in ("/health", "/health/ready", "/", "/page/page.js", "/page/style.css"):
            assert httpx.get(f"{url}{path}").status_code == 200
        right = {"Authorization": "Bearer secret ñ".encode()}
        for headers in ({}, {"Authorization": "Bearer secret"}, {"Authorization": "secret ñ".encode()}):
            for path in ("/models", "/metrics", "/openapi.json", "/nothing"):
                answer = httpx.get(f"{url}{path}", headers=headers)
                assert (answer.status_code, answer.json()["error"]) == (401, "TokenError")
                assert answer.headers["www-authenticate"] == "Bearer"
            assert httpx.post(f"{url}/info", content=stream, headers=headers).status_code == 401
        assert httpx.post(f"{url}/info", content=stream, headers=right).status_code == 200
        description = httpx.get(f"{url}/openapi.json", headers=right).json()
        assert description["security"] == [{"token": []}]
        assert description["paths"]["/health"]["get"]["security"] == []


def half_sent(url: str, path: str, length: int) -> socket.socket:
    """A connection over which a request was begun: its head and half of its body."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
    connection.sendall(bytes(length // 2))
    return connection


def test_one_request_too_many_is_sent_away_and_may_come_back(stream: bytes) -> None:
    with serving(workers=1, queue=1) as url, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(half_sent(url, "/info", 1000))
        deadline = time.monotonic() + 30
        while (answer := httpx.post(f"{url}/info", content=stream)).status_code == 200:
            assert time.monotonic() < deadline  # the two may not have been noticed yet
        assert answer.status_code == 503
        assert answer.json()["error"] == "BusyError"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert httpx.get(f"{url}/health").status_code == 200
        stack.close()
        while httpx.post(f"{url}/info", content=stream).status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_client_that_stops_sending_is_let_go(stream: bytes) -> None:
    with serving(workers=1, queue=0, transfer_timeout=0.3) as url:
        with half_sent(url, "/info", 1000) as connection:
            answer = b""
            while piece := connection.recv(4096):  # ends because the service closes the connection
                answer += piece
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"error":"SlowTransferError"' in answer
        assert httpx.post(f"{url}/info", content=stream).status_code == 200


def test_a_client_that_does_not_take_its_answer_is_let_go(codec: Codec, synthetic: Make) -> None:
    small = codec.encode(synthetic(64, 64)).data
    large = codec.encode(synthetic(800, 800), quality=0).data
    with serving(workers=1, queue=0, transfer_timeout=0.5) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(60)
            connection.connect((host, int(port)))
            head = f"POST /decode?format=bmp HTTP/1.1\r\nHost: x\r\nContent-Length: {len(large)}\r\n\r\n"
            connection.sendall(head.encode() + large)
            assert connection.recv(12) == b"HTTP/1.1 200"
            deadline = time.monotonic() + 60
            while httpx.post(f"{url}/decode", content=small).status_code == 503:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            received = 12
            while piece := connection.recv(65536):
                received += len(piece)
        assert received < 3 * 800 * 800  # the rest was not kept for it


# Work that nobody waits for -----------------------------------------------------------------------------------------


async def never() -> None:
    await asyncio.Event().wait()


def test_waiting_work_of_a_client_that_has_gone_never_starts() -> None:
    async def scenario() -> None:
        workers = Workers(1, 4, timeout=30)
        release, begun, gone = threading.Event(), [], asyncio.Event()
        first = asyncio.create_task(workers.run(lambda check: release.wait(), never()))
        second = asyncio.create_task(workers.run(begun.append, gone.wait()))
        while not (workers.running and workers.waiting):
            await asyncio.sleep(0.01)
        gone.set()
        with pytest.raises(ClientGoneError):
            await second
        assert workers.waiting == 0
        release.set()
        assert (await first)[0] is True
        assert (await workers.run(lambda check: "next", never()))[0] == "next"
        assert begun == []
        await workers.close()

    asyncio.run(scenario())


def test_running_work_is_stopped_when_time_is_up_and_keeps_its_place_until_then() -> None:
    async def scenario() -> None:
        workers = Workers(1, 1, timeout=0.2)
        release, ends = threading.Event(), []

        def work(check: Check) -> None:
            release.wait()
            try:
                check(0.5)
            except DroppedError as error:
                ends.append(error)
                raise

        with workers.place(), pytest.raises(TimeLimitError, match=r"0\.2 s"):
            await workers.run(work, never())
        assert workers.running == 1
        with workers.place():
            with pytest.raises(BusyError), workers.place():
                pass
            with pytest.raises(BusyError, match="no worker") as caught:
                await workers.run(lambda check: None, never())
            assert caught.value.retry_after >= 1
        release.set()
        while workers.running:
            await asyncio.sleep(0.01)
        assert len(ends) == 1
        assert (await workers.run(lambda check: "next", never()))[0] == "next"
        await workers.close()

    asyncio.run(scenario())


def test_what_waits_and_is_alike_is_done_together() -> None:
    async def scenario() -> None:
        workers = Workers(1, 20, timeout=30)
        release = threading.Event()
        groups: list[list[int]] = []

        def together(items: Sequence[int]) -> list[int | Exception]:
            groups.append(list(items))
            return [InputError("odd one") if item == 3 else 10 * item for item in items]

        def alone(check: Check) -> int:
            raise AssertionError("was to be done with others")

        first = asyncio.create_task(workers.run(lambda check: release.wait(), never()))
        gone = asyncio.Event()
        kinds = [Batch("other" if n > 6 else "small", n, 4, together) for n in range(9)]
        others = {
            n: asyncio.create_task(workers.run(alone, gone.wait() if n == 2 else never(), kind))
            for n, kind in enumerate(kinds)
        }
        single = asyncio.create_task(workers.run(lambda check: "single", never()))
        while workers.waiting < 10:
            await asyncio.sleep(0.01)
        gone.set()
        with pytest.raises(ClientGoneError):
            await others[2]
        release.set()
        await first
        with pytest.raises(InputError, match="odd one"):
            await others[3]
        assert {n: (await task)[0] for n, task in others.items() if n not in (2, 3, 5, 6)} == {
            0: 0, 1: 10, 4: 40, 7: 70, 8: 80,
        }  # fmt: skip
        assert (await single)[0] == "single"
        assert groups == [[0, 1, 3, 4], [5, 6], [7, 8]]
        await workers.close()

    asyncio.run(scenario())


def test_small_files_that_wait_are_decoded_together(
    codec: Codec, synthetic: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any quality and to any format; a damaged one fails alone, and metadata stays with its picture."""
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pictures = [replace(synthetic(40, 56, alpha=True, seed=seed), icc=icc if seed % 2 else None) for seed in range(6)]
    files = [codec.encode(picture, quality=30 + 10 * n).data for n, picture in enumerate(pictures)]
    damaged = bytearray(files[4])
    damaged[-10] ^= 0xFF
    sizes: list[int] = []
    decode_batch = Codec.decode_batch
    monkeypatch.setattr(
        Codec, "decode_batch", lambda self, files, **o: sizes.append(len(files)) or decode_batch(self, files, **o)
    )
    began, release = threading.Event(), threading.Event()
    compare = operations.largest_within
    monkeypatch.setattr(operations, "largest_within", lambda *a: began.set() or (release.wait() and compare(*a)))
    with serving(workers=1) as url, ThreadPoolExecutor(8) as pool:

        def post(path: str, body: bytes) -> httpx.Response:
            return httpx.post(f"{url}{path}", content=body, timeout=60)

        first = pool.submit(post, "/compare?format=jpeg&size=4000", write_picture(pictures[0], "png"))
        began.wait()
        for bodies in ([files[0], files[1], files[2]], [files[3], bytes(damaged), files[5]]):
            began.clear()
            answers = [pool.submit(post, "/decode", body) for body in bodies]
            while "calotype_queue_depth 3.0" not in httpx.get(f"{url}/metrics").text:
                time.sleep(0.02)
            release.set()
            assert first.result().status_code == 200
            release.clear()
            first = pool.submit(post, "/compare?format=jpeg&size=4000", write_picture(pictures[0], "png"))
            began.wait()
            for body, answer in zip(bodies, answers, strict=True):
                if body == damaged:
                    assert answer.result().status_code == 422
                    continue
                expected = codec.decode(body).picture
                with Image.open(io.BytesIO(answer.result().content)) as image:
                    assert image.info.get("icc_profile") == expected.icc
                    found = np.asarray(image)
                assert np.array_equal(found[:, :, 3], expected.alpha)
                # Only the float synthesis may differ, and by one step at most.
                assert np.abs(found[:, :, :3].astype(int) - expected.pixels).max() <= 1
        release.set()
        assert first.result().status_code == 200
    assert sizes == [3, 3]


def test_errors_of_the_work_come_up() -> None:
    async def scenario() -> None:
        workers = Workers(1, 1, timeout=30)

        def work(check: Check) -> None:
            raise InputError("as expected")

        with pytest.raises(InputError, match="as expected"):
            await workers.run(work, never())
        await workers.close()

    asyncio.run(scenario())


def test_a_long_encoding_ends_at_the_time_limit(synthetic: Make) -> None:
    body = write_picture(synthetic(700, 700), "ppm")
    with serving(timeout=0.05) as url:
        answer = httpx.post(f"{url}/encode?target_psnr=33&tile=256", content=body, timeout=60)
        assert (answer.status_code, answer.json()["error"]) == (504, "TimeLimitError")


# Load ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "service.py"
    spec = importlib.util.spec_from_file_location("benchmark_service", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_mixed_requests_get_right_answers(benchmark: ModuleType, codec: Codec, synthetic: Make) -> None:
    available = benchmark.cases([synthetic(96, 80), synthetic(65, 130, seed=1)], codec)
    requests = benchmark.mixture(available, 40, seed=3)
    assert len({case.kind for case in requests}) == len({case.kind for case in available}) > 15
    limits = {"max_pixels": benchmark.MAX_PIXELS, "max_body": benchmark.MAX_BODY}
    with serving(workers=2, transfer_timeout=benchmark.TRANSFER_TIMEOUT, **limits) as url:
        outcomes = asyncio.run(benchmark.load(url, requests, 16))
        assert httpx.get(f"{url}/health").status_code == 200
    assert len(outcomes) == 40
    assert [outcome for outcome in outcomes if not outcome.right] == []


def test_a_burst_is_answered_or_sent_away(benchmark: ModuleType, codec: Codec, synthetic: Make) -> None:
    available = [c for c in benchmark.cases([synthetic(96, 80)], codec) if c.kind in ("encode", "decode")]
    with serving(workers=1, queue=2) as url:
        outcomes = asyncio.run(benchmark.load(url, benchmark.mixture(available, 24, seed=3), 24))
    answered = [o for o in outcomes if o.status == 200]
    refused = [o for o in outcomes if o.status == 503]
    assert len(answered) + len(refused) == 24
    assert len(answered) >= 3
    assert refused
    assert all(o.right for o in answered)
    assert all(o.retry_after is not None for o in refused)


# Description --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def description(url: str, stream: bytes, png: bytes) -> BaseSchema:
    """The service's own description, with bodies that are pictures, streams, damaged ones, and noise."""
    damaged = st.integers(0, len(stream) - 1).map(lambda i: stream[:i] + bytes([stream[i] ^ 0x55]) + stream[i + 1 :])
    bodies = st.sampled_from([png, stream]) | damaged | st.binary(max_size=200)
    schemathesis.openapi.media_type("application/octet-stream", bodies)
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def fuzzed() -> Iterator[tuple[str, str, GenerationMode]]:
    """Path, method, and whether requests are to be right or wrong; one without parameters can't be wrong."""
    for path, methods in openapi.describe(Settings())["paths"].items():
        for method, operation in methods.items():
            yield path, method, GenerationMode.POSITIVE
            if operation.get("parameters"):
                yield path, method, GenerationMode.NEGATIVE


@pytest.mark.parametrize(("path", "method", "mode"), list(fuzzed()))
def test_the_description_is_true(description: BaseSchema, path: str, method: str, mode: GenerationMode) -> None:
    operation = description[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=25 if method == "post" else 2)
    def check(case: schemathesis.Case) -> None:
        # A body that is no picture is refused although it is of the described type.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()


def test_the_examples_of_the_documentation(url: str, png: bytes, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "SERVICE.md").read_text(encoding="utf-8")
    text = text.replace("http://127.0.0.1:8000", url)
    files = {"photo.jpg": png}
    commands = re.findall(r"^curl --data-binary @(\S+) '(\S+)' -o (\S+)$", text, re.MULTILINE)
    assert len(commands) == text.count("curl ") == 2
    for source, address, output in commands:
        files[output] = httpx.post(address, content=files[source]).raise_for_status().content
    assert probe(files["photo.clt"]).quality == 50
    assert opened(files["photo.webp"]).shape == (48, 40, 3)
    photo = tmp_path / "photo.png"
    photo.write_bytes(png)
    names: dict[str, Any] = {"photo": photo}
    programs = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    assert len(programs) == 2
    for program in programs:
        exec(program, names)
    assert probe(names["data"]).bpp <= 0.5
    assert {route.path for route in names["app"].routes} >= {"/encode", "/decode", "/"}


# Command ------------------------------------------------------------------------------------------------------------


def start(*arguments: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """`calotype serve` as a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "calotype.cli", "--device", "cpu", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("Calotype is at http://127.0.0.1:")
    return process, line.split()[3].rstrip("/")


def test_interrupted_it_finishes_what_runs(photo: Picture) -> None:
    process, url = start("--workers", "1", CALOTYPE_TOKEN="secret")
    answers: list[httpx.Response] = []
    try:
        assert httpx.get(f"{url}/models", timeout=60).status_code == 401
        token = {"Authorization": "Bearer secret"}
        body = write_picture(photo, "png")
        request = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{url}/encode?target_psnr=34&tile=256", content=body, headers=token, timeout=120)
            )
        )
        request.start()
        while "calotype_running 1.0" not in httpx.get(f"{url}/metrics", headers=token).text:
            assert not answers
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(120)
    request.join()
    assert code == 0
    assert answers[0].status_code == 200
    assert probe(answers[0].content).width == photo.width
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_an_address_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = CliRunner().invoke(serve_command, ["--port", str(other.getsockname()[1])])
    assert isinstance(result.exception, InputError)
    assert "--port" in str(result.exception)


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_who_can_reach_it(monkeypatch: pytest.MonkeyPatch, host: str, local: bool) -> None:
    """Without a token, an address that others can reach is warned of."""
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: [s.close() for s in sockets])
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    for arguments, warned in ((["--token", "secret"], False), ([], not local)):
        result = CliRunner().invoke(serve_command, ["--host", host, "--port", "0", *arguments], obj=Cli())
        assert result.exit_code == 0, result.output
        assert f"Calotype is at http://{host}:" in result.stdout
        assert ("anyone who reaches this address" in result.stderr) == warned


def test_without_its_libraries_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(serve_command, [])
    assert isinstance(result.exception, CalotypeError)
    assert "pip install 'calotype[serve]'" in str(result.exception)


def test_help_and_settings_are_light() -> None:
    program = (
        "import sys; import calotype.cli.serve; print(sorted({'torch', 'starlette', 'uvicorn'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
