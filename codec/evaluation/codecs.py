"""The codecs that can be measured: a registry of families, and specs such as `calotype:hyperprior:q10-90:8`.

Each one is a real encoder that writes a real file and a decoder that reads that file back.
Thread counts are set wherever a codec takes one: the bytes of some depend on it, and their default is the machine's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Family:
    """A kind of codec. `scale` names its own setting; `variants` documents what may follow the name."""

    name: str
    summary: str
    scale: str
    settings: tuple[float, ...]
    variant: str
    variants: str
    open: Callable[[str, str, int], StillCodec]
    missing: Callable[[], str | None]
    learned: bool = False


@dataclass(frozen=True)
class CodecSpec:
    """A family, its variant, and the settings to measure. Picklable: worker processes open it for themselves."""

    family: str
    variant: str
    settings: tuple[float, ...]

    @property
    def name(self) -> str:
        """The curve's name: settings are the points on it."""
        family = FAMILIES[self.family]
        return self.family if self.variant == family.variant and not family.learned else f"{self.family}:{self.variant}"

    @property
    def learned(self) -> bool:
        return FAMILIES[self.family].learned

    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""
        return FAMILIES[self.family].missing()

    def open(self, device: str = "cpu", threads: int = 1) -> StillCodec:
        """`device` is for learned codecs only. `threads` bounds the codec where it can be told."""
        return FAMILIES[self.family].open(self.variant, device, threads)


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


def _lacks(feature: str) -> Callable[[], str | None]:
    return lambda: None if features.check(feature) else f"this Pillow was built without {feature}"


def _lacks_package(module: str, package: str) -> Callable[[], str | None]:
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


def _open_jpeg(variant: str, device: str, threads: int) -> StillCodec:
    if variant not in ("420", "444"):
        raise InputError(f"jpeg has the variants 420 and 444, not {variant!r}")
    subsampling = "4:2:0" if variant == "420" else "4:4:4"
    return PillowCodec(
        "JPEG", ".jpg", _pillow("libjpeg_turbo" if features.check("libjpeg_turbo") else "jpg"),
        lambda q: {"quality": round(q), "subsampling": subsampling, "optimize": True},
    )  # fmt: skip


def _open_webp(variant: str, device: str, threads: int) -> StillCodec:
    method = _whole(variant, 0, 6, "the method of webp")
    return PillowCodec("WEBP", ".webp", _pillow("webp"), lambda q: {"quality": round(q), "method": method})


def _avif_opener(subsampling: str) -> Callable[[str, str, int], StillCodec]:
    def open_avif(variant: str, device: str, threads: int) -> StillCodec:
        speed = _whole(variant, 0, 10, "the speed of avif")
        # The encoder's bytes depend on its thread count, whose default is the machine's number of processors.
        return PillowCodec(
            "AVIF", ".avif", _pillow("avif"),
            lambda q: {"quality": round(q), "subsampling": subsampling, "speed": speed, "max_threads": threads},
        )  # fmt: skip

    return open_avif


def _open_jp2(variant: str, device: str, threads: int) -> StillCodec:
    return PillowCodec(
        "JPEG2000", ".jp2", _pillow("jpg_2000"),
        lambda bpp: {"quality_mode": "rates", "quality_layers": [round(24 / bpp, 4)], "irreversible": True, "mct": 1},
    )  # fmt: skip


def _open_jxl(variant: str, device: str, threads: int) -> StillCodec:
    effort = _whole(variant, 1, 10, "the effort of jxl")
    plugin: Any = importlib.import_module("pillow_jxl.JpegXLImagePlugin")
    plugin.DECODE_THREADS = threads
    library = f"pillow-jxl-plugin {importlib.metadata.version('pillow-jxl-plugin')}"
    return PillowCodec(
        "JXL", ".jxl", library, lambda q: {"quality": round(q), "effort": effort, "num_threads": threads}
    )


def _open_heic(variant: str, device: str, threads: int) -> StillCodec:
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


def _heic_missing() -> str | None:
    reason = _lacks_package("pillow_heif", "pillow-heif")()
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
    """A model of Calotype; the setting is its quality, 0 to 100."""

    suffix = ".clt"

    def __init__(self, model: str, device: str, threads: int) -> None:
        from calotype.api import Codec
        from calotype.models import zoo

        self.model, self.where = model, f"{device}, {threads} thread{'s' if threads > 1 else ''}"
        self.weights = zoo.describe(model).sha256
        self.codec = Codec.load(model, device=device)

    def describe(self, setting: float) -> str:
        version = importlib.metadata.version("calotype")
        what = f"model {self.model}, quality={setting:g}, weights sha256 {self.weights}, {self.where}"
        return f"calotype {version}: {what}"

    def encode(self, pixels: Pixels, setting: float, path: Path) -> Seconds:
        encoded = self.codec.encode(Picture(np.ascontiguousarray(pixels)), quality=setting, metadata=())
        path.write_bytes(encoded.data)
        return dict(encoded.seconds)

    def decode(self, path: Path, size: Size) -> tuple[Pixels, Seconds]:
        decoded = self.codec.decode(path.read_bytes())
        pixels = decoded.picture.pixels
        return (np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels), dict(decoded.seconds)


# --- CompressAI's ---


def _open_compressai(variant: str, device: str, threads: int) -> StillCodec:
    from calotype.evaluation.compressai_codec import CompressAiCodec

    return CompressAiCodec(variant, device, threads)


def _compressai_missing() -> str | None:
    from calotype.evaluation import compressai_codec

    return compressai_codec.missing()


# --- registry ---

_Q = "quality"
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("calotype", "this project", _Q, (5, 17, 29, 41, 53, 65, 77, 89), "hyperprior", "a model's name",
               CalotypeCodec, lambda: None, learned=True),
        Family("jpeg", "JPEG, optimised Huffman tables", _Q, (6, 12, 20, 30, 45, 60, 75, 86), "420", "420 or 444",
               _open_jpeg, _lacks("jpg")),
        Family("webp", "WebP, lossy", _Q, (0, 8, 20, 35, 50, 65, 78, 86), "6", "method 0-6", _open_webp,
               _lacks("webp")),
        Family("avif444", "AVIF 4:4:4", _Q, (12, 22, 32, 41, 50, 58, 66, 74), "6", "speed 0-10",
               _avif_opener("4:4:4"), _lacks("avif")),
        Family("avif420", "AVIF 4:2:0", _Q, (12, 22, 32, 41, 50, 58, 66, 74), "6", "speed 0-10",
               _avif_opener("4:2:0"), _lacks("avif")),
        Family("jp2", "JPEG 2000 by OpenJPEG, irreversible", "bpp", (0.11, 0.18, 0.28, 0.42, 0.6, 0.85, 1.15, 1.48), "",
               "none", _open_jp2, _lacks("jpg_2000")),
        Family("jxl", "JPEG XL, lossy", _Q, (5, 12, 22, 35, 50, 65, 78, 87), "7", "effort 1-10",
               _open_jxl, _lacks_package("pillow_jxl", "pillow-jxl-plugin")),
        Family("heic", "HEIC by x265", _Q, (12, 18, 24, 30, 36, 42, 48, 54), "420", "420 or 444",
               _open_heic, _heic_missing),
        Family("vvc", "VVC intra 4:2:0 by vvenc", "qp", (46, 42, 38, 34, 31, 28, 25, 22), "medium",
               "a preset of vvenc", lambda variant, device, threads: VvcCodec(variant, threads),
               lambda: ffmpeg.missing("encoder", "libvvenc")),
        Family("compressai", "learned codecs of CompressAI, your weights", _Q, (1, 2, 3, 4, 5, 6, 7, 8), "mbt2018-mean",
               "an architecture", _open_compressai, _compressai_missing, learned=True),
    )
}  # fmt: skip
"""Default settings are eight points over about 0.1-1.5 bpp on photographs."""

_RANGE = re.compile(r"q(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)")
_LIST = re.compile(r"q(\d+(?:\.\d+)?(?:\+\d+(?:\.\d+)?)*)")


def parse_spec(text: str) -> CodecSpec:
    """`NAME[:VARIANT][:qLOW-HIGH[:POINTS] | :qA+B+C]` -> CodecSpec. Raises InputError.

    q is on the codec's own scale (`Family.scale`); POINTS is 8 unless given.
    """
    name, *parts = text.strip().split(":")
    if name not in FAMILIES:
        raise InputError(f"unknown codec {name!r}: use one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    variant, settings = family.variant, family.settings
    if parts and not parts[0].startswith("q"):
        variant = parts.pop(0)
        if family.variants == "none":
            raise InputError(f"{name} has no variants: {variant!r} cannot follow it")
    if parts:
        chosen = parts.pop(0)
        if match := _RANGE.fullmatch(chosen):
            count = int(parts.pop(0)) if parts and parts[0].isdigit() else 8
            if count < 1:
                raise InputError(f"{text!r} asks for no points")
            low, high = float(match[1]), float(match[2])
            settings = tuple(round(float(value), 3) for value in np.linspace(low, high, count))
            if family.scale != "bpp" and name != "calotype":
                settings = tuple(dict.fromkeys(float(round(value)) for value in settings))
        elif match := _LIST.fullmatch(chosen):
            settings = tuple(float(value) for value in match[1].split("+"))
        else:
            parts.insert(0, chosen)
    if parts:
        raise InputError(f"{':'.join(parts)!r} in {text!r} is not understood: write q10-90:8 or q10+50+90")
    return CodecSpec(name, variant, tuple(float(value) for value in settings))


def parse_specs(texts: Iterable[str]) -> list[CodecSpec]:
    """Specs of several texts, each of which may hold several separated by commas; doubles are joined."""
    specs: dict[str, CodecSpec] = {}
    for text in texts:
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            spec = parse_spec(part)
            known = specs.get(spec.name)
            merged = dict.fromkeys((*(known.settings if known else ()), *spec.settings))
            specs[spec.name] = CodecSpec(spec.family, spec.variant, tuple(merged))
    return list(specs.values())


@functools.lru_cache(maxsize=8)
def opened(spec: CodecSpec, device: str = "cpu", threads: int = 1) -> StillCodec:
    """The codec, opened once in a process: models stay loaded between pictures."""
    return spec.open(device, threads)
