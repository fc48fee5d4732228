"""Ordinary picture files in and out, through Pillow: pixels, alpha, metadata."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import threading
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from calotype.errors import InputError, LimitError, OutputExistsError
from calotype.limits import DEFAULT_MAX_PIXELS, MAX_SIDE
from calotype.png import write_png

Pixels = npt.NDArray[np.uint8]

OUTPUT_SUFFIXES = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".bmp": "bmp",
    ".ppm": "ppm",
    ".pgm": "ppm",
    ".avif": "avif",
    ".npy": "npy",
}
INPUT_SUFFIXES = frozenset(OUTPUT_SUFFIXES) - {".npy"}
_INPUT_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF", "PPM")
_ORIENTATION = 0x0112
_EXIF = b"Exif\0\0"
_LAYOUT_TAGS = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339, 347}
    | {512, 513, 514, 519, 520, 521, 529, 530, 531, 532, 700, 34675}
)
"""TIFF tags of size, samples, compression and strips; 700 and 34675 hold XMP and the ICC profile, kept on their own."""


@dataclass(frozen=True)
class Picture:
    """A picture in memory: pixels [H, W, C] uint8 (C is 1 for gray, 3 for RGB), alpha [H, W] uint8, raw metadata."""

    pixels: Pixels
    alpha: Pixels | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 3 or shape[2] not in (1, 3) or 0 in shape:
            raise InputError(
                f"pixels must be [H, W, 1 or 3] uint8 and not empty, got {list(shape)} {self.pixels.dtype}"
            )
        if self.alpha is not None and (self.alpha.shape != shape[:2] or self.alpha.dtype != np.uint8):
            raise InputError("alpha must be [H, W] uint8 of the picture's size")

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]


_OPENING = threading.Lock()


def _open(stream: Path | io.BytesIO, formats: tuple[str, ...]) -> Image.Image:
    """Read a header without Pillow's own size limit, which is a global: our callers check theirs before decoding."""
    with _OPENING:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(stream, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def read_picture(source: Path | bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Picture:
    """Read a JPEG, PNG, WebP, TIFF, BMP, AVIF or PPM file; the first frame of an animation.

    The EXIF orientation is applied to the pixels. 16-bit samples are reduced to 8 bits.
    Raises InputError if it cannot be read, LimitError if it has over `max_pixels` pixels (before decoding it).
    """
    name = "the input" if isinstance(source, bytes) else str(source)
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with _open(stream, _INPUT_FORMATS) as image:
            if image.width * image.height > max_pixels or max(image.size) > MAX_SIDE:
                raise LimitError(
                    f"{name} has {image.width}x{image.height} pixels, over the limit of {max_pixels}: raise max_pixels"
                )
            return from_pillow(image)
    except LimitError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a picture of a known format ({', '.join(_INPUT_FORMATS)})") from error
    # What Pillow and its plugins raise for damaged files is not documented: anything may come.
    except Exception as error:
        raise InputError(f"{name} cannot be read: {error}") from error


def from_pillow(image: Image.Image) -> Picture:
    """Pixels, alpha and metadata of a Pillow image, upright."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)  # turns the pixels and takes the orientation out of EXIF and XMP
    icc = image.info.get("icc_profile")
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if isinstance(xmp, str):
        xmp = xmp.encode()
    exif = image.info.get("exif") or _exif_of_tags(image)
    if exif and not exif.startswith(_EXIF):
        exif = _EXIF + exif  # formats differ in this; files of ours and JPEG have it
    has_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        pixels = _to_8_bit(np.asarray(image))
        return Picture(pixels[:, :, None], None, icc, exif, xmp)
    gray = image.mode in ("1", "L", "LA", "La")
    converted = image.convert(("LA" if gray else "RGBA") if has_alpha else ("L" if gray else "RGB"))
    array = np.asarray(converted)
    if array.ndim == 2:
        array = array[:, :, None]
    alpha = None
    if has_alpha:
        array, alpha = array[:, :, :-1], np.ascontiguousarray(array[:, :, -1])
        if (alpha == 255).all():
            alpha = None
    if not gray and icc and image.mode == "CMYK":
        icc = None  # the profile described the inks, not the RGB that was made of them
    return Picture(np.ascontiguousarray(array), alpha, icc or None, exif or None, xmp or None)


def _exif_of_tags(image: Image.Image) -> bytes | None:
    """EXIF from tags that a format keeps elsewhere, as TIFF does, without those that describe the file's layout."""
    exif = image.getexif()
    for tag in list(exif):
        if tag in _LAYOUT_TAGS:
            del exif[tag]
    return exif.tobytes() if len(exif) else None


def _to_8_bit(samples: npt.NDArray[np.generic]) -> Pixels:
    """Wide gray samples to 8 bits: 16-bit integers by 257, floats are taken as [0, 1]."""
    wide = samples.astype(np.float64)
    scale = 255.0 if samples.dtype.kind == "f" else 1 / 257
    return np.clip(np.rint(wide * scale), 0, 255).astype(np.uint8)


def to_pillow(picture: Picture) -> Image.Image:
    """The picture as a Pillow image of mode L, LA, RGB or RGBA."""
    array = picture.pixels
    if picture.alpha is not None:
        array = np.concatenate([array, picture.alpha[:, :, None]], 2)
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array))


def write_picture(picture: Picture, format: str) -> bytes:
    """Encode as png, jpeg, webp, tiff, bmp, ppm, avif (through Pillow) or npy ([H, W, C] uint8, alpha last).

    PNG, TIFF, BMP, PPM and NPY are lossless; WebP is written lossless; JPEG and AVIF at quality 95.
    Raises InputError for an unknown format or a picture that it cannot hold.
    """
    out = io.BytesIO()
    if format == "npy":
        array = picture.pixels if picture.alpha is None else np.dstack([picture.pixels, picture.alpha])
        np.save(out, array)
        return out.getvalue()
    if format not in set(OUTPUT_SUFFIXES.values()):
        raise InputError(
            f"unknown output format {format!r}: use one of {', '.join(sorted(set(OUTPUT_SUFFIXES.values())))}"
        )
    image = to_pillow(picture)
    if format in ("jpeg", "ppm") and picture.alpha is not None:
        image = image.convert("RGB" if image.mode == "RGBA" else "L")
    if format == "bmp" and image.mode == "LA":
        image = image.convert("RGBA")
    defaults: dict[str, dict[str, Any]] = {
        "jpeg": {"quality": 95, "subsampling": 0},
        "webp": {"lossless": True, "quality": 20, "method": 1},
        "tiff": {"compression": "tiff_adobe_deflate"},
        "avif": {"quality": 95, "subsampling": "4:4:4"},
    }
    options = defaults.get(format, {})
    if format in ("png", "jpeg", "webp", "tiff", "avif"):
        options |= {k: v for k, v in (("icc_profile", picture.icc), ("exif", picture.exif)) if v}
        if picture.xmp and format in ("jpeg", "webp", "avif"):
            options["xmp"] = picture.xmp
        elif picture.xmp and format == "png":
            from PIL.PngImagePlugin import PngInfo

            text = PngInfo()
            text.add_itxt("XML:com.adobe.xmp", picture.xmp.decode("utf-8", "replace"))
            options["pnginfo"] = text
    try:
        if format == "png":
            return write_png(np.asarray(image), **options)
        image.save(out, format.upper(), **options)
    except (OSError, ValueError) as error:
        raise InputError(f"the picture cannot be written as {format}: {error}") from error
    return out.getvalue()


def encode_alpha(alpha: Pixels) -> bytes:
    """The alpha plane [H, W] as a lossless gray PNG."""
    out = io.BytesIO()
    Image.fromarray(alpha).save(out, "PNG", optimize=True)
    return out.getvalue()


def decode_alpha(data: bytes, width: int, height: int) -> Pixels:
    """Inverse of `encode_alpha`; raises InputError unless it is a gray PNG of exactly this size."""
    try:
        with _open(io.BytesIO(data), ("PNG",)) as image:
            if image.size != (width, height) or image.mode != "L":
                raise InputError("the alpha plane does not match the picture")
            return np.array(image)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"the alpha plane cannot be read: {error}") from error


def write_file(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write all or nothing: a temporary file beside `path`, flushed to disk, then renamed.

    Raises OutputExistsError if `path` is there and `overwrite` is false, InputError if the folder cannot be written.
    """
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} is there already: use --force to replace it or --skip-existing to keep it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def as_picture(image: Any) -> Picture:
    """A `Picture` of an array [H, W] or [H, W, C] uint8, or of a Pillow image.

    C is 1 gray, 3 RGB, or 2 or 4 with alpha as the last channel.
    """
    if isinstance(image, Picture):
        return image
    if hasattr(image, "getexif"):
        return from_pillow(image)
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.shape[2] in (2, 4):
        return Picture(np.ascontiguousarray(array[:, :, :-1]), np.ascontiguousarray(array[:, :, -1]))
    return Picture(array)


def strip_metadata(picture: Picture, ignore: Collection[str]) -> Picture:
    """The picture without the named metadata."""
    return replace(picture, **dict.fromkeys(ignore))  # type: ignore[arg-type]
