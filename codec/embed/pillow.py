"""Calotype as a format of Pillow, once `register()` was called: `Image.open("a.clt")` and `image.save("b.clt")`."""

from __future__ import annotations

import io
from typing import IO, Any

from PIL import Image, ImageFile

from calotype import container
from calotype.api import DEFAULT_MODEL, DEFAULT_QUALITY, DEFAULT_TILE, SCALES, Codec
from calotype.errors import CalotypeError, FormatError, InputError
from calotype.header import BRIEF_LIMIT, BRIEF_MAGIC
from calotype.limits import MAX_METADATA
from calotype.media import from_pillow, to_pillow
from calotype.models.zoo import name_of
from calotype.rate import Target

FORMAT = "CALOTYPE"
_INFO = {"icc": "icc_profile", "exif": "exif", "xmp": "xmp"}
_TARGETS = {"target_size": "size", "target_bpp": "bpp", "target_psnr": "psnr"}
_OPENED = (*container.BOXES.values(), container.HEADER)
"""Chunks that are read when a file is opened; the alpha plane and the tiles are not."""


class PillowError(CalotypeError, OSError):
    """A file that does not decode, for callers that know only Pillow: it promises them an OSError."""

    exit_code = FormatError.exit_code


def register(*, device: str = "auto") -> None:
    """Teach Pillow to open and save `.clt` files, from now on and in every thread.

    Args:
        device: where pictures are encoded and decoded; "auto" is CUDA where there is one, else the CPU.

    Opening reads the header and the metadata (`info["icc_profile"]`, `info["exif"]`, `info["xmp"]`); Pillow's own
    limit of pixels applies. `load` decodes and raises PillowError, which is an OSError too, if it cannot. `draft` and
    with it `thumbnail` decode at 1/2, 1/4 or 1/8 of the size. `save` takes quality (0 to 100), or one of target_size
    (bytes), target_bpp and target_psnr (dB); tile; icc_profile, exif and xmp. As with Pillow's own formats only the
    profile is kept unless it is named; an orientation in `exif` is applied to the pixels. `save` raises InputError,
    LimitError and TargetError.
    """
    CalotypeImageFile.device = device
    Image.register_open(FORMAT, CalotypeImageFile, lambda prefix: prefix.startswith((container.MAGIC, BRIEF_MAGIC)))
    Image.register_save(FORMAT, lambda image, file, _: _save(image, file, device))
    Image.register_extension(FORMAT, container.SUFFIX)
    Image.register_mime(FORMAT, "image/x-calotype")


class CalotypeImageFile(ImageFile.ImageFile):
    """A `.clt` file in Pillow; mode L, LA, RGB or RGBA."""

    format = FORMAT
    format_description = "Calotype neural image"
    device = "auto"

    def _open(self) -> None:
        assert self.fp is not None
        head = _read_head(self.fp)
        try:
            self.header = container.read_header(head)
            # The tiles were not read, so they are missing; what else is damaged shows in `load`.
            boxes = container.read_still(head, max_pixels=self.header.width * self.header.height, partial=True).boxes
        except CalotypeError as error:
            raise SyntaxError(str(error)) from error
        self._size = (self.header.width, self.header.height)
        self._mode = ("L" if self.header.channels == 1 else "RGB") + ("A" if self.header.alpha else "")
        self.info.update({_INFO[kind]: content for kind, content in boxes.items()})
        self.scale = 1
        self.tile = [ImageFile._Tile("raw", (0, 0, *self.size), 0, self.mode)]

    def draft(self, mode: str | None, size: tuple[int, int] | None) -> tuple[str, tuple[int, int, float, float]] | None:
        """Decode at 1/2, 1/4 or 1/8 of the size: the smallest that is not below `size`. The mode stays."""
        if not self.tile or self.scale != 1 or size is None:
            return None
        width, height = self.size
        ratio = min(width // max(size[0], 1), height // max(size[1], 1))
        self.scale = max(scale for scale in SCALES if scale <= max(ratio, 1))
        self._size = (-(-width // self.scale), -(-height // self.scale))
        return self.mode, (0, 0, width / self.scale, height / self.scale)

    def load(self) -> Any:
        """Decode, unless that is done. Raises PillowError."""
        if self.tile:
            assert self.fp is not None
            self.fp.seek(0)
            try:
                codec = Codec.load(name_of(self.header.weights) or DEFAULT_MODEL, device=self.device)
                decoded = codec.decode(
                    self.fp.read(), scale=self.scale, max_pixels=self.header.width * self.header.height
                )
            except CalotypeError as error:
                raise PillowError(str(error)) from error
            image = to_pillow(decoded.picture)
            self.im, self.readonly, self.tile = image.im, image.readonly, []
            if self._exclusive_fp:
                self.fp.close()
            self.fp = None
        return super().load()


def _read_head(file: IO[bytes]) -> bytes:
    """Magic, header and metadata chunks from the start of a file. Raises SyntaxError for a length that is not ours."""
    start = file.read(len(container.MAGIC))
    if container.is_brief(start):
        return start + file.read(BRIEF_LIMIT - len(start))
    parts = [start]
    while len(head := file.read(8)) == 8:
        length, name = int.from_bytes(head[:4], "little"), head[4:]
        if name in _OPENED:
            # Incompressible metadata grows a little in its box.
            if length > 2 * MAX_METADATA:
                raise SyntaxError(f"a metadata box of {length} bytes: the file is damaged")
            parts += [head, file.read(length + 4)]
        elif name[:1].islower():
            file.seek(length + 4, io.SEEK_CUR)
        else:
            break
    return b"".join(parts)


def _save(image: Image.Image, file: IO[bytes], device: str) -> None:
    options = image.encoderinfo
    given = {kind: float(options[name]) for name, kind in _TARGETS.items() if options.get(name) is not None}
    if len(given) > 1 or (given and "quality" in options):
        raise InputError(f"choose one of quality, {', '.join(_TARGETS)}")
    target = next((Target(kind, value) for kind, value in given.items()), None)  # type: ignore[arg-type]
    plain = image.copy()
    exif, xmp = options.get("exif"), options.get("xmp")
    metadata = {
        "icc_profile": options.get("icc_profile", image.info.get("icc_profile")),
        "exif": exif.tobytes() if isinstance(exif, Image.Exif) else exif,
        "xmp": xmp,
        "transparency": image.info.get("transparency"),
    }
    plain.info = {key: value for key, value in metadata.items() if value is not None}
    encoded = Codec.load(device=device).encode(
        from_pillow(plain),
        quality=options.get("quality", DEFAULT_QUALITY),
        target=target,
        tile=options.get("tile", DEFAULT_TILE),
    )
    file.write(encoded.data)
