"""The codecs that can be measured: a registry of families, and specs such as `calotype:hyperprior:q10-90:8`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from calotype.errors import InputError
from calotype.evaluation import ffmpeg
from calotype.evaluation.metrics import Medium
from calotype.evaluation.still_codecs import (
    CalotypeCodec,
    StillCodec,
    VvcCodec,
    avif_opener,
    heic_missing,
    lacks,
    lacks_package,
    open_heic,
    open_jp2,
    open_jpeg,
    open_jxl,
    open_webp,
)
from calotype.evaluation.video_codecs import ENCODERS, CalotypeVideoCodec, FfmpegVideoCodec, VideoCodec

DEFAULT_KEYINT = 32


@dataclass(frozen=True)
class Family:
    """A kind of codec. `scale` names its own setting; `variants` documents what may follow the name.

    `open` makes a StillCodec of (variant, device, threads), or a VideoCodec of (variant, keyint, device, threads).
    """

    name: str
    summary: str
    scale: str
    settings: tuple[float, ...]
    variant: str
    variants: str
    open: Callable[..., Any]
    missing: Callable[[], str | None]
    learned: bool = False
    medium: Medium = "still"


@dataclass(frozen=True)
class CodecSpec:
    """A family, its variant, and the settings to measure. Picklable: worker processes open it for themselves.

    `keyint`, for video: the largest distance of key frames, in frames.
    """

    family: str
    variant: str
    settings: tuple[float, ...]
    keyint: int = DEFAULT_KEYINT

    @property
    def name(self) -> str:
        """The curve's name: settings are the points on it."""
        family = FAMILIES[self.family]
        hidden = self.variant == family.variant and not self.learned and self.medium == "still"
        return self.family if hidden or not self.variant else f"{self.family}:{self.variant}"

    @property
    def learned(self) -> bool:
        return FAMILIES[self.family].learned

    @property
    def medium(self) -> Medium:
        return FAMILIES[self.family].medium

    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""
        return FAMILIES[self.family].missing()

    def open(self, device: str = "cpu", threads: int = 1) -> StillCodec:
        """`device` is for learned codecs only. `threads` bounds the codec where it can be told. Raises InputError."""
        if self.medium != "still":
            raise InputError(f"{self.name} codes video, not pictures")
        codec: StillCodec = FAMILIES[self.family].open(self.variant, device, threads)
        return codec

    def open_video(self, device: str = "cpu", threads: int = 1) -> VideoCodec:
        """As `open`, for video. Raises InputError."""
        if self.medium != "video":
            raise InputError(f"{self.name} codes pictures, not video")
        codec: VideoCodec = FAMILIES[self.family].open(self.variant, self.keyint, device, threads)
        return codec


def _open_compressai(variant: str, device: str, threads: int) -> StillCodec:
    from calotype.evaluation.compressai_codec import CompressAiCodec

    return CompressAiCodec(variant, device, threads)


def _compressai_missing() -> str | None:
    from calotype.evaluation import compressai_codec

    return compressai_codec.missing()


def _video(name: str, summary: str, scale: str, settings: tuple[float, ...], variant: str) -> Family:
    """An encoder of ffmpeg."""
    library = ENCODERS[name].library
    tunes = ", ".join(ENCODERS[name].tunes)
    return Family(
        name, summary, scale, settings, variant, f"PRESET[:TUNE], tunes {tunes}",
        lambda variant, keyint, device, threads: FfmpegVideoCodec(name, variant, keyint),
        lambda: ffmpeg.missing("encoder", library), medium="video",
    )  # fmt: skip


_Q = "quality"
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("calotype", "this project", _Q, (5, 17, 29, 41, 53, 65, 77, 89), "hyperprior",
               "NAME[+TUNE][@EFFORT] of a model", CalotypeCodec, lambda: None, learned=True),
        Family("jpeg", "JPEG, optimised Huffman tables", _Q, (6, 12, 20, 30, 45, 60, 75, 86), "420", "420 or 444",
               open_jpeg, lacks("jpg")),
        Family("webp", "WebP, lossy", _Q, (0, 8, 20, 35, 50, 65, 78, 86), "6", "method 0-6", open_webp,
               lacks("webp")),
        Family("avif444", "AVIF 4:4:4", _Q, (12, 22, 32, 41, 50, 58, 66, 74), "6", "SPEED[+TUNE], 0-10",
               avif_opener("4:4:4"), lacks("avif")),
        Family("avif420", "AVIF 4:2:0", _Q, (12, 22, 32, 41, 50, 58, 66, 74), "6", "SPEED[+TUNE], 0-10",
               avif_opener("4:2:0"), lacks("avif")),
        Family("jp2", "JPEG 2000 by OpenJPEG, irreversible", "bpp", (0.11, 0.18, 0.28, 0.42, 0.6, 0.85, 1.15, 1.48), "",
               "none", open_jp2, lacks("jpg_2000")),
        Family("jxl", "JPEG XL, lossy", _Q, (5, 12, 22, 35, 50, 65, 78, 87), "7", "effort 1-10",
               open_jxl, lacks_package("pillow_jxl", "pillow-jxl-plugin")),
        Family("heic", "HEIC by x265", _Q, (12, 18, 24, 30, 36, 42, 48, 54), "420", "420 or 444",
               open_heic, heic_missing),
        Family("vvc", "VVC intra 4:2:0 by vvenc", "qp", (46, 42, 38, 34, 31, 28, 25, 22), "fast",
               "a preset of vvenc", lambda variant, device, threads: VvcCodec(variant, threads),
               lambda: ffmpeg.missing("encoder", "libvvenc")),
        Family("compressai", "learned codecs of CompressAI, your weights", _Q, (1, 2, 3, 4, 5, 6, 7, 8), "mbt2018-mean",
               "an architecture", _open_compressai, _compressai_missing, learned=True),
        Family("calotype:video", "this project's video", _Q, (10, 26, 42, 58, 74, 90), "", "intra: key frames only",
               CalotypeVideoCodec, lambda: None, learned=True, medium="video"),
        _video("x264", "H.264 by x264", "crf", (16, 21, 26, 31, 36, 41), "medium"),
        _video("x265", "HEVC by x265", "crf", (16, 21, 26, 31, 36, 41), "medium"),
        _video("svtav1", "AV1 by SVT-AV1", "crf", (16, 25, 34, 43, 52, 62), "6"),
        _video("vvenc", "VVC by vvenc, 10 bit inside", "qp", (18, 22, 27, 32, 37, 41), "medium"),
    )
}  # fmt: skip
"""Default settings are eight points over about 0.1-1.5 bpp on photographs, and six over about 30-44 dB on clips."""

_RANGE = re.compile(r"q(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)")
_LIST = re.compile(r"q(\d+(?:\.\d+)?(?:\+\d+(?:\.\d+)?)*)")


def parse_spec(text: str, keyint: int = DEFAULT_KEYINT) -> CodecSpec:
    """`NAME[:VARIANT][:qLOW-HIGH[:POINTS] | :qA+B+C]` -> CodecSpec. Raises InputError.

    q is on the codec's own scale (`Family.scale`); POINTS is 8 unless given, 6 for video.
    """
    words = text.strip().split(":")
    pair = ":".join(words[:2])
    name, parts = (pair, words[2:]) if pair in FAMILIES else (words[0], words[1:])
    if name not in FAMILIES:
        raise InputError(f"unknown codec {name!r}: use one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    variant, settings = family.variant, family.settings
    chosen = [part for part in parts[: 2 if family.medium == "video" else 1] if not part.startswith("q")]
    if chosen:
        variant, parts = ":".join(chosen), parts[len(chosen) :]
        if family.variants == "none":
            raise InputError(f"{name} has no variants: {variant!r} cannot follow it")
    if parts:
        points = parts.pop(0)
        if match := _RANGE.fullmatch(points):
            count = int(parts.pop(0)) if parts and parts[0].isdigit() else len(family.settings)
            if count < 1:
                raise InputError(f"{text!r} asks for no points")
            low, high = float(match[1]), float(match[2])
            settings = tuple(round(float(value), 3) for value in np.linspace(low, high, count))
            if family.scale != "bpp" and not name.startswith("calotype"):
                settings = tuple(dict.fromkeys(float(round(value)) for value in settings))
        elif match := _LIST.fullmatch(points):
            settings = tuple(float(value) for value in match[1].split("+"))
        else:
            parts.insert(0, points)
    if parts:
        raise InputError(f"{':'.join(parts)!r} in {text!r} is not understood: write q10-90:8 or q10+50+90")
    return CodecSpec(name, variant, tuple(float(value) for value in settings), keyint)


def parse_specs(texts: Iterable[str], keyint: int = DEFAULT_KEYINT) -> list[CodecSpec]:
    """Specs of several texts, each of which may hold several separated by commas; doubles are joined."""
    specs: dict[str, CodecSpec] = {}
    for text in texts:
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            spec = parse_spec(part, keyint)
            known = specs.get(spec.name)
            merged = dict.fromkeys((*(known.settings if known else ()), *spec.settings))
            specs[spec.name] = CodecSpec(spec.family, spec.variant, tuple(merged), keyint)
    return list(specs.values())


@functools.lru_cache(maxsize=8)
def opened(spec: CodecSpec, device: str = "cpu", threads: int = 1) -> StillCodec:
    """The codec, opened once in a process: models stay loaded between pictures."""
    return spec.open(device, threads)


@functools.lru_cache(maxsize=8)
def opened_video(spec: CodecSpec, device: str = "cpu", threads: int = 1) -> VideoCodec:
    """As `opened`, for video."""
    return spec.open_video(device, threads)
