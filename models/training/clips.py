"""Clips for training the video model: frames in Y'CbCr 4:2:0 and the motion between them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from calotype.models import tables
from calotype.models.motion import BLOCK, HALF_WIDTHS, Planes, Reference, code_field, search
from calotype.models.training.counting import SymbolCounts

SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".y4m"}
ALIGN = 16
MOTION_COST = 6 / 255
"""What a bit of motion may save in absolute differences, as in `motion.search`; of a middle quality."""


@dataclass(frozen=True)
class Clip:
    """Frames, and the motion of the clip as it is played to and fro without end.

    luma: [T, H, W] uint8; chroma: [T, 2, H/2, W/2] uint8. Played to and fro it shows the frames `order`, over and over;
    fields: [2T - 2, 2, H/8, W/8] int16, from each frame of `order` to the one shown before it.
    """

    luma: Tensor
    chroma: Tensor
    fields: Tensor

    @property
    def order(self) -> list[int]:
        """Numbers of the frames shown in one period: 0 1 … T-1 T-2 … 1."""
        return to_and_fro(len(self.luma))


def to_and_fro(frames: int) -> list[int]:
    return [*range(frames), *range(frames - 2, 0, -1)]


def find_clips(folder: Path) -> list[Path]:
    """All video files below `folder`, sorted. Raises FileNotFoundError if there are none."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"no clips ({', '.join(sorted(SUFFIXES))}) below {folder}")
    return found


def load_frames(path: Path, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Luma [T, H, W] and chroma [T, 2, H/2, W/2] uint8; sides are cut to multiples of 16."""
    luma, chroma = [], []
    with av.open(str(path)) as source:
        for frame in source.decode(video=0):
            planes = []
            for plane in frame.reformat(format="yuv420p").planes:
                array = np.frombuffer(bytes(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
                planes.append(torch.from_numpy(array.copy()))
            height, width = (s // ALIGN * ALIGN for s in planes[0].shape)
            luma.append(planes[0][:height, :width])
            chroma.append(torch.stack([p[: height // 2, : width // 2] for p in planes[1:]]))
            if len(luma) == limit:
                break
    return torch.stack(luma), torch.stack(chroma)


def to_planes(luma: Tensor, chroma: Tensor) -> Planes:
    """[B, H, W] and [B, 2, H/2, W/2] uint8 to floats in [-0.5, 0.5]."""
    return Planes(luma[:, None].float() / 255 - 0.5, chroma.float() / 255 - 0.5)


@torch.inference_mode()
def load_clip(path: Path) -> Clip:
    """Frames and their motion, found between the original frames."""
    luma, chroma = load_frames(path)
    fields: list[Tensor] = []
    order = to_and_fro(len(luma))
    for i, j in zip(order, [*order[1:], 0], strict=True):
        before, now = (to_planes(luma[k : k + 1], chroma[k : k + 1]) for k in (i, j))
        previous = fields[-1][None].long() if fields else None
        fields.append(search(now, Reference(before), MOTION_COST, previous)[0].short())
    return Clip(luma, chroma, torch.stack([fields[-1], *fields[:-1]]))


def load_clips(folder: Path, cache: Path) -> list[Clip]:
    """All clips below `folder`. The search takes a tenth of a second a frame, so its result is kept in `cache`."""
    paths = find_clips(folder)
    known = torch.load(cache, weights_only=True) if cache.exists() else {}
    clips = []
    for path in paths:
        if path.name in known:
            luma, chroma = load_frames(path)
            clips.append(Clip(luma, chroma, known[path.name]))
        else:
            clips.append(load_clip(path))
            known[path.name] = clips[-1].fields
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(known, cache)
    return clips


def count_vectors(fields: Iterable[Tensor]) -> list[Tensor]:
    """How often each symbol of motion fields [T, 2, h, w] was coded in each context: the input of `fit_tables`."""
    counts = SymbolCounts(HALF_WIDTHS, tables.SKIP)
    for frames in fields:
        previous = torch.zeros_like(frames[:1]).long()
        for field in frames[1:].long().split(1):
            previous = counts.of(code_field((1, *field.shape[2:]), previous, tables.SKIP, field))
    return counts.rows


@dataclass(frozen=True)
class Segment:
    """A run of frames at one place of a clip: luma [T, P, P], chroma [T, 2, P/2, P/2], fields [T, 2, P/8, P/8]."""

    luma: Tensor
    chroma: Tensor
    fields: Tensor


class RandomSegments:
    """Endless random segments of clips, with flips; all clips are held decoded in memory.

    Clips are short; a longer segment plays one to and fro.
    """

    def __init__(self, clips: list[Clip], *, frames: int, crop: int, seed: int) -> None:
        self.frames, self.crop = frames, crop
        self.random = random.Random(seed)
        self.clips = [c for c in clips if min(c.luma.shape[1:]) >= crop and len(c.luma) > 1]
        if not self.clips:
            raise ValueError(f"no clip has two frames of at least {crop} pixels on their short side")

    def __next__(self) -> Segment:
        rng, side = self.random, self.crop
        clip = rng.choice(self.clips)
        order = clip.order
        start = rng.randrange(len(order))
        times = [(start + i) % len(order) for i in range(self.frames)]
        numbers = [order[time] for time in times]
        # Crops begin at whole blocks of chroma and motion.
        top = rng.randrange((clip.luma.shape[1] - side) // ALIGN + 1) * ALIGN
        left = rng.randrange((clip.luma.shape[2] - side) // ALIGN + 1) * ALIGN
        luma = clip.luma[numbers, top : top + side, left : left + side]
        chroma = clip.chroma[numbers, :, top // 2 : (top + side) // 2, left // 2 : (left + side) // 2]
        fields = clip.fields[
            times, :, top // BLOCK : (top + side) // BLOCK, left // BLOCK : (left + side) // BLOCK
        ].clone()
        if rng.random() < 0.5:
            luma, chroma, fields = luma.flip(2), chroma.flip(3), fields.flip(3)
            fields[:, 1] = -fields[:, 1]
        if rng.random() < 0.5:
            luma, chroma, fields = luma.transpose(1, 2), chroma.transpose(2, 3), fields.transpose(2, 3).flip(1)
        return Segment(luma, chroma, fields)
