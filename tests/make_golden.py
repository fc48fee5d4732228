"""Write the folders tests/golden*: files that every later version must decode to the same symbols.

Run after new weights:

python tests/make_golden.py
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

import av
import numpy as np
from video_clips import pan

from calotype import VideoEncoder
from calotype.api import Codec
from calotype.media import Picture, read_picture, write_picture
from calotype.video.frames import Frame
from calotype.video.gop import GopDecoder
from calotype.video.packet import FramePacket
from calotype.video.stream import StreamReader, StreamWriter

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
EARLIER = {"hyperprior-1": TESTS / "golden_hyperprior_1"}
"""Files of weights that others have taken the place of: never made again."""
MIXTURE = TESTS / "golden_mixture"
MIXTURE_CASES = ("portrait-q10", "portrait-q60", "coffee-q85", "alpha-q30", "tiles-q25", "pattern-q100", "pixel-q50")
VISUAL = TESTS / "golden_visual"
VISUAL_CASES = ("portrait-q10", "coffee-q85")
VQGAN = TESTS / "golden_vqgan"
VQGAN_PACKETS = {"portrait-q10": 1, "portrait-q60": 5, "coffee-q85": 1, "alpha-q30": 2, "tiles-q25": 4, "pixel-q50": 3}
VIDEO = TESTS / "golden_video"
INDEX = "hashes.json"


def _crop(name: str, top: int, left: int, height: int, width: int, step: int = 1) -> np.ndarray:
    pixels = read_picture(TESTS.parent / "samples" / name).pixels
    return np.ascontiguousarray(pixels[top : top + height * step : step, left : left + width * step : step])


def _pattern(height: int, width: int) -> np.ndarray:
    """Colours, hard edges and noise: symbols that a photograph seldom has."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    y, x = np.mgrid[:height, :width]
    checks = ((y // 9 + x // 11) % 2).astype(bool)
    pixels[checks] = np.stack([x * 255 // width, y * 255 // height, 255 - x * 255 // width], 2)[checks]
    return pixels


def cases() -> dict[str, tuple[Picture, float, int]]:
    """Name -> (picture, quality, tile side)."""
    face, cup = _crop("astronaut.png", 40, 160, 96, 120), _crop("coffee.png", 100, 220, 90, 110)
    fur = _crop("chelsea.png", 60, 120, 128, 128)
    ramp = np.linspace(0, 255, 70 * 50).reshape(50, 70).astype(np.uint8)
    return {
        "portrait-q10": (Picture(face), 10, 1024),
        "portrait-q60": (Picture(face), 60, 1024),
        "coffee-q85": (Picture(cup), 85, 1024),
        "fur-q100": (Picture(fur), 100, 1024),
        "gray-q45": (Picture(fur[:77, :101, 1:2].copy()), 45, 1024),
        "alpha-q30": (Picture(face[:50, :70].copy(), ramp), 30, 1024),
        "tiles-q25": (Picture(_crop("rocket.jpg", 20, 60, 200, 280, 2)), 25, 256),
        "pattern-q0": (Picture(_pattern(64, 80)), 0, 1024),
        "pattern-q100": (Picture(_pattern(40, 48)), 100, 1024),
        "pixel-q50": (Picture(np.array([[[200, 30, 90]]], np.uint8)), 50, 1024),
    }


def main() -> None:
    """Replace the files of all folders."""
    make_stills("hyperprior", GOLDEN, cases())
    make_stills("visual", VISUAL, {name: cases()[name] for name in VISUAL_CASES})
    make_stills("mixture", MIXTURE, {name: case for name, case in cases().items() if name in MIXTURE_CASES})
    make_stills("vqgan", VQGAN, {name: cases()[name] for name in VQGAN_PACKETS}, VQGAN_PACKETS)
    make_video()


def make_stills(
    model: str,
    folder: Path,
    pictures: dict[str, tuple[Picture, float, int]],
    packets: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Replace the folder's files: every picture encoded and decoded, and the hashes of the symbols."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    codec = Codec.load(model, device="cpu")
    index = {}
    for name, (picture, quality, tile) in pictures.items():
        data = codec.encode(picture, quality=quality, tile=tile, packets=packets.get(name, 1)).data
        (folder / f"{name}.clt").write_bytes(data)
        (folder / f"{name}.png").write_bytes(write_picture(codec.decode(data).picture, "png"))
        index[f"{name}.clt"] = {"symbols": codec.symbol_hash(data), "pixels_png": f"{name}.png"}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def make_video() -> None:
    """A raw stream of two groups of pictures, the hash of its symbols, and its last frame."""
    VIDEO.mkdir(exist_ok=True)
    clip = io.BytesIO()
    writer = StreamWriter(clip)
    with VideoEncoder(112, 80, time_base=Fraction(1, 25), quality=45, keyint=4, device="cpu") as encoder:
        pictures = [av.VideoFrame.from_ndarray(rgb, "rgb24") for rgb in pan(7, (112, 80), sample="coffee.png")]
        for number, picture in enumerate(pictures):
            picture.pts, picture.time_base = number, Fraction(1, 25)
            for packet in encoder.encode(picture):
                writer.write(packet.data)
        for packet in encoder.encode(None):
            writer.write(packet.data)
    writer.close()
    (VIDEO / "pan.clt").write_bytes(clip.getvalue())
    frames, symbols = decode_video(clip.getvalue())
    last = frames[-1]
    np.savez_compressed(VIDEO / "last.npz", y=last.y, u=last.u, v=last.v)
    (VIDEO / INDEX).write_text(json.dumps({"pan.clt": {"symbols": symbols, "frames": len(frames)}}, indent=2) + "\n")


def decode_video(data: bytes) -> tuple[list[Frame], str]:
    """All frames of a raw stream, and the SHA-256 of all symbols."""
    digest, frames = hashlib.sha256(), []
    decoder: GopDecoder | None = None
    for _, packet in StreamReader(data).packets():
        fields = FramePacket.unpack(packet)
        if decoder is None:
            assert fields.config is not None
            decoder = GopDecoder(fields.config.format, "cpu", symbols_seen=digest.update)
        frames.append(decoder.decode(fields.payload, key=fields.key))
    return frames, digest.hexdigest()


if __name__ == "__main__":
    main()
