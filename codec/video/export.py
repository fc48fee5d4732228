"""From Calotype videos to ordinary ones, and to pictures."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from calotype import media
from calotype.errors import FormatError, InputError
from calotype.limits import DEFAULT_MAX_PIXELS
from calotype.publish import publish, refuse_existing
from calotype.video.decoder import Shown, VideoDecoder, as_av
from calotype.video.matroska import MatroskaReader
from calotype.video.packet import FramePacket
from calotype.video.timeline import PacketSource
from calotype.video.tracks import EXACT_TIMES, TrackCopier, copied, in_order, surroundings

if TYPE_CHECKING:
    import av
    from av.container import InputContainer, OutputContainer
    from av.stream import Stream
    from av.video.stream import VideoStream

Progress = Callable[[int, int | None], None]
"""Called with the frames done and, if it is known, their number in all."""
RAW = "rawvideo"
"""The encoder of Y4M files and of bare frames."""
MILLISECOND = Fraction(1, 1000)


class WriteOnly:
    """A pipe for PyAV, which would otherwise try to seek."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._file.write(bytes(data))
        except OSError as error:
            self.error = error  # PyAV makes another of it
            raise
        return len(data)


@dataclass
class Exported:
    """What was written; `damaged` are numbers of frames that were concealed."""

    width: int = 0
    height: int = 0
    frames: int = 0
    damaged: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def chosen(decoder: VideoDecoder, part: slice) -> Iterator[Shown]:
    """The frames of a range without step; decoding begins at the key frame before it."""
    if part.start in (None, 0) and (part.stop is None or part.stop >= 0):
        for count, shown in enumerate(decoder.frames()):
            if part.stop is not None and count >= part.stop:
                return
            yield shown
        return
    for place in range(len(decoder))[part]:
        yield decoder.frame_at(place)


def export_video(
    source: Path | BinaryIO,
    target: Path | BinaryIO,
    *,
    format: str | None = None,
    vcodec: str,
    options: dict[str, str] | None = None,
    part: slice = slice(None),
    allow_partial: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    device: str = "auto",
    sound: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Exported:
    """Decode a video into an ordinary file, by an encoder of FFmpeg.

    Args:
        source: a Matroska file or raw stream of ours, or a binary file with a raw stream.
        target: a path, or a binary file to write to, which needs a `format` (a name of FFmpeg's, such as "mp4").
        vcodec, options: the encoder and its options, such as {"crf": "18"}.
        part: which frames; other tracks are kept only with all of them.
        allow_partial, max_pixels, device: see `VideoDecoder`.
        sound: keep the sound tracks.
    Raises:
        what decoding raises, InputError if the encoder or container refuses, OutputExistsError.
    """
    decoder = VideoDecoder(source, device=device, allow_partial=allow_partial, max_pixels=max_pixels)
    export = _Export(decoder, vcodec, options or {}, part, sound, progress, warn)
    if not isinstance(target, Path):
        pipe = WriteOnly(target)
        try:
            export.write(pipe, format, "standard output")
        except InputError as error:
            raise (pipe.error or error) from error
        target.flush()
        return export.result
    refuse_existing(target, overwrite)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        export.write(str(temporary), format, str(target))
        publish(temporary, target, overwrite=overwrite)
    finally:
        temporary.unlink(missing_ok=True)
    return export.result


def export_pictures(
    source: Path | BinaryIO,
    folder: Path,
    *,
    format: str = "png",
    part: slice = slice(None),
    allow_partial: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Decode a video into one upright picture a frame: `folder`/000000.png and so on, by the frame's number.

    Raises what decoding raises, OutputExistsError, InputError.
    """
    decoder = VideoDecoder(source, device=device, allow_partial=allow_partial, max_pixels=max_pixels)
    result = Exported()
    for shown in chosen(decoder, part):
        pixels = decoder.as_rgb(shown).permute(1, 2, 0).cpu().numpy()
        picture = media.Picture(upright(pixels, shown.config.display_matrix))
        data = media.write_picture(picture, format)
        media.write_file(folder / f"{shown.number:06}.{format}", data, overwrite=overwrite)
        result.width, result.height = picture.width, picture.height
        result.frames += 1
        if progress:
            progress(result.frames, None)
    if not result.frames:
        raise InputError("no frame is in that range")
    result.damaged = sorted(set(decoder.damage.frames))
    return result


def upright(pixels: npt.NDArray[np.uint8], matrix: tuple[int, ...] | None) -> npt.NDArray[np.uint8]:
    """Pixels [H, W, C] turned and mirrored as a display matrix says, to the nearest of the eight positions."""
    if matrix is None:
        return pixels
    a, b, _, c, d = matrix[:5]
    if max(abs(a), abs(d)) < max(abs(b), abs(c)):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


@contextmanager
def _writable(name: str) -> Iterator[None]:
    import av

    try:
        yield
    except (av.error.FFmpegError, ValueError) as error:
        raise InputError(f"{name} cannot be written: {error}") from error


@dataclass
class _Export:
    """One call of `export_video`."""

    decoder: VideoDecoder
    vcodec: str
    options: dict[str, str]
    part: slice
    sound: bool
    progress: Progress | None
    warn: Callable[[str], None] | None
    result: Exported = field(default_factory=Exported)

    def write(self, target: str | WriteOnly, format: str | None, name: str) -> None:
        import av

        shown = chosen(self.decoder, self.part)
        first = next(shown, None)
        if first is None:
            raise InputError("no frame is in that range")
        self.result.width, self.result.height = first.config.format.width, first.config.format.height
        with _writable(name), av.open(cast(Any, target), "w", format=format, container_options=EXACT_TIMES) as output:
            stream = self._stream(output, first)
            ours = ((t, partial(output.mux, p)) for t, p in self._encoded(stream, itertools.chain([first], shown)))
            reader = self.decoder.source
            if not isinstance(reader, MatroskaReader) or self.part != slice(None) or self.vcodec == RAW:
                in_order(ours)
            else:
                with reader.open() as (container, track):
                    in_order(ours, self._beside(output, stream, container, track))
        self.result.damaged = sorted(set(self.decoder.damage.frames))

    def _stream(self, output: OutputContainer, first: Shown) -> VideoStream:
        config = first.config
        rate = self.decoder.average_rate or 1 / (first.duration * config.time_base)
        stream = cast("VideoStream", output.add_stream(self.vcodec, rate=rate, options=self.options))
        stream.width, stream.height, stream.pix_fmt = config.format.width, config.format.height, "yuv420p"
        context, colour = stream.codec_context, config.format.colour
        context.color_range = 2 if colour.full_range else 1
        context.color_primaries, context.color_trc = colour.primaries, colour.transfer
        context.colorspace = colour.matrix_code
        if config.sample_aspect:
            stream.sample_aspect_ratio = config.sample_aspect
        if self.vcodec == RAW:
            self._note_times()
            return stream
        stream.time_base = context.time_base = config.time_base
        if config.display_matrix:
            stream.set_display_matrix(config.display_matrix)
        return stream

    def _note_times(self) -> None:
        """Say that a format without times loses them, if frames do not all last as long, but for rounding."""
        if self.decoder.average_rate is None:
            return
        durations = [entry.duration for entry in self.decoder.entries]
        if max(durations) - min(durations) > 1:
            self._note("frames last unequally long, and raw frames have their mean rate at most")

    def _note(self, text: str) -> None:
        self.result.notes.append(text)
        if self.warn:
            self.warn(text)

    def _encoded(self, stream: VideoStream, shown: Iterable[Shown]) -> Iterator[tuple[Fraction, av.Packet[Any]]]:
        for one in shown:
            picture = as_av(one)
            if self.vcodec == RAW:  # Y4M has no times, only a rate
                picture.pts, picture.time_base = self.result.frames, 1 / stream.codec_context.framerate
            yield from _timed(stream.encode(picture))
            self.result.frames += 1
            if self.progress:
                self.progress(self.result.frames, None)
        yield from _timed(stream.encode(None))

    def _beside(
        self, output: OutputContainer, stream: VideoStream, container: InputContainer, track: Stream
    ) -> Iterator[tuple[Fraction, Callable[[], None]]]:
        """Take over what lies beside the video; gives what is still to be written."""
        format = output.format.name.split(",")[0]
        beside = surroundings(container, track, sound=self.sound, format=format)
        for what in beside.dropped:
            self._note(f"{what} is left out: the output cannot hold it")
        stream.metadata.update(beside.video_metadata)
        output.metadata.update(beside.metadata)
        output.set_chapters(list(beside.chapters))
        offset = _moved(self.decoder.source)
        packets = copied(container, beside, offset, None, "the input")
        copier = TrackCopier(output, beside.tracks)
        return ((t, partial(copier.write, p)) for t, p in packets)


def _moved(source: PacketSource) -> Fraction:
    """By how many seconds a program that copied a Matroska file moved its times against those in our packets."""
    place, data = next(source.packets())
    try:
        fields = FramePacket.unpack(data)
    except FormatError:
        return Fraction(0)
    if fields.config is None:
        return Fraction(0)
    moved = Fraction(place, 1000) - fields.pts * fields.config.time_base
    return moved if abs(moved) > MILLISECOND else Fraction(0)


def _timed(packets: list[av.Packet[Any]]) -> Iterator[tuple[Fraction, av.Packet[Any]]]:
    for packet in packets:
        stamp = packet.dts if packet.dts is not None else packet.pts or 0
        yield stamp * (packet.time_base or Fraction(1)), packet
