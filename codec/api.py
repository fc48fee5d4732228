"""The Python interface: encode and decode pictures, inspect and check files."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from calotype import container, media, rate
from calotype.container import Still
from calotype.device import pick_device
from calotype.errors import CalotypeError, FormatError, InputError, LimitError, ModelNotFoundError
from calotype.header import Header
from calotype.limits import DEFAULT_MAX_PIXELS, MAX_SIDE, MAX_TILES
from calotype.media import Picture, as_picture
from calotype.models import zoo
from calotype.rate import QUALITY_STEPS, Target

if TYPE_CHECKING:
    import torch

    from calotype.models.gradient import LearnedGradient
    from calotype.picture import DecodeJob, PictureCoder
    from calotype.stopwatch import Stopwatch
    from calotype.tokens import TokenCoder, Tokens
    from calotype.windows import Box

MODELS: dict[zoo.Tune, str] = {"psnr": "hyperprior", "visual": "visual"}
"""The models for everyday pictures, by what they are trained for."""
DEFAULT_MODEL = MODELS["psnr"]
DEFAULT_QUALITY = 60.0
DEFAULT_TILE = 1024
DEFAULT_EFFORT = 5
EFFORTS = (3, 4, 5, 7, 9)
METADATA = ("icc", "exif", "xmp")
SCALES = (1, 2, 4, 8)
Progress = Callable[[float], None]
Region = tuple[int, int, int, int]


@dataclass(frozen=True)
class Encoded:
    """An encoded file; `psnr` (dB, RGB, 8 bit) is known only if the encoder decoded its output."""

    data: bytes
    quality: float
    bpp: float
    psnr: float | None
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Decoded:
    """A decoded picture, and what of it had to be filled in.

    Payloads are numbered tile after tile, and packet after packet in a tile of several.

    Attributes:
        damaged: numbers of the payloads that were damaged (empty unless `allow_partial`).
        lost: numbers of the payloads that were dropped to simulate loss.
        packets: payloads of a tile.
    """

    picture: Picture
    damaged: tuple[int, ...]
    seconds: Mapping[str, float]
    lost: tuple[int, ...] = ()
    packets: int = 1


def psnr(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of two 8-bit pictures of equal shape; infinite if they are equal."""
    squares = 0.0
    for start in range(0, a.shape[0], 512):  # in strips: a float copy of a large picture would be eight times its size
        difference = a[start : start + 512].astype(np.int32) - b[start : start + 512]
        squares += float(np.square(difference).sum(dtype=np.float64))
    return float("inf") if squares == 0 else 10 * float(np.log10(255**2 * a.size / squares))


def models(*, superseded: bool = False) -> list[zoo.ModelSpec]:
    """The models that new files are written with, and, if asked, then those that older files need."""
    return [zoo.describe(name) for name in zoo.names(superseded=superseded)]


def model(name: str) -> zoo.ModelSpec:
    """A shipped model. Raises ModelNotFoundError."""
    try:
        return zoo.describe(name)
    except zoo.WeightsError as error:
        raise ModelNotFoundError(str(error)) from error


def model_for(name: str | None, tune: zoo.Tune | None) -> str:
    """The model to encode with: the one that is named, or that of `MODELS` for a tune.

    Raises InputError if both are given and differ.
    """
    if name is not None and tune is not None and name != MODELS[tune]:
        raise InputError(f"the tune {tune} means the model {MODELS[tune]}, not {name}: give one of the two")
    return name or MODELS[tune or "psnr"]


def verify_model(name: str) -> None:
    """Check the SHA-256 of a model's weights. Raises ModelNotFoundError."""
    try:
        zoo.verify_weights(name)
    except zoo.WeightsError as error:
        raise ModelNotFoundError(str(error)) from error


_LOADING = threading.Lock()
"""Threads that start together share one network instead of loading one each."""


@functools.cache
def _coder(name: str, device: str, tune: zoo.Tune | None) -> PictureCoder | TokenCoder:
    from calotype.models.vqgan import Vqgan
    from calotype.picture import PictureCoder, StillModel
    from calotype.tokens import TokenCoder

    chosen = pick_device(device)
    try:
        network = zoo.load(name, str(chosen), tune)
    except zoo.WeightsError as error:
        raise ModelNotFoundError(str(error)) from error
    if isinstance(network, Vqgan):
        return TokenCoder(network, chosen)
    if not isinstance(network, StillModel):
        raise ModelNotFoundError(f"model {name!r} does not code still pictures")
    # A second synthesis draws, but files don't depend on it.
    encoder = None if tune is None else functools.partial(zoo.load, name, str(chosen), None)

    def gradient() -> LearnedGradient | None:
        try:
            return zoo.load_gradient(name, str(chosen))
        except zoo.WeightsError as error:
            raise ModelNotFoundError(str(error)) from error

    return PictureCoder(network, chosen, tune=zoo.describe(name).tune, encoder=encoder, gradient=gradient)


class Codec:
    """A model on a device: encodes and decodes pictures. Threads may share one."""

    def __init__(self, coder: PictureCoder | TokenCoder, spec: zoo.ModelSpec, tune: zoo.Tune | None = None) -> None:
        self.coder, self.spec, self.tune = coder, spec, tune

    @classmethod
    def load(cls, model: str = DEFAULT_MODEL, *, device: str = "auto", tune: zoo.Tune | None = None) -> Codec:
        """Load shipped weights (cached).

        Args:
            tune: what decoding draws from files of the model hyperprior: "psnr" the picture of least error, "visual"
                one that looks a little sharper. All others draw what they were trained for.
        Raises:
            ModelNotFoundError for an unknown model, or one without that tune, InputError for a device that is not here.
        """
        if tune is not None and tune not in zoo.TUNES:
            raise InputError(f"unknown tune {tune!r}: use {' or '.join(zoo.TUNES)}")
        spec = globals()["model"](model)
        with _LOADING:
            return cls(_coder(model, device, None if tune == spec.tune else tune), spec, tune)

    def encode(
        self,
        picture: Picture,
        *,
        quality: float = DEFAULT_QUALITY,
        target: Target | None = None,
        tile: int = DEFAULT_TILE,
        effort: int = DEFAULT_EFFORT,
        metadata: Collection[str] = METADATA,
        packets: int = 1,
        progress: Progress | None = None,
    ) -> Encoded:
        """Encode a picture.

        Args:
            quality: 0 (smallest) to 100 (best), in steps of 0.1; ignored if there is a target.
            target: end just below a size or rate, or at a PSNR; with a model of tokens the best of every fifth quality
                that is no larger, or the first that reaches the PSNR.
            tile: side in pixels of the tiles that can be decoded alone: 256, 512, 1024, 2048 or 4096.
            effort: 3, 4, 5, 7 or 9: time to encode for smaller files at equal quality; decoding stays as it is. At 3
                symbols are those next to the latent; from 4 on those whose errors cancel: by an estimate, from 5 on
                looked for 1, 6 or 20 times. Models that are not made for least error are alike at 3 to 5: `visual`
                refines its latents by 6 or 20 steps at 7 and 9, `vqgan` searches for tokens by 10 or 48.
            metadata: which of "icc", "exif" and "xmp" are kept.
            packets: 1 to 32 parts of each tile that can be lost one by one; above 1 with models of tokens only.
            progress: called with the fraction that is done.
        Raises:
            InputError for arguments out of range, LimitError, TargetError.
        """
        from calotype.stopwatch import Stopwatch
        from calotype.tokens import TokenCoder

        _check_quality(quality)
        coder = self.coder if packets == 1 else self._token_coder()
        _check_layout(picture.width, picture.height, tile, packets)
        _check_effort(effort)
        unknown = set(metadata) - set(METADATA)
        if unknown:
            raise InputError(f"unknown metadata {', '.join(sorted(unknown))}: use {', '.join(METADATA)}")
        watch = Stopwatch(self.coder.device)
        boxes = {key: value for key in METADATA if key in metadata and (value := getattr(picture, key))}
        with watch("alpha"):
            alpha = None if picture.alpha is None else media.encode_alpha(picture.alpha)

        def pack(step: int, on_progress: Progress | None = None) -> bytes:
            if isinstance(coder, TokenCoder):
                tiles = coder.encode(picture.pixels, step, tile, watch, on_progress, effort, packets)
            else:
                tiles = coder.encode(picture.pixels, step, tile, watch, on_progress, effort)
            header = self._header(picture.width, picture.height, picture.pixels.shape[2], tile, step, packets)
            return container.write_shortest(replace(header, alpha=alpha is not None), tiles, boxes=boxes, alpha=alpha)

        area = picture.width * picture.height
        reached: float | None = None
        if target is None:
            step = round(quality * QUALITY_STEPS / 100)
            data = pack(step, progress)
        else:
            trials = 0

            def trial(step: int) -> tuple[float, tuple[bytes, float | None]]:
                nonlocal trials
                data = pack(step)
                trials += 1
                if progress:
                    progress(1 - 0.7**trials)  # the number of trials is not known in advance
                if target.kind == "psnr":
                    value = psnr(picture.pixels, self.decode(data, max_pixels=area).picture.pixels)
                    return value, (data, value)
                return (len(data) * 8 / area if target.kind == "bpp" else float(len(data))), (data, None)

            if isinstance(coder, TokenCoder):
                step, (data, reached) = rate.bisect(target, trial)
            else:
                step, (data, reached) = rate.search(target, trial)
            if progress:
                progress(1.0)
        return Encoded(data, step * 100 / QUALITY_STEPS, len(data) * 8 / area, reached, watch.seconds)

    def decode(
        self,
        data: bytes | memoryview,
        *,
        region: Region | None = None,
        scale: int = 1,
        allow_partial: bool = False,
        simulate_loss: float = 0.0,
        seed: int = 0,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        progress: Progress | None = None,
    ) -> Decoded:
        """Decode a file.

        Args:
            region: (x, y, width, height) in pixels of the full picture; only the tiles it touches are decoded.
            scale: 1, 2, 4 or 8: the picture, or region, at 1/scale of its size.
            allow_partial: fill in damaged tiles, or packets of them, instead of raising.
            simulate_loss: share in [0, 1] of the file's tiles, or packets of them, that is dropped and filled in, for
                experiments: exactly that share, rounded to the nearest, chosen by `seed`.
            max_pixels: refuse larger pictures before allocating memory for them.
        Raises:
            FormatError and its kinds, LimitError, ModelNotFoundError, DriftError, InputError for bad arguments.
        """
        from calotype.stopwatch import Stopwatch

        if scale not in SCALES:
            raise InputError(f"scale must be one of {', '.join(map(str, SCALES))}, got {scale}")
        if not 0 <= simulate_loss <= 1:
            raise InputError(f"the share of packets to lose must be 0 to 1, got {simulate_loss:g}")
        watch = Stopwatch(self.coder.device)
        with watch("parse"):
            header = container.read_header(data, max_pixels=max_pixels)
            area = _area(header, region)
            job = _job(header, watch, allow_partial=allow_partial)
            wanted = None if region is None else self._for(header).coder.tiles_for(job, area)
            still = container.read_still(data, max_pixels=max_pixels, partial=allow_partial, wanted=wanted)
            lost = set(random.Random(seed).sample(range(header.payloads), round(simulate_loss * header.payloads)))
            job.payload = lambda number: None if number in lost else still.tiles[number]
            codec = self._for(header)
        pixels = codec._pixels(job, header, area, scale, progress)
        alpha = None
        if still.alpha is not None:
            with watch("alpha"):
                try:
                    alpha = _crop_alpha(still, region, scale)
                except InputError as error:
                    if not allow_partial:
                        raise FormatError(str(error)) from error
        picture = Picture(pixels, alpha, still.boxes.get("icc"), still.boxes.get("exif"), still.boxes.get("xmp"))
        damaged = tuple(sorted(set(job.damaged) - lost))
        return Decoded(picture, damaged, watch.seconds, tuple(sorted(lost)), header.packets)

    def encode_batch(
        self,
        x: torch.Tensor | npt.NDArray[Any],
        *,
        quality: float | Sequence[float] = DEFAULT_QUALITY,
        tile: int = DEFAULT_TILE,
    ) -> list[bytes]:
        """Encode each picture of a batch to the file that `encode` makes of it.

        Args:
            x: [N, C, H, W], uint8 or float in [0, 1] (rounded to 8 bits), on any device; C is 1 gray, 3 RGB, or 2 or 4
                with alpha as the last channel.
            quality: for all, or one for each.
        Raises:
            InputError for another shape, type or range, LimitError.
        """
        from calotype import batch

        pixels = batch.as_bytes(x)
        qualities = [float(quality)] * len(pixels) if isinstance(quality, int | float) else list(quality)
        if len(qualities) != len(pixels):
            raise InputError(f"{len(qualities)} qualities for {len(pixels)} pictures: give one, or one for each")
        return [
            self.encode(as_picture(picture), quality=q, tile=tile).data
            for picture, q in zip(pixels, qualities, strict=True)
        ]

    def decode_batch(
        self, files: Sequence[bytes | memoryview], *, scale: int = 1, max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> torch.Tensor:
        """Decode files of one size to [N, C, ceil(H/scale), ceil(W/scale)] uint8 on this codec's device.

        The pixels never leave the device. Files of equal tiles go through the networks together, of any quality.

        Args:
            files: of equal width, height, colour channels and alpha; alpha becomes the last channel.
            scale: 1, 2, 4 or 8.
            max_pixels: refuse larger pictures before allocating memory for them.
        Raises:
            InputError for an empty batch or unequal files, else what `decode` raises; damage names the file's number.
        """
        import torch

        from calotype import batch
        from calotype.tokens import TokenCoder

        if scale not in SCALES:
            raise InputError(f"scale must be one of {', '.join(map(str, SCALES))}, got {scale}")
        if not files:
            raise InputError("the batch is empty: give at least one file")
        stills: list[Still] = []
        for number, data in enumerate(files):
            try:
                still = container.read_still(data, max_pixels=max_pixels)
                kind, wanted = _describe(still.header), _describe(stills[0].header if stills else still.header)
                if kind != wanted:
                    raise InputError(f"it is {kind}, file 0 is {wanted}: only equal ones can be decoded together")
            except CalotypeError as error:
                raise type(error)(f"file {number} of the batch: {error}") from error
            stills.append(still)
        header = stills[0].header
        groups: dict[tuple[int, int, bytes], list[int]] = {}
        for number, still in enumerate(stills):
            groups.setdefault((still.header.tile, still.header.packets, still.header.weights), []).append(number)
        height, width = -(-header.height // scale), -(-header.width // scale)
        channels = header.channels + header.alpha
        out = torch.empty(len(files), channels, height, width, dtype=torch.uint8, device=self.coder.device)
        for numbers in groups.values():
            codec = self._for(stills[numbers[0]].header)
            if isinstance(codec.coder, TokenCoder):
                for number in numbers:
                    out[number, : header.channels] = codec._alone(number, stills[number], scale)
                continue
            pixels = batch.decode(codec.coder, {n: stills[n] for n in numbers}, scale)
            if header.channels == 1:
                pixels = pixels.float().mean(1, keepdim=True).round().to(torch.uint8)
            out[numbers, : header.channels] = pixels
        if header.alpha:
            for number, still in enumerate(stills):
                try:
                    alpha = _crop_alpha(still, None, scale)
                except InputError as error:
                    raise FormatError(f"file {number} of the batch: {error}") from error
                out[number, -1] = torch.from_numpy(alpha).to(out.device)
        return out

    def _alone(self, number: int, still: Still, scale: int) -> torch.Tensor:
        """Pixels [C, h, w] uint8 of a file of a batch."""
        import torch

        from calotype.stopwatch import Stopwatch

        job = _job(still.header, Stopwatch(self.coder.device))
        job.payload = still.tiles.__getitem__
        try:
            pixels = self._pixels(job, still.header, _area(still.header, None), scale)
        except CalotypeError as error:
            raise type(error)(f"file {number} of the batch: {error}") from error
        return torch.from_numpy(pixels).permute(2, 0, 1).to(self.coder.device)

    def _for(self, header: Header) -> Codec:
        """This codec, or the one whose weights the file names.

        Raises ModelNotFoundError, FormatError for packets where there can be none.
        """
        from calotype.tokens import TokenCoder

        codec = self._named(header)
        if header.packets > 1 and not isinstance(codec.coder, TokenCoder):
            raise FormatError("the file has packets, but its model knows none: it is damaged")
        return codec

    def _header(self, width: int, height: int, channels: int, tile: int, quality: int, packets: int = 1) -> Header:
        """Of a file without alpha that this codec writes."""
        weights = bytes.fromhex(self.spec.sha256[:16])
        return Header(width, height, 1 if channels == 1 else 3, False, tile, quality, self.spec.id, weights, packets)

    def _named(self, header: Header) -> Codec:
        if bytes.fromhex(self.spec.sha256[:16]) == header.weights:
            return self
        name = zoo.name_of(header.weights)
        if name is None:
            raise ModelNotFoundError(
                f"the file needs weights {header.weights.hex()} (model {header.model}), which are not installed: "
                "use the Calotype version that wrote it"
            )
        return Codec.load(name, device=str(self.coder.device), tune=self.tune)

    def _pixels(
        self, job: DecodeJob, header: Header, area: Box, scale: int = 1, progress: Progress | None = None
    ) -> npt.NDArray[np.uint8]:
        pixels = self.coder.decode(job, area, scale, progress)
        return _gray(pixels) if header.channels == 1 else pixels

    def symbol_hash(self, data: bytes) -> str:
        """SHA-256 of all decoded symbols in raster order of the tiles: equal on every machine."""
        from calotype.picture import symbol_digest
        from calotype.stopwatch import Stopwatch

        still = container.read_still(data)
        parts: dict[int, list[bytes]] = {}
        job = _job(still.header, Stopwatch(self.coder.device))
        job.payload = still.tiles.__getitem__
        job.symbols_seen = lambda number, symbols: parts.setdefault(number, []).append(symbols)
        self._for(still.header)._pixels(job, still.header, _area(still.header, None), scale=8)
        return symbol_digest(parts)

    def verify(self, data: bytes, *, deep: bool = False) -> None:
        """Check every CRC; with `deep` also decode every symbol. Raises FormatError and its kinds, DriftError."""
        container.read_still(data)
        if deep:
            self.symbol_hash(data)

    # Tokens -----------------------------------------------------------------------------------------------------------

    def tokenise(self, picture: Picture, *, quality: float = DEFAULT_QUALITY, effort: int = DEFAULT_EFFORT) -> Tokens:
        """The tokens of a picture, without its alpha and metadata.

        Raises InputError if this is not a model of tokens, or for a quality or effort out of range; LimitError.
        """
        from calotype.stopwatch import Stopwatch

        coder = self._token_coder()
        _check_quality(quality)
        _check_effort(effort)
        _check_layout(picture.width, picture.height, DEFAULT_TILE, 1)
        step = round(quality * QUALITY_STEPS / 100)
        header = self._header(picture.width, picture.height, picture.pixels.shape[2], DEFAULT_TILE, step)
        return self._as_tokens(header, coder.analyse(picture.pixels, step, Stopwatch(coder.device), effort=effort))

    def tokens_of(self, data: bytes | memoryview, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Tokens:
        """The tokens in a file. Raises what `decode` does; InputError if its model is not one of tokens."""
        from calotype.stopwatch import Stopwatch

        still = container.read_still(data, max_pixels=max_pixels)
        codec = self._for(still.header)
        job = _job(still.header, Stopwatch(codec.coder.device))
        job.payload = still.tiles.__getitem__
        tokens, _ = codec._token_coder().read(job, _whole(job))
        return codec._as_tokens(still.header, tokens)

    def draw(self, tokens: Tokens, *, region: Region | None = None, scale: int = 1) -> Picture:
        """The picture that tokens stand for; `region` and `scale` as in `decode`.

        Raises InputError if they are not tokens of the model whose weights they name, ModelNotFoundError if it is not
        installed.
        """
        import torch

        from calotype.stopwatch import Stopwatch

        if scale not in SCALES:
            raise InputError(f"scale must be one of {', '.join(map(str, SCALES))}, got {scale}")
        codec, header = self._of_tokens(tokens, DEFAULT_TILE, 1)
        job = _job(header, Stopwatch(codec.coder.device))
        indexes = torch.from_numpy(tokens.indexes).long()
        known = torch.ones_like(indexes, dtype=torch.bool)
        pixels = codec._token_coder().draw(job, _whole(job), indexes, known, _area(header, region), scale)
        return Picture(_gray(pixels) if header.channels == 1 else pixels)

    def encode_tokens(self, tokens: Tokens, *, tile: int = DEFAULT_TILE, packets: int = 1) -> bytes:
        """The file of tokens, as `encode` makes it of the picture that they are of. Raises as `draw`, LimitError."""
        import torch

        from calotype.stopwatch import Stopwatch

        _check_layout(tokens.width, tokens.height, tile, packets)
        codec, header = self._of_tokens(tokens, tile, packets)
        indexes, watch = torch.from_numpy(tokens.indexes).long(), Stopwatch(codec.coder.device)
        return container.write_shortest(
            header, codec._token_coder().write(indexes, header.quality, tile, packets, watch)
        )

    def _token_coder(self) -> TokenCoder:
        from calotype.tokens import TokenCoder

        if not isinstance(self.coder, TokenCoder):
            raise InputError(f"model {self.spec.name!r} has no tokens and no packets: use one that has, such as vqgan")
        return self.coder

    def _as_tokens(self, header: Header, indexes: torch.Tensor) -> Tokens:
        from calotype.tokens import Tokens

        return Tokens(
            indexes.numpy().astype(np.int32), self._token_coder().codebook(header.quality), header.quality / 10,
            header.width, header.height, header.channels, header.weights,
        )  # fmt: skip

    def _of_tokens(self, tokens: Tokens, tile: int, packets: int) -> tuple[Codec, Header]:
        """The codec that tokens are of, and the header of their file. Raises ModelNotFoundError, InputError."""
        step = round(tokens.quality * QUALITY_STEPS / 100)
        header = replace(
            self._header(tokens.width, tokens.height, tokens.channels, tile, step, packets), weights=tokens.weights
        )
        codec = self._named(header)
        size = len(codec._token_coder().codebook(step))
        if size != len(tokens.codebook):
            raise InputError(
                f"at quality {tokens.quality:g} the model {codec.spec.name} has {size} codewords, "
                f"these tokens have {len(tokens.codebook)}"
            )
        return codec, replace(header, model=codec.spec.id)


def _check_quality(quality: float) -> None:
    if not 0 <= quality <= 100:
        raise InputError(f"quality must be 0 to 100, got {quality:g}")


def _check_effort(effort: int) -> None:
    if effort not in EFFORTS:
        raise InputError(f"effort must be one of {', '.join(map(str, EFFORTS))}, got {effort}")


def _check_layout(width: int, height: int, tile: int, packets: int) -> None:
    """Raise InputError, LimitError unless a file can hold a picture in such tiles and packets."""
    if tile not in container.TILE_SIZES:
        raise InputError(f"tile must be one of {', '.join(map(str, container.TILE_SIZES))}, got {tile}")
    if not 1 <= packets <= container.MAX_PACKETS:
        raise InputError(f"packets must be 1 to {container.MAX_PACKETS}, got {packets}")
    if max(width, height) > MAX_SIDE:
        raise LimitError(f"{width}x{height}: a side may have {MAX_SIDE} pixels at most")
    if -(-width // tile) * -(-height // tile) * packets > MAX_TILES:
        raise LimitError(f"more than {MAX_TILES} tiles, or packets of them: use larger ones")


def _job(header: Header, watch: Stopwatch, *, allow_partial: bool = False) -> DecodeJob:
    from calotype.picture import DecodeJob

    size = (header.height, header.width)
    return DecodeJob(
        lambda number: None, size, header.quality, header.tile, watch, allow_partial, packets=header.packets
    )


def _whole(job: DecodeJob) -> Box:
    """All positions of the latent or of the tokens."""
    from calotype.windows import Box

    return Box(0, 0, *job.latent_shape)


def _gray(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.rint(pixels.mean(2, keepdims=True)).astype(np.uint8)


def _area(header: Header, region: Region | None) -> Box:
    """The region as a box of pixels. Raises InputError unless it lies inside the picture."""
    from calotype.windows import Box

    x, y, width, height = region or (0, 0, header.width, header.height)
    if min(x, y) < 0 or min(width, height) < 1 or x + width > header.width or y + height > header.height:
        raise InputError(f"region {x},{y},{width},{height} is not inside the picture of {header.width}x{header.height}")
    return Box(y, x, y + height, x + width)


def _crop_alpha(still: Still, region: Region | None, scale: int) -> npt.NDArray[np.uint8]:
    """The alpha plane of a region, reduced by the mean of scale x scale pixels."""
    assert still.alpha is not None
    header = still.header
    x, y, width, height = region or (0, 0, header.width, header.height)
    full = media.decode_alpha(still.alpha, header.width, header.height)
    if scale == 1:
        return np.ascontiguousarray(full[y : y + height, x : x + width])
    # The grid of the reduced picture is anchored at the origin, as for the pixels.
    top, left = y // scale * scale, x // scale * scale
    bottom, right = -(-(y + height) // scale) * scale, -(-(x + width) // scale) * scale
    part = full[top:bottom, left:right].astype(np.float32)
    part = np.pad(part, ((0, bottom - top - part.shape[0]), (0, right - left - part.shape[1])), mode="edge")
    return np.rint(part.reshape(part.shape[0] // scale, scale, -1, scale).mean((1, 3))).astype(np.uint8)


def _describe(header: Header) -> str:
    kind = f"{header.width}x{header.height} {'gray' if header.channels == 1 else 'RGB'}"
    return f"{kind} with alpha" if header.alpha else kind


def encode(
    image: Any, *, model: str | None = None, tune: zoo.Tune | None = None, device: str = "auto", **options: Any
) -> bytes:
    """Encode an array, Pillow image or `Picture` to the bytes of a `.clt` file; options as `Codec.encode`.

    `model` and `tune` as in `model_for`.
    """
    return Codec.load(model_for(model, tune), device=device).encode(as_picture(image), **options).data


def decode(
    data: bytes | memoryview, *, device: str = "auto", tune: zoo.Tune | None = None, **options: Any
) -> npt.NDArray[np.uint8]:
    """Decode to [H, W, C] uint8, alpha as the last channel if there is one; options as `Codec.decode` and `load`."""
    header = container.read_header(data)
    name = zoo.name_of(header.weights) or DEFAULT_MODEL
    picture = Codec.load(name, device=device, tune=tune).decode(data, **options).picture
    return picture.pixels if picture.alpha is None else np.dstack([picture.pixels, picture.alpha])
