r"""Crops of pictures beside each other, one row a picture: the original, and what codecs make of it. Makes the pictures
in README and docs.

python benchmarks/strip.py docs/images/strip.png samples/coffee.png:180,80,240,240 --bpp 0.25
python benchmarks/strip.py docs/images/low.jpg samples/chelsea.png:120,40,220,220 samples/astronaut.png:130,0,220,220 \
    samples/coffee.png:180,80,220,220 --columns q5,q10,q20
python benchmarks/strip.py docs/images/visual.jpg samples/chelsea.png:120,40,220,220 \
    samples/astronaut.png:130,0,220,220 samples/coffee.png:180,80,220,220 --columns avif,calotype,visual --bpp 0.2

Columns: jpeg, webp and avif at the size of the last column of Calotype; calotype; visual, the model of that name;
qN, Calotype at quality N.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from calotype.api import DEFAULT_MODEL, Codec, psnr
from calotype.media import Picture, read_picture, to_pillow
from calotype.rate import Target
from calotype.service.anchors import Format, largest_within

CAPTION = 22
GAP = 4
OTHERS: dict[str, tuple[Format, str | None]] = {"jpeg": ("jpeg", None), "webp": ("webp", None), "avif": ("avif", "4")}
"""Format and variant of the evaluation's codec."""


def other(name: str, picture: Picture, size: int) -> tuple[int, Picture]:
    format, variant = OTHERS[name]
    written = largest_within(picture, format, size, (), lambda: None, variant)
    return len(written.data), read_picture(written.data)


def own(name: str, picture: Picture, bpp: float) -> tuple[int, Picture]:
    codec = Codec.load("visual" if name == "visual" else DEFAULT_MODEL)
    if name.startswith("q"):
        data = codec.encode(picture, quality=float(name[1:]), metadata=()).data
    else:
        data = codec.encode(picture, target=Target("bpp", bpp), metadata=()).data
    return len(data), codec.decode(data).picture


def row(picture: Picture, columns: list[str], bpp: float) -> list[tuple[str, Picture]]:
    """(caption, picture) of the original and each column."""
    made = {name: own(name, picture, bpp) for name in columns if name not in OTHERS}
    size = list(made.values())[-1][0]
    made |= {name: other(name, picture, size) for name in columns if name in OTHERS}
    captions = {"calotype": "Calotype", "visual": "Calotype, visual", "jpeg": "JPEG", "webp": "WebP", "avif": "AVIF"}
    shown = [("original", picture)]
    for name in columns:
        length, decoded = made[name]
        caption = captions.get(name, f"quality {name[1:]}")
        shown.append((f"{caption}  {length} B  {psnr(picture.pixels, decoded.pixels):.2f} dB", decoded))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("pictures", nargs="+", help="PICTURE:x,y,width,height; crops of equal size")
    parser.add_argument("--columns", default="jpeg,webp,calotype")
    parser.add_argument("--bpp", type=float, default=0.25)
    options = parser.parse_args()
    rows = []
    for text in options.pictures:
        path, _, crop = text.rpartition(":")
        rows.append((row(read_picture(Path(path)), options.columns.split(","), options.bpp), crop.split(",")))
    width, height = (int(side) for side in rows[0][1][2:])
    across = len(rows[0][0])
    strip = Image.new("RGB", ((width + GAP) * across - GAP, (height + CAPTION) * len(rows)), "white")
    draw = ImageDraw.Draw(strip)
    for number, (shown, crop) in enumerate(rows):
        x, y = int(crop[0]), int(crop[1])
        for place, (caption, picture) in enumerate(shown):
            left, top = place * (width + GAP), number * (height + CAPTION)
            pixels = np.ascontiguousarray(picture.pixels[y : y + height, x : x + width])
            strip.paste(to_pillow(Picture(pixels)).convert("RGB"), (left, top + CAPTION))
            draw.text((left + 2, top + 5), caption, fill="black")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    strip.save(options.output, **({"quality": 92} if options.output.suffix == ".jpg" else {"optimize": True}))


if __name__ == "__main__":
    main()
