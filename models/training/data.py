"""Random crops from a folder of photographs."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import EllipsisType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def find_photos(folder: Path) -> list[Path]:
    """All photographs below `folder`, sorted. Raises FileNotFoundError if there are none."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"no photographs ({', '.join(sorted(SUFFIXES))}) below {folder}")
    return found


def load_rgb(path: Path) -> np.ndarray:
    """The photograph as [H, W, 3] uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def to_tensor(photo: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 to [1, 3, H, W] in [-0.5, 0.5]."""
    return torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() / 255 - 0.5


def random_part(rng: random.Random, crop: int, side: int) -> tuple[EllipsisType, slice, slice]:
    """Where a square of `side`, at most the crop, lies in a crop [..., P, P]: at whole multiples of 16 pixels."""
    side = min(side, crop)
    top, left = (16 * rng.randrange((crop - side) // 16 + 1) for _ in range(2))
    return ..., slice(top, top + side), slice(left, left + side)


class RandomCrops:
    """An endless stream of batches [B, 3, P, P] uint8, channels innermost in memory, with random flips and transposes.

    All photographs are held decoded in the memory of `device` (three bytes a pixel), and crops are cut there, so that
    the loop never waits for a decoder or a transfer. Photographs with a shorter side than the crop are left out.
    """

    def __init__(
        self, folder: Path, *, batch: int, crop: int, seed: int, device: torch.device = torch.device("cpu")
    ) -> None:
        self.batch, self.crop, self.device = batch, crop, device
        self.generator = torch.Generator(device).manual_seed(seed)
        with ThreadPoolExecutor() as pool:
            photos = [p for p in pool.map(load_rgb, find_photos(folder)) if min(p.shape[:2]) >= crop]
        if not photos:
            raise ValueError(f"no photograph below {folder} is at least {crop} pixels on its short side")
        self.pixels = torch.from_numpy(np.concatenate([p.reshape(-1, 3) for p in photos])).to(device)
        self.heights, self.widths = torch.tensor([p.shape[:2] for p in photos], device=device).unbind(1)
        self.ends = (self.heights * self.widths).cumsum(0)

    def __next__(self) -> Tensor:
        shape = 5, self.batch, 1
        u = torch.rand(shape, generator=self.generator, device=self.device, dtype=torch.float64).unbind()
        # A photograph is drawn as often as its number of pixels, so that no pixel is favoured.
        which = torch.searchsorted(self.ends, (u[0] * self.ends[-1]).long(), right=True)
        height, width, side = self.heights[which], self.widths[which], self.crop
        top, left = (u[1] * (height - side + 1)).long(), (u[2] * (width - side + 1)).long()
        first = self.ends[which] - height * width + top * width + left
        across = torch.arange(side, device=self.device)
        down = width * across
        across = torch.where(u[3] < 0.5, across, across.flip(0))
        rows, columns = (torch.where(u[4] < 0.5, a, b) for a, b in ((down, across), (across, down)))
        where = first[:, :, None] + rows[:, :, None] + columns[:, None, :]
        return self.pixels[where].permute(0, 3, 1, 2)
