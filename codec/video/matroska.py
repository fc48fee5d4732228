"""Videos in Matroska, beside the untouched sound, subtitles and attachments of their sources.

PyAV writes only codecs that FFmpeg knows, so the video track is muxed as Snow, a codec whose id is as long as ours and
which nobody uses, and the id is replaced in the finished header.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calotype.errors import FormatError, InputError
from calotype.video.packet import Packet, StreamConfig
from calotype.video.tracks import EXACT_TIMES, Surroundings, TrackCopier

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.stream import Stream

CODEC_ID = b"V_CLT1"
_STAND_IN = b"V_SNOW"
# Matroska's element CodecID with a length of 6, so that the same letters in a title are not taken for it.
_CODEC_ELEMENT = b"\x86\x86"
_EBML = b"\x1a\x45\xdf\xa3"
HEAD_BYTES = 1 << 20
"""The codec's id is found within these first bytes."""
_OPTIONS = {
    "write_crc32": "0",  # it would cover the codec's id
    "fflags": "+bitexact",  # the same input gives the same file: no random ids
    **EXACT_TIMES,
}


def is_matroska(head: bytes) -> bool:
    """Whether a file that begins with these bytes (up to `HEAD_BYTES`) is Matroska with a Calotype video track."""
    return head.startswith(_EBML) and _CODEC_ELEMENT + CODEC_ID in head


class MatroskaWriter:
    """Writes a Matroska file. Packets should come in the order of their times. Raises InputError."""

    def __init__(
        self, path: Path, config: StreamConfig, rate: Fraction | None, around: Surroundings = Surroundings()
    ) -> None:
        import av

        self._path = path
        with _av_errors(path):
            self._output = av.open(str(path), "w", format="matroska", container_options=_OPTIONS)
            stream = self._output.add_stream("snow", rate=rate or 25, options={"strict": "experimental"})
            stream.width, stream.height, stream.pix_fmt = config.format.width, config.format.height, "yuv420p"
            colour = config.format.colour
            context = stream.codec_context
            context.color_range = 2 if colour.full_range else 1
            context.color_primaries, context.color_trc = colour.primaries, colour.transfer
            context.colorspace = colour.matrix_code
            if config.sample_aspect:
                stream.sample_aspect_ratio = config.sample_aspect
            if config.display_matrix:
                stream.set_display_matrix(config.display_matrix)
            stream.metadata.update(around.video_metadata)
            self._stream = stream
            self._copier = TrackCopier(self._output, around.tracks)
            self._output.metadata.update(around.metadata)
            self._output.set_chapters(list(around.chapters))
            for attachment in around.attachments:
                self._output.add_attachment(attachment.name, attachment.media_type, attachment.data)

    def write(self, packet: Packet) -> None:
        """Append a video packet."""
        import av

        p = av.Packet(packet.data)
        p.stream, p.time_base = self._stream, packet.time_base
        p.pts = p.dts = packet.pts
        p.duration = packet.duration
        p.is_keyframe = packet.is_keyframe
        with _av_errors(self._path):
            self._output.mux(p)

    def copy(self, packet: av.Packet[Any]) -> None:
        """Append a packet of another track as it is."""
        with _av_errors(self._path):
            self._copier.write(packet)

    def close(self) -> None:
        """Finish the file and give the video track its codec id."""
        with _av_errors(self._path):
            self._output.close()
        with self._path.open("r+b") as file:
            at = file.read(HEAD_BYTES).index(_CODEC_ELEMENT + _STAND_IN) + len(_CODEC_ELEMENT)
            file.seek(at)
            file.write(CODEC_ID)

    def abort(self) -> None:
        """Close without a valid file."""
        with _av_errors(self._path):
            self._output.close()


class MatroskaReader:
    """Reads the video packets of a Matroska file from a path or bytes."""

    def __init__(self, source: Path | bytes) -> None:
        self._source = source

    @contextmanager
    def open(self) -> Iterator[tuple[InputContainer, Stream]]:
        """The container and its Calotype track. Raises FormatError, InputError."""
        import av

        source = io.BytesIO(self._source) if isinstance(self._source, bytes) else str(self._source)
        with _av_errors(self._source, FormatError):
            opened = av.open(source, "r", format="matroska")
        with opened as container:
            tracks = [s for s in container.streams.video if s.codec_context is None]
            if not tracks:
                raise FormatError("this Matroska file has no Calotype video track")
            yield container, tracks[0]

    def packets(self, start: int | None = None) -> Iterator[tuple[int, bytes]]:
        """(place, packet) in order, from the place `start` or from the beginning; a place is Matroska's time.

        Raises FormatError, InputError.
        """
        with self.open() as (container, stream), _av_errors(self._source, FormatError):
            if start is not None:
                container.seek(start, stream=stream)
            for packet in container.demux(stream):
                if packet.size and (start is None or (packet.pts or 0) >= start):
                    yield packet.pts or 0, bytes(packet)


@contextmanager
def _av_errors(where: Path | bytes, kind: type[FormatError] | type[InputError] = InputError) -> Iterator[None]:
    import av

    name = "the input" if isinstance(where, bytes) else str(where)
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        raise kind(f"{name}: {error.strerror or error}") from error
