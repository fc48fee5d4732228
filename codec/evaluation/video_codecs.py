"""Video codecs that can be measured: real encoders in ffmpeg, and ours. Each writes one Matroska file and no audio."""

from __future__ import annotations

import importlib.metadata
import itertools
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from calotype.errors import InputError
from calotype.evaluation import ffmpeg
from calotype.evaluation.clips import Clip, decode_file
from calotype.video.frames import Colour, Frame


class VideoCodec(ABC):
    """An opened video codec. It codes the frames of a raw file into a file, and decodes that file."""

    suffix = ".mkv"

    @abstractmethod
    def describe(self, setting: float) -> str:
        """Everything that decides the bytes: software versions, the command line or options, weights. One line."""

    @abstractmethod
    def encode(self, clip: Clip, setting: float, path: Path) -> None: ...

    @abstractmethod
    def decode(self, path: Path) -> Iterator[Frame]:
        """All frames in order of presentation."""


@dataclass(frozen=True)
class Encoder:
    """An encoder of ffmpeg: how its options say what we want of it.

    `tunes` are options by the word after the preset in a spec; KEYINT stands for the largest distance of key frames.
    `parameters` go into one option of the encoder's own, `parameter_option`, colons between.
    """

    library: str
    presets: tuple[str, ...]
    quality_option: str
    options: tuple[str, ...]
    parameter_option: str
    parameters: tuple[str, ...]
    tunes: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
    pixels: str = "yuv420p"

    def arguments(self, preset: str, tune: str, setting: float, keyint: int) -> list[str]:
        """From the frames' pixel format to the encoder's last option."""
        options, parameters = self.tunes.get(tune, ((), ()))
        words = ["-pix_fmt", self.pixels, "-c:v", self.library, "-preset", preset, *options]
        words += [self.quality_option, f"{setting:g}", "-threads", "1", *self.options]
        if self.parameters or parameters:
            words += [self.parameter_option, ":".join((*self.parameters, *parameters))]
        return [word.replace("KEYINT", str(keyint)) for word in words]


_X26 = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")
ENCODERS = {
    # One thread: x264 would cut frames into a slice a thread for low latency, and all would give other bytes on other
    # machines. The text that x264 and x265 write about themselves into the stream (600 bytes) is left out.
    "x264": Encoder(
        "libx264", _X26, "-crf", ("-g", "KEYINT", "-bsf:v", "filter_units=remove_types=6"), "-x264-params", (),
        {"zerolatency": (("-tune", "zerolatency"), ()), "psnr": (("-tune", "psnr"), ()),
         "psnr+zerolatency": (("-tune", "psnr,zerolatency"), ())},
    ),
    "x265": Encoder(
        "libx265", _X26, "-crf", (), "-x265-params",
        ("keyint=KEYINT", "pools=none", "frame-threads=1", "info=0", "log-level=error"),
        {"zerolatency": (("-tune", "zerolatency"), ()), "psnr": (("-tune", "psnr"), ()),
         "psnr+zerolatency": (("-tune", "zerolatency"), ("aq-mode=0", "psy-rd=0", "psy-rdoq=0", "cutree=0"))},
    ),
    "svtav1": Encoder(
        "libsvtav1", tuple(str(preset) for preset in range(14)), "-crf", ("-g", "KEYINT"), "-svtav1-params", ("lp=1",),
        {"zerolatency": ((), ("pred-struct=1",))},
    ),
    "vvenc": Encoder(
        "libvvenc", ("faster", "fast", "medium", "slow", "slower"), "-qp", ("-qpa", "0"), "-vvenc-params",
        ("intraperiod=KEYINT", "verbosity=0"),
        {"zerolatency": ((), ("gopsize=8", "picreordering=0", "decodingrefreshtype=none"))}, "yuv420p10le",
    ),
}  # fmt: skip


class FfmpegVideoCodec(VideoCodec):
    """One of ENCODERS through the ffmpeg program; decoded by the decoders in PyAV."""

    def __init__(self, encoder: str, variant: str, keyint: int) -> None:
        self.encoder, self.keyint = ENCODERS[encoder], keyint
        self.preset, _, self.tune = variant.partition(":")
        if self.preset not in self.encoder.presets:
            raise InputError(f"{encoder} has the presets {', '.join(self.encoder.presets)}, not {self.preset!r}")
        if self.tune and self.tune not in self.encoder.tunes:
            raise InputError(f"{encoder} has the tunes {', '.join(self.encoder.tunes)}, not {self.tune!r}")

    def _arguments(self, size: str, rate: str, source: str, setting: float, target: str) -> list[str]:
        return [
            "-f", "rawvideo", "-pix_fmt", "yuv420p", "-video_size", size, "-framerate", rate, "-i", source,
            *self.encoder.arguments(self.preset, self.tune, setting, self.keyint),
            "-fflags", "+bitexact", "-flags:v", "+bitexact", "-f", "matroska", target,
        ]  # fmt: skip

    def describe(self, setting: float) -> str:
        command = shlex.join(["ffmpeg", *self._arguments("WxH", "FPS", "clip.yuv", setting, "coded.mkv")])
        return f"ffmpeg {ffmpeg.version()}: {command}"

    def encode(self, clip: Clip, setting: float, path: Path) -> None:
        size = f"{clip.width}x{clip.height}"
        ffmpeg.run(self._arguments(size, str(clip.rate), str(clip.frames.path), setting, str(path)))

    def decode(self, path: Path) -> Iterator[Frame]:
        return decode_file(path)


class CalotypeVideoCodec(VideoCodec):
    """Ours; the setting is the quality, 0 to 100. Variant `intra` has key frames only."""

    def __init__(self, variant: str, keyint: int, device: str, threads: int) -> None:
        if variant not in ("", "intra"):
            raise InputError(f"calotype:video has the variant intra, not {variant!r}")
        self.keyint = 1 if variant == "intra" else keyint
        self.device, self.threads = device, threads

    def describe(self, setting: float) -> str:
        from calotype.video.gop import video_format

        format = video_format(16, 16, Colour(), 0)
        weights = f"first bytes of the weights' sha256 {format.intra_weights.hex()} and {format.inter_weights.hex()}"
        where = f"{self.device}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        version = importlib.metadata.version("calotype")
        return f"calotype {version}: video, quality={setting:g}, keyint={self.keyint}, {weights}, {where}"

    def encode(self, clip: Clip, setting: float, path: Path) -> None:
        from calotype.video.encoder import VideoEncoder
        from calotype.video.matroska import MatroskaWriter

        writer: MatroskaWriter | None = None
        encoder = VideoEncoder(
            clip.width, clip.height, time_base=1 / clip.rate, quality=setting, keyint=self.keyint, device=self.device,
            colour=clip.colour,
        )  # fmt: skip
        with encoder:
            for frame in itertools.chain(clip.frames, [None]):
                packets = encoder.encode(frame)
                if writer is None and encoder.config is not None:
                    writer = MatroskaWriter(path, encoder.config, clip.rate)
                for packet in packets:
                    assert writer is not None
                    writer.write(packet)
        if writer is not None:
            writer.close()

    def decode(self, path: Path) -> Iterator[Frame]:
        from calotype.video.decoder import VideoDecoder

        return (shown.frame for shown in VideoDecoder(path, device=self.device).frames())
