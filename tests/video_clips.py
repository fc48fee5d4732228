"""Small real clips for the tests of video: pans over the sample pictures, with a tone, made by FFmpeg's encoders."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from calotype.video.frames import from_av

SAMPLES = Path(__file__).parent.parent / "samples"


def pan(count: int, size: tuple[int, int] = (160, 96), *, sample: str = "astronaut.png") -> list[npt.NDArray[np.uint8]]:
    """RGB frames [H, W, 3]: the camera moves over a photograph and goes nearer."""
    width, height = size
    picture = Image.open(SAMPLES / sample).convert("RGB")
    frames = []
    for i in range(count):
        zoom = 1.6 - 0.004 * i
        left, top = 40 + 1.7 * i, 30 + 0.6 * i
        box = (left, top, left + zoom * width, top + zoom * height)
        frames.append(np.asarray(picture.resize(size, Image.Resampling.BILINEAR, box)))
    return frames


def tone(output: Any, stream: Any, seconds: float, rate: int) -> None:
    """Encode a tone that slowly rises."""
    t = np.arange(round(seconds * rate)) / rate
    samples = (0.3 * np.sin(2 * np.pi * (300 + 40 * t) * t)).astype(np.float32)
    size = stream.codec_context.frame_size or 1024
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        frame = av.AudioFrame.from_ndarray(part[None], "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


def make_clip(
    path: Path,
    frames: Sequence[npt.NDArray[np.uint8]],
    *,
    times: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 12800),
    pix_fmt: str = "yuv420p",
    video: str = "libx264",
    options: dict[str, str] | None = None,
    audio: str | None = None,
    rotation: int = 0,
    colour: tuple[int, int, int, int] = (2, 1, 1, 1),
    metadata: dict[str, str] | None = None,
    chapters: Sequence[dict[str, Any]] = (),
    attachment: bytes | None = None,
    subtitles: Path | None = None,
) -> Path:
    """Write a clip.

    Args:
        times: of the frames in units of `time_base`; 25 frames per second if None.
        colour: H.273 primaries, transfer, matrix, and the range (1 limited, 2 full).
        subtitles: a file whose first track is copied.
    """
    times = times or [i * int(1 / (25 * time_base)) for i in range(len(frames))]
    with av.open(str(path), "w") as output:
        if video == "libx264":
            options = {"crf": "12", "preset": "veryfast", **(options or {})}
        stream: Any = output.add_stream(video, rate=25, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.time_base = stream.codec_context.time_base = time_base
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = colour
        if rotation:
            stream.set_display_rotation(rotation)
        sound = None
        if audio:
            rate = 48000 if audio == "libopus" else 44100
            sound = output.add_stream(audio, rate=rate, layout="mono")
            sound.metadata["language"] = "eng"
        copied = source = None
        if subtitles:
            source = av.open(str(subtitles))
            copied = output.add_stream_from_template(source.streams[0])
        output.metadata.update(metadata or {})
        output.set_chapters(list(chapters))
        if attachment:
            output.add_attachment("notes.txt", "text/plain", attachment)
        for pixels, pts in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(
                format=pix_fmt, dst_colorspace=1 if colour[2] == 1 else 5, dst_color_range=colour[3], threads=1
            )
            frame.pts, frame.time_base = pts, time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound is not None:
            tone(output, sound, float(times[-1] * time_base) + 0.04, rate)
        if source is not None:
            for packet in source.demux():
                if packet.size:
                    packet.stream = copied
                    output.mux(packet)
            source.close()
    return path


def luma(path: Path) -> list[npt.NDArray[np.uint8]]:
    """The luma planes of a video as an 8-bit 4:2:0 one."""
    with av.open(str(path)) as container:
        return [from_av(f).y for f in container.decode(video=0)]


def packets(path: Path, kind: str) -> list[bytes]:
    """The packets of the first track of a kind."""
    with av.open(str(path)) as container:
        stream = next(s for s in container.streams if s.type == kind)
        return [bytes(p) for p in container.demux(stream) if p.size]


def times(path: Path) -> list[Fraction]:
    """When each frame of an ordinary video plays, in seconds."""
    with av.open(str(path)) as container:
        return [f.pts * f.time_base for f in container.decode(video=0)]


def psnr(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """In dB."""
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9)))
