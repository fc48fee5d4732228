"""Evaluation of video: its numbers against independent computations, its runs and reports, on clips made here."""

from __future__ import annotations

import base64
import io
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from test_evaluation import browser

from calotype.cli.console import Settings
from calotype.cli.evaluate import compare_command, eval_command
from calotype.errors import InputError
from calotype.evaluation import clips, codecs, ffmpeg, video_codecs, video_metrics
from calotype.evaluation.dataset import Dataset
from calotype.evaluation.metrics import parse_metrics
from calotype.evaluation.run import Options, Run, evaluate

SAMPLES = Path(__file__).parent.parent / "samples"
WIDTH, HEIGHT, FRAMES = 176, 164, 10
METRICS = ("psnr-yuv-611", "psnr-y", "psnr-u", "psnr-v", "ms-ssim-y", "vmaf", "vmaf-neg")
Plane = np.ndarray[Any, np.dtype[Any]]


def make_clip(path: Path, sample: str, codec: str, rate: Fraction) -> None:
    """A window that moves over a photograph, without loss."""
    pixels = np.asarray(Image.open(SAMPLES / sample).convert("RGB"))
    with av.open(str(path), "w", options={"strict": "-1"}) as container:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FRAMES):
            window = pixels[40 + number : 40 + number + HEIGHT, 30 + 3 * number : 30 + 3 * number + WIDTH]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(window), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode(None))


def planes(path: Path, format: str = "yuv420p") -> list[tuple[Plane, Plane, Plane]]:
    """Y, U and V of all frames of a file, by PyAV's own conversion to arrays."""
    with av.open(str(path)) as container:
        flat = [frame.to_ndarray(format=format).reshape(-1) for frame in container.decode(video=0)]
    luma, chroma = WIDTH * HEIGHT, WIDTH * HEIGHT // 4
    return [(f[:luma], f[luma : luma + chroma], f[luma + chroma :]) for f in flat]


def needs(name: str) -> codecs.CodecSpec:
    spec = codecs.parse_spec(name)
    if reason := spec.missing():
        pytest.skip(reason)
    return spec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips")
    make_clip(path / "a.mkv", "coffee.png", "ffv1", Fraction(25))
    make_clip(path / "b.y4m", "chelsea.png", "wrapped_avframe", Fraction(30000, 1001))
    (path / "notes.txt").write_text("no clip")
    return path


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    needs("x264")
    specs = codecs.parse_specs(["x264:veryfast:zerolatency:q20+26+32+38"], keyint=8)
    return evaluate(folder, specs, tmp_path_factory.mktemp("run") / "run", Options(metrics=METRICS))


# Clips ------------------------------------------------------------------------------------------------------------


def test_clips_are_read_as_they_are(folder: Path) -> None:
    assert Dataset.load(folder, "video").pictures == ("a.mkv", "b.y4m")
    clip = clips.read_clip(folder / "b.y4m")
    assert (clip.width, clip.height, clip.rate) == (WIDTH, HEIGHT, Fraction(30000, 1001))
    expected = planes(folder / "b.y4m")
    assert len(clip.frames) == len(expected) == FRAMES
    for frame, wanted in zip(clip.frames, expected, strict=True):
        assert all(np.array_equal(getattr(frame, p).reshape(-1), w) for p, w in zip("yuv", wanted, strict=True))
    assert len(clips.read_clip(folder / "b.y4m", 3).frames) == 3
    assert len(clips.read_clip(folder / "b.y4m", 99).frames) == FRAMES


def test_what_is_no_clip_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"no video at all")
    with pytest.raises(InputError, match="cannot be read as a video"):
        clips.read_clip(tmp_path / "x.mp4")
    with pytest.raises(InputError, match="has no videos"):
        Dataset.load(SAMPLES, "video")
    with pytest.raises(InputError, match="one run"):
        evaluate(folder, codecs.parse_specs(["x264,jpeg"]), tmp_path / "run", Options())


# Numbers ----------------------------------------------------------------------------------------------------------


def test_rates_and_psnr_equal_independent_ones(run: Run, folder: Path) -> None:
    assert len(run.records) == 8
    assert not run.failures
    for record in run.records:
        path = (
            run.folder / "files" / "x264-veryfast-zerolatency" / f"{record['setting']:g}" / f"{record['picture']}.mkv"
        )
        fps = 25 if record["picture"] == "a.mkv" else 30000 / 1001
        assert record["bytes"] == path.stat().st_size
        assert record["bpp"] == pytest.approx(path.stat().st_size * 8 / (WIDTH * HEIGHT * FRAMES))
        assert record["kbps"] == pytest.approx(path.stat().st_size * 8 / 1000 / (FRAMES / fps))
        assert 0.5 * record["bpp"] < record["bpp_payload"] < record["bpp"]
        originals, decoded = planes(folder / record["picture"]), planes(path)
        each = np.array([
            [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(x, y, strict=True)]
            for x, y in zip(originals, decoded, strict=True)
        ])  # fmt: skip
        for name, column in zip("yuv", each.T, strict=True):
            assert record["per_frame"][f"psnr-{name}"] == pytest.approx(column.tolist(), abs=1e-9)
        mean = ((6 * each[:, 0] + each[:, 1] + each[:, 2]) / 8).mean()
        assert record["metrics"]["psnr-yuv-611"] == pytest.approx(mean, abs=1e-9)


def test_psnr_equals_that_of_libvmaf(run: Run, folder: Path, tmp_path: Path) -> None:
    if reason := ffmpeg.missing("filter", "libvmaf"):
        pytest.skip(reason)
    record = run.records[0]
    path = run.folder / "files" / "x264-veryfast-zerolatency" / f"{record['setting']:g}" / f"{record['picture']}.mkv"
    clock = "settb=AVTB,setpts=N"
    ffmpeg.run(
        ["-i", str(path), "-i", str(folder / record["picture"]), "-lavfi",
         f"[0:v]{clock}[d];[1:v]{clock}[r];[d][r]libvmaf=feature=name=psnr:log_fmt=json:log_path=log.json",
         "-f", "null", "-"],
        cwd=tmp_path,
    )  # fmt: skip
    pooled = json.loads((tmp_path / "log.json").read_text())["pooled_metrics"]
    assert record["metrics"]["psnr-y"] == pytest.approx(pooled["psnr_y"]["mean"], abs=1e-3)
    assert record["metrics"]["psnr-u"] == pytest.approx(pooled["psnr_cb"]["mean"], abs=1e-3)
    assert record["metrics"]["vmaf"] == pytest.approx(pooled["vmaf"]["mean"], abs=1e-3)


def test_quality_falls_with_the_setting(run: Run) -> None:
    (curve,) = run.curves
    for name in METRICS:
        qualities = [quality for _, quality in curve.series(name)]
        assert len(qualities) == 4
        assert qualities == sorted(qualities)
    assert [point.kbps for point in curve.points] == sorted(point.kbps or 0 for point in curve.points)


def test_ms_ssim_is_that_of_its_package(run: Run, folder: Path) -> None:
    import torch
    from pytorch_msssim import ms_ssim

    record = run.records[0]
    path = run.folder / "files" / "x264-veryfast-zerolatency" / f"{record['setting']:g}" / f"{record['picture']}.mkv"
    values = []
    for (a, _, _), (b, _, _) in zip(planes(folder / record["picture"]), planes(path), strict=True):
        x, y = (torch.tensor(p).reshape(1, 1, HEIGHT, WIDTH).float() for p in (a, b))
        values.append(float(ms_ssim(x, y, data_range=255)))
    assert record["metrics"]["ms-ssim-y"] == pytest.approx(np.mean(values), abs=1e-9)


def test_equal_frames_and_lost_frames(folder: Path) -> None:
    clip = clips.read_clip(folder / "a.mkv")
    short = clip.beginning(3)
    values, each = video_metrics.measure(["psnr-yuv-611"], clip, clip.frames)
    assert values == {"psnr-yuv-611": video_metrics.PSNR_LIMIT}
    assert len(each["psnr-yuv-611"]) == FRAMES
    with pytest.raises(InputError, match="3 frames were decoded, 10 were encoded"):
        video_metrics.measure(["psnr-yuv-611"], clip, short.frames)
    assert parse_metrics(["psnr-yuv,ms-ssim"], "video") == ["psnr-yuv-611", "ms-ssim-y"]
    with pytest.raises(InputError, match="unknown metric"):
        parse_metrics(["ssimulacra2"], "video")


# Codecs -----------------------------------------------------------------------------------------------------------


def test_specs() -> None:
    spec = codecs.parse_spec("x264:veryslow:zerolatency:q20-40:3", 12)
    assert (spec.name, spec.settings, spec.keyint) == ("x264:veryslow:zerolatency", (20, 30, 40), 12)
    assert codecs.parse_spec("svtav1").name == "svtav1:6"
    assert len(codecs.parse_spec("vvenc:fast").settings) == 6
    assert codecs.parse_spec("calotype:video").name == "calotype:video"
    assert codecs.parse_spec("calotype:video:intra:q20+40").name == "calotype:video:intra"
    for wrong in ("x264:best", "x264:medium:grain", "svtav1:14", "vvenc:medium:psnr", "calotype:video:fast", "jpeg"):
        with pytest.raises(InputError):
            codecs.parse_spec(wrong).open_video()


@pytest.mark.parametrize(
    "name",
    ["x264:veryfast", "x264:veryfast:psnr+zerolatency", "x265:ultrafast", "x265:ultrafast:zerolatency", "svtav1:12",
     "svtav1:12:zerolatency", "vvenc:faster", "vvenc:faster:zerolatency"],
)  # fmt: skip
def test_anchors_keep_the_frames_and_the_distance_of_key_frames(name: str, folder: Path, tmp_path: Path) -> None:
    spec = needs(name)
    clip, path = clips.read_clip(folder / "a.mkv"), tmp_path / "coded.mkv"
    codec = codecs.CodecSpec(spec.family, spec.variant, spec.settings, keyint=8).open_video()
    codec.encode(clip, spec.settings[2], path)
    decoded = clips.RawVideo(tmp_path / "decoded.yuv", WIDTH, HEIGHT)
    decoded.write(codec.decode(path))
    quality = video_metrics.measure(["psnr-y"], clip, decoded)[0]["psnr-y"]
    assert quality is not None
    assert 28 < quality < video_metrics.PSNR_LIMIT
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert len(packets) == FRAMES
    # With reordering, vvenc's key frame is the last of its eight, so that ten frames hold only one.
    assert sum(packet.is_keyframe for packet in packets) == (1 if name == "vvenc:faster" else 2)
    if name.endswith("zerolatency"):
        assert [packet.pts for packet in packets] == sorted(packet.pts or 0 for packet in packets)
    assert clips.payload_bytes(path) == sum(packet.size for packet in packets)
    assert "-i clip.yuv" in codec.describe(spec.settings[2])
    assert f" {spec.settings[2]:g} " in codec.describe(spec.settings[2])


def test_ten_bits_are_rounded_and_not_dithered(folder: Path, tmp_path: Path) -> None:
    spec = needs("vvenc:faster")
    clip, path, codec = clips.read_clip(folder / "a.mkv"), tmp_path / "coded.mkv", spec.open_video()
    codec.encode(clip.beginning(2), 20, path)
    for frame, wanted in zip(codec.decode(path), planes(path, "yuv420p10le"), strict=True):
        for name, plane in zip("yuv", wanted, strict=True):
            expected = np.clip(np.floor(plane.astype(float) / 4 + 0.5), 0, 255)
            assert np.array_equal(getattr(frame, name).reshape(-1), expected)


def test_our_video_is_measured(folder: Path, tmp_path: Path) -> None:
    from calotype.errors import ModelNotFoundError

    try:
        codecs.parse_spec("calotype:video").open_video().describe(50)
    except ModelNotFoundError as error:
        pytest.skip(f"no weights here: {error}")
    specs = codecs.parse_specs(["calotype:video:q20+70,calotype:video:intra:q20"])
    options = Options(metrics=("psnr-yuv-611", "psnr-y"), frames=3)
    found = evaluate(folder / "a.mkv", specs, tmp_path / "run", options)
    assert not found.failures
    video, intra = found.curves
    assert video.kind == intra.kind == "learned"
    assert video.points[0].bpp < video.points[1].bpp
    assert video.series("psnr-y")[0][1] < video.series("psnr-y")[1][1]
    path = tmp_path / "run" / "files" / "calotype-video-intra" / "20" / "a.mkv.mkv"
    with av.open(str(path)) as container:
        assert all(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
    assert "weights" in found.records[0]["description"]


# Runs and reports -------------------------------------------------------------------------------------------------


def test_a_run_goes_on_without_repeating(folder: Path, tmp_path: Path) -> None:
    needs("x264")
    seen: list[tuple[str, float]] = []

    def note(done: int, total: int, record: dict[str, Any]) -> None:
        seen.append((record["picture"], record["setting"]))

    options = Options(metrics=("psnr-y",), frames=4, resume=True)
    out = tmp_path / "run"
    evaluate(folder, codecs.parse_specs(["x264:ultrafast:q30"]), out, options, note)
    with (out / "records.jsonl").open("a") as file:
        file.write('{"picture": "a.mkv", "codec": "x2')  # as after a kill
    found = evaluate(folder, codecs.parse_specs(["x264:ultrafast:q30+40"]), out, options, note)
    assert sorted(seen) == [("a.mkv", 30), ("a.mkv", 40), ("b.y4m", 30), ("b.y4m", 40)]
    assert len(found.records) == 4
    with pytest.raises(InputError, match="other pictures or frames"):
        evaluate(folder, codecs.parse_specs(["x264:ultrafast:q30"]), out, Options(metrics=("psnr-y",), resume=True))
    seen.clear()
    evaluate(folder, codecs.parse_specs(["x264:ultrafast:q30"], keyint=2), out, options, note)
    assert sorted(seen) == [("a.mkv", 30), ("b.y4m", 30)]


def test_a_codec_that_loses_frames_fails(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("x264")
    whole = video_codecs.FfmpegVideoCodec.decode
    monkeypatch.setattr(video_codecs.FfmpegVideoCodec, "decode", lambda self, path: iter(list(whole(self, path))[1:]))
    specs = codecs.parse_specs(["x264:ultrafast:q30"])
    found = evaluate(folder, specs, tmp_path / "run", Options(("psnr-y",), frames=4))
    assert [record["error"] for record in found.failures] == ["InputError: 3 frames were decoded, 4 were encoded"] * 2
    assert not found.curves[0].points


@pytest.fixture(scope="module")
def reported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run made by the command, with all its reports."""
    needs("x264")
    out = tmp_path_factory.mktemp("command") / "run"
    arguments = [
        str(folder), "-c", "x264:ultrafast:q18+24+30+36,x264:veryfast:q18+24+30+36", "-m", "psnr-yuv,psnr-y",
        "--frames", "4", "--keyint", "4", "-o", str(out),
    ]  # fmt: skip
    result = CliRunner().invoke(eval_command, arguments, obj=Settings(quiet=True), standalone_mode=False)
    assert result.exception is None, result.output
    return out


def test_reports_of_video(reported: Path, folder: Path) -> None:
    data = json.loads((reported / "comparison.json").read_text())
    row = next(b for b in data["bd"] if (b["test"], b["metric"]) == ("x264:veryfast", "psnr-yuv-611"))
    assert row["counted"] == 2
    assert row["rate"] < 0  # the better preset
    assert all(len(curve["results"]["kbps"]) == 4 for curve in data["curves"])
    head = (reported / "records.csv").read_text().splitlines()[0].split(",")
    assert head[4:12] == ["width", "height", "frames", "fps", "kbps", "bpp_payload", "bytes", "bpp"]
    with Image.open(reported / "rate-quality.png") as image:
        assert image.width > 1000
    text = (reported / "report.html").read_text()
    start = text.index('<script type="application/json" id="data">') + len('<script type="application/json" id="data">')
    page = json.loads(text[start : text.index("</script>", start)])
    assert page["title"].endswith("2 clips")
    assert [shown["name"] for shown in page["viewer"]] == ["a.mkv, frame 3", "b.y4m, frame 3"]
    for shown in page["viewer"]:
        with av.open(str(folder / shown["name"].split(",")[0])) as container:
            frame = list(container.decode(video=0))[2].to_ndarray(format="rgb24")
        image = Image.open(io.BytesIO(base64.b64decode(shown["original"].partition(",")[2])))
        assert np.abs(np.asarray(image).astype(float) - frame).max() < 40  # chroma is enlarged in other ways
        for rate in shown["rates"]:
            assert [crop["codec"] for crop in rate["crops"]] == ["x264:ultrafast", "x264:veryfast"]
            near = [float(crop["text"].split(" bpp")[0]) for crop in rate["crops"]]
            assert all(abs(math.log(value / rate["rate"])) < 0.7 for value in near)
    compared = CliRunner().invoke(compare_command, [str(reported), "-m", "psnr-yuv", "--json"], obj=Settings())
    assert compared.exit_code == 0, compared.output
    assert {row["metric"] for row in json.loads(compared.stdout)["bd"]} == {"psnr-yuv-611"}


def test_the_page_shows_rates_in_kilobits(reported: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = browser()
    if program is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=program)
        page = chromium.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((reported / "report.html").as_uri())
        page.wait_for_function("document.querySelector('#rd .xtitle')?.textContent.includes('bits per pixel')")
        page.select_option("#axis", "kbps")
        page.wait_for_function("document.querySelector('#rd .xtitle').textContent.includes('kbit/s')")
        assert page.locator("#rd .scatterlayer .trace").count() == 2
        old = page.get_attribute("#left-image", "src")
        page.select_option("#picture", "1")
        assert page.get_attribute("#left-image", "src") != old
        chromium.close()
    assert complaints == []
