"""One file, one set of symbols: on every instruction set, thread count, batch size, and way of decoding.

Each variant decodes the same files in a process of its own, because libraries choose their kernels at start-up. This
module is also the program of that process: `python tests/test_determinism.py JOB.json`.

Variables: CALOTYPE_TEST_PHOTOS names a folder of photographs to use whole instead of crops of the samples;
CALOTYPE_TEST_QEMU=1 adds emulated processors (minutes each; needs qemu-x86_64-static).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import make_golden
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calotype import container
from calotype.api import Codec
from calotype.media import Picture
from calotype.models.exact import IntConv
from calotype.models.hyperprior import Hyperprior
from calotype.models.mixture import Mixture
from calotype.picture import DecodeJob, PictureCoder, symbol_digest
from calotype.stopwatch import Stopwatch
from calotype.windows import Box

QUALITIES = (5, 45, 90)
PLANTS = {"hyperprior": ("up_out", 160), "visual": ("up_out", 160), "mixture": ("middle_enter", 128)}
"""Models, and the layer of the entropy path of each, with its width, after which a test plants a float operation."""
X86 = platform.machine() in ("x86_64", "AMD64")


# The worker -------------------------------------------------------------------------------------------------------


class FloatConvolution(nn.Module):
    """What must never be on the entropy path: a convolution with fractions, rounded afterwards."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.layer(x, t)
        return torch.matmul(self.weight, x.flatten(2)).view(x.shape)


class PathDigest:
    """SHA-256 over every tensor that enters or leaves a layer of the entropy path."""

    def __init__(self, network: Hyperprior | Mixture) -> None:
        self._hash = hashlib.sha256()
        for module in network.prior.modules():
            if isinstance(module, (IntConv, FloatConvolution)):
                module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for tensor in (inputs[0], output):
            self._hash.update(tensor.cpu().contiguous().numpy().tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Decode the job's files with every number of threads and batch size; see `Variant`."""
    base = Codec.load(job["model"], device=job["device"])
    network = copy.deepcopy(base.coder.network)
    assert isinstance(network, Hyperprior | Mixture)
    if job["plant"]:
        name, width = PLANTS[job["model"]]
        setattr(network.prior, name, FloatConvolution(network.prior.get_submodule(name), width))
    path = PathDigest(network)
    symbols: dict[str, str] = {}
    farthest = 0
    for threads in job["threads"]:
        torch.set_num_threads(threads)
        for batch in job["batches"]:
            codec = Codec(PictureCoder(network, base.coder.device, batch=batch), base.spec)
            for name, (file, pixels) in job["files"].items():
                data = Path(file).read_bytes()
                if job["plant"]:
                    drive(codec, data)
                    continue
                symbols[f"{name}, {threads} threads, batch {batch}"] = codec.symbol_hash(data)
                if job["pixels"]:
                    decoded = codec.decode(data).picture.pixels.astype(np.int16)
                    farthest = max(farthest, int(np.abs(decoded - np.load(pixels)).max()))
    return {
        "symbols": symbols,
        "path": path.hexdigest(),
        "farthest": farthest,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def drive(codec: Codec, data: bytes) -> None:
    """Run the decoding side of the entropy model on made-up symbols: a planted network cannot read a real file."""
    quality = torch.tensor([container.read_header(data).quality])
    generator = torch.Generator().manual_seed(0)
    coding = codec.coder.network.code((1, 12, 12), quality)
    request = next(coding)
    try:
        while True:
            request = coding.send(torch.randint(-3, 4, request.tables.shape, generator=generator, dtype=torch.int32))
    except StopIteration:
        pass


# The tests --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """An encoded picture, its model, and what this process decodes it to."""

    model: str
    data: bytes
    file: Path
    pixels_file: Path
    symbols: str
    pixels: np.ndarray


@pytest.fixture(scope="module", params=PLANTS)
def codec(request: pytest.FixtureRequest) -> Codec:
    """Every model in turn, on the CPU."""
    return Codec.load(request.param, device="cpu")


@pytest.fixture(scope="module")
def cases(codec: Codec, photos: dict[str, Picture], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every photograph, of most models some, at every quality; those of the samples are cut into several tiles."""
    folder = tmp_path_factory.mktemp("determinism")
    made = {}
    whole = codec.spec.name == "hyperprior" or os.environ.get("CALOTYPE_TEST_PHOTOS")
    for name, picture in list(photos.items())[: None if whole else 2]:
        for quality in QUALITIES:
            data = codec.encode(picture, quality=quality, tile=256).data
            pixels = codec.decode(data).picture.pixels
            key = f"{name} at {quality}"
            file, pixels_file = folder / f"{key}.clt", folder / f"{key}.npy"
            file.write_bytes(data)
            np.save(pixels_file, pixels)
            made[key] = Case(codec.spec.name, data, file, pixels_file, codec.symbol_hash(data), pixels)
    assert any(container.read_header(case.data).tiles > 1 for case in made.values())
    return made


def run_worker(
    cases: dict[str, Case],
    folder: Path,
    environment: dict[str, str],
    *,
    threads: Sequence[int] = (2,),
    batches: Sequence[int] = (1,),
    device: str = "cpu",
    plant: bool = False,
    pixels: bool = True,
    prefix: Sequence[str] = (),
) -> dict[str, Any]:
    job = {
        "model": next(iter(cases.values())).model,
        "files": {key: (str(case.file), str(case.pixels_file)) for key, case in cases.items()},
        "threads": threads,
        "batches": batches,
        "device": device,
        "plant": plant,
        "pixels": pixels,
        "out": str(folder / "out.json"),
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    subprocess.run(
        [*prefix, sys.executable, __file__, str(folder / "job.json")], env=os.environ | environment, check=True
    )
    result: dict[str, Any] = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return result


def check(result: dict[str, Any], cases: dict[str, Case]) -> None:
    assert len(result["symbols"]) >= len(cases)
    for run, symbols in result["symbols"].items():
        assert symbols == cases[run.split(",")[0]].symbols, run
    assert result["farthest"] <= 1


@pytest.fixture(scope="module")
def path(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the whole entropy path as this machine computes it by default: stricter than that of the symbols."""
    digest: str = run_worker(cases, tmp_path_factory.mktemp("path"), {})["path"]
    return digest


VARIANTS = [
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ATEN_CPU_CAPABILITY": "avx512"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ONEDNN_MAX_CPU_ISA": "DEFAULT"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
]


@pytest.mark.skipif(not X86, reason="instruction sets of x86")
@pytest.mark.parametrize("environment", VARIANTS, ids=lambda e: " ".join(f"{k}={v}" for k, v in e.items()))
def test_instruction_sets(cases: dict[str, Case], path: str, tmp_path: Path, environment: dict[str, str]) -> None:
    result = run_worker(cases, tmp_path, environment)
    wanted = environment.get("ATEN_CPU_CAPABILITY", "")
    if wanted in ("default", "avx2"):  # the variable works, so the test tests something
        assert result["capability"].lower() == wanted
    check(result, cases)
    assert result["path"] == path


def test_threads_and_batches(cases: dict[str, Case], tmp_path: Path) -> None:
    result = run_worker(cases, tmp_path, {}, threads=(1, 2, 4), batches=(1, 8), pixels=False)
    assert len(result["symbols"]) == 6 * len(cases)
    check(result, cases)


def test_pixels_of_threads_and_batches(cases: dict[str, Case], tmp_path: Path) -> None:
    few = dict(list(cases.items())[:3])
    check(run_worker(few, tmp_path, {}, threads=(1, 4), batches=(8,)), few)


@pytest.mark.skipif(not X86, reason="instruction sets of x86")
def test_planted_float_operation_is_caught(cases: dict[str, Case], tmp_path: Path) -> None:
    """With a float product on the path the digest depends on the instruction set; without it, it does not."""
    few = dict(list(cases.items())[:1])
    basic = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}

    def digests(plant: bool) -> set[str]:
        return {run_worker(few, tmp_path, e, plant=plant)["path"] for e in ({}, basic)}

    assert len(digests(False)) == 1
    assert len(digests(True)) == 2


def test_tile_by_tile_equals_whole(codec: Codec, cases: dict[str, Case]) -> None:
    """Each tile asked for alone gives the same symbols and, put together, the same pixels."""
    for key, case in cases.items():
        still = container.read_still(case.data)
        header = still.header
        parts: dict[int, list[bytes]] = {}
        tiles = [
            (x, y, min(header.tile, header.width - x), min(header.tile, header.height - y))
            for y in range(0, header.height, header.tile)
            for x in range(0, header.width, header.tile)
        ]
        for number, (x, y, width, height) in enumerate(tiles):
            seen: dict[int, list[bytes]] = {}
            job = DecodeJob(
                still.tiles.__getitem__,
                (header.height, header.width),
                header.quality,
                header.tile,
                Stopwatch(torch.device("cpu")),
                symbols_seen=lambda n, symbols, seen=seen: seen.setdefault(n, []).append(symbols),  # type: ignore[misc]
            )
            pixels = codec.coder.decode(job, Box(y, x, y + height, x + width), 1)
            parts[number] = seen[number]
            whole = case.pixels[y : y + height, x : x + width].astype(int)
            assert np.abs(pixels - whole).max() <= 1, key
        assert symbol_digest(parts) == case.symbols, key


def test_symbols_are_repeatable_and_depend_on_the_file(codec: Codec, cases: dict[str, Case]) -> None:
    assert len({case.symbols for case in cases.values()}) == len(cases)
    for case in cases.values():
        assert codec.symbol_hash(case.data) == case.symbols


def test_threads_share_a_codec(codec: Codec, cases: dict[str, Case]) -> None:
    """Decoding several files at once in one process mixes nothing up."""
    chosen = list(cases.values())[:6]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(codec.symbol_hash, [case.data for case in chosen * 2]))
    assert found == [case.symbols for case in chosen * 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda(cases: dict[str, Case], tmp_path: Path) -> None:
    result = run_worker(cases, tmp_path, {}, device="cuda", batches=(1, 8))
    assert len(result["symbols"]) == 2 * len(cases)
    check(result, cases)


QEMU = shutil.which("qemu-x86_64-static")
SINGLE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Idle threads spin, which emulation makes dear."""


def emulated(test: Callable[..., None]) -> Callable[..., None]:
    """A test for every emulated `processor`."""
    for mark in (
        pytest.mark.skipif(
            os.environ.get("CALOTYPE_TEST_QEMU") != "1", reason="takes minutes: set CALOTYPE_TEST_QEMU=1"
        ),
        pytest.mark.skipif(QEMU is None, reason="qemu-x86_64-static is not installed"),
        pytest.mark.parametrize("processor", ["Nehalem", "Haswell"]),
    ):
        test = mark(test)
    return test


@emulated
def test_emulated_processors(cases: dict[str, Case], tmp_path: Path, processor: str) -> None:
    assert QEMU is not None
    few = cases if os.environ.get("CALOTYPE_TEST_PHOTOS") else dict(list(cases.items())[1:2])
    check(run_worker(few, tmp_path, SINGLE, threads=(1,), prefix=[QEMU, "-cpu", processor]), few)


GOLDEN_SCRIPT = """
from make_golden import VIDEO, VQGAN, decode_video
from calotype.api import Codec
print(decode_video((VIDEO / "pan.clt").read_bytes())[1])
data = (VQGAN / "portrait-q60.clt").read_bytes()
codec = Codec.load("vqgan", device="cpu")
codec.decode(data)
print(codec.symbol_hash(data))
"""


@emulated
def test_emulated_processors_read_video_and_tokens(processor: str) -> None:
    assert QEMU is not None
    wanted = [
        json.loads((folder / make_golden.INDEX).read_text(encoding="utf-8"))[name]["symbols"]
        for folder, name in ((make_golden.VIDEO, "pan.clt"), (make_golden.VQGAN, "portrait-q60.clt"))
    ]
    command = [QEMU, "-cpu", processor, sys.executable, "-c", GOLDEN_SCRIPT]
    done = subprocess.run(
        command, cwd=make_golden.TESTS, env=os.environ | SINGLE, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == wanted


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(job["out"]).write_text(json.dumps(work(job)), encoding="utf-8")


if __name__ == "__main__":
    main()
