"""Evaluation: its numbers against independent computations, its runs against interruption, its page in a browser."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from calotype.cli.console import Settings
from calotype.cli.evaluate import bench_command, compare_command, eval_command
from calotype.errors import InputError, OutputExistsError
from calotype.evaluation import codecs, metrics
from calotype.evaluation.bdrate import bd, bootstrap, compare_curves, usable
from calotype.evaluation.bench import photograph
from calotype.evaluation.curves import from_compressai, to_compressai
from calotype.evaluation.dataset import Dataset
from calotype.evaluation.published import read_published
from calotype.evaluation.run import Options, Run, evaluate, read_records

# BD-rates in per cent against VTM of the published Kodak curves, computed independently of this project's code.
PUBLISHED_BD = {
    "av1": 16.2, "bmshj2018-factorized": 68.1, "bmshj2018-hyperprior": 30.5, "cheng2020-anchor": 3.7,
    "mbt2018-mean": 21.3, "mbt2018": 11.0, "hm": 23.3, "jpeg": 208.5, "jpeg2000": 98.0, "webp": 78.7, "bpg444": 22.0,
    "mbt2018-mean-vbr": 23.4, "elic2022": -7.0, "mlicplusplus": -15.0, "hpcm-large": -20.0, "cool-chic-v5.0": -6.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small pictures, one of odd size, large enough for MS-SSIM."""
    path = tmp_path_factory.mktemp("pictures")
    Image.fromarray(photograph(208, 176, 1)).save(path / "a.png")
    Image.fromarray(photograph(183, 201, 2)).save(path / "b.png")
    return path


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    specs = codecs.parse_specs(["jpeg:q10+30+50+70+85,webp:q5+25+50+75+90,avif444:8:q20+35+50+65+80"])
    return evaluate(folder, specs, tmp_path_factory.mktemp("run") / "run", Options())


def strip(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what differs between equal runs: times."""
    kept = [{k: v for k, v in r.items() if "seconds" not in k and "stages" not in k} for r in records]
    return sorted(kept, key=lambda r: (r["codec"], r["picture"], r["setting"]))


# BD-rates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED_BD)
def test_bd_rates_of_published_curves(name: str) -> None:
    curves = {curve.name: curve for curve in read_published("kodak")}
    result = bd(curves["vtm"].series("psnr"), curves[name].series("psnr"))
    assert abs(result.rate - PUBLISHED_BD[name]) < 0.2


def test_bd_rate_of_a_scaled_curve_is_the_scale() -> None:
    anchor = [(0.1 * 2**i, 28.0 + 3 * i) for i in range(5)]
    cheaper = [(0.8 * rate, quality) for rate, quality in anchor]
    for method in ("pchip", "akima", "cubic"):
        result = bd(anchor, cheaper, method)
        assert result.rate == pytest.approx(-20)
        assert result.quality > 0
        assert result.overlap == 1


def test_no_bd_rate_without_overlap_or_points() -> None:
    low = [(0.1 * (i + 1), 20.0 + i) for i in range(5)]
    high = [(0.1 * (i + 1), 30.0 + i) for i in range(5)]
    assert math.isnan(bd(low, high).rate)
    assert bd(low, high).reason == "no common quality"
    few = bd(low, low[:3])
    assert math.isnan(few.rate)
    assert (few.anchor_points, few.test_points) == (5, 3)
    assert bd(low, low, bpp_range=(0.1, 0.35)).anchor_points == 3


def test_points_that_no_one_would_choose_are_left_out() -> None:
    assert usable([(0.3, 31.0), (0.1, 30.0), (0.2, 29.0), (0.4, 31.0)]) == [(0.1, 30.0), (0.3, 31.0)]


def test_bootstrap_is_reproducible_and_holds_the_mean() -> None:
    values = [-10.0, -5.0, 0.0, -20.0, -7.0]
    low, high = bootstrap(values)
    assert (low, high) == bootstrap(values)
    assert low < np.mean(values) < high
    assert math.isnan(bootstrap(values[:2])[0])


def test_bd_per_picture_then_mean(run: Run) -> None:
    curves = {curve.name: curve for curve in run.curves}
    summary = compare_curves(curves["jpeg"], curves["webp"], "psnr")
    rates = [result.rate for result in summary.pictures.values()]
    assert summary.counted == 2
    assert summary.mean_rate == pytest.approx(np.mean(rates))
    assert summary.rate == summary.mean_rate


# Curves that others published --------------------------------------------------------------------------------------


def test_compressai_form_round_trips(run: Run) -> None:
    curve = run.curves[0]
    again = from_compressai(json.loads(json.dumps(to_compressai(curve, "text"))), "anchor")
    assert again.name == curve.name
    assert again.series("psnr") == curve.series("psnr")
    assert again.series("ms-ssim") == curve.series("ms-ssim")


def test_published_files(tmp_path: Path) -> None:
    path = tmp_path / "rd.json"
    path.write_text(json.dumps({"x": [[0.5, 33.0, 0.98], [0.2, 30.0, None]]}))
    (curve,) = read_published(str(path))
    assert curve.series("psnr") == [(0.2, 30.0), (0.5, 33.0)]
    assert len(curve.series("ms-ssim")) == 1
    assert [curve.name for curve in read_published("kodak:vtm+webp")] == ["vtm", "webp"]
    with pytest.raises(InputError, match="no curve 'nothing'"):
        read_published("kodak:nothing")
    with pytest.raises(InputError):
        read_published("no-such-collection")


# Metrics ----------------------------------------------------------------------------------------------------------


def noisy(pixels: np.ndarray[Any, np.dtype[np.uint8]], sigma: float) -> np.ndarray[Any, np.dtype[np.uint8]]:
    noise = np.random.default_rng(0).normal(0, sigma, pixels.shape)
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)


def test_psnr_and_ms_ssim_are_those_of_their_packages() -> None:
    import torch
    from pytorch_msssim import ms_ssim
    from skimage.metrics import peak_signal_noise_ratio

    a = photograph(200, 180)
    b = noisy(a, 6)
    values = metrics.measure(["psnr", "ms-ssim"], a, b)
    assert values["psnr"] == peak_signal_noise_ratio(a, b)
    assert values["psnr"] == pytest.approx(10 * math.log10(255**2 / np.mean((a.astype(float) - b) ** 2)), abs=1e-9)
    x, y = (torch.tensor(p).permute(2, 0, 1)[None].float() for p in (a, b))
    assert values["ms-ssim"] == float(ms_ssim(x, y, data_range=255))


@pytest.mark.parametrize("name", [metric.name for metric in metrics.METRICS.values() if metric.group])
def test_metrics_order_pictures(name: str) -> None:
    if reason := metrics.missing(name):
        pytest.skip(reason)
    a = photograph(192, 176)
    scale = metrics.METRICS[name].scaled
    good, bad = (metrics.measure([name], a, noisy(a, sigma))[name] for sigma in (3, 25))
    assert good is not None
    assert bad is not None
    assert scale(good) > scale(bad)


def test_no_value_is_none() -> None:
    a = photograph(64, 48)
    assert metrics.measure(["psnr", "ms-ssim"], a, a) == {"psnr": None, "ms-ssim": None}
    with pytest.raises(InputError, match="decoded picture"):
        metrics.measure(["psnr"], a, a[1:])
    with pytest.raises(InputError, match="unknown metric"):
        metrics.parse_metrics(["psnr,psnrr"])


# Codecs -----------------------------------------------------------------------------------------------------------


def test_specs() -> None:
    spec = codecs.parse_spec("calotype:hyperprior:q10-90:5")
    assert (spec.name, spec.settings) == ("calotype:hyperprior", (10, 30, 50, 70, 90))
    assert codecs.parse_spec("calotype").name == "calotype:hyperprior"
    assert codecs.parse_spec("avif444").name == "avif444"
    assert codecs.parse_spec("avif444:6").name == "avif444"
    assert codecs.parse_spec("avif444:4:q50").settings == (50,)
    assert codecs.parse_spec("jp2:q0.1+0.5").settings == (0.1, 0.5)
    joined = codecs.parse_specs(["jpeg:q10,webp", "jpeg:q20+10"])
    assert [spec.name for spec in joined] == ["jpeg", "webp"]
    assert joined[0].settings == (10, 20)
    for wrong in ("gif", "jpeg:q10-90:8:9", "jpeg:q", "jp2:6", "jpeg:420:fine"):
        with pytest.raises(InputError):
            codecs.parse_spec(wrong)
    for wrong in ("webp:9", "vvc:best", "jpeg:422", "avif444:4+vmaf", "x264:medium"):
        with pytest.raises(InputError):
            codecs.parse_spec(wrong).open()


def test_avif_is_tuned_for_what_is_asked(tmp_path: Path) -> None:
    pixels = photograph(65, 97)
    made = {}
    for name in ("avif444:8", "avif444:8+psnr", "avif444:8+ssimulacra2"):
        codecs.parse_spec(f"{name}:q50").open().encode(pixels, 50, tmp_path / "a.avif")
        made[name] = (tmp_path / "a.avif").read_bytes()
    assert len(set(made.values())) == 3
    out, advanced = io.BytesIO(), {"tune": "psnr"}
    Image.fromarray(pixels).save(
        out, "AVIF", quality=50, subsampling="4:4:4", speed=8, max_threads=1, advanced=advanced
    )
    assert made["avif444:8+psnr"] == out.getvalue()


STILLS = [family.name for family in codecs.FAMILIES.values() if family.medium == "still" and family.name != "calotype"]


@pytest.mark.parametrize("name", [*STILLS, "jpeg:444", "heic:444"])
def test_anchors_write_files_and_read_them(name: str, tmp_path: Path) -> None:
    spec = codecs.parse_spec(name)
    if reason := spec.missing():
        pytest.skip(reason)
    codec, pixels = spec.open(), photograph(65, 97)
    sizes = []
    for setting in (spec.settings[0], spec.settings[-1]):
        path = tmp_path / f"{setting:g}{codec.suffix}"
        codec.encode(pixels, setting, path)
        decoded, _ = codec.decode(path, (97, 65))
        assert decoded.shape == pixels.shape
        assert decoded.dtype == np.uint8
        sizes.append(path.stat().st_size)
        assert f"{setting:g}" in codec.describe(setting) or name == "jp2"
    assert sizes[0] < sizes[1]
    quality = metrics.measure(["psnr"], pixels, decoded)["psnr"]
    assert quality is not None
    assert quality > 25


def test_points_equal_an_independent_pillow_script(run: Run, folder: Path) -> None:
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "jpeg": ("JPEG", {"subsampling": "4:2:0", "optimize": True}),
        "webp": ("WEBP", {"method": 6}),
        "avif444:8": ("AVIF", {"subsampling": "4:4:4", "speed": 8, "max_threads": 1}),
    }
    assert len(run.records) == 30
    for record in run.records:
        format, more = options[record["codec"]]
        image = Image.open(folder / record["picture"]).convert("RGB")
        out = io.BytesIO()
        image.save(out, format, quality=int(record["setting"]), **more)
        a, b = (np.asarray(x, dtype=float) for x in (image, Image.open(out).convert("RGB")))
        assert record["bytes"] == len(out.getvalue())
        assert record["bpp"] == len(out.getvalue()) * 8 / (image.width * image.height)
        assert record["metrics"]["psnr"] == pytest.approx(10 * math.log10(255**2 / np.mean((a - b) ** 2)), abs=1e-9)


def test_our_codec_is_measured(folder: Path, tmp_path: Path) -> None:
    from calotype.errors import ModelNotFoundError

    try:
        codecs.parse_spec("calotype").open()
    except ModelNotFoundError as error:
        pytest.skip(f"no weights here: {error}")
    found = evaluate(folder, codecs.parse_specs(["calotype:q20+80"]), tmp_path / "run", Options())
    assert not found.failures
    (curve,) = found.curves
    assert curve.kind == "learned"
    assert curve.points[0].bpp < curve.points[1].bpp
    assert found.records[0]["encode_stages"]
    assert "weights sha256" in found.records[0]["description"]


def test_codecs_of_compressai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressai", reason="compressai is not installed")
    import torch
    from compressai.models import FactorizedPrior

    torch.manual_seed(0)
    network = FactorizedPrior(8, 12)
    network.update()
    torch.save(network.state_dict(), tmp_path / "bmshj2018-factorized-1-00000000.pth.tar")
    spec = codecs.parse_spec("compressai:bmshj2018-factorized:q1")
    monkeypatch.delenv("CALOTYPE_COMPRESSAI_WEIGHTS", raising=False)
    assert "CALOTYPE_COMPRESSAI_WEIGHTS" in (spec.missing() or "")
    monkeypatch.setenv("CALOTYPE_COMPRESSAI_WEIGHTS", str(tmp_path))
    assert spec.missing() is None
    codec, pixels, path = spec.open(), photograph(97, 65), tmp_path / "x.cai"
    codec.encode(pixels, 1, path)
    decoded, _ = codec.decode(path, (65, 97))
    assert decoded.shape == pixels.shape
    assert "weights sha256" in codec.describe(1)
    with pytest.raises(InputError, match="no weights"):
        codec.encode(pixels, 2, path)


# Runs -------------------------------------------------------------------------------------------------------------


def test_two_jobs_give_the_numbers_of_one(run: Run, folder: Path, tmp_path: Path) -> None:
    specs = codecs.parse_specs(["jpeg:q10+30+50+70+85,webp:q5+25+50+75+90,avif444:8:q20+35+50+65+80"])
    two = evaluate(folder, specs, tmp_path / "run", Options(jobs=2))
    assert strip(two.records) == strip(run.records)


def test_a_killed_run_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    text = "avif444:6:q10-80:6"
    out = tmp_path / "run"
    program = (
        "import sys; from pathlib import Path; from calotype.evaluation import codecs, run\n"
        "run.evaluate(Path(sys.argv[1]), codecs.parse_specs([sys.argv[2]]), Path(sys.argv[3]), run.Options())"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(folder), text, str(out)])
    records = out / "records.jsonl"
    deadline = time.monotonic() + 40
    while not records.exists() or records.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole = records.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    before = whole.count(b"\n")
    records.write_bytes(whole + b'{"picture": "a.png", "cod')  # the worst moment to be killed
    with pytest.raises(OutputExistsError):
        evaluate(folder, codecs.parse_specs([text]), out, Options())
    seen: list[int] = []
    found = evaluate(
        folder, codecs.parse_specs([text]), out, Options(resume=True), lambda done, total, record: seen.append(done)
    )
    assert records.read_bytes().startswith(whole)
    assert len(found.records) == 12
    assert seen == list(range(before + 1, 13))
    clean = evaluate(folder, codecs.parse_specs([text]), tmp_path / "clean", Options())
    assert strip(clean.records) == strip(found.records)
    again: list[int] = []
    evaluate(folder, codecs.parse_specs([text]), out, Options(resume=True), lambda done, total, r: again.append(done))
    assert not again


def test_a_run_adds_codecs_metrics_and_repeats_what_changed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    evaluate(folder, codecs.parse_specs(["jpeg:q20+50"]), out, Options(metrics=("psnr",)))
    seen: list[str] = []

    def note(done: int, total: int, record: dict[str, Any]) -> None:
        seen.append(record["codec"])

    evaluate(folder, codecs.parse_specs(["jpeg:q20+50,webp:q50"]), out, Options(metrics=("psnr",), resume=True), note)
    assert seen == ["webp", "webp"]
    lines = (out / "records.jsonl").read_text().splitlines()
    changed = json.loads(lines[0]) | {"description": "an older encoder"}
    (out / "records.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n")
    seen.clear()
    evaluate(folder, codecs.parse_specs(["jpeg:q20+50,webp:q50"]), out, Options(metrics=("psnr",), resume=True), note)
    assert seen == ["jpeg"]
    assert len(read_records(out / "records.jsonl")) == 6


def test_points_of_an_older_codec_leave_the_curve(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    evaluate(folder, codecs.parse_specs(["webp:q50,jpeg:q20+35+50"]), out, Options(metrics=("psnr",)))
    for name in ("run.json", "records.jsonl"):
        text = (out / name).read_text()
        changed = text.replace("quality=20,", "quality=20, older=True,")
        assert changed != text
        (out / name).write_text(changed)
    found = evaluate(folder, codecs.parse_specs(["jpeg:q50"]), out, Options(metrics=("psnr",), resume=True))
    assert [curve.name for curve in found.curves] == ["webp", "jpeg"]
    assert [point.setting for point in found.curves[1].points] == [35, 50]


def test_other_pictures_are_refused_and_failures_are_told(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "pictures"
    shutil.copytree(folder, mine)
    out = tmp_path / "run"
    evaluate(mine, codecs.parse_specs(["jpeg:q50"]), out, Options())
    (mine / "c.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="other pictures"):
        evaluate(mine, codecs.parse_specs(["jpeg:q50"]), out, Options(resume=True))
    other = evaluate(mine, codecs.parse_specs(["jpeg:q50"]), tmp_path / "other", Options())
    assert [record["picture"] for record in other.failures] == ["c.png"]
    assert not other.curves[0].points  # a mean over two of three pictures would be another number
    (tmp_path / "run" / "results").mkdir()
    with pytest.raises(InputError, match="no pictures"):
        Dataset.load(tmp_path / "run" / "results")


def test_missing_encoders_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    broken = replace(codecs.FAMILIES["webp"], missing=lambda: "not built in")
    monkeypatch.setattr(codecs, "FAMILIES", {**codecs.FAMILIES, "webp": broken})
    found = evaluate(folder, codecs.parse_specs(["jpeg:q50,webp:q50"]), tmp_path / "run", Options())
    assert found.manifest["skipped"] == {"webp": "not built in"}
    with pytest.raises(InputError, match="not built in"):
        evaluate(folder, codecs.parse_specs(["webp:q50"]), tmp_path / "none", Options())


# Commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run made by the command, with all its reports."""
    out = tmp_path_factory.mktemp("command") / "run"
    arguments = [
        str(folder), "-c", "jpeg:q10+30+50+70+85,webp:q5+25+50+75+90", "-o", str(out),
        "--published", "kodak:vtm+mbt2018-mean", "--bpp-range", "all",
    ]  # fmt: skip
    result = CliRunner().invoke(eval_command, arguments, obj=Settings(quiet=True), standalone_mode=False)
    assert result.exception is None, result.output
    return out


def test_eval_writes_its_reports(reported: Path) -> None:
    data = json.loads((reported / "comparison.json").read_text())
    assert data["schema"] == "calotype.compare/1"
    assert {curve["kind"] for curve in data["curves"]} == {"anchor", "published"}
    theirs = json.loads((reported / "results" / "webp.json").read_text())
    assert {"bpp", "psnr-rgb", "ms-ssim-rgb", "encoding_time", "decoding_time"} <= set(theirs["results"])
    assert len(theirs["per_image"]) == 10
    assert (reported / "records.csv").read_text().count("\n") == 21
    assert "| webp | psnr | jpeg |" in (reported / "bd-rates.md").read_text()
    with Image.open(reported / "rate-quality.png") as image:
        assert image.width > 1000
    assert "<svg" in (reported / "rate-quality.svg").read_text()


def test_compare(reported: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"out{suffix}" for suffix in (".json", ".csv", ".md", ".png", ".html")]
    arguments = [
        str(reported), "--anchor", "jpeg", "--bd-method", "akima", "--bpp-range", "all", "--json",
        *(part for path in files for part in ("-o", str(path))),
    ]  # fmt: skip
    result = CliRunner().invoke(compare_command, arguments, obj=Settings(), standalone_mode=False)
    assert result.exception is None, result.output
    found = json.loads(result.stdout)
    assert {(row["test"], row["method"]) for row in found["bd"]} == {("webp", "akima")}
    assert all(path.stat().st_size for path in files)
    alone = CliRunner().invoke(
        compare_command, [str(reported / "results" / "webp.json"), "--published", "kodak:vtm"], obj=Settings()
    )
    assert alone.exit_code == 0, alone.output
    some = ["-c", "webp", "-m", "psnr", "--published", "kodak:vtm", "--bpp-range", "all"]
    chosen = CliRunner().invoke(compare_command, [str(reported), *some], obj=Settings())
    assert chosen.exit_code == 0, chosen.output
    assert "jpeg" not in chosen.output
    wrong = CliRunner().invoke(compare_command, [str(reported), "-o", "x.gif"], obj=Settings())
    assert wrong.exit_code == 2


def test_bench_puts_ratios_first(tmp_path: Path) -> None:
    arguments = [
        "-c", "jpeg,webp", "--anchor", "jpeg", "--size", "96x64", "--reps", "2", "--warmup", "0", "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(bench_command, arguments, obj=Settings(quiet=True), standalone_mode=False)
    assert result.exception is None, result.output
    found = json.loads(result.stdout)
    assert found["anchor"] == "jpeg ×1"
    first = found["results"][0]
    assert list(first)[1:3] == ["encode_ratio", "decode_ratio"]
    assert first["encode_ratio"] == 1
    assert first["memory_peak_bytes"] > 1e6
    assert len(found["results"]) == 2


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def test_the_page_works_in_a_browser(reported: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = browser()
    if program is None:
        pytest.skip("no Chromium is installed")
    page_file = reported / "report.html"
    text = page_file.read_text()
    assert 'src="http' not in text
    assert "/*DATA*/" not in text
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=program)
        page = chromium.new_page(viewport={"width": 1200, "height": 900})
        complaints: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri())
        page.wait_for_selector("#rd .scatterlayer .trace")
        assert page.locator("#rd .scatterlayer .trace").count() == 4
        assert page.locator("#speed .scatterlayer .trace").count() == 2
        page.select_option("#metric", "ms-ssim")
        page.check("#log")
        page.wait_for_function("document.querySelector('#rd .ytitle').textContent.includes('MS-SSIM')")
        assert page.locator("#bd tr").count() >= 2

        shown = "document.getElementById('left-image').style.clipPath"
        before = page.evaluate(shown)
        page.locator("#stage").scroll_into_view_if_needed()
        box = page.locator("#stage").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 20)
        page.mouse.up()
        assert page.evaluate(shown) != before
        assert abs(float(page.input_value("#slider")) - 25) < 2
        page.fill("#slider", "80")
        assert "20%" in page.evaluate(shown)
        old = page.get_attribute("#right-image", "src")
        page.select_option("#right", "original")
        assert page.get_attribute("#right-image", "src") != old
        assert page.evaluate("document.getElementById('left-image').naturalWidth") > 0
        chromium.close()
    assert complaints == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in requests)
