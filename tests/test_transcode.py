"""Whole videos through the command line: in and back, resumed, piped, damaged, inspected."""

from __future__ import annotations

import functools
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from conftest import Run
from PIL import Image
from video_clips import luma, make_clip, packets, pan, psnr, times

from calotype import VideoDecoder
from calotype.errors import InputError, OutputExistsError
from calotype.video import groups, parts
from calotype.video.export import export_video, upright
from calotype.video.transcode import Settings, encode_video

SIZE = (160, 96)
VARYING = [0, 400, 1024, 1025, 2048, 2560, 5000, 5512, 6024, 6536, 7048, 7560]


@pytest.fixture
def run(run: Run) -> Run:
    """As everywhere, on the CPU."""
    return functools.partial(run, "--device", "cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 frames at uneven times, turned, BT.709, with sound, chapters and tags."""
    return make_clip(
        tmp_path_factory.mktemp("clip") / "in.mp4", pan(12, SIZE), times=VARYING, audio="aac", rotation=90,
        colour=(1, 1, 1, 1), metadata={"title": "A pan"},
        chapters=[{"id": 1, "start": 0, "end": 300, "time_base": Fraction(1, 1000), "metadata": {"title": "One"}}],
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoded(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clip in groups of 4."""
    out = tmp_path_factory.mktemp("encoded") / "out.mkv"
    encode_video(clip, out, Settings(quality=60, keyint=4), device="cpu")
    return out


# There and back ---------------------------------------------------------------------------------------------------


def test_everything_survives_the_way_there_and_back(run: Run, clip: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there.mkv", tmp_path / "back.mp4"
    made = run("transcode", clip, "-o", there, "-g", 4, "--json")
    assert made.code == 0, made.err
    assert made.json["schema"] == "calotype.transcode/1"
    assert (made.json["frames"], made.json["gops"], made.json["notes"]) == (12, 3, [])
    assert made.json["bytes"] == there.stat().st_size
    assert packets(there, "audio") == packets(clip, "audio")
    assert run("transcode", there, "-o", back, "--vcodec", "libx264", "--crf", 10).code == 0
    assert packets(back, "audio") == packets(clip, "audio")
    assert times(back) == times(clip)
    for before, after in zip(luma(clip), luma(back), strict=True):
        assert psnr(before, after) > 30
    with av.open(str(back)) as container, av.open(str(clip)) as source:
        frame, wanted = next(container.decode(video=0)), next(source.decode(video=0))
        assert frame.rotation == wanted.rotation == 90
        for tag in ("color_primaries", "color_trc", "colorspace", "color_range"):
            assert getattr(frame, tag) == getattr(wanted, tag)
        assert container.metadata["title"] == "A pan"
        assert [c["metadata"] for c in container.chapters()] == [{"title": "One"}]
        assert container.streams.audio[0].metadata["language"] == "eng"
        # Sound and picture begin as far from each other as before.
        first = [s.start_time * s.time_base for s in container.streams]
        wanted_first = [s.start_time * s.time_base for s in source.streams]
        assert first[1] - first[0] == pytest.approx(wanted_first[1] - wanted_first[0], abs=0.0011)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.mp4", "there.mkv"]


@pytest.mark.parametrize(
    ("size", "pix_fmt", "codec"),
    [((161, 97), "yuv444p", "libx264"), (SIZE, "yuv420p10le", "libx265"), ((96, 64), "rgb24", "png")],
)
def test_odd_sizes_and_other_formats(run: Run, tmp_path: Path, size: tuple[int, int], pix_fmt: str, codec: str) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    colour = (2, 2, 0, 2) if pix_fmt == "rgb24" else (2, 1, 1, 1)
    source = make_clip(tmp_path / "in.mov", pan(3, size), pix_fmt=pix_fmt, video=codec, options=options, colour=colour)
    out, back = tmp_path / "out.mkv", tmp_path / "back.mkv"
    assert run("transcode", source, "-o", out, "-q", 80).code == 0
    assert run("transcode", out, "-o", back, "--vcodec", "ffv1").code == 0
    if pix_fmt != "rgb24":
        for before, after in zip(luma(source), luma(back), strict=True):
            assert before.shape == after.shape == (size[1], size[0])
            assert psnr(before, after) > 33
    else:
        with av.open(str(source)) as container, av.open(str(back)) as other:
            for a, b in zip(container.decode(video=0), other.decode(video=0), strict=True):
                assert b.colorspace == 1
                b = b.reformat(format="rgb24", src_colorspace=1, dst_colorspace=1)
                assert psnr(a.to_ndarray(format="rgb24"), b.to_ndarray()) > 26


def test_an_excerpt_begins_at_zero_with_its_sound(run: Run, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    assert run("transcode", clip, "-o", out, "--start", "0.08", "--frames", 5, "-q", 20).code == 0
    begin = VARYING[2]
    shown = list(VideoDecoder(out, device="cpu").frames())
    assert [s.pts for s in shown] == [t - begin for t in VARYING[2:7]]
    end = (VARYING[7] - begin) / 12800
    sound = packets(clip, "audio")
    kept = packets(out, "audio")
    assert kept == sound[sound.index(kept[0]) :][: len(kept)]
    with av.open(str(out)) as container:
        stream = container.streams.audio[0]
        starts = [float(p.pts * stream.time_base) for p in container.demux(stream) if p.size]
        assert 0 <= starts[0] < 0.024
        assert end - 0.024 <= starts[-1] < end
        (chapter,) = container.chapters()
        assert chapter["end"] * chapter["time_base"] == pytest.approx(0.3 - 0.08, abs=0.001)


def test_sound_can_be_left_out(run: Run, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    assert run("transcode", clip, "-o", out, "--audio", "none", "-q", 10, "--frames", 2).code == 0
    with av.open(str(out)) as container:
        assert [s.type for s in container.streams] == ["video"]


def test_a_target_bitrate(run: Run, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    made = run("transcode", clip, "-o", out, "--target-bitrate", "150k", "-g", 4, "--json")
    assert made.code == 0
    assert made.json["kbps"] == pytest.approx(150, rel=0.05)
    assert run("info", out, "--json").json["results"][0]["kbps"] == pytest.approx(made.json["kbps"])
    high = run("transcode", clip, "-o", out, "-f", "--target-bitrate", "90M", "--frames", 2)
    assert high.code == 0
    assert "below the target" in high.err
    low = run("transcode", clip, "-o", tmp_path / "low.mkv", "--target-bitrate", 500)
    assert low.code == 7
    assert [p.name for p in tmp_path.iterdir()] == ["out.mkv"]


# Names ------------------------------------------------------------------------------------------------------------


def test_outputs_are_guarded(run: Run, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    out.write_bytes(b"precious")
    assert run("transcode", clip, "-o", out).code == 6
    assert run("transcode", clip, "-o", out, "-n").code == 0
    assert out.read_bytes() == b"precious"
    assert run("transcode", clip, "-o", out, "-f", "--frames", 2).code == 0
    assert len(VideoDecoder(out, device="cpu")) == 2


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["IN", "-o", "x.mp4"], "--vcodec"),
        (["IN", "-o", "IN"], "another output"),
        (["IN", "-o", "x.mkv", "-q", "5", "--target-bitrate", "9k"], "exclude"),
        (["IN", "-o", "x.mkv", "--crf", "5"], "--vcodec"),
        (["IN", "-o", "x.mkv", "--vcodec", "libx264", "-g", "5"], "--keyint"),
        (["IN", "-o", "x.mkv", "--start", "soon"], "1:30"),
        (["IN", "-o", "-", "--json"], "exclude|both"),
        (["ENC", "-o", "x.mkv"], "already"),
    ],
)
def test_contradictions_are_usage_errors(run: Run, clip: Path, encoded: Path, args: list[str], hint: str) -> None:
    names = {"IN": clip, "ENC": encoded}
    made = run("transcode", *(names.get(a, a) for a in args))
    assert made.code == 2
    assert any(part in made.err for part in hint.split("|")), made.err


def test_sources_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    assert run("transcode", tmp_path / "text.mp4", "-o", tmp_path / "o.mkv").code == 3
    assert run("transcode", tmp_path / "absent.mp4", "-o", tmp_path / "o.mkv").code == 3
    sound = tmp_path / "sound.mka"
    with av.open(str(sound), "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    made = run("transcode", sound, "-o", tmp_path / "o.mkv")
    assert made.code == 3
    assert "no video track" in made.err
    assert [p.name for p in tmp_path.iterdir() if "o.mkv" in p.name] == []


# Resuming ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def interrupt(clip: Path, out: Path, at: int, settings: Settings = Settings(quality=60, keyint=4)) -> None:
    """Encode until `at` frames are done, and die."""

    def progress(done: int, total: int | None) -> None:
        if done >= at:
            raise Killed

    with pytest.raises(Killed):
        encode_video(clip, out, settings, device="cpu", progress=progress)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of each group that is encoded."""
    seen: list[int] = []
    original = groups.encode_gop

    def encode_gop(config: Any, gop: groups.Gop, *rest: Any) -> Any:
        seen.append(gop.number)
        return original(config, gop, *rest)

    monkeypatch.setattr(groups, "encode_gop", encode_gop)
    return seen


def test_a_resumed_encoding_gives_the_same_file(
    clip: Path, encoded: Path, tmp_path: Path, encodings: list[int]
) -> None:
    out = tmp_path / "out.mkv"
    interrupt(clip, out, 8)
    assert not out.exists()
    assert encodings == [0, 1]
    encodings.clear()
    encode_video(clip, out, Settings(quality=60, keyint=4), device="cpu", resume=True)
    assert encodings == [2]
    assert out.read_bytes() == encoded.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out.mkv"]


def test_damaged_parts_are_made_again(clip: Path, encoded: Path, tmp_path: Path, encodings: list[int]) -> None:
    out = tmp_path / "out.mkv"
    interrupt(clip, out, 8)
    part = tmp_path / "out.mkv.parts" / "000001.clt"
    part.write_bytes(part.read_bytes()[:-300])
    encodings.clear()
    encode_video(clip, out, Settings(quality=60, keyint=4), device="cpu", resume=True)
    assert encodings == [1, 2]
    assert out.read_bytes() == encoded.read_bytes()


def test_a_bitrate_is_resumed_with_its_account(clip: Path, tmp_path: Path) -> None:
    settings = Settings(target_bitrate=150e3, keyint=2)
    encode_video(clip, tmp_path / "whole.mkv", settings, device="cpu")
    interrupt(clip, tmp_path / "out.mkv", 6, settings)
    encode_video(clip, tmp_path / "out.mkv", settings, device="cpu", resume=True)
    assert (tmp_path / "out.mkv").read_bytes() == (tmp_path / "whole.mkv").read_bytes()


def test_parts_of_another_job_are_refused(clip: Path, encoded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    interrupt(clip, out, 4)
    with pytest.raises(InputError, match="other settings"):
        encode_video(clip, out, Settings(quality=61, keyint=4), device="cpu", resume=True)
    other = make_clip(tmp_path / "other.mp4", pan(3, SIZE))
    with pytest.raises(InputError, match="another source"):
        encode_video(other, out, Settings(quality=60, keyint=4), device="cpu", resume=True)
    encode_video(clip, out, Settings(quality=60, keyint=4), device="cpu")
    assert out.read_bytes() == encoded.read_bytes()


def test_a_folder_that_is_not_ours_is_left_alone(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / f"out.mkv{parts.SUFFIX}"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(OutputExistsError, match="in the way"):
            encode_video(clip, tmp_path / "out.mkv", device="cpu", resume=resume)
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_killed_and_resumed_processes_give_the_same_file(clip: Path, encoded: Path, tmp_path: Path) -> None:
    """Through the command line: the first one gets SIGKILL when a group is done."""
    out = tmp_path / "out.mkv"
    command = [sys.executable, "-m", "calotype.cli", "--device", "cpu", "transcode", str(clip), "-o", str(out)]
    command += ["-q", "60", "-g", "4"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    first = tmp_path / "out.mkv.parts" / "000000.clt"
    for _ in range(6000):
        if first.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if out.exists():
        pytest.skip("it was done before the signal came")
    assert first.exists()
    again = [*command, "--resume"]
    subprocess.run(again, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stderr=subprocess.DEVNULL)
    assert out.read_bytes() == encoded.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out.mkv"]


# Pipes ------------------------------------------------------------------------------------------------------------


def test_pipes_in_and_out(run: Run, clip: Path, encoded: Path) -> None:
    out = run("transcode", clip, "-o", "-", "-q", 60, "-g", 4)
    assert out.code == 0
    assert "audio track 1" in out.err
    # The same packets as in Matroska.
    assert [f.pts for f in VideoDecoder(out.out, device="cpu").frames()] == VARYING
    decoded = run("decode", "-", "-o", "-", "--format", "y4m", stdin=out.out)
    assert decoded.code == 0
    assert decoded.out.startswith(b"YUV4MPEG2 W160 H96 ")
    assert decoded.out.count(b"FRAME\n") == 12
    again = run("transcode", "-", "-o", "-", "-q", 60, stdin=decoded.out)
    assert again.code == 0
    second = [s.frame for s in VideoDecoder(again.out, device="cpu").frames()]
    first = [s.frame for s in VideoDecoder(encoded, device="cpu").frames()]
    assert all(psnr(a.y, b.y) > 32 for a, b in zip(first, second, strict=True))
    assert run("info", "-", stdin=again.out).code == 0
    assert run("verify", "-", "--deep", stdin=again.out).code == 0


def test_a_pipe_into_a_file(run: Run, encoded: Path, tmp_path: Path) -> None:
    y4m = run("decode", encoded, "-o", "-", "--format", "y4m").out
    assert run("transcode", "-", "-o", tmp_path / "a.mkv", stdin=y4m).code == 0
    assert len(VideoDecoder(tmp_path / "a.mkv", device="cpu")) == 12
    assert run("transcode", "-", "-o", tmp_path / "b.mkv", "--resume", stdin=y4m).code == 3


# Decoding ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frames(encoded: Path) -> list[Any]:
    return [s.frame for s in VideoDecoder(encoded, device="cpu").frames()]


def test_y4m_holds_the_decoded_planes(run: Run, encoded: Path, frames: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out.y4m"
    made = run("decode", encoded, "-o", out, "--frames", "3:7")
    assert made.code == 0
    assert "mean rate" in made.err
    found = luma(out)
    assert all(np.array_equal(a, f.y) for a, f in zip(found, frames[3:7], strict=True))


def test_pictures_are_upright(run: Run, clip: Path, encoded: Path, tmp_path: Path) -> None:
    assert run("decode", encoded, "-o", f"{tmp_path}/p/", "--frames", "9:").code == 0
    names = sorted(p.name for p in (tmp_path / "p").iterdir())
    assert names == ["000009.png", "000010.png", "000011.png"]
    picture = np.asarray(Image.open(tmp_path / "p" / names[0]))
    assert picture.shape == (160, 96, 3)
    # 90 degrees counter-clockwise from what is stored.
    assert psnr(picture, np.rot90(pan(10, SIZE)[9])) > 26
    assert run("decode", encoded, "-o", f"{tmp_path}/p/", "--frames", "9").code == 6


def test_all_eight_positions() -> None:
    picture = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    one = 65536
    for matrix, wanted in {
        (one, 0, 0, 0, one): [[0, 1, 2], [3, 4, 5]],
        (-one, 0, 0, 0, one): [[2, 1, 0], [5, 4, 3]],
        (one, 0, 0, 0, -one): [[3, 4, 5], [0, 1, 2]],
        (-one, 0, 0, 0, -one): [[5, 4, 3], [2, 1, 0]],
        (0, one, 0, one, 0): [[0, 3], [1, 4], [2, 5]],
        (0, one, 0, -one, 0): [[3, 0], [4, 1], [5, 2]],
        (0, -one, 0, one, 0): [[2, 5], [1, 4], [0, 3]],
        (0, -one, 0, -one, 0): [[5, 2], [4, 1], [3, 0]],
    }.items():
        assert upright(picture, (*matrix, 0, 0, 0, 1 << 30))[:, :, 0].tolist() == wanted


def test_mp4_and_ranges(run: Run, encoded: Path, frames: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    made = run("decode", encoded, "-o", out, "--frames", "-2:", "--json")
    assert made.code == 0
    assert made.json["results"][0]["frames"] == 2
    assert all(psnr(a, f.y) > 35 for a, f in zip(luma(out), frames[-2:], strict=True))
    assert run("decode", encoded, "-o", tmp_path / "x.mp4", "--frames", "50:60").code == 3
    assert run("decode", encoded, "-o", out).code == 6
    assert run("decode", encoded, "-o", out, "-n").code == 0


def test_decode_says_what_it_needs(run: Run, clip: Path, encoded: Path, tmp_path: Path) -> None:
    assert "-o" in run("decode", encoded).err
    for args in (
        [encoded],
        [encoded, "-o", "-"],
        [encoded, "-o", tmp_path / "x.avi"],
        [encoded, encoded.parent / "other.clt", "-o", tmp_path / "x.mp4"],
        [encoded, "-o", tmp_path / "x.mp4", "--region", "0,0,5,5"],
        [encoded, "-o", tmp_path / "x.mp4", "--frames", "a:b"],
        [tmp_path / "p.clt", "--frames", "1:2"],
    ):
        assert run("decode", *args).code == 2
    assert run("decode", clip, "-o", tmp_path / "x.png").code == 4  # an ordinary video is not ours


def test_encoders_that_refuse_are_named(encoded: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.mp4"):
        export_video(encoded, tmp_path / "x.mp4", vcodec="nonsense", device="cpu")
    with pytest.raises(InputError):
        export_video(encoded, tmp_path / "no" / "x.mp4", vcodec="libx264", device="cpu")
    assert list(tmp_path.iterdir()) == []


class ClosedPipe(io.RawIOBase):
    def write(self, data: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_goes_away_is_a_broken_pipe(clip: Path, encoded: Path) -> None:
    with pytest.raises(BrokenPipeError):
        export_video(encoded, ClosedPipe(), vcodec="rawvideo", format="yuv4mpegpipe", device="cpu")
    with pytest.raises(BrokenPipeError):
        encode_video(clip, ClosedPipe(), device="cpu")


# Inspecting -------------------------------------------------------------------------------------------------------


def test_info_agrees_with_pyav(run: Run, encoded: Path) -> None:
    (record,) = run("info", encoded, "--json").json["results"]
    assert (record["width"], record["height"], record["frames"], record["gops"]) == (*SIZE, 12, 3)
    assert (record["lost_frames"], record["quality"], record["turned"]) == (0, 60, True)
    assert (record["matrix"], record["primaries"], record["full_range"]) == ("bt709", 1, False)
    assert [(t["type"], t["codec"]) for t in record["tracks"]] == [("audio", "aac")]
    with av.open(str(encoded)) as container:
        assert record["duration"] == container.duration / 1e6
        stream = container.streams.video[0]
        size = sum(p.size for p in container.demux(stream))
    end = (VARYING[-1] + 512) / 12800
    assert record["kbps"] == pytest.approx(size * 8 / end / 1000)
    text = run("info", encoded).out.decode()
    assert "12 in 3 groups" in text


def test_verify_finds_damage(run: Run, encoded: Path, tmp_path: Path) -> None:
    assert run("verify", encoded).code == 0
    assert run("verify", encoded, "--deep").code == 0
    data = bytearray(encoded.read_bytes())
    place = data.index(packets(encoded, "video")[6][12:60])
    data[place + 30] ^= 1
    bad = tmp_path / "bad.mkv"
    bad.write_bytes(data)
    assert run("verify", bad).code == 4
    assert run("info", bad, "--json").json["results"][0]["lost_frames"] == 1
    refused = run("decode", bad, "-o", tmp_path / "x.mp4")
    assert refused.code == 4
    assert not (tmp_path / "x.mp4").exists()
    made = run("decode", bad, "-o", tmp_path / "x.mp4", "--allow-partial", "--json")
    assert made.code == 0
    assert made.json["results"][0]["damaged_frames"] == [6, 7]
    assert made.json["results"][0]["status"] == "partial"
    assert len(luma(tmp_path / "x.mp4")) == 12


@pytest.fixture(autouse=True)
def _no_leftovers(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("*.tmp*"))
