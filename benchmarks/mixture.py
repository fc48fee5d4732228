"""The model `mixture`: its speed against `hyperprior` in the same run, and how well its codebooks are used.

    python benchmarks/mixture.py FOLDER [--threads 2] [--quality 60] [--pictures 4] [--repeat 5] [--device cpu]
    python benchmarks/mixture.py FOLDER --codebooks [--pictures 24]

Speed: both models encode and decode every picture in turns, at equal quality; a time is the median of its turns. Stop
everything else on the machine while it runs.

Codebooks: over all pictures at qualities 0 to 100 in steps of 10, how many codewords of every codebook are used, the
perplexity of their use, and what the prior saves of the bits that the symbols would take at log2 K each; of those that
are coded, and of all with those that are skipped.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from speed import medians

from calotype.api import Codec
from calotype.media import Picture, read_picture
from calotype.models.mixture import Mixture
from calotype.models.quantizers import QUALITY_STEPS
from calotype.models.training.codebooks import Scene, levels, observe


def compare(pictures: list[Picture], quality: float, repeat: int, device: str) -> None:
    """Print ratios and times of both ways, and the rates."""
    codecs = {name: Codec.load(name, device=device) for name in ("hyperprior", "mixture")}
    totals: dict[str, float] = {}
    sizes = dict.fromkeys(codecs, 0)
    for picture in pictures:
        files = {name: codec.encode(picture, quality=quality).data for name, codec in codecs.items()}
        actions = {}
        for name, codec in codecs.items():
            sizes[name] += len(files[name])
            actions[f"{name} encode"] = lambda c=codec, p=picture: c.encode(p, quality=quality)
            actions[f"{name} decode"] = lambda c=codec, d=files[name]: c.decode(d)
        for action, spent in medians(actions, repeat).items():
            totals[action] = totals.get(action, 0.0) + spent
    megapixels = sum(p.width * p.height for p in pictures) / 1e6
    print(f"{len(pictures)} pictures, {megapixels:.2f} Mpx, quality {quality:g}, {device}")
    ratios = {way: totals[f"hyperprior {way}"] / totals[f"mixture {way}"] for way in ("encode", "decode")}
    print(f"mixture is faster than hyperprior: encode {ratios['encode']:.2f}x, decode {ratios['decode']:.2f}x")
    for name in codecs:
        speeds = ", ".join(f"{way} {megapixels / totals[f'{name} {way}']:.2f} Mpx/s" for way in ratios)
        print(f"{name}: {speeds}, {sizes[name] * 8 / megapixels / 1e6:.3f} bpp")


def report_codebooks(pictures: list[Picture], device: str) -> None:
    """Print use, perplexity and savings over all qualities."""
    network = Codec.load("mixture", device=device).coder.network
    assert isinstance(network, Mixture)
    scenes = []
    for picture in pictures:
        height, width = (side // 16 * 16 for side in picture.pixels.shape[:2])
        x = torch.from_numpy(picture.pixels[:height, :width].copy()).permute(2, 0, 1)[None].float().div(255).sub(0.5)
        x = x.contiguous(memory_format=torch.channels_last)
        for quality in range(0, QUALITY_STEPS + 1, QUALITY_STEPS // 10):
            y = network.analyse(x, torch.tensor([quality / QUALITY_STEPS]))
            middle, coarse = network.hyper_analysis(y)
            scenes.append(Scene(coarse, middle, y, torch.tensor([quality])))
    found, bits = observe(network, scenes)
    fixed = everything = 0.0
    for level, own, name in zip(levels(network), found, ("coarse", "middle", "fine"), strict=True):
        for book, statistics in zip(level.books, own, strict=True):
            counts = statistics.counts.sum(0)
            share = counts / counts.sum()
            perplexity = 2 ** -float((share * share.clamp(min=1e-12).log2()).sum())
            fixed += float(counts.sum()) * math.log2(book.size)
            used = int((counts > 0).sum())
            kind = f"{name:6} {book.groups:3} groups of {book.dimension}, K {book.size:3}"
            print(f"{kind}: used {used / book.size:6.1%}, perplexity {perplexity:6.1f}, coded {counts.sum():.3g}")
        positions = sum(getattr(s, {"fine": "y"}.get(name, name)).shape[2:].numel() for s in scenes)
        everything += positions * sum(book.groups * math.log2(book.size) for book in level.books)
    print(
        f"saved against log2 K for each symbol: {1 - bits / fixed:.1%} of the coded, {1 - bits / everything:.1%} of all"
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--codebooks", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quality", type=float, default=60)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    paths = sorted(p for p in options.folder.iterdir() if p.suffix in (".png", ".jpg", ".webp"))[: options.pictures]
    pictures = [read_picture(p) for p in paths]
    if options.codebooks:
        report_codebooks(pictures, options.device)
    else:
        compare(pictures, options.quality, options.repeat, options.device)


if __name__ == "__main__":
    main()
