"""Pictures a second that a PyTorch DataLoader gives: Calotype, CompressAI's bmshj2018-hyperprior (quality 4) and JPEG.

    python benchmarks/dataloader.py FOLDER [--side 256] [--count 128] [--batch 16] [--workers 2] [--threads 2]

All three give the same crops as uint8 [N, 3, side, side] batches on the device, in the same run. JPEG (quality 90,
Pillow) is decoded in the workers, the usual way; for both learned codecs workers read bytes and the main process
decodes. Prints ratios first. CompressAI has fresh weights (its trained ones are a download): its networks do the same
work, and its latents, nearly all zero, cost its entropy coder less than real ones would. Stop everything else on the
machine while it runs.
"""

from __future__ import annotations

import argparse
import io
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from calotype.api import Codec
from calotype.embed.torch import Dataset, Loader
from calotype.media import read_picture


def crops(folder: Path, side: int, count: int) -> Tensor:
    """[count, 3, side, side] uint8 from the pictures of a folder, several places of each."""
    paths = sorted(p for p in folder.iterdir() if p.suffix in (".png", ".jpg", ".webp"))
    pictures = [
        p.pixels for p in map(read_picture, paths) if p.pixels.shape[2] == 3 and min(p.pixels.shape[:2]) >= side
    ]
    random = np.random.default_rng(0)
    chosen = []
    for number in range(count):
        pixels = pictures[number % len(pictures)]
        y, x = (random.integers(0, extent - side + 1) for extent in pixels.shape[:2])
        chosen.append(pixels[y : y + side, x : x + side])
    return torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2)


class JpegDataset(torch.utils.data.Dataset[Tensor]):
    """Decodes JPEG files where it runs: in the workers."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(Image.open(self.files[index]))).permute(2, 0, 1)


class CompressAiLoader:
    """Files of pickled strings, decompressed a batch at a time."""

    def __init__(self, model: Any, files: Sequence[Path], side: int, **options: Any) -> None:
        self.model, self.side = model, side
        self.samples: DataLoader[Any] = DataLoader(Dataset(files), **options)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.samples:
            strings = [list(part) for part in zip(*map(pickle.loads, batch), strict=True)]
            with torch.inference_mode():
                x = self.model.decompress(strings, (self.side // 64, self.side // 64))["x_hat"]
                yield x.clamp(0, 1).mul(255).round().to(torch.uint8)


def rate(loader: Callable[[], Iterable[Tensor]], count: int, repeat: int) -> float:
    """Pictures a second, the median of `repeat` passes after one that warms up; the start of workers included."""
    rates = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        seen = sum(len(batch) for batch in loader())
        assert seen == count
        rates.append(count / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quality", type=float, default=60)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from compressai.zoo import bmshj2018_hyperprior

    model = bmshj2018_hyperprior(4, "mse", pretrained=False).eval().to(options.device)
    model.update(force=True)
    codec = Codec.load(device=options.device)
    x = crops(options.folder, options.side, options.count)
    kinds = ("calotype", "compressai", "jpeg")
    sizes = dict.fromkeys(kinds, 0)
    with tempfile.TemporaryDirectory() as place:
        files = {kind: [Path(place, f"{n:05}.{kind}") for n in range(options.count)] for kind in kinds}
        for number, data in enumerate(codec.encode_batch(x, quality=options.quality)):
            files["calotype"][number].write_bytes(data)
        for number, picture in enumerate(x):
            with torch.inference_mode():
                strings = model.compress(picture[None].to(options.device).float() / 255)["strings"]
            files["compressai"][number].write_bytes(pickle.dumps([part[0] for part in strings]))
            out = io.BytesIO()
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(out, "JPEG", quality=90)
            files["jpeg"][number].write_bytes(out.getvalue())
        for kind in kinds:
            sizes[kind] = sum(path.stat().st_size for path in files[kind])
        loading = {"batch_size": options.batch, "num_workers": options.workers}
        calotype = Loader(Dataset(files["calotype"]), device=options.device, **loading)
        compressai = CompressAiLoader(model, files["compressai"], options.side, **loading)
        jpeg: DataLoader[Tensor] = DataLoader(JpegDataset(files["jpeg"]), **loading)
        rates = {
            "calotype": rate(lambda: calotype, options.count, options.repeat),
            "compressai": rate(lambda: compressai, options.count, options.repeat),
            "jpeg": rate(lambda: (batch.to(options.device) for batch in jpeg), options.count, options.repeat),
        }
    print(f"Calotype gives {rates['calotype'] / rates['compressai']:.1f} times the pictures of bmshj2018-hyperprior, "
          f"{rates['calotype'] / rates['jpeg']:.3f} times those of JPEG")  # fmt: skip
    print(f"{options.count} pictures of {options.side}x{options.side}, batches of {options.batch}, "
          f"{options.workers} workers, {options.threads} threads, {options.device}")  # fmt: skip
    for kind in kinds:
        bpp = sizes[kind] * 8 / (options.count * options.side**2)
        print(f"    {kind:10} {rates[kind]:8.1f} pictures/s   {bpp:.2f} bpp")


if __name__ == "__main__":
    main()
