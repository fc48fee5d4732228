"""The command line on real files: names, pipes, folders, exit codes, JSON, interruption."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result, Run
from PIL import Image, ImageCms

import calotype
from calotype import container
from calotype.header import BRIEF_MAGIC
from calotype.models import zoo

SAMPLES = Path(__file__).parent.parent / "samples"
SIZE = (96, 64)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For such small pictures more threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spawn(*args: object, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "calotype.cli", *map(str, args)], **options)


@functools.cache
def sample_pictures() -> list[Image.Image]:
    paths = sorted(p for p in SAMPLES.iterdir() if p.suffix in (".jpg", ".png")) if SAMPLES.is_dir() else []
    return [Image.open(path).convert("RGB") for path in paths]


def photo(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """A crop of a sample picture, or smooth noise where there are no samples."""
    rng = np.random.default_rng(seed)
    samples = sample_pictures()
    if not samples:
        noise = rng.integers(0, 256, (8, 12, 3), np.uint8)
        return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    sample = samples[seed % len(samples)]
    left, top = (int(rng.integers(0, side - part + 1)) for side, part in zip(sample.size, size, strict=True))
    crop = sample.crop((left, top, left + size[0], top + size[1]))
    return Image.fromarray(np.asarray(crop))  # without the sample's metadata


def save(path: Path, seed: int = 0, size: tuple[int, int] = SIZE, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed, size).save(path, **options)
    return path


def pixels(source: Path | bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return np.asarray(image.convert("RGB"))


def psnr(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="session")
def stream() -> bytes:
    """The encoded `photo()`."""
    data: bytes = calotype.encode(photo())
    return data


@pytest.fixture
def encoded(tmp_path: Path, stream: bytes) -> Path:
    """An encoded picture, and the picture in a folder beside it."""
    save(tmp_path / "source" / "a.png")
    (tmp_path / "a.clt").write_bytes(stream)
    return tmp_path / "a.clt"


def rewritten(path: Path, *, weights: bytes | None = None, tile: Callable[[bytes], bytes] = lambda t: t) -> bytes:
    """The file with another header or other payloads, and right checksums."""
    still = container.read_still(path.read_bytes())
    header = dataclasses.replace(still.header, weights=weights or still.header.weights)
    return container.write_still(header, [tile(bytes(t)) for t in still.tiles if t is not None])


# Names and files --------------------------------------------------------------------------------------------------


def test_round_trip_with_default_names(tmp_path: Path, run: Run) -> None:
    source = save(tmp_path / "a.jpg", quality=95)
    result = run("encode", source)
    assert (result.code, result.out) == (0, b"")
    assert tree(tmp_path) == ["a.clt", "a.jpg"]
    assert str(tmp_path / "a.clt") in result.err
    assert run("decode", tmp_path / "a.clt").code == 0
    assert tree(tmp_path) == ["a.clt", "a.jpg", "a.png"]
    assert psnr(pixels(source), pixels(tmp_path / "a.png")) > 24
    assert (tmp_path / "a.clt").stat().st_size < source.stat().st_size


def test_pipes_give_the_same_bytes_as_files(tmp_path: Path, encoded: Path, run: Run) -> None:
    source = tmp_path / "source" / "a.png"
    piped = run("encode", "-", stdin=source.read_bytes())
    assert (piped.code, piped.out) == (0, encoded.read_bytes())
    decoded = run("decode", "-", "--format", "png", stdin=piped.out)
    assert decoded.code == 0
    assert run("decode", encoded, "-o", tmp_path / "b.png").code == 0
    assert np.array_equal(pixels(decoded.out), pixels(tmp_path / "b.png"))


def test_format_of_standard_output_must_be_given(encoded: Path, run: Run) -> None:
    result = run("decode", "-", stdin=encoded.read_bytes())
    assert (result.code, result.out) == (2, b"")
    assert "--format" in result.err


def test_folder_is_mirrored(tmp_path: Path, run: Run) -> None:
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "deep" / "b.jpg", 1)
    save(tmp_path / "in" / ".hidden.png", 2)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    assert run("encode", tmp_path / "in", "-o", tmp_path / "flat").code == 0
    assert tree(tmp_path / "flat") == ["a.clt"]
    assert run("encode", tmp_path / "in", "-r", "-o", tmp_path / "all").code == 0
    assert tree(tmp_path / "all") == ["a.clt", "deep/b.clt"]
    assert run("decode", tmp_path / "all", "-r", "-o", tmp_path / "back", "--format", "webp").code == 0
    assert tree(tmp_path / "back") == ["a.webp", "deep/b.webp"]


def test_folder_without_pictures(tmp_path: Path, run: Run) -> None:
    (tmp_path / "in").mkdir()
    assert run("encode", tmp_path / "in").code == 3


@pytest.mark.parametrize(
    ("suffix", "format_"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("tiff", "TIFF"), ("bmp", "BMP")]
)
def test_output_format_follows_the_suffix(tmp_path: Path, encoded: Path, run: Run, suffix: str, format_: str) -> None:
    assert run("decode", encoded, "-o", tmp_path / f"b.{suffix}").code == 0
    with Image.open(tmp_path / f"b.{suffix}") as image:
        assert (image.format, image.size) == (format_, SIZE)


def test_output_format_must_be_clear(tmp_path: Path, encoded: Path, run: Run) -> None:
    assert run("decode", encoded, "-o", tmp_path / "b.xyz").code == 2
    assert run("decode", encoded, "-o", tmp_path / "b.jpg", "--format", "png").code == 2
    assert run("decode", encoded, "-o", tmp_path / "b.xyz", "--format", "npy").code == 0
    assert np.load(tmp_path / "b.xyz").shape == (64, 96, 3)


def test_existing_output_is_kept_unless_forced(tmp_path: Path, run: Run) -> None:
    source, target = save(tmp_path / "a.png"), tmp_path / "a.clt"
    target.write_bytes(b"precious")
    assert run("encode", source).code == 6
    assert run("encode", source, "--dry-run").code == 6
    assert target.read_bytes() == b"precious"
    assert run("encode", source, "--force").code == 0
    assert target.read_bytes().startswith(BRIEF_MAGIC)


def test_skip_existing(tmp_path: Path, run: Run) -> None:
    sources = [save(tmp_path / name) for name in ("a.png", "b.png")]
    (tmp_path / "a.clt").write_bytes(b"precious")
    result = run("encode", *sources, "-n", "--json")
    assert result.code == 0
    assert [r["status"] for r in result.json["results"]] == ["skipped", "ok"]
    assert result.json["skipped"] == 1
    assert (tmp_path / "a.clt").read_bytes() == b"precious"
    assert (tmp_path / "b.clt").read_bytes().startswith(BRIEF_MAGIC)


def test_two_inputs_for_one_output_stop_before_any_work(tmp_path: Path, run: Run) -> None:
    sources = [save(tmp_path / name) for name in ("x.png", "a.png", "a.jpg")]
    result = run("encode", *sources)
    assert result.code == 2
    assert "a.png" in result.err
    assert "a.jpg" in result.err
    assert tree(tmp_path) == ["a.jpg", "a.png", "x.png"]


def test_output_may_not_be_an_input(tmp_path: Path, run: Run) -> None:
    source = save(tmp_path / "a.png")
    before = source.read_bytes()
    (tmp_path / "link.png").symlink_to(source)
    for target in (source, tmp_path / "link.png"):
        assert run("encode", source, "-f", "-o", target).code == 2
    assert source.read_bytes() == before


def test_only_regular_files_are_replaced(tmp_path: Path, run: Run) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert run("encode", save(tmp_path / "a.png"), "-f", "-o", tmp_path / "pipe").code == 6
    assert (tmp_path / "pipe").is_fifo()


def test_dry_run_writes_nothing(tmp_path: Path, run: Run) -> None:
    sources = [save(tmp_path / name) for name in ("a.png", "b.png")]
    result = run("encode", *sources, "-o", tmp_path / "out", "--dry-run")
    assert result.code == 0
    assert result.out.decode().splitlines() == [
        f"{source} -> {tmp_path / 'out' / source.stem}.clt" for source in sources
    ]
    assert tree(tmp_path) == ["a.png", "b.png"]


def test_preserve_times(tmp_path: Path, run: Run) -> None:
    source = save(tmp_path / "a.png")
    os.utime(source, (1_000_000_000, 1_000_000_000))
    assert run("encode", source, "--preserve-times").code == 0
    assert (tmp_path / "a.clt").stat().st_mtime == 1_000_000_000


def test_jobs_give_the_same_files(tmp_path: Path, run: Run) -> None:
    sources = [save(tmp_path / "in" / f"{seed}.png", seed) for seed in range(4)]
    assert run("encode", *sources, "-o", tmp_path / "one").code == 0
    assert run("encode", *sources, "-o", tmp_path / "two", "-j", "2").code == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == ["0.clt", "1.clt", "2.clt", "3.clt"]
    for name in tree(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# Options of encoding and decoding ---------------------------------------------------------------------------------


def test_quality_and_targets(tmp_path: Path, run: Run) -> None:
    source = save(tmp_path / "a.png")

    def record(*options: object) -> Any:
        result = run("encode", source, "-f", "--json", *options)
        assert result.code == 0
        return result.json["results"][0]

    small, large = record("-q", 10), record("-q", 90)
    assert small["bytes"] < large["bytes"]
    assert large["quality"] == 90
    limit = (small["bytes"] + large["bytes"]) // 2
    assert 0.97 * limit <= record("--target-size", limit)["bytes"] <= limit
    assert record("--target-psnr", 33)["psnr"] == pytest.approx(33, abs=0.1)
    assert run("decode", tmp_path / "a.clt", "-o", tmp_path / "b.png").code == 0
    assert psnr(pixels(source), pixels(tmp_path / "b.png")) == pytest.approx(33, abs=0.1)


def test_one_target_at_most(tmp_path: Path, run: Run) -> None:
    source = save(tmp_path / "a.png")
    assert run("encode", source, "-q", 60, "--target-bpp", 1).code == 2
    assert run("encode", source, "--target-size", "1k", "--target-bpp", 1).code == 2
    assert tree(tmp_path) == ["a.png"]


def test_options_from_the_environment(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "a.png")
    monkeypatch.setenv("CALOTYPE_ENCODE_QUALITY", "20")
    assert run("encode", source, "--json").json["results"][0]["quality"] == 20
    # A target on the command line outranks the quality of the environment.
    by_target = run("encode", source, "-f", "--json", "--target-psnr", 30).json["results"][0]
    assert by_target["psnr"] == pytest.approx(30, abs=0.1)


@pytest.mark.parametrize(
    ("text", "expected"), [("40000", 40000), ("40k", 40000), ("40KiB", 40960), ("1.5M", 1_500_000), ("2kB", 2000)]
)
def test_sizes(text: str, expected: int) -> None:
    from calotype.cli.options import size

    assert size(text) == expected


@pytest.mark.parametrize(
    "options",
    [
        ["--target-size", "big"],
        ["--target-size", "0"],
        ["--quality", "101"],
        ["--tile", "300"],
        ["--metadata", "gps"],
        ["--jobs", "0"],
        ["--device", "tpu"],
        ["-f", "-n"],
        ["--json", "-o", "-"],
    ],
)
def test_bad_options(tmp_path: Path, run: Run, options: Sequence[str]) -> None:
    assert run("encode", save(tmp_path / "a.png"), *options).code == 2
    assert tree(tmp_path) == ["a.png"]


def test_tune(tmp_path: Path, encoded: Path, run: Run) -> None:
    for tune in ("psnr", "visual"):
        assert run("decode", encoded, "-o", tmp_path / f"{tune}.png", "--tune", tune).code == 0
    assert (pixels(tmp_path / "psnr.png") != pixels(tmp_path / "visual.png")).any()
    listed = json.loads(run("models", "show", "hyperprior", "--json").out)["models"]
    assert [model["tunes"] for model in listed] == [["psnr", "visual"]]


def test_region_and_scale(tmp_path: Path, encoded: Path, run: Run) -> None:
    def decoded(*options: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        assert run("decode", encoded, "-f", "-o", tmp_path / "b.png", *options).code == 0
        return pixels(tmp_path / "b.png")

    full = decoded()
    region = decoded("--region", "10,20,30,25")
    assert region.shape == (25, 30, 3)
    assert np.abs(region.astype(int) - full[20:45, 10:40]).max() <= 1
    half = decoded("--scale", "1/2")
    assert half.shape == (32, 48, 3)
    assert psnr(half, full.reshape(32, 2, 48, 2, 3).mean((1, 3))) > 25
    assert decoded("--scale", "1/8").shape == (8, 12, 3)
    assert decoded("--region", "16,16,32,32", "--scale", "1/4").shape == (8, 8, 3)
    assert run("decode", encoded, "-f", "--region", "90,0,10,10", "-o", tmp_path / "c.png").code == 3
    assert run("decode", encoded, "-f", "--region", "0,0,0,10", "-o", tmp_path / "c.png").code == 2
    assert not (tmp_path / "c.png").exists()


def test_max_pixels(tmp_path: Path, encoded: Path, run: Run) -> None:
    assert run("decode", encoded, "--max-pixels", "6143").code == 3
    assert run("decode", encoded, "--max-pixels", "6144").code == 0
    assert run("encode", tmp_path / "a.png", "-f", "--max-pixels", "6143").code == 3


def test_metadata_is_kept_or_dropped(tmp_path: Path, run: Run) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010E] = "a description"
    source = save(tmp_path / "a.png", icc_profile=profile, exif=exif)

    def kept(*options: str) -> list[str]:
        assert run("encode", source, "-f", *options).code == 0
        record = run("info", tmp_path / "a.clt", "--json").json["results"][0]
        return [kind for kind in ("icc", "exif", "xmp") if record[kind]]

    assert kept("--metadata", "none") == []
    assert kept("--metadata", "exif") == ["exif"]
    assert kept() == ["icc", "exif"]
    assert run("decode", tmp_path / "a.clt", "-o", tmp_path / "b.png", "--ignore-metadata", "exif").code == 0
    with Image.open(tmp_path / "b.png") as image:
        assert image.info["icc_profile"] == profile
        assert not image.getexif()


def test_verify_option_publishes_nothing_that_does_not_decode(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calotype.api import Codec
    from calotype.errors import ChecksumError

    source = save(tmp_path / "a.png")
    result = run("encode", source, "--verify", "--json")
    assert (result.code, result.json["results"][0]["verified"]) == (0, True)

    def broken(*_: object, **__: object) -> None:
        raise ChecksumError("tile 0 is damaged")

    monkeypatch.setattr(Codec, "verify", broken)
    assert run("encode", source, "--verify", "-o", tmp_path / "b.clt").code == 8
    assert tree(tmp_path) == ["a.clt", "a.png"]


# Failures ---------------------------------------------------------------------------------------------------------


def test_unreadable_inputs(tmp_path: Path, run: Run) -> None:
    missing = run("encode", tmp_path / "missing.png")
    assert missing.code == 3
    assert missing.err.count("missing.png") == 1
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert run("encode", tmp_path / "a.png").code == 3
    assert run("decode", tmp_path / "missing.clt").code == 3
    assert tree(tmp_path) == ["a.png"]


def test_corrupt_streams(tmp_path: Path, encoded: Path, run: Run) -> None:
    data = encoded.read_bytes()
    flipped = bytearray(data)
    flipped[-10] ^= 1
    cases = {"magic": b"no" + data[2:], "cut": data[:-1], "header": data[:20], "empty": b"", "flipped": bytes(flipped)}
    for name, content in cases.items():
        bad = tmp_path / "bad.clt"
        bad.write_bytes(content)
        for command in (["decode"], ["verify"], ["verify", "--deep"]):
            result = run(*command, bad)
            assert (name, result.code, result.err.count("\n")) == (name, 4, 1)
    assert not (tmp_path / "bad.png").exists()


def test_unknown_models(tmp_path: Path, encoded: Path, run: Run) -> None:
    source = tmp_path / "source" / "a.png"
    assert run("encode", source, "-m", "no-such-model").code == 5
    # A missing model is an error of the command, not one of each file.
    assert run("encode", source, save(tmp_path / "b.png"), "-m", "no-such-model").code == 5
    assert run("models", "show", "no-such-model").code == 5
    assert run("models", "verify", "no-such-model").code == 5
    encoded.write_bytes(rewritten(encoded, weights=bytes(8)))
    assert run("info", encoded, "--json").json["results"][0]["model"] is None
    assert run("verify", encoded).code == 0
    assert run("verify", encoded, "--deep").code == 5
    assert run("decode", encoded).code == 5


def test_unreachable_target(tmp_path: Path, run: Run) -> None:
    assert run("encode", save(tmp_path / "a.png"), "--target-size", "20").code == 7
    assert tree(tmp_path) == ["a.png"]


def test_drift_is_told_from_damage(tmp_path: Path, encoded: Path, run: Run) -> None:
    encoded.write_bytes(rewritten(encoded, tile=lambda payload: bytes([payload[0] ^ 1]) + payload[1:]))
    assert run("verify", encoded).code == 0
    assert run("verify", encoded, "--deep").code == 8
    assert run("decode", encoded).code == 8
    assert not encoded.with_suffix(".png").exists()


def test_one_damaged_tile(tmp_path: Path, run: Run) -> None:
    source = save(tmp_path / "a.png", size=(512, 64))
    assert run("encode", source, "--tile", 256).code == 0
    data = bytearray((tmp_path / "a.clt").read_bytes())
    data[-10] ^= 1
    (tmp_path / "a.clt").write_bytes(data)
    assert run("decode", tmp_path / "a.clt", "-o", tmp_path / "b.png").code == 4
    assert not (tmp_path / "b.png").exists()
    result = run("decode", tmp_path / "a.clt", "-o", tmp_path / "b.png", "--allow-partial", "--json")
    record = result.json["results"][0]
    assert (result.code, record["status"], record["damaged_tiles"]) == (0, "partial", [1])
    assert psnr(pixels(source)[:, :160], pixels(tmp_path / "b.png")[:, :160]) > 24


@pytest.mark.parametrize("jobs", [1, 2])
def test_batch_goes_on_after_a_bad_file(tmp_path: Path, run: Run, jobs: int) -> None:
    sources = [save(tmp_path / f"{name}.png") for name in "abc"]
    sources[1].write_bytes(sources[1].read_bytes()[:200])
    result = run("encode", *sources, "-o", tmp_path / "out", "-j", jobs)
    assert result.code == 9
    assert tree(tmp_path / "out") == ["a.clt", "c.clt"]
    lines = result.err.splitlines()
    assert sum("b.png" in line for line in lines) == 1
    assert lines[-1] == "calotype: 3 files: 2 done, 1 failed"


def test_fail_fast(tmp_path: Path, run: Run) -> None:
    sources = [save(tmp_path / f"{name}.png") for name in "abc"]
    sources[1].write_bytes(b"")
    result = run("encode", *sources, "-o", tmp_path / "out", "--fail-fast", "--json")
    assert result.code == 9
    assert [r["status"] for r in result.json["results"]] == ["ok", "failed"]
    assert result.json["not_started"] == 1
    assert tree(tmp_path / "out") == ["a.clt"]


def test_fail_fast_with_jobs(tmp_path: Path, run: Run) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    sources = [bad, *(save(tmp_path / f"{seed}.png", seed) for seed in range(30))]
    result = run("encode", *sources, "--fail-fast", "-j", "2", "--json")
    assert result.code == 9
    assert result.json["not_started"] > 0
    assert result.json["not_started"] + len(result.json["results"]) == len(sources)


@pytest.mark.parametrize("jobs", [1, 2])
def test_unexpected_errors_ask_for_a_report(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    from calotype.api import Codec

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("seven by nought")

    monkeypatch.setattr(Codec, "encode", broken)
    source = save(tmp_path / "a.png")
    result = run("encode", source, "-j", jobs)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "seven by nought" in result.err
    assert "report" in result.err
    assert "Traceback" in run("encode", source, "-vv", "-j", jobs).err
    assert run("encode", source, save(tmp_path / "b.png"), "-j", jobs).code == 9


# Reports ----------------------------------------------------------------------------------------------------------


def test_json_of_encode_and_decode(tmp_path: Path, run: Run) -> None:
    good, bad = save(tmp_path / "a.png"), tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    result = run("encode", good, bad, "--json")
    document = result.json
    assert (result.code, document["schema"], document["failed"]) == (9, "calotype.encode/1", 1)
    first, second = document["results"]
    size = (tmp_path / "a.clt").stat().st_size
    assert (
        first.items()
        >= {
            "input": str(good),
            "output": str(tmp_path / "a.clt"),
            "status": "ok",
            "width": 96,
            "height": 64,
            "bytes": size,
            "quality": 60.0,
            "psnr": None,
            "model": "hyperprior",
            "verified": False,
        }.items()
    )
    assert first["bpp"] == pytest.approx(size * 8 / (96 * 64))
    assert all(seconds >= 0 for seconds in first["seconds"].values())
    assert second["status"] == "failed"
    assert second["error"].items() >= {"type": "InputError", "exit_code": 3}.items()

    result = run("decode", tmp_path / "a.clt", "-o", tmp_path / "b.webp", "--json")
    assert result.json["schema"] == "calotype.decode/1"
    assert result.json["results"][0].items() >= {"format": "webp", "width": 96, "damaged_tiles": []}.items()


def test_info(tmp_path: Path, encoded: Path, run: Run) -> None:
    result = run("info", encoded, "--json", "--chunks")
    assert (result.code, result.json["schema"]) == (0, "calotype.info/1")
    record = result.json["results"][0]
    assert (
        record.items()
        >= {
            "input": str(encoded),
            "width": 96,
            "height": 64,
            "channels": 3,
            "alpha": False,
            "quality": 60.0,
            "model": "hyperprior",
            "tiles": 1,
            "file_bytes": encoded.stat().st_size,
        }.items()
    )
    assert [chunk["name"] for chunk in record["chunks"]] == ["HEAD", "TILE"]
    assert sum(chunk["length"] for chunk in record["chunks"]) + len(BRIEF_MAGIC) == encoded.stat().st_size
    text = run("info", encoded).out.decode()
    assert "96x64" in text
    assert "hyperprior" in text
    mixed = run("info", encoded, tmp_path / "missing.clt", "--json")
    assert mixed.code == 9
    assert [r["status"] for r in mixed.json["results"]] == ["ok", "failed"]


def test_verify(encoded: Path, run: Run) -> None:
    assert run("verify", encoded).out.decode() == f"{encoded}: ok\n"
    result = run("verify", "--deep", encoded, "--json")
    assert (result.code, result.json["schema"]) == (0, "calotype.verify/1")
    assert result.json["results"][0].items() >= {"status": "ok", "deep": True}.items()


def test_models(tmp_path: Path, run: Run) -> None:
    listed = run("models", "list", "--json").json
    assert listed["schema"] == "calotype.models/1"
    record = next(r for r in listed["models"] if r["name"] == "hyperprior")
    assert record["sha256"] in run("models", "show", "hyperprior").out.decode()
    assert run("models", "verify", "--json").json["failed"] == 0
    assert run("models", "export", tmp_path / "missing.pt", "hyperprior", "--folder", tmp_path).code == 3


def test_quiet_prints_errors_only(tmp_path: Path, run: Run) -> None:
    source = save(tmp_path / "a.png")
    assert run("--quiet", "encode", source) == (0, b"", "")
    assert run("encode", "--quiet", source).err.count("\n") == 1


def test_progress_bar_on_a_terminal_only(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    source = save(tmp_path / "a.png")
    monkeypatch.setenv("TERM", "xterm")
    for options, shown in (([], True), (["--no-progress"], False), (["--quiet"], False)):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            assert run("encode", source, "-f", *options).code == 0
        assert ("%" in terminal.getvalue()) is shown
    assert "%" not in run("encode", source, "-f").err


def test_train_refuses_bad_recipes(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("yaml")
    unknown = run("train", "no-such-recipe")
    assert unknown.code == 2
    assert "hyperprior" in unknown.err
    incomplete = run("train", "hyperprior", "--set", "train=photos")
    assert incomplete.code == 2
    assert "validation" in incomplete.err
    assert run("train", "hyperprior", "--set", "nonsense").code == 2
    (tmp_path / "bad.yaml").write_text("model: [")
    assert run("train", tmp_path / "bad.yaml").code == 2


def test_train_resume_and_export(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("yaml")
    save(tmp_path / "photos" / "a.png", size=(128, 128))
    shutil.copy(zoo.WEIGHTS / zoo.INDEX, tmp_path)
    tiny = {
        "train": tmp_path / "photos", "validation": tmp_path / "photos", "output": tmp_path / "run", "steps": 1,
        "decay_steps": 1, "batch": 1, "crop": 64, "validation_items": 1, "bf16": "false",
    }  # fmt: skip

    def train(**changes: object) -> Result:
        settings = [f"--set={key}={value}" for key, value in (tiny | changes).items()]
        return run("train", "hyperprior", "--device", "cpu", "--json", *settings)

    first = train()
    assert (first.code, first.json["schema"], first.json["output"]) == (0, "calotype.train/1", str(tmp_path / "run"))
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    # All steps are done, so a second run starts from the checkpoint and has nothing to train.
    assert train().json["loss"] == first.json["loss"]
    assert train(train=tmp_path / "missing").code == 3
    assert train(model="no-such-model").code == 5

    exported = run("models", "export", checkpoint, "hyperprior", "--folder", tmp_path, "--json")
    weights = Path(exported.json["weights"])
    assert weights.parent == tmp_path
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert json.loads((tmp_path / "index.json").read_text())["hyperprior"]["sha256"] == digest
    assert run("models", "export", checkpoint, "no-such-model", "--folder", tmp_path).code == 5
    assert run("models", "export", tmp_path / "index.json", "hyperprior", "--folder", tmp_path).code == 3


# The process ------------------------------------------------------------------------------------------------------


def test_light_commands_do_not_load_torch(encoded: Path) -> None:
    commands = [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("encode", "decode", "info", "verify", "models", "train", "completion")),
        ["info", str(encoded), "--chunks", "--json"],
        ["verify", str(encoded)],
        ["models", "list"],
        ["completion", "bash"],
        ["encode", str(encoded.parent / "source" / "a.png"), "--dry-run"],
    ]
    script = (
        "import sys\nfrom calotype.cli import main\n"
        f"for command in {commands!r}:\n"
        "    try: main(command)\n"
        "    except SystemExit as end: assert end.code == 0, (command, end.code)\n"
        "    assert 'torch' not in sys.modules, command\n"
        "    assert 'PIL' not in sys.modules or command[-1] != '--help', command\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run: Run, shell: str) -> None:
    result = run("completion", shell)
    assert result.code == 0
    assert b"_CALOTYPE_COMPLETE" in result.out


def test_completion_knows_the_commands() -> None:
    environment = os.environ | {"_CALOTYPE_COMPLETE": "bash_complete", "COMP_WORDS": "calotype dec", "COMP_CWORD": "1"}
    with spawn(env=environment, stdout=subprocess.PIPE) as process:
        out, _ = process.communicate()
    assert out == b"plain,decode\n"


def test_binary_data_never_reaches_a_terminal(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    source = save(tmp_path / "a.png")
    with spawn("encode", source, "-o", "-", stdout=follower, stderr=subprocess.PIPE) as process:
        _, err = process.communicate()
    os.close(follower)
    os.close(leader)
    assert process.returncode == 2
    assert b"terminal" in err


@pytest.mark.parametrize("command", [["info", "--json"], ["decode", "-o", "-", "--format", "ppm"]])
def test_broken_pipe_is_quiet(encoded: Path, command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with spawn(*command, "--quiet", encoded, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        _, err = process.communicate()
    assert (process.returncode, err) == (1, b"")


@pytest.mark.parametrize(("number", "jobs"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_interrupted_batch_leaves_whole_files_only(tmp_path: Path, number: signal.Signals, jobs: int) -> None:
    for seed in range(200):
        save(tmp_path / "in" / f"{seed:03}.png", seed)
    out = tmp_path / "out"
    with spawn("encode", tmp_path / "in", "-o", out, "-j", jobs, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob("*.clt")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "calotype: interrupted"
    assert b"Traceback" not in err
    written = tree(out)
    assert 0 < len(written) < 200
    for name in written:
        assert name.endswith(".clt")
        container.read_still((out / name).read_bytes())


def test_interrupt_while_writing_leaves_no_file(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "a.png")

    def interrupted(*_: object) -> None:
        # As the user's Ctrl-C at the worst moment: the temporary file is complete, but not in its place.
        assert len(tree(tmp_path)) == 2
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr(os, "replace", interrupted)
    assert run("encode", source).code == 130
    assert tree(tmp_path) == ["a.png"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_interrupt_that_becomes_another_error(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    """Some libraries answer Ctrl-C with an error of their own: the batch must still end."""
    from calotype.api import Codec

    def interrupted(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt as error:
            raise ImportError("half of a module") from error
        raise ImportError("half of a module")

    monkeypatch.setattr(Codec, "encode", interrupted)
    sources = [save(tmp_path / "in" / f"{seed}.png", seed) for seed in range(4)]
    result = run("encode", *sources, "-j", jobs)
    assert result.code == 130
    assert "half of a module" not in result.err
    assert "4 files" not in result.err
