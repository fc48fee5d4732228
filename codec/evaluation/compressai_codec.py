"""Learned codecs of CompressAI as anchors: its architectures, its own entropy coding, weights from a folder.

Their weights cannot be shipped. Put the files of its model zoo (such as `mbt2018-mean-1-e522738d.pth.tar`) in a folder
and name it in the environment variable CALOTYPE_COMPRESSAI_WEIGHTS. The setting is CompressAI's quality, 1 to 8.
Unlike the rates in CompressAI's own tables, which leave out headers, ours are of files: 8 bytes of sizes more and
4 a string.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from calotype.errors import InputError
from calotype.evaluation.still_codecs import Seconds, Size, StillCodec
from calotype.media import Pixels

FOLDER_VARIABLE = "CALOTYPE_COMPRESSAI_WEIGHTS"
_SIZES = struct.Struct("<HHHH")
_LENGTH = struct.Struct("<I")
_STRIDE = 64


def missing() -> str | None:
    """Why no codec of CompressAI can run; None if one could."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder or not Path(folder).is_dir():
        return f"{FOLDER_VARIABLE} does not name a folder with weights of CompressAI"
    try:
        importlib.import_module("compressai")
    except ImportError:
        return "the package compressai is not installed"
    return None


class CompressAiCodec(StillCodec):
    """One architecture; the networks of its qualities are loaded as they are used, the last one stays."""

    suffix = ".cai"

    def __init__(self, architecture: str, device: str, threads: int) -> None:
        from compressai.zoo.image import model_architectures

        if architecture not in model_architectures:
            raise InputError(f"compressai has no {architecture!r}: use one of {', '.join(model_architectures)}")
        self.architecture, self.device, self.threads = architecture, device, threads
        self._loaded: tuple[int, Any] | None = None

    def _weights(self, quality: int) -> Path:
        folder = Path(os.environ.get(FOLDER_VARIABLE, ""))
        found = sorted(folder.glob(f"{self.architecture}-{quality}-*.pth*"))
        if not found:
            raise InputError(f"{folder} has no weights {self.architecture}-{quality}-*.pth.tar")
        return found[0]

    def _network(self, quality: int) -> Any:
        if self._loaded is None or self._loaded[0] != quality:
            import torch
            from compressai.zoo.image import model_architectures
            from compressai.zoo.pretrained import load_pretrained

            state = load_pretrained(torch.load(self._weights(quality), map_location="cpu", weights_only=True))
            network = model_architectures[self.architecture].from_state_dict(state).eval().to(self.device)
            network.update()
            self._loaded = quality, network
        return self._loaded[1]

    def describe(self, setting: float) -> str:
        path = self._weights(round(setting))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        version = importlib.metadata.version("compressai")
        return f"compressai {version}: {path.name}, weights sha256 {digest}, {self.device}, {self.threads} threads"

    def encode(self, pixels: Pixels, setting: float, path: Path) -> Seconds:
        import torch

        height, width = pixels.shape[:2]
        padded = np.pad(pixels, ((0, -height % _STRIDE), (0, -width % _STRIDE), (0, 0)), mode="edge")
        x = torch.from_numpy(padded.copy()).permute(2, 0, 1)[None].to(self.device).float() / 255
        with torch.inference_mode():
            out = self._network(round(setting)).compress(x)
        parts = [bytes([round(setting)]), _SIZES.pack(height, width, *out["shape"])]
        for (string,) in out["strings"]:
            parts += [_LENGTH.pack(len(string)), string]
        path.write_bytes(b"".join(parts))
        return {}

    def decode(self, path: Path, size: Size) -> tuple[Pixels, Seconds]:
        import torch

        data = path.read_bytes()
        height, width, *shape = _SIZES.unpack_from(data, 1)
        strings, place = [], 1 + _SIZES.size
        while place < len(data):
            (length,) = _LENGTH.unpack_from(data, place)
            place += _LENGTH.size
            strings.append([data[place : place + length]])
            place += length
        with torch.inference_mode():
            x = self._network(data[0]).decompress(strings, tuple(shape))["x_hat"]
        pixels = (x[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        return np.ascontiguousarray(pixels[:height, :width]), {}
