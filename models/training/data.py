"""Random crops from a folder of photographs."""

from __future__ import annotations

import queue
import random
import threading
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
    """An endless, prefetched stream of batches [B, 3, P, P] uint8, with random flips and transposes.

    All photographs are held decoded in memory (three bytes a pixel), so that the loop never waits for a decoder.
    """

    def __init__(self, folder: Path, *, batch: int, crop: int, seed: int, prefetch: int = 4) -> None:
        self.batch, self.crop = batch, crop
        self.random = random.Random(seed)
        photos = [load_rgb(p) for p in find_photos(folder)]
        self.photos = [p for p in photos if min(p.shape[:2]) >= crop]
        if not self.photos:
            raise ValueError(f"no photograph below {folder} is at least {crop} pixels on its short side")
        # A photograph is drawn as often as its number of crops, so that no pixel is favoured.
        self.weights = [float(p.shape[0] * p.shape[1]) for p in self.photos]
        self.queue: queue.Queue[Tensor] = queue.Queue(prefetch)
        threading.Thread(target=self._fill, daemon=True).start()

    def _fill(self) -> None:
        while True:
            self.queue.put(self._draw())

    def _draw(self) -> Tensor:
        side, rng = self.crop, self.random
        out = np.empty((self.batch, side, side, 3), np.uint8)
        for i, photo in enumerate(rng.choices(self.photos, self.weights, k=self.batch)):
            top = rng.randrange(photo.shape[0] - side + 1)
            left = rng.randrange(photo.shape[1] - side + 1)
            crop = photo[top : top + side, left : left + side]
            if rng.random() < 0.5:
                crop = crop[:, ::-1]
            if rng.random() < 0.5:
                crop = crop.transpose(1, 0, 2)
            out[i] = crop
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    def __next__(self) -> Tensor:
        return self.queue.get()
