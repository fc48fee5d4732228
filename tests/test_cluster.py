"""Many machines: the manifest, and real workers on this machine where Ray is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image
from video_clips import make_clip, pan

from calotype.api import Codec
from calotype.cluster import workers as workers_module
from calotype.cluster.manifest import NAME, Manifest
from calotype.cluster.pictures import PictureEncoder
from calotype.cluster.throughput import Throughput
from calotype.cluster.videos import GopWorker, weights
from calotype.cluster.workers import WorkerError, Workers
from calotype.errors import FormatError, InputError, ModelNotFoundError
from calotype.job import EncodeJob
from calotype.media import Picture
from calotype.rate import Target
from calotype.video.frames import Colour, from_av
from calotype.video.gop import video_format
from calotype.video.groups import Gop, TimedFrame, encode_gop
from calotype.video.packet import StreamConfig
from calotype.video.transcode import Settings, encode_video

JOB = EncodeJob("hyperprior", 60, Target("bpp", 0.8), 1024, ("icc", "exif", "xmp"), False)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def calotype(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "calotype.cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Manifest ---------------------------------------------------------------------------------------------------------


def test_manifest_knows_what_is_finished(tmp_path: Path) -> None:
    source, output = tmp_path / "a.png", tmp_path / "out" / "a.clt"
    source.write_bytes(b"picture")
    path = tmp_path / "out" / NAME
    options = {"quality": 60.0, "metadata": ("icc",)}
    manifest = Manifest(path, options)
    assert not manifest.finished(source, output)
    manifest.failed(source, output, InputError("no good"))
    assert not Manifest(path, options).finished(source, output)
    manifest.succeeded(source, output, b"encoded", "host/1")
    assert not Manifest(path, options).finished(source, output)  # noted, but not written before the end came
    output.write_bytes(b"encoded")
    assert Manifest(path, options).finished(source, output)
    assert [json.loads(line)["status"] for line in path.read_text().splitlines()] == ["failed", "ok"]

    assert not Manifest(path, {**options, "quality": 61.0}).finished(source, output)
    output.write_bytes(b"Encoded")
    assert not Manifest(path, options).finished(source, output)
    output.write_bytes(b"encoded")
    os.utime(source, ns=(0, 0))
    assert not Manifest(path, options).finished(source, output)
    source.unlink()
    assert not Manifest(path, options).finished(source, output)


def test_manifest_of_a_run_that_was_killed(tmp_path: Path) -> None:
    sources = [tmp_path / "a.png", tmp_path / "b.png"]
    manifest = Manifest(tmp_path / NAME, {})
    for source in sources:
        source.write_bytes(b"picture")
        source.with_suffix(".clt").write_bytes(b"encoded")
        manifest.succeeded(source, source.with_suffix(".clt"), b"encoded", "host/1")
    text = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(text[:-30])
    resumed = Manifest(tmp_path / NAME, {})
    assert [resumed.finished(s, s.with_suffix(".clt")) for s in sources] == [True, False]
    resumed.succeeded(sources[1], sources[1].with_suffix(".clt"), b"encoded", "host/2")
    again = Manifest(tmp_path / NAME, {})
    assert all(again.finished(s, s.with_suffix(".clt")) for s in sources)


def test_throughput_by_worker() -> None:
    throughput = Throughput("pictures", "Mpx", 2)
    assert throughput.lines() == []
    assert throughput.record()["workers"] == []
    for worker, megapixels in (("b/2", 1.0), ("a/1", 2.0), ("b/2", 3.0)):
        throughput.add(worker, megapixels, 100.0)
    first, *rest = throughput.lines()
    assert first.startswith("3 pictures, 6.00 Mpx in 100.0 s: 0.03 pictures/s, 0.06 Mpx/s")
    assert [line.split(",")[0] for line in rest] == ["  worker a/1: 1 pictures", "  worker b/2: 2 pictures"]
    assert "4.00 Mpx, 0.02 Mpx/s, busy 200%" in rest[1]
    record = throughput.record()
    assert record["seconds"] == pytest.approx(100, abs=1)
    assert record["Mpx_per_second"] == pytest.approx(0.06, abs=0.001)
    assert record["workers"][0] == {"worker": "a/1", "pictures": 1, "Mpx": 2.0, "seconds": 100.0}


# Without a cluster ------------------------------------------------------------------------------------------------


def test_worker_encodes_as_this_process_does(tmp_path: Path, photo: Picture, codec: Codec) -> None:
    Image.fromarray(photo.pixels[:100, :140]).save(tmp_path / "a.png")
    encoder = PictureEncoder(JOB, codec.spec.sha256, "cpu")
    assert encoder((tmp_path / "a.png").read_bytes()).encoded.data == JOB.run(codec, tmp_path / "a.png").encoded.data
    with pytest.raises(ModelNotFoundError, match="other weights"):
        PictureEncoder(JOB, "0" * 64, "cpu")


def test_worker_encodes_groups_as_this_process_does() -> None:
    config = StreamConfig(video_format(48, 32, Colour(), 600), Fraction(1, 25), Fraction(0), None)
    pictures = [from_av(av.VideoFrame.from_ndarray(p, "rgb24")) for p in pan(2, (48, 32))]
    gop = Gop(3, 9, [TimedFrame(p, 9 + i, 1) for i, p in enumerate(pictures)], False)
    assert GopWorker(weights(), "cpu")((config, gop, None)) == encode_gop(config, gop, None, "cpu")
    with pytest.raises(ModelNotFoundError, match="other weights"):
        GopWorker((b"\0" * 8, weights()[1]), "cpu")


def test_errors_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="local, auto or ray://"):
        Workers("http://example.com", lambda device: str)
    (tmp_path / "a.png").write_bytes(b"")
    for arguments, code, why in (
        (("encode", "-", "--cluster", "local", "-o", "a.clt"), 2, "standard input"),
        (("encode", "a.png", "--cluster", "nonsense"), 3, "use local, auto or ray://"),
        (("encode", "a.png", "--cluster", "local", "-m", "none"), 5, "none"),
        (("transcode", "a.png", "--cluster", "local", "-o", "a.mp4", "--vcodec", "libx264"), 2, "--cluster means"),
        (("transcode", "a.png", "--cluster", "local", "-o", "a.mkv"), 3, "a.png cannot be read"),
    ):
        process = calotype(*arguments, cwd=tmp_path)
        _, error = process.communicate()
        assert (process.returncode, why in error) == (code, True), error
    process = calotype("encode", "a.png", "--cluster", "local", "--dry-run", cwd=tmp_path)
    assert (process.communicate()[0], process.returncode) == ("a.png -> a.clt\n", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'calotype\[cluster\]'"):
        Workers("local", lambda device: str)


# With real workers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Iterator[Workers[Any, Any]]:
    """One worker that does what it is told, and tries twice."""

    def make(device: str) -> Callable[[str], Any]:
        def work(order: str) -> Any:
            if order == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if order == "fail":
                raise FormatError("as it was told")
            if order == "long":
                time.sleep(2)  # a quick worker may be done before anybody waits for it
            return f"{order} on {device}"

        return work

    with Workers("local", make, device="cpu", limit=1, retries=1) as workers:
        yield workers


@needs_ray
def test_a_unit_that_kills_its_workers_fails_alone(pool: Workers[Any, Any]) -> None:
    first = pool.call("one")
    with pytest.raises(WorkerError, match="died"):
        pool.call("die")
    with pytest.raises(FormatError) as raised:
        pool.call("fail")
    assert (type(raised.value), str(raised.value)) == (FormatError, "as it was told")
    second = pool.call("two")
    assert (first.result, second.result) == ("one on cpu", "two on cpu")
    assert first.worker != second.worker
    with ThreadPoolExecutor(4) as threads:
        assert [done.result for done in threads.map(pool.call, "abcd")] == [f"{letter} on cpu" for letter in "abcd"]


@needs_ray
def test_a_wait_can_be_ended(pool: Workers[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "_POLL", 0.0)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.call("long", interrupt)
    assert pool.call("short").result == "short on cpu"


@needs_ray
def test_batch_survives_kill_and_a_bad_file(tmp_path: Path, photo: Picture, codec: Codec) -> None:
    (tmp_path / "in").mkdir()
    for number in range(24):
        y, x = 8 * number, 12 * number
        Image.fromarray(photo.pixels[y : y + 96, x : x + 112]).save(tmp_path / "in" / f"{number:02}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    command = ("encode", "in", "-o", "out", "--target-bpp", "0.8", "--cluster", "local", "-j", "2", "--device", "cpu")
    process = calotype(*command, "--json", cwd=tmp_path)
    manifest = tmp_path / "out" / NAME
    while process.poll() is None and not (manifest.exists() and manifest.read_text().count('"ok"')):
        time.sleep(0.02)
    entries = [json.loads(line) for line in manifest.read_text().splitlines(keepends=True) if line.endswith("\n")]
    victim = next(entry["worker"] for entry in reversed(entries) if entry["status"] == "ok")
    os.kill(int(victim.split("/")[1]), signal.SIGKILL)
    output, error = process.communicate()

    assert process.returncode == 9, error
    assert "bad.png: the input is not a picture" in error
    assert "24 pictures" in error
    results = json.loads(output)["results"]
    assert [r["status"] for r in results] == ["ok"] * 24 + ["failed"]
    workers = {r["worker"] for r in results[:-1]}
    assert victim in workers
    assert len(workers) == 3  # two, and one in the place of the one that was killed
    for number in range(24):
        alone = JOB.run(codec, tmp_path / "in" / f"{number:02}.png").encoded.data
        assert (tmp_path / "out" / f"{number:02}.clt").read_bytes() == alone

    # Again: all that is left is the bad file; without it there is nothing to start workers for.
    (tmp_path / "in" / "bad.png").unlink()
    process = calotype(*command, cwd=tmp_path)
    _, error = process.communicate()
    assert (process.returncode, error.count("\n")) == (0, 1), error
    assert "24 of 24 files were done before" in error


# Videos -----------------------------------------------------------------------------------------------------------

VIDEO = Settings(target_bitrate=90_000, keyint=3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 frames with sound."""
    return make_clip(tmp_path_factory.mktemp("clip") / "in.mp4", pan(18, (64, 48)), audio="aac")


def busy_workers(driver: int) -> list[int]:
    """Process numbers of the workers, in the cluster that `driver` started, that have a unit of work."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            grandparent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
        if name.startswith(b"ray::") and b".work" in name and driver in (parent, grandparent):
            found.append(int(folder.name))
    return found


@needs_ray
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds workers in /proc")
def test_video_survives_kill_and_is_resumed(clip: Path, tmp_path: Path) -> None:
    encode_video(clip, tmp_path / "local.mkv", VIDEO, device="cpu")
    out = tmp_path / "out.mkv"

    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_video(clip, out, VIDEO, device="cpu", progress=interrupt)
    parts = out.with_name("out.mkv.parts")
    assert [part.name for part in parts.glob("*.clt")] == ["000000.clt"]

    command = ["transcode", clip, "-o", out, "--target-bitrate", "90k", "-g", 3, "--resume", "--device", "cpu"]
    process = calotype(*command, "--cluster", "local", "-j", 2, "--json", cwd=tmp_path)
    while process.poll() is None and not (parts / "000001.clt").exists():
        time.sleep(0.02)
    workers: list[int] = []
    while process.poll() is None and not workers:
        workers = busy_workers(process.pid)
    for worker in workers[:1]:
        os.kill(worker, signal.SIGKILL)
    output, error = process.communicate()

    assert (process.returncode, len(workers) > 0) == (0, True), error
    assert out.read_bytes() == (tmp_path / "local.mkv").read_bytes()
    report = json.loads(output)["cluster"]
    shares = {int(share["worker"].split("/")[1]): share for share in report["workers"]}
    assert sum(share["gops"] for share in shares.values()) == 5
    assert sum(share["frames"] for share in shares.values()) == 15
    # The last groups were not done by the one that was killed, and there were two workers again.
    assert len(shares.keys() - {workers[0]}) == 2
    assert "5 gops, 15 frames in" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local.mkv", "out.mkv"]
