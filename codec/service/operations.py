"""What the service does with a body: parameters and bytes in, a reply out. Knows nothing of HTTP connections."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from calotype import api, container
from calotype.api import Codec
from calotype.errors import CalotypeError
from calotype.media import Picture, as_picture, read_picture, write_picture
from calotype.models import zoo
from calotype.rate import Target
from calotype.service.anchors import Format, largest_within
from calotype.service.settings import Settings
from calotype.service.workers import Batch, Check

CLT = "image/x-calotype"
BATCH_PIXELS = 2**18
"""Pixels of the pictures that are decoded together: small ones gain much by it, those from 512x512 on nothing."""
MEDIA_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "avif": "image/avif",
    "tiff": "image/tiff",
    "bmp": "image/bmp",
    "ppm": "image/x-portable-anymap",
    "npy": "application/octet-stream",
}


def _flag(value: Any) -> Any:
    if value not in ("true", "false", True, False):
        raise ValueError("must be true or false")
    return value


Flag = Annotated[bool, BeforeValidator(_flag)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Metadata = Annotated[
    str,
    Field(
        pattern=r"^(all|none|(icc|exif|xmp)(,(icc|exif|xmp)){0,2})$",
        description="Metadata to keep: all, none or some of icc,exif,xmp.",
    ),
]


def _kinds(metadata: str) -> tuple[str, ...]:
    if metadata in ("all", "none"):
        return api.METADATA if metadata == "all" else ()
    return tuple(metadata.split(","))


class Query(BaseModel):
    """Parameters of a request; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EncodeQuery(Query):
    """At most one of quality, target_size, target_bpp and target_psnr."""

    model: str | None = Field(None, description="A name from /models; hyperprior unless tune says otherwise.")
    quality: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="0 (smallest) to 100 (best); 60 without any target."
    )
    target_size: int | None = Field(None, gt=0, lt=2**53, description="Most bytes of the file.")
    target_bpp: Positive | None = Field(None, description="Most bits per pixel of the file.")
    target_psnr: Positive | None = Field(None, description="PSNR to reach, in dB.")
    tile: Literal["256", "512", "1024", "2048", "4096"] = Field("1024", description="Side of a tile in pixels.")
    effort: Literal["3", "4", "5", "7", "9"] = Field("5", description="7 and 9: much more time for smaller files.")
    tune: zoo.Tune | None = Field(None, description="psnr: the model hyperprior. visual: the model visual.")
    packets: int = Field(
        1, ge=1, le=container.MAX_PACKETS, description="Parts of a tile that can be lost; models of tokens."
    )
    metadata: Metadata = "all"
    measure: Flag = Field(False, description="Decode the result and report its PSNR.")

    @model_validator(mode="after")
    def _one_aim(self) -> Self:
        given = [n for n in ("quality", "target_size", "target_bpp", "target_psnr") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: choose one")
        return self

    @property
    def target(self) -> Target | None:
        kinds: dict[Literal["size", "bpp", "psnr"], float | None] = {
            "size": self.target_size,
            "bpp": self.target_bpp,
            "psnr": self.target_psnr,
        }
        return next((Target(kind, value) for kind, value in kinds.items() if value is not None), None)


class DecodeQuery(Query):
    """How a picture is decoded."""

    format: Literal["png", "jpeg", "webp", "avif", "tiff", "bmp", "ppm", "npy"] = "png"
    region: str | None = Field(
        None, pattern=r"^[0-9]{1,7}(,[0-9]{1,7}){3}$", description="x,y,width,height in pixels of the full picture."
    )
    scale: Literal["1", "2", "4", "8"] = Field("1", description="Decode at 1/scale of the size.")
    tune: zoo.Tune | None = Field(None, description="How to draw files of hyperprior; visual is a little sharper.")
    allow_partial: Flag = Field(False, description="Fill in damaged tiles instead of failing.")
    simulate_loss: float = Field(
        0, ge=0, le=1, allow_inf_nan=False, description="Share of the packets that is dropped and restored."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Chooses which packets are dropped.")

    @property
    def box(self) -> api.Region | None:
        if self.region is None:
            return None
        x, y, width, height = map(int, self.region.split(","))
        return x, y, width, height


class CompareQuery(Query):
    """Which codec is to write the picture, and how large it may be."""

    format: Format
    size: int = Field(gt=0, lt=2**53, description="Most bytes of the file.")
    metadata: Metadata = "all"


class InfoQuery(Query):
    """No parameters."""


@dataclass(frozen=True)
class Reply:
    """The result of an operation; `seconds` by stage, `pixels` of the coded picture."""

    body: bytes
    media_type: str
    pixels: int
    seconds: Mapping[str, float]
    headers: dict[str, str] = field(default_factory=dict)


def _headers(**values: float | str | None) -> dict[str, str]:
    """Facts about a result: bpp=0.5 becomes Calotype-Bpp: 0.5; None is left out."""
    texts = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items() if v is not None}
    return {f"Calotype-{name.replace('_', '-').title()}": text for name, text in texts.items()}


def _written(picture: Picture, format: str, seconds: Mapping[str, float], **numbers: Sequence[int]) -> Reply:
    """The reply that is a decoded picture."""
    started = time.perf_counter()
    data = write_picture(picture, format)
    seconds = {**seconds, "write": time.perf_counter() - started}
    lists = {name: ",".join(map(str, found)) or None for name, found in numbers.items()}
    facts = _headers(width=str(picture.width), height=str(picture.height), **lists)
    return Reply(data, MEDIA_TYPES[format], picture.width * picture.height, seconds, facts)


def _with_metadata(picture: Picture, body: bytes) -> Picture:
    return replace(picture, **container.read_still(body).boxes)  # type: ignore[arg-type]


def _no_check(_fraction: float = 0.0) -> None:
    """For work on behalf of several, which goes on though one of them goes away."""


def _caught(work: Callable[..., Reply], *arguments: Any) -> Reply | Exception:
    """The result, or the error, as one result among others."""
    try:
        return work(*arguments)
    except Exception as error:
        return error


class Engine:
    """The operations on one device. Threads share it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def codec(self, model: str = api.DEFAULT_MODEL, tune: zoo.Tune | None = None) -> Codec:
        """A model, loaded when it is first asked for. Raises ModelNotFoundError."""
        return Codec.load(model, device=self._settings.device, tune=tune)

    def _read(self, body: bytes) -> tuple[Picture, float]:
        """The picture in a body, and the seconds that it took."""
        started = time.perf_counter()
        picture = read_picture(body, max_pixels=self._settings.max_pixels)
        return picture, time.perf_counter() - started

    def encode(self, query: EncodeQuery, body: bytes, check: Check) -> Reply:
        """A picture to a `.clt` file."""
        codec = self.codec(api.model_for(query.model, query.tune))
        picture, reading = self._read(body)
        check()
        encoded = codec.encode(
            picture,
            quality=api.DEFAULT_QUALITY if query.quality is None else query.quality,
            target=query.target,
            tile=int(query.tile),
            effort=int(query.effort),
            packets=query.packets,
            metadata=_kinds(query.metadata),
            progress=check,
        )
        psnr = encoded.psnr
        seconds = {"read": reading, **encoded.seconds}
        if query.measure and psnr is None:
            started = time.perf_counter()
            again = codec.decode(encoded.data, max_pixels=self._settings.max_pixels, progress=check)
            psnr = api.psnr(picture.pixels, again.picture.pixels)
            seconds["measure"] = time.perf_counter() - started
        facts = _headers(
            quality=encoded.quality, bpp=encoded.bpp, psnr=psnr, width=str(picture.width), height=str(picture.height)
        )
        return Reply(encoded.data, CLT, picture.width * picture.height, seconds, facts)

    def decode(self, query: DecodeQuery, body: bytes, check: Check) -> Reply:
        """A `.clt` file to a picture."""
        header = container.read_header(body, max_pixels=self._settings.max_pixels)
        # With a model that is not installed any codec will do: it says so when it decodes.
        codec = self.codec(zoo.name_of(header.weights) or api.DEFAULT_MODEL, query.tune)
        decoded = codec.decode(
            body,
            region=query.box,
            scale=int(query.scale),
            allow_partial=query.allow_partial,
            simulate_loss=query.simulate_loss,
            seed=query.seed,
            max_pixels=self._settings.max_pixels,
            progress=check,
        )
        return _written(
            decoded.picture, query.format, decoded.seconds, damaged_tiles=decoded.damaged, lost_packets=decoded.lost
        )

    def batch(self, query: DecodeQuery, body: bytes) -> Batch[Reply] | None:
        """How a file is decoded together with others of equal size and tiles; None if it is to be decoded alone."""
        try:
            header = container.read_header(body, max_pixels=self._settings.max_pixels)
        except CalotypeError:
            return None  # decoding it will say what is wrong
        model = zoo.name_of(header.weights)
        most = BATCH_PIXELS // (header.width * header.height)
        if model is None or most < 2 or query.region or query.allow_partial or query.simulate_loss:
            return None
        kind = (replace(header, quality=0), query.scale, query.tune)
        return Batch(kind, (query, body), most, lambda items: self._decode_together(model, items))

    def _decode_together(self, model: str, items: Sequence[tuple[DecodeQuery, bytes]]) -> list[Reply | Exception]:
        started = time.perf_counter()
        try:
            files = [body for _, body in items]
            query = items[0][0]
            pixels = self._batching(model, query.tune).decode_batch(files, scale=int(query.scale)).cpu().numpy()
        except CalotypeError:
            # Somebody's file is at fault, which is not to be felt by the others.
            return [_caught(self.decode, *item, _no_check) for item in items]
        seconds = {"together": time.perf_counter() - started}
        return [
            _caught(_written, _with_metadata(as_picture(np.moveaxis(planes, 0, 2)), body), query.format, seconds)
            for planes, (query, body) in zip(pixels, items, strict=True)
        ]

    def _batching(self, model: str, tune: zoo.Tune | None) -> Codec:
        """A model that takes as many pictures together as it is given."""
        from calotype.picture import PictureCoder

        codec = self.codec(model, tune)
        if not isinstance(codec.coder, PictureCoder):
            return codec
        coder = PictureCoder(codec.coder.network, codec.coder.device, tune=codec.spec.tune, batch=BATCH_PIXELS)
        return Codec(coder, codec.spec, tune)

    def compare(self, query: CompareQuery, body: bytes, check: Check) -> Reply:
        """A picture to the best file of an older format that is no larger than `size`."""
        picture, reading = self._read(body)
        written = largest_within(picture, query.format, query.size, _kinds(query.metadata), check)
        pixels = picture.width * picture.height
        facts = _headers(
            quality=str(written.quality), bpp=len(written.data) * 8 / pixels, psnr=written.psnr,
            width=str(picture.width), height=str(picture.height),
        )  # fmt: skip
        seconds = {"read": reading, **written.seconds}
        return Reply(written.data, MEDIA_TYPES[query.format], pixels, seconds, facts)

    def info(self, query: InfoQuery, body: bytes, check: Check) -> Reply:
        """What a `.clt` file says about itself."""
        return Reply(container.probe(body).model_dump_json().encode(), "application/json", 0, {})

    def models(self) -> dict[str, Any]:
        """The installed models of still pictures, and the one that is taken if none is named."""
        kept = ("name", "id", "architecture", "summary", "sha256")
        return {
            "default": api.DEFAULT_MODEL,
            "models": [
                {name: getattr(spec, name) for name in kept} for spec in api.models() if spec.architecture != "video"
            ],
        }

    def warm_up(self) -> None:
        """Load the default model and decode a small picture, so that the first request need not wait for it."""
        codec = self.codec()
        codec.decode(codec.encode(Picture(np.zeros((64, 64, 3), np.uint8))).data)
