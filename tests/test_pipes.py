"""Real ffmpeg processes on both sides of ours, joined by pipes; and pipes that end too early."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import test_transcode
from test_transcode import Run
from video_clips import make_clip, pan

from calotype import VideoDecoder
from calotype.video.frames import Frame, from_av
from calotype.video.transcode import Settings, encode_video

CALOTYPE = (sys.executable, "-m", "calotype.cli", "--device", "cpu")
SIZE = (65, 49)
"""Odd, so that chroma planes are rounded up."""
run = test_transcode.run
RAW = ("-f", "rawvideo", "-pix_fmt", "yuv420p")


@pytest.fixture(scope="module")
def ffmpeg() -> tuple[str, ...]:
    return (pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe(), "-v", "error", "-nostdin")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 frames without colour tags, which no pipe keeps."""
    path = tmp_path_factory.mktemp("clip") / "in.mkv"
    return make_clip(path, pan(5, SIZE), time_base=Fraction(1, 1000), video="ffv1", colour=(2, 2, 2, 1))


@pytest.fixture(scope="module")
def encoded(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clip, encoded from file to file."""
    out = tmp_path_factory.mktemp("encoded") / "out.mkv"
    encode_video(clip, out, Settings(quality=60, keyint=4), device="cpu")
    return out


@pytest.fixture(scope="module")
def y4m(clip: Path, ffmpeg: tuple[str, ...]) -> bytes:
    """What ffmpeg makes of the clip."""
    return subprocess.run([*ffmpeg, "-i", clip, "-f", "yuv4mpegpipe", "-"], capture_output=True, check=True).stdout


def chain(*commands: Sequence[object]) -> list[int]:
    """Run commands at the same time, the output of each being the input of the next; gives their exit codes."""
    processes: list[subprocess.Popen[bytes]] = []
    for command in commands:
        before = processes[-1].stdout if processes else subprocess.DEVNULL
        last = len(processes) == len(commands) - 1
        out = subprocess.DEVNULL if last else subprocess.PIPE
        processes.append(subprocess.Popen([str(c) for c in command], stdin=before, stdout=out))
        if processes[:-1]:
            processes[-2].stdout.close()  # type: ignore[union-attr]  # else it would outlive its reader
    return [process.wait() for process in processes]


def same(a: Frame, b: Frame) -> bool:
    return all(np.array_equal(getattr(a, plane), getattr(b, plane)) for plane in "yuv")


@pytest.mark.parametrize("format", ["y4m", "rawvideo"])
def test_ffmpeg_on_both_sides(format: str, clip: Path, encoded: Path, ffmpeg: tuple[str, ...], tmp_path: Path) -> None:
    size = f"{SIZE[0]}x{SIZE[1]}"
    raw = format == "rawvideo"
    codes = chain(
        [*ffmpeg, "-i", clip, *(RAW if raw else ("-f", "yuv4mpegpipe")), "-"],
        [*CALOTYPE, "transcode", "-", *(("--rawvideo", f"{size}@25") if raw else ()), "-g", 4, "-o", "-"],
        [*CALOTYPE, "decode", "-", "--format", format, "-o", "-"],
        [*ffmpeg, *((*RAW, "-video_size", size, "-framerate", 25) if raw else ()), "-i", "-", "-c:v", "ffv1",
         tmp_path / "out.mkv"],
    )  # fmt: skip
    assert codes == [0, 0, 0, 0]
    expected = [shown.frame for shown in VideoDecoder(encoded, device="cpu").frames()]
    with av.open(str(tmp_path / "out.mkv")) as container:
        found = list(container.decode(video=0))
        assert container.streams.video[0].average_rate == 25
    assert len(expected) == 5
    assert all(same(a, from_av(b)) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("command", ["transcode", "decode"])
def test_a_reader_that_goes_away_is_no_crash(command: str, encoded: Path, y4m: bytes) -> None:
    options = ["-", "-o", "-"] if command == "transcode" else [encoded, "--format", "y4m", "-o", "-"]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as gone:
        process = subprocess.run([*CALOTYPE, command, *options], input=y4m, stdout=gone, stderr=subprocess.PIPE)
    assert (process.returncode, process.stderr) == (1, b"")


def test_a_writer_that_stops_inside_a_frame(run: Run, y4m: bytes, tmp_path: Path) -> None:
    frame = 65 * 49 + 2 * 33 * 25
    out = tmp_path / "out.mkv"
    made = run("transcode", "-", "--rawvideo", "65x49@25", "-g", 1, "-o", out, stdin=bytes(2 * frame + 100))
    assert (made.code, "whole frames of 65x49" in made.err) == (3, True)
    assert list(tmp_path.iterdir()) == []  # what is encoded cannot be gone on with
    assert run("transcode", "-", "-o", out, stdin=y4m[:-500]).code == 0  # for FFmpeg this is the end of a Y4M
    assert len(VideoDecoder(out, device="cpu")) == 4


def test_raw_frames_need_a_size_and_a_rate(run: Run, encoded: Path, tmp_path: Path) -> None:
    for value in ("65x49", "x", "65x49@", "0x49@25", "65x49@-1"):
        made = run("transcode", "-", "--rawvideo", value, "-o", tmp_path / "out.mkv")
        assert (made.code, "640x480@25" in made.err) == (2, True)
    for value in ("9999999x9999999@25", "64x48@0", "64x48@1/0"):
        made = run("transcode", "-", "--rawvideo", value, "-o", tmp_path / "out.mkv", stdin=bytes(10_000))
        assert (made.code, "cannot be read" in made.err) == (3, True)
    assert run("decode", encoded, "-o", "-").code == 2
    assert run("decode", encoded, "--format", "rawvideo", "-o", f"{tmp_path}/").code == 2
    assert list(tmp_path.iterdir()) == []
