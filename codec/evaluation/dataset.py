"""A folder of pictures or clips to measure on, and the fingerprint that says which they were."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calotype.errors import InputError
from calotype.evaluation import clips
from calotype.evaluation.metrics import Medium
from calotype.media import INPUT_SUFFIXES, Pixels, read_picture


@dataclass(frozen=True)
class Dataset:
    """Files of a folder: names relative to it, sorted; `fingerprint` is the sha256 of all names and contents.

    `pictures` are clips if it was loaded as video.
    """

    name: str
    folder: Path
    pictures: tuple[str, ...]
    fingerprint: str

    @classmethod
    def load(cls, source: Path, medium: Medium = "still") -> Dataset:
        """All pictures or videos in and below a folder, by their suffixes, or one file. Raises InputError."""
        suffixes, what = (INPUT_SUFFIXES, "picture") if medium == "still" else (clips.SUFFIXES, "video")
        if source.is_file():
            folder, files = source.parent, [source]
        elif source.is_dir():
            folder = source
            files = sorted(p for p in source.rglob("*") if p.is_file() and p.suffix.lower() in suffixes)
        else:
            raise InputError(f"{source} is neither a folder nor a {what} file")
        if not files:
            raise InputError(f"{source} has no {what}s ({', '.join(sorted(suffixes))})")
        digest = hashlib.sha256()
        names = sorted(path.relative_to(folder).as_posix() for path in files)
        for name in names:
            content = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            digest.update(f"{content}  {name}\n".encode())  # the lines of sha256sum
        return cls(source.resolve().name, folder, tuple(names), digest.hexdigest())

    def read(self, name: str) -> Pixels:
        return read_rgb(self.folder / name)


@functools.lru_cache(maxsize=2)
def read_rgb(path: Path) -> Pixels:
    """A picture as [H, W, 3] uint8; gray is repeated, alpha dropped. The last two stay in memory, read-only."""
    pixels = read_picture(path).pixels
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, 2)
    pixels.flags.writeable = False
    return pixels
