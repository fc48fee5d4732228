"""One measurement: encode an original to a file, decode that file, compare. Of a picture or of a clip."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calotype.evaluation import metrics, video_metrics
from calotype.evaluation.clips import Clip, RawVideo, payload_bytes, read_clip
from calotype.evaluation.codecs import CodecSpec, opened, opened_video
from calotype.evaluation.dataset import read_rgb
from calotype.evaluation.still_codecs import StillCodec
from calotype.evaluation.video_codecs import VideoCodec
from calotype.media import Pixels
from calotype.video.frames import Frame

Record = dict[str, Any]
_WARM_UP_FRAMES = 2


@dataclass(frozen=True)
class Item:
    """One measurement to make. Picklable. `frames` are the first ones of a clip, all if None."""

    picture: str
    source: Path
    spec: CodecSpec
    setting: float
    metrics: tuple[str, ...]
    files: Path
    keep: bool
    device: str
    threads: int
    frames: int | None = None

    @property
    def key(self) -> tuple[str, str, float]:
        return self.picture, self.spec.name, self.setting

    def encoded(self, suffix: str) -> Path:
        """Where the encoded file goes; its folder is made."""
        path = encoded_path(self.files, self.spec.name, self.setting, self.picture, suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def encoded_path(files: Path, codec: str, setting: float, picture: str, suffix: str) -> Path:
    """Where a run keeps an encoded file."""
    return files / codec.replace(":", "-") / f"{setting:g}" / (picture + suffix)


def open_codec(spec: CodecSpec, device: str, threads: int) -> StillCodec | VideoCodec:
    """Anchors always get one thread: their points are then the same in every run and on every machine."""
    open_it = opened if spec.medium == "still" else opened_video
    return open_it(spec, device, threads) if spec.learned else open_it(spec)


def measure(item: Item) -> Record:
    """The record of an item. A codec that fails gives one with `error`."""
    record: Record = {
        "picture": item.picture,
        "codec": item.spec.name,
        "learned": item.spec.learned,
        "setting": item.setting,
    }
    try:
        started = time.perf_counter()
        codec = open_codec(item.spec, item.device, item.threads)
        load = time.perf_counter() - started
        found = _measure_picture(codec, item) if isinstance(codec, StillCodec) else _measure_clip(codec, item)
        return record | {"description": codec.describe(item.setting), "load_seconds": load} | found
    except Exception as error:
        # Encoders of many makers fail in many ways. One broken picture or setting must not cost the night's run: it is
        # told of, and tried again on resume.
        return record | {"error": f"{type(error).__name__}: {error}"}


_warm: set[CodecSpec] = set()


def _is_cold(spec: CodecSpec) -> bool:
    """A learned codec's first call in a process allocates and plans: its time would be that of no other."""
    cold = spec.learned and spec not in _warm
    _warm.add(spec)
    return cold


def _measure_picture(codec: StillCodec, item: Item) -> Record:
    pixels = read_rgb(item.source)
    path = item.encoded(codec.suffix)
    if _is_cold(item.spec):
        _code_picture(codec, item.setting, pixels, path)
    decoded, seconds = _code_picture(codec, item.setting, pixels, path)
    size = path.stat().st_size
    height, width = pixels.shape[:2]
    if not item.keep:
        path.unlink()
    return {
        "width": width,
        "height": height,
        "bytes": size,
        "bpp": size * 8 / (width * height),
        "metrics": metrics.measure(item.metrics, pixels, decoded),
        **seconds,
    }


def _code_picture(codec: StillCodec, setting: float, pixels: Pixels, path: Path) -> tuple[Pixels, Record]:
    started = time.perf_counter()
    encode_stages = codec.encode(pixels, setting, path)
    between = time.perf_counter()
    decoded, decode_stages = codec.decode(path, (pixels.shape[0], pixels.shape[1]))
    ended = time.perf_counter()
    return decoded, {
        "encode_seconds": between - started,
        "decode_seconds": ended - between,
        "encode_stages": encode_stages,
        "decode_stages": decode_stages,
    }


def _measure_clip(codec: VideoCodec, item: Item) -> Record:
    clip = read_clip(item.source, item.frames)
    path = item.encoded(codec.suffix)
    if _is_cold(item.spec):
        with tempfile.TemporaryDirectory() as folder:
            _code_clip(codec, item.setting, clip.beginning(_WARM_UP_FRAMES), Path(folder, "warm-up" + codec.suffix))
    decoded, seconds = _code_clip(codec, item.setting, clip, path)
    count, pixels = len(clip.frames), clip.width * clip.height
    bits, payload_bits = path.stat().st_size * 8, payload_bytes(path) * 8
    values, each = video_metrics.measure(item.metrics, clip, decoded)
    decoded.path.unlink()
    if not item.keep:
        path.unlink()
    return {
        "width": clip.width,
        "height": clip.height,
        "frames": count,
        "fps": float(clip.rate),
        "bytes": bits // 8,
        "bpp": bits / (pixels * count),
        "bpp_payload": payload_bits / (pixels * count),
        "kbps": bits / 1000 * float(clip.rate) / count,
        "metrics": values,
        "per_frame": each,
        "encode_fps": count / seconds["encode_seconds"],
        "decode_fps": count / seconds["decode_seconds"],
        **seconds,
    }


class _Timed:
    """Frames of a decoder, and the seconds spent on them."""

    def __init__(self, frames: Iterator[Frame]) -> None:
        self._frames = frames
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        started = time.perf_counter()
        try:
            return next(self._frames)
        finally:
            self.seconds += time.perf_counter() - started


def _code_clip(codec: VideoCodec, setting: float, clip: Clip, path: Path) -> tuple[RawVideo, Record]:
    started = time.perf_counter()
    codec.encode(clip, setting, path)
    encode_seconds = time.perf_counter() - started
    decoded = RawVideo(clip.scratch("decoded.yuv"), clip.width, clip.height)
    frames = _Timed(codec.decode(path))
    decoded.write(frames)
    return decoded, {"encode_seconds": encode_seconds, "decode_seconds": frames.seconds}
