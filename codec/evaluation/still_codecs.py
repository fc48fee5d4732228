"""Still-picture codecs that can be measured: encoders in Pillow and its plugins, VVC in ffmpeg, and ours.

Each one is a real encoder that writes a real file and a decoder that reads that file back.
Thread counts are set wherever a codec takes one: the bytes of some depend on it, and their default is the machine's.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from calotype.errors import InputError
from calotype.evaluation import ffmpeg
from calotype.media import Picture, Pixels

Size = tuple[int, int]
Seconds = dict[str, float]
"""Seconds by stage, where a codec knows its stages; may be empty."""


class StillCodec(ABC):
    """An opened still-picture codec. Pixels are [H, W, 3] uint8 RGB."""

    suffix: str

    @abstractmethod
    def describe(self, setting: float) -> str:
        """Everything that decides the bytes: software versions and options, weights. One line for the report."""

    @abstractmethod
    def encode(self, pixels: Pixels, setting: float, path: Path) -> Seconds: ...

    @abstractmethod
    def decode(self, path: Path, size: Size) -> tuple[Pixels, Seconds]:
        """`size` is the original's (height, width), for formats that hold even sizes only."""


# --- encoders in Pillow and its plugins ---


class PillowCodec(StillCodec):
    """A format that Pillow, or a plugin of it, writes and reads."""

    def __init__(self, format: str, suffix: str, library: str, options: Callable[[float], dict[str, Any]]) -> None:
        self.format, self.suffix, self.library, self.options = format, suffix, library, options

    def describe(self, setting: float) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options(setting).items())
        return f"{self.library}: save({self.format!r}, {options})"

    def encode(self, pixels: Pixels, setting: float, path: Path) -> Seconds:
        Image.fromarray(pixels).save(path, self.format, **self.options(setting))
        return {}

    def decode(self, path: Path, size: Size) -> tuple[Pixels, Seconds]:
        with Image.open(path, formats=(self.format,)) as image:
            return np.asarray(image.convert("RGB")), {}


def _pillow(feature: str) -> str:
    return f"Pillow {importlib.metadata.version('pillow')} ({feature} {features.version(feature)})"


def lacks(feature: str) -> Callable[[], str | None]:
    return lambda: None if features.check(feature) else f"this Pillow was built without {feature}"


def lacks_package(module: str, package: str) -> Callable[[], str | None]:
    def check() -> str | None:
        try:
            importlib.import_module(module)
        except ImportError:
            return f"the package {package} is not installed (pip install 'calotype[eval]')"
        return None

    return check


def _whole(variant: str, low: int, high: int, what: str) -> int:
    if not variant.isdigit() or not low <= int(variant) <= high:
        raise InputError(f"{what} must be a whole number from {low} to {high}, not {variant!r}")
    return int(variant)


def open_jpeg(variant: str, device: str, threads: int) -> StillCodec:
    if variant not in ("420", "444"):
        raise InputError(f"jpeg has the variants 420 and 444, not {variant!r}")
    subsampling = "4:2:0" if variant == "420" else "4:4:4"
    return PillowCodec(
        "JPEG", ".jpg", _pillow("libjpeg_turbo" if features.check("libjpeg_turbo") else "jpg"),
        lambda q: {"quality": round(q), "subsampling": subsampling, "optimize": True},
    )  # fmt: skip


def open_webp(variant: str, device: str, threads: int) -> StillCodec:
    method = _whole(variant, 0, 6, "the method of webp")
    return PillowCodec("WEBP", ".webp", _pillow("webp"), lambda q: {"quality": round(q), "method": method})


AVIF_TUNES = ("", "psnr", "ssim", "iq", "ssimulacra2")
"""Of libaom; without one libavif chooses, from version 1.4 on iq."""


def avif_opener(subsampling: str) -> Callable[[str, str, int], StillCodec]:
    def open_avif(variant: str, device: str, threads: int) -> StillCodec:
        number, _, tune = variant.partition("+")
        speed = _whole(number, 0, 10, "the speed of avif")
        if tune not in AVIF_TUNES:
            raise InputError(f"avif has the tunes {', '.join(AVIF_TUNES[1:])}, not {tune!r}")
        # The encoder's bytes depend on its thread count, whose default is the machine's number of processors.
        options: dict[str, Any] = {"subsampling": subsampling, "speed": speed, "max_threads": threads}
        if tune:
            options["advanced"] = {"tune": tune}
        return PillowCodec("AVIF", ".avif", _pillow("avif"), lambda q: {"quality": round(q), **options})

    return open_avif


def open_jp2(variant: str, device: str, threads: int) -> StillCodec:
    return PillowCodec(
        "JPEG2000", ".jp2", _pillow("jpg_2000"),
        lambda bpp: {"quality_mode": "rates", "quality_layers": [round(24 / bpp, 4)], "irreversible": True, "mct": 1},
    )  # fmt: skip


def open_jxl(variant: str, device: str, threads: int) -> StillCodec:
    effort = _whole(variant, 1, 10, "the effort of jxl")
    plugin: Any = importlib.import_module("pillow_jxl.JpegXLImagePlugin")
    plugin.DECODE_THREADS = threads
    library = f"pillow-jxl-plugin {importlib.metadata.version('pillow-jxl-plugin')}"
    return PillowCodec(
        "JXL", ".jxl", library, lambda q: {"quality": round(q), "effort": effort, "num_threads": threads}
    )


def open_heic(variant: str, device: str, threads: int) -> StillCodec:
    if variant not in ("420", "444"):
        raise InputError(f"heic has the variants 420 and 444, not {variant!r}")
    heif = importlib.import_module("pillow_heif")
    heif.register_heif_opener()
    library = f"pillow-heif {importlib.metadata.version('pillow-heif')} ({heif.libheif_info()['HEIF']})"
    # x265 splits its work, and so its bytes, by the number of processors unless it is told not to.
    parallel = {"x265:pools": "none" if threads == 1 else str(threads), "x265:frame-threads": "1"}
    return PillowCodec(
        "HEIF", ".heic", library, lambda q: {"quality": round(q), "chroma": int(variant), "enc_params": dict(parallel)}
    )


def heic_missing() -> str | None:
    reason = lacks_package("pillow_heif", "pillow-heif")()
    if reason is None and not importlib.import_module("pillow_heif").libheif_info()["encoders"]:
        return "this pillow-heif was built without an encoder"
    return reason


# --- VVC through ffmpeg ---


class VvcCodec(StillCodec):
    """VVC intra by vvenc: a single picture, 10-bit 4:2:0, BT.709 full range, tuned for PSNR (no perceptual QP)."""

    suffix = ".266"
    _colour = "color_matrix=bt709:{0}_range=full:flags=lanczos+accurate_rnd+full_chroma_int+full_chroma_inp"

    def __init__(self, preset: str, threads: int) -> None:
        if preset not in ("faster", "fast", "medium", "slow", "slower"):
            raise InputError(f"vvc has the presets faster, fast, medium, slow and slower, not {preset!r}")
        self.preset, self.threads = preset, threads

    def describe(self, setting: float) -> str:
        return (
            f"ffmpeg {ffmpeg.version()} libvvenc: -preset {self.preset} -qp {round(setting)} -qpa 0 "
            f"-threads {self.threads}, one intra picture, yuv420p10 BT.709 full range; times include starting a process"
        )

    def encode(self, pixels: Pixels, setting: float, path: Path) -> Seconds:
        height, width = pixels.shape[:2]
        # 4:2:0 needs even sides: repeat the last row or column, cut it off again after decoding.
        padded = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        filters = f"scale=out_{self._colour.format('out')},format=yuv420p10le"
        ffmpeg.run(
            ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{padded.shape[1]}x{padded.shape[0]}", "-i", "-",
             "-vf", filters, "-frames:v", "1", "-c:v", "libvvenc", "-preset", self.preset, "-qp", str(round(setting)),
             "-qpa", "0", "-threads", str(self.threads), "-f", "vvc", str(path)],
            stdin=padded.tobytes(),
        )  # fmt: skip
        return {}

    def decode(self, path: Path, size: Size) -> tuple[Pixels, Seconds]:
        filters = f"scale=in_{self._colour.format('in')},format=rgb24"
        data = ffmpeg.run(
            ["-threads", str(self.threads), "-f", "vvc", "-i", str(path), "-vf", filters, "-frames:v", "1",
             "-c:v", "ppm", "-f", "image2pipe", "-"]
        )  # fmt: skip
        header = re.match(rb"P6\s+(\d+)\s+(\d+)\s+255\s", data)
        if header is None:
            raise InputError(f"ffmpeg decoded no picture from {path.name}")
        width, height = int(header[1]), int(header[2])
        pixels = np.frombuffer(data, np.uint8, offset=header.end()).reshape(height, width, 3)
        return pixels[: size[0], : size[1]], {}


# --- ours ---


class CalotypeCodec(StillCodec):
    """A model of Calotype, NAME[+TUNE][@EFFORT]; the setting is its quality, 0 to 100."""

    suffix = ".clt"

    def __init__(self, variant: str, device: str, threads: int) -> None:
        from calotype.api import DEFAULT_EFFORT, EFFORTS, Codec

        looks, _, effort = variant.partition("@")
        model, _, tune = looks.partition("+")
        if effort and effort not in map(str, EFFORTS):
            raise InputError(f"effort must be one of {', '.join(map(str, EFFORTS))}, got {effort!r}")
        self.effort = int(effort or DEFAULT_EFFORT)
        self.model, self.where = model, f"{device}, {threads} thread{'s' if threads > 1 else ''}"
        self.codec = Codec.load(model, device=device, tune=tune or None)  # type: ignore[arg-type]
        spec, self.tune = self.codec.spec, tune or self.codec.spec.tune
        self.weights = spec.visual.sha256 if tune == "visual" and spec.visual else spec.sha256

    def describe(self, setting: float) -> str:
        version = importlib.metadata.version("calotype")
        options = f"quality={setting:g}, effort={self.effort}, tune={self.tune}"
        return f"calotype {version}: model {self.model}, {options}, weights sha256 {self.weights}, {self.where}"

    def encode(self, pixels: Pixels, setting: float, path: Path) -> Seconds:
        picture = Picture(np.ascontiguousarray(pixels))
        encoded = self.codec.encode(picture, quality=setting, effort=self.effort, metadata=())
        path.write_bytes(encoded.data)
        return dict(encoded.seconds)

    def decode(self, path: Path, size: Size) -> tuple[Pixels, Seconds]:
        decoded = self.codec.decode(path.read_bytes())
        pixels = decoded.picture.pixels
        return (np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels), dict(decoded.seconds)
