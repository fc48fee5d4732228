"""Lost packets of the token model: how much worse are pictures when a share of the packets is gone?

    python benchmarks/loss.py FOLDER --quality 70 --share 0.2
    python benchmarks/loss.py samples/coffee.png --quality 90 --strip docs/images/tokens.jpg

For each picture: PSNR and feature distance to the original without loss, with the lost tokens restored, and with the
mean codeword in their places. The same packets are lost for both.
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from calotype.api import Codec, psnr
from calotype.evaluation import features
from calotype.media import read_picture
from calotype.models.tokens import interleave
from calotype.models.vqgan import Vqgan
from calotype.tokens import Tokens

KINDS = ("whole", "restored", "mean")


def draw(network: Vqgan, codewords: Tensor, step: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Pixels [h, w, 3] of codewords [1, D, H, W]."""
    x = network.synthesise(codewords, torch.tensor([step]))[0, :, : size[0], : size[1]]
    pixels: npt.NDArray[np.uint8] = x.add(0.5).mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels


@torch.inference_mode()
def variants(network: Vqgan, tokens: Tokens, known: Tensor, size: tuple[int, int]) -> dict[str, npt.NDArray[np.uint8]]:
    """The picture without loss, restored, and filled with the mean codeword of what is left."""
    indexes, step = torch.from_numpy(tokens.indexes)[None].long(), network.ladder_step(round(10 * tokens.quality))
    codewords = network.embed(indexes, step)
    mean = codewords[:, :, known].mean(2)[:, :, None, None]
    made = {
        "whole": codewords,
        "restored": network.embed(indexes, step, known[None]),
        "mean": torch.where(known, codewords, mean),
    }
    return {kind: draw(network, made[kind], step, size) for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="a folder, or a picture")
    parser.add_argument(
        "--strip", type=Path, help="write the original and the variants of the last picture, side by side"
    )
    parser.add_argument("--model", default="vqgan")
    parser.add_argument("--quality", type=float, default=70)
    parser.add_argument("--effort", type=int, default=5)
    parser.add_argument("--packets", type=int, default=10)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    codec = Codec.load(arguments.model, device="cpu")
    network = codec.coder.network
    assert isinstance(network, Vqgan)
    chosen = random.Random(arguments.seed)
    rows: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for path in sorted(arguments.input.iterdir()) if arguments.input.is_dir() else [arguments.input]:
        picture = read_picture(path)
        tokens = codec.tokenise(picture, quality=arguments.quality, effort=arguments.effort)
        lost = chosen.sample(range(arguments.packets), round(arguments.share * arguments.packets))
        known = ~torch.isin(interleave(*tokens.indexes.shape, arguments.packets), torch.tensor(lost))
        made = variants(network, tokens, known, picture.pixels.shape[:2])
        for kind, pixels in made.items():
            rows[kind].append((psnr(picture.pixels, pixels), features.distance(picture.pixels, pixels)))
        print(path.name, *(f"{kind} {rows[kind][-1][0]:.2f} dB {rows[kind][-1][1]:.4f}" for kind in KINDS), sep="  ")
    if arguments.strip:
        Image.fromarray(np.hstack([picture.pixels, *made.values()])).save(arguments.strip, quality=90)
    for kind in KINDS:
        decibels, distances = (statistics.fmean(values) for values in zip(*rows[kind], strict=True))
        print(f"{kind:8}  PSNR {decibels:.2f} dB  feature distance {distances:.4f}")


if __name__ == "__main__":
    main()
