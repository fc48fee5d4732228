"""Groups of pictures: frames to payloads and back, in order. No packets, no timestamps, no files.

A payload begins with the frame's type and quality; then follow the CRC-32 of its symbols and the symbols. A group
starts with a key frame, which needs nothing before it; each other frame is predicted from the one before.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from calotype import symbols
from calotype.api import Codec
from calotype.device import pick_device
from calotype.entropy import SymbolTables
from calotype.errors import FormatError, ModelNotFoundError
from calotype.models import tables, zoo
from calotype.models.motion import HALF_WIDTHS, Planes, Reference, compensate, search
from calotype.models.quantizers import QUALITY_STEPS
from calotype.models.video import Memory, Video, frame_psnr, quality_offset, search_cost
from calotype.picture import PictureCoder
from calotype.stopwatch import Stopwatch
from calotype.video import planes
from calotype.video.frames import Colour, Frame, gray
from calotype.video.packet import VideoFormat
from calotype.video.steadiness import Steadiness

INTRA, INTER = 0, 1
"""Types of frames: coded like a still picture, or predicted from the frame before."""
VIDEO_MODEL = "video"
_HEAD = struct.Struct("<BH")
EXTRAPOLATED = 3
"""So many lost frames in a row go on moving; then the picture stands still."""
_T = TypeVar("_T")


def video_format(width: int, height: int, colour: Colour, quality: int) -> VideoFormat:
    """The format of new videos, with the models that are shipped."""
    inter = zoo.describe(VIDEO_MODEL)
    assert inter.key_frames is not None
    intra = zoo.describe(inter.key_frames)
    weights = [bytes.fromhex(spec.sha256[:16]) for spec in (intra, inter)]
    return VideoFormat(width, height, colour, quality, intra.id, weights[0], inter.id, weights[1])


@functools.cache
def _video(weights: bytes, number: int, device: str) -> tuple[Video, SymbolTables]:
    name = _name(weights, number)
    try:
        network = zoo.load(name, device)
    except zoo.WeightsError as error:
        raise ModelNotFoundError(str(error)) from error
    if not isinstance(network, Video):
        raise ModelNotFoundError(f"model {name!r} does not predict frames: the video is damaged")
    frequencies = torch.cat([network.prior.frequencies, network.motion_frequencies]).cpu().numpy().astype(np.int32)
    half_widths = [tables.half_width(i) for i in range(tables.SCALES)] + list(HALF_WIDTHS)
    return network, SymbolTables(frequencies, half_widths, tables.SKIP)


def _name(weights: bytes, number: int) -> str:
    name = zoo.name_of(weights)
    if name is None:
        raise ModelNotFoundError(
            f"the video needs weights {weights.hex()} (model {number}), which are not installed: use the Calotype "
            "version that wrote it"
        )
    return name


class _Chain:
    """What encoder and decoder hold between frames, and how a frame follows from its symbols.

    Attributes:
        reference: the last decoded frame; floats, so that nothing is lost by rounding from frame to frame.
        field: its motion, zeros after a key frame.
    """

    def __init__(self, format: VideoFormat, device: str) -> None:
        self.format = format
        self.device = pick_device(device)
        self.watch = Stopwatch(self.device)
        name = _name(format.intra_weights, format.intra_model)
        coder = Codec.load(name, device=str(self.device)).coder
        if not isinstance(coder, PictureCoder):
            raise ModelNotFoundError(f"model {name!r} does not code key frames: the video is damaged")
        self.image, self.image_tables, self.layout = coder.network, coder.tables, coder.layout
        self.reference: Planes | None = None

    @functools.cached_property
    def _inter(self) -> tuple[Video, SymbolTables]:
        return _video(self.format.inter_weights, self.format.inter_model, str(self.device))

    @property
    def video(self) -> Video:
        return self._inter[0]

    @property
    def video_tables(self) -> SymbolTables:
        return self._inter[1]

    def _quality(self, quality: int) -> tuple[Tensor, Tensor]:
        integer = torch.tensor([quality], device=self.device)
        return integer, integer.float() / QUALITY_STEPS

    def _after_key(self, latent: Tensor, t: Tensor) -> Frame:
        rgb = self.image.synthesise(self.image.dequantise(latent), t)
        rows, columns = self.format.latent_shape
        self.field = torch.zeros(1, 2, 2 * rows, 2 * columns, dtype=torch.int64, device=self.device)
        self.memory = Memory(torch.zeros_like(latent), latent, torch.ones(1, device=self.device))
        return self._show(planes.from_rgb(rgb, self.format.colour))

    def _after_inter(self, latent: Tensor, field: Tensor, prediction: Planes, context: Tensor, t: Tensor) -> Frame:
        self.field = field
        self.memory = Memory(latent, self.memory.key, torch.zeros(1, device=self.device))
        # The entropy path has channels innermost, in which torch cannot shuffle pixels everywhere.
        y_hat = self.video.dequantise(latent).contiguous(memory_format=self.layout)
        return self._show(self.video.synthesise(y_hat, prediction, context, t))

    def _show(self, decoded: Planes) -> Frame:
        self.reference = decoded
        return planes.to_frame(decoded, self.format.width, self.format.height)


class GopEncoder(_Chain):
    """Encodes the frames of one or more groups, strictly in order. Raises ModelNotFoundError, InputError.

    After `encode`, `shown` is the frame that a decoder will show.
    """

    shown: Frame
    _steadiness: Steadiness

    def __init__(self, format: VideoFormat, device: str = "auto") -> None:
        super().__init__(format, device)
        self._place = 0
        """Of the next frame in its group."""

    @torch.inference_mode()
    def encode(self, frame: Frame, *, key: bool, quality: int | None = None) -> bytes:
        """The payload of the next frame; `quality` 0..1000 replaces that of the format for this group."""
        key = key or self.reference is None
        self._place = 0 if key else self._place + 1
        base = self.format.quality if quality is None else quality
        offset = quality_offset(self._place) + (0 if key else self._steadiness.correction)
        step = min(max(base + offset, 0), QUALITY_STEPS)
        integer, t = self._quality(step)
        x = planes.to_planes(frame, self.device)
        shape = (1, *self.format.latent_shape)
        if key or self.reference is None:
            y = self.image.analyse(planes.to_rgb(x, self.format.colour), t)
            (payload,), latent = symbols.write(self.image.code(shape, integer, y), self.image_tables, 1, self.watch)
            self.shown = self._after_key(latent, t)
            self._steadiness = Steadiness(functools.partial(self._alone, base), x)
            return _HEAD.pack(INTRA, step) + payload
        source = Reference(self.reference)
        field = search(x, source, search_cost(t), self.field)
        prediction = compensate(source, field)
        context = self.video.context(prediction)
        y = self.video.analyse(x, prediction, context, t)
        coding = self.video.code(shape, integer, self.memory, self.field, field, y)
        (payload,), (field, latent) = symbols.write(coding, self.video_tables, 1, self.watch)
        self.shown = self._after_inter(latent, field, prediction, context, t)
        self._steadiness.note(x, frame_psnr(x, self.reference))
        return _HEAD.pack(INTER, step) + payload

    def _alone(self, quality: int, x: Planes) -> float:
        """PSNR of a frame if it were coded as a key frame at an integer quality, but for the means of its latents."""
        t = self._quality(quality)[1]
        y = self.image.analyse(planes.to_rgb(x, self.format.colour), t)
        return frame_psnr(x, planes.from_rgb(self.image.synthesise(torch.round(y), t), self.format.colour))


class GopDecoder(_Chain):
    """Decodes payloads in order. A frame that is missing or damaged is replaced by `conceal`.

    Args:
        symbols_seen: called with each run of decoded symbols as little-endian int32.
    """

    def __init__(
        self, format: VideoFormat, device: str = "auto", *, symbols_seen: Callable[[bytes], None] | None = None
    ) -> None:
        super().__init__(format, device)
        self._symbols_seen = symbols_seen
        self._lost = 0

    @torch.inference_mode()
    def decode(self, payload: bytes, *, key: bool) -> Frame:
        """The next frame. Raises FormatError for damaged data, DriftError for symbols that are not the encoder's."""
        if len(payload) < _HEAD.size:
            raise FormatError("a frame is too short: the video is damaged")
        kind, quality = _HEAD.unpack_from(payload)
        if kind not in (INTRA, INTER) or quality > QUALITY_STEPS:
            raise FormatError(f"a frame of unknown type {kind} or quality {quality}: the video is damaged or too new")
        if key and kind != INTRA:
            raise FormatError("a key packet holds a predicted frame: the video is damaged")
        integer, t = self._quality(quality)
        shape = (1, *self.format.latent_shape)
        data = payload[_HEAD.size :]
        if kind == INTRA:
            latent = self._read(self.image.code(shape, integer), self.image_tables, data)
            frame = self._after_key(latent, t)
        else:
            if self.reference is None or self._lost:
                raise FormatError("a predicted frame whose reference is missing: decode from a key frame on")
            coding = self.video.code(shape, integer, self.memory, self.field)
            field, latent = self._read(coding, self.video_tables, data)
            prediction = compensate(Reference(self.reference), field)
            frame = self._after_inter(latent, field, prediction, self.video.context(prediction), t)
        self._lost = 0
        return frame

    @torch.inference_mode()
    def conceal(self) -> Frame:
        """What to show for a frame that is lost: the last one, moving on for a little, or mid-gray if there is none."""
        if self.reference is None:
            return gray(self.format.width, self.format.height)
        if self._lost < EXTRAPOLATED:
            self.reference = compensate(Reference(self.reference), self.field)
        self._lost += 1
        return planes.to_frame(self.reference, self.format.width, self.format.height)

    def _read(self, coding: symbols.Coding[_T], table: SymbolTables, data: bytes) -> _T:
        return symbols.read(coding, table, [data], ["a frame"], self.watch, device=self.device, seen=self._note)

    def _note(self, place: int, run: bytes) -> None:
        if self._symbols_seen:
            self._symbols_seen(run)
