"""What the tests share: the codec with the shipped weights, photographs, and pictures that look a little like them."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, settings

from calotype.api import Codec
from calotype.cli import main
from calotype.media import Picture, read_picture
from calotype.models import tables
from calotype.models.exact import integerise
from calotype.models.hyperprior import Hyperprior
from calotype.models.quantizers import lagrangian
from calotype.picture import PictureCoder

Pixels = npt.NDArray[np.uint8]

SAMPLES = Path(__file__).parent.parent / "samples"

settings.register_profile(
    "calotype", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("calotype")


def synthesise(height: int, width: int, channels: int = 3, *, seed: int = 0) -> Pixels:
    """Shading, soft shapes and texture, [height, width, channels] away from the ends of the range."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 64.0
    planes = []
    for _ in range(channels):
        plane = 110 + 25 * np.sin(x + 3 * rng.random()) * np.cos(0.7 * y + 3 * rng.random())
        for _ in range(4):
            distance = np.hypot(y - rng.random() * height / 64, x - rng.random() * width / 64)
            plane += 25 * (rng.random() - 0.5) * np.tanh(6 * (distance - 0.4 - rng.random()))
        planes.append(plane + 4 * rng.standard_normal((height, width)))
    return np.clip(np.stack(planes, 2), 20, 235).astype(np.uint8)


def objective(codec: Codec, picture: Picture, quality: float, effort: int, tile: int = 1024) -> float:
    """bpp + λ · 255² · MSE of a real file, decoded again."""
    made = codec.encode(picture, quality=quality, effort=effort, tile=tile)
    shown = codec.decode(made.data).picture.pixels.astype(float) - picture.pixels
    return made.bpp + float(lagrangian(torch.tensor(quality / 100))) * float(np.square(shown).mean())


def unpacked(codec: Codec) -> Codec:
    """The same weights with every symbol rounded and coded by itself."""
    network = codec.coder.network
    plain = integerise(Hyperprior(replace(network.config, packed=False)))
    state = network.state_dict()
    state["prior.frequencies"] = state["prior.frequencies"][: len(tables.gaussian_frequencies())]
    plain.load_state_dict(state)
    plain = plain.to(memory_format=torch.channels_last).requires_grad_(False)
    return Codec(PictureCoder(plain, torch.device("cpu"), gradient=codec.coder._gradient), codec.spec)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small pictures gain nothing from threads, and on a busy machine idle ones spin for minutes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def codec() -> Codec:
    """The shipped model on the CPU."""
    return Codec.load(device="cpu")


@pytest.fixture(scope="session")
def synthetic() -> Callable[..., Picture]:
    """Makes a `Picture` of a height and width; see `synthesise`."""

    def make(height: int, width: int, channels: int = 3, *, alpha: bool = False, seed: int = 0) -> Picture:
        pixels = synthesise(height, width, channels, seed=seed)
        plane = synthesise(height, width, 1, seed=seed + 1)[:, :, 0] if alpha else None
        return Picture(pixels, plane)

    return make


@pytest.fixture(scope="session")
def photo() -> Picture:
    """A cat, 451x300."""
    return read_picture(SAMPLES / "chelsea.png")


@pytest.fixture(scope="session")
def large_photo() -> Picture:
    """A photograph of over 0.3 megapixels."""
    picture = read_picture(SAMPLES / "hubble.jpg")
    return Picture(np.ascontiguousarray(picture.pixels[:512, :640]))


@pytest.fixture(scope="session")
def photos() -> dict[str, Picture]:
    """Photographs by name: crops of the samples, or whole those in the folder named by CALOTYPE_TEST_PHOTOS."""
    folder = os.environ.get("CALOTYPE_TEST_PHOTOS")
    paths = sorted(p for p in Path(folder or SAMPLES).iterdir() if p.suffix in (".png", ".jpg"))
    read = {p.stem: read_picture(p) for p in paths}
    if folder:
        return read
    return {name: Picture(np.ascontiguousarray(p.pixels[60:260, 40:340])) for name, p in read.items()}


# The command line -----------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a command left: its exit code, and what it wrote to standard output and to standard error."""

    code: int
    out: bytes
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.json["results"]


Run = Callable[..., Result]


@pytest.fixture
def run(capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process: loading the networks once saves seconds a test."""

    def call(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        out, err = capsysbinary.readouterr()
        code = caught.value.code
        assert isinstance(code, int)
        return Result(code, out, err.decode())

    return call
