"""A strip of crops at about the same file size: original, JPEG, WebP, Calotype. Makes the picture in README.

python benchmarks/strip.py samples/coffee.png docs/images/strip.png --bpp 0.25 --crop 180,120,240,240
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from calotype.api import Codec, psnr
from calotype.media import Picture, read_picture, to_pillow
from calotype.rate import Target

CAPTION = 22


def pillow_at(picture: Picture, size: int, save: Callable[[Image.Image, io.BytesIO, int], None]) -> tuple[int, Picture]:
    """The largest file of at most `size` bytes (or the smallest there is) over qualities 1 to 95."""
    best: tuple[int, Picture] | None = None
    for quality in range(95, 0, -1):
        out = io.BytesIO()
        save(to_pillow(picture), out, quality)
        best = len(out.getvalue()), read_picture(out.getvalue())
        if best[0] <= size:
            break
    assert best is not None
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bpp", type=float, default=0.25)
    parser.add_argument("--crop", default="0,0,256,256", help="x,y,width,height")
    options = parser.parse_args()
    x, y, width, height = map(int, options.crop.split(","))
    picture = read_picture(options.picture)
    codec = Codec.load()
    encoded = codec.encode(picture, target=Target("bpp", options.bpp))
    size = len(encoded.data)
    columns = [
        ("original", None, picture),
        ("JPEG", *pillow_at(picture, size, lambda im, out, q: im.save(out, "JPEG", quality=q, optimize=True))),
        ("WebP", *pillow_at(picture, size, lambda im, out, q: im.save(out, "WEBP", quality=q, method=6))),
        ("Calotype", size, codec.decode(encoded.data).picture),
    ]
    strip = Image.new("RGB", ((width + 4) * len(columns) - 4, height + CAPTION), "white")
    draw = ImageDraw.Draw(strip)
    for number, (name, length, shown) in enumerate(columns):
        left = number * (width + 4)
        crop = np.ascontiguousarray(shown.pixels[y : y + height, x : x + width])
        strip.paste(to_pillow(Picture(crop)).convert("RGB"), (left, CAPTION))
        text = name if length is None else f"{name}  {length} B  {psnr(picture.pixels, shown.pixels):.2f} dB"
        draw.text((left + 2, 5), text, fill="black")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    strip.save(options.output, optimize=True)


if __name__ == "__main__":
    main()
