"""Speed of still pictures against CompressAI's bmshj2018-hyperprior (quality 4) in the same run, on the same threads.

    python benchmarks/speed.py FOLDER [--threads 2] [--quality 60] [--pictures 4] [--repeat 3] [--device cpu]

Prints the ratio first, then megapixels a second by stage, and the networks' multiply-accumulates per pixel. The anchor
has fresh weights (its trained ones are a download): its networks do the same work, and its latents, nearly all zero,
cost its entropy coder less than real ones would. Stop everything else on the machine while it runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calotype.api import Codec
from calotype.media import Picture, read_picture
from calotype.models.exact import IntConv
from calotype.models.hyperprior import Hyperprior


def seconds(action: Callable[[], Any], repeat: int) -> float:
    """Median wall time of `action` after one warm-up."""
    action()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def anchor(pictures: list[Picture], device: str, repeat: int) -> tuple[float, float]:
    """Total seconds of CompressAI's `compress` and `decompress` over all pictures."""
    from compressai.zoo import bmshj2018_hyperprior

    model = bmshj2018_hyperprior(4, "mse", pretrained=False).eval().to(device)
    model.update(force=True)
    encode = decode = 0.0
    with torch.inference_mode():
        for picture in pictures:
            x = torch.from_numpy(picture.pixels.copy()).permute(2, 0, 1)[None].float().to(device) / 255
            x = x[:, :, : x.shape[2] // 64 * 64, : x.shape[3] // 64 * 64]
            out = model.compress(x)
            encode += seconds(lambda x=x: model.compress(x), repeat)
            decode += seconds(lambda out=out: model.decompress(out["strings"], out["shape"]), repeat)
    return encode, decode


def complexity(network: Hyperprior, side: int = 512) -> dict[str, float]:
    """Multiply-accumulates per pixel, in thousands: analysis with hyper-analysis, entropy networks, synthesis."""
    counts: dict[str, float] = {}
    stage = ""

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d | IntConv)
        positions = output.shape[2] * output.shape[3]
        counts[stage] = counts.get(stage, 0.0) + layer.weight.numel() * positions / side**2 / 1000

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d | IntConv)]
    with torch.inference_mode():
        t = torch.tensor([0.5])
        stage = "analysis"
        y = network.analyse(torch.zeros(1, 3, side, side), t)
        coding = network.code((1, side // 16, side // 16), torch.tensor([500]), y)
        request = next(coding)
        stage = "entropy networks"
        try:
            while True:
                assert request.symbols is not None
                request = coding.send(request.symbols)
        except StopIteration as stop:
            latent = stop.value
        stage = "synthesis"
        network.synthesise(network.dequantise(latent), t)
    for hook in hooks:
        hook.remove()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quality", type=float, default=60)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    paths = sorted(p for p in options.folder.iterdir() if p.suffix in (".png", ".jpg", ".webp"))[: options.pictures]
    pictures = [read_picture(p) for p in paths]
    megapixels = sum(p.width * p.height for p in pictures) / 1e6
    codec = Codec.load(device=options.device)

    encode = decode = 0.0
    stages: dict[str, dict[str, float]] = {"encode": {}, "decode": {}}
    for picture in pictures:
        encoded = codec.encode(picture, quality=options.quality)
        encode += seconds(lambda p=picture: codec.encode(p, quality=options.quality), options.repeat)
        decode += seconds(lambda d=encoded.data: codec.decode(d), options.repeat)
        for name, spent in (
            ("encode", codec.encode(picture, quality=options.quality).seconds),
            ("decode", codec.decode(encoded.data).seconds),
        ):
            for stage, value in spent.items():
                stages[name][stage] = stages[name].get(stage, 0.0) + value
    anchor_encode, anchor_decode = anchor(pictures, options.device, options.repeat)

    print(f"{len(pictures)} pictures, {megapixels:.2f} Mpx, {options.threads} threads, {options.device}")
    ratios = f"encode {anchor_encode / encode:.1f}x, decode {anchor_decode / decode:.1f}x"
    print(f"faster than bmshj2018-hyperprior q4: {ratios}")
    for name, total, other in (("encode", encode, anchor_encode), ("decode", decode, anchor_decode)):
        print(f"{name}: {megapixels / total:.2f} Mpx/s (anchor {megapixels / other:.2f})")
        for stage, value in sorted(stages[name].items(), key=lambda item: -item[1]):
            print(
                f"    {stage:10} {value / sum(stages[name].values()):6.1%}  {megapixels / max(value, 1e-9):8.1f} Mpx/s"
            )
    parts = complexity(codec.coder.network.cpu())
    print("kMAC/px: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items()))
    print(f"kMAC/px: encode {sum(parts.values()) - parts['synthesis']:.2f}, "
          f"decode {parts['entropy networks'] + parts['synthesis']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
