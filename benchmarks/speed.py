"""Speed of still pictures against CompressAI's bmshj2018-hyperprior (quality 4) in the same run, on the same threads.

    python benchmarks/speed.py FOLDER [--threads 2] [--quality 60] [--pictures 4] [--repeat 5] [--device cpu]

Prints the ratio first, then megapixels a second by stage, the shares of a 12-megapixel photo from file to file, and the
networks' multiply-accumulates per pixel. The two codecs take turns on every picture; a time is the median of its turns.
Stop everything else on the machine while it runs.

The anchor is CompressAI's own network of that quality (128 and 192 channels) with its own `compress` and `decompress`.
Its trained weights are a download, so it has fresh ones, and what costs the same with any weights is left as it is. Its
coder's work depends on the symbols, and fresh weights give none worth coding. So they are calibrated on the pictures:
the last layer of the analysis is scaled and shifted per channel to latents of mean zero and of spreads that fall
geometrically by 100 from the first channel to the last, and the last layer of the hyper-synthesis gets these spreads as
its bias, for the coder to use tables that fit. One common factor brings the real strings of the latent to the published
rate of the trained model on the Kodak pictures, 0.478 bpp; the hyper-latent's strings, a few per cent of a trained
model's rate, come on top. Both codecs' rates are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from calotype.api import DEFAULT_EFFORT, Codec
from calotype.media import Picture, read_picture, write_picture
from calotype.models import shaping, zoo
from calotype.models.exact import IntConv
from calotype.models.gradient import LearnedGradient
from calotype.models.hyperprior import Hyperprior
from calotype.models.priors import drive, own_symbols

FAST = 3
"""Effort of the plain encoder."""
ANCHOR_BPP = 0.478
"""Rate of the trained model on the Kodak pictures, from CompressAI's published results."""


def as_input(picture: Picture, device: str) -> Tensor:
    """[1, 3, H, W] in [0, 1], cut to multiples of 64, which is what the anchor takes."""
    height, width = (side // 64 * 64 for side in picture.pixels.shape[:2])
    return torch.from_numpy(picture.pixels[:height, :width].copy()).permute(2, 0, 1)[None].float().to(device) / 255


def rates(model: Any, inputs: list[Tensor]) -> tuple[float, float]:
    """Bits per pixel of the anchor's strings: of the latent and of the hyper-latent."""
    area = sum(x.shape[2] * x.shape[3] for x in inputs)
    latent, hyper = zip(*(model.compress(x)["strings"] for x in inputs), strict=True)
    return tuple(8 * sum(len(string) for (string,) in strings) / area for strings in (latent, hyper))  # type: ignore[return-value]


def anchor(inputs: list[Tensor], device: str) -> Any:
    """CompressAI's model, calibrated as the module's text says."""
    from compressai.zoo import bmshj2018_hyperprior

    torch.manual_seed(0)
    model = bmshj2018_hyperprior(4, "mse", pretrained=False).eval().to(device)
    model.update(force=True)
    last, scales = model.g_a[-1], model.h_s[-2]
    latents = torch.cat([model.g_a(x)[0].flatten(1) for x in inputs], 1)
    spread = torch.logspace(0, -2, len(latents), device=device)
    last.bias.sub_(latents.mean(1)).div_(latents.std(1)).mul_(spread)
    last.weight.mul_((spread / latents.std(1))[:, None, None, None])
    weight, bias = last.weight.clone(), last.bias.clone()
    low, high = 0.0, 10.0
    for _ in range(8):  # bisection of the common factor, as a power of two
        factor = 2 ** ((low + high) / 2)
        last.weight.copy_(weight * factor)
        last.bias.copy_(bias * factor)
        scales.bias.copy_(spread * factor)
        low, high = (low, (low + high) / 2) if rates(model, inputs)[0] > ANCHOR_BPP else ((low + high) / 2, high)
    return model


def medians(actions: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Median wall times of actions that take turns, after a warm-up of each."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeat + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def photo(pictures: list[Picture]) -> bytes:
    """A JPEG file of 4000x3000 pixels, patched together from the pictures."""
    side = min(min(p.width, p.height) for p in pictures)
    patches = [p.pixels[:side, :side] for p in pictures]
    across, down = -(-4000 // side), -(-3000 // side)
    rows = [np.concatenate([patches[(i + j) % len(patches)] for j in range(across)], 1) for i in range(down)]
    return write_picture(Picture(np.ascontiguousarray(np.concatenate(rows)[:3000, :4000])), "jpeg")


def shares(codec: Codec, pictures: list[Picture], quality: float) -> dict[str, dict[str, float]]:
    """Seconds per stage of a 12-megapixel photo: JPEG file to our file, and our file to PNG file."""
    file = photo(pictures)
    stages: dict[str, dict[str, float]] = {}

    def timed(way: str, name: str, action: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = action()
        spent = time.perf_counter() - started
        inner = {} if name else dict(result.seconds)
        stages.setdefault(way, {}).update(inner | {name or "other": spent - sum(inner.values())})
        return result

    picture = timed("encode", "read JPEG", lambda: read_picture(file))
    encoded = timed("encode", "", lambda: codec.encode(picture, quality=quality))
    decoded = timed("decode", "", lambda: codec.decode(encoded.data))
    timed("decode", "write PNG", lambda: write_picture(decoded.picture, "png"))
    return stages


def complexity(network: Hyperprior, estimate: LearnedGradient, side: int = 512) -> dict[str, float]:
    """Multiply-accumulates per pixel, in thousands: analysis with hyper-analysis, entropy networks, synthesis.

    And what an encoder looks at once each at effort 5, after the entropy networks: the estimated gradient, and
    synthesis with its own.
    """
    integer = 0.0

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal integer
        assert isinstance(layer, IntConv)
        integer += layer.weight.numel() * output.shape[2] * output.shape[3]

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, IntConv)]
    with torch.no_grad():
        t = torch.tensor([0.5])
        with FlopCounterMode(display=False) as analysis:
            analysed = network.analyse_with_features(torch.zeros(1, 3, side, side), t)
            y = analysed.latent
            network.hyper_analysis(y)
        latent = drive(network.code((1, side // 16, side // 16), torch.tensor([500]), y), own_symbols)
        y_hat = network.dequantise(latent)
        with FlopCounterMode(display=False) as synthesis:
            network.synthesise(y_hat, t)
        with FlopCounterMode(display=False) as guess:
            estimate(y_hat - y, analysed, t)
        with FlopCounterMode(display=False) as gradient:
            shaping.error_gradient(
                network.synthesise, y_hat, torch.zeros(1, 3, side, side), t, bf16=False, straight=True
            )
    for hook in hooks:
        hook.remove()
    per_pixel = 1 / side**2 / 1000
    return {
        "analysis": analysis.get_total_flops() / 2 * per_pixel,
        "entropy networks": integer * per_pixel,
        "synthesis": synthesis.get_total_flops() / 2 * per_pixel,
        "estimated gradient": guess.get_total_flops() / 2 * per_pixel,
        "synthesis and its gradient": gradient.get_total_flops() / 2 * per_pixel,
    }


def report(stages: dict[str, float], megapixels: float) -> None:
    """Print the share and the speed of each stage."""
    for stage, spent in sorted(stages.items(), key=lambda item: -item[1]):
        print(f"    {stage:10} {spent / sum(stages.values()):6.1%}  {megapixels / max(spent, 1e-9):8.1f} Mpx/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quality", type=float, default=60)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    paths = sorted(p for p in options.folder.iterdir() if p.suffix in (".png", ".jpg", ".webp"))[: options.pictures]
    pictures = [read_picture(p) for p in paths]
    megapixels = sum(p.width * p.height for p in pictures) / 1e6
    codec = Codec.load(device=options.device)
    with torch.inference_mode():
        inputs = [as_input(p, options.device) for p in pictures]
        model = anchor(inputs, options.device)
        anchor_rates = rates(model, inputs)
        times: dict[str, float] = {}
        stages: dict[str, dict[str, float]] = {"encode": {}, "fast encode": {}, "decode": {}}
        size = 0
        for picture, x in zip(pictures, inputs, strict=True):
            encoded, other = codec.encode(picture, quality=options.quality), model.compress(x)
            size += len(encoded.data)
            actions = {
                "encode": lambda p=picture: codec.encode(p, quality=options.quality),
                "fast encode": lambda p=picture: codec.encode(p, quality=options.quality, effort=FAST),
                "decode": lambda d=encoded.data: codec.decode(d),
                "anchor encode": lambda x=x: model.compress(x),
                "anchor decode": lambda o=other: model.decompress(o["strings"], o["shape"]),
            }
            for name, spent in medians(actions, options.repeat).items():
                times[name] = times.get(name, 0.0) + spent
            for way in stages:
                for stage, spent in actions[way]().seconds.items():
                    stages[way][stage] = stages[way].get(stage, 0.0) + spent
        large = shares(codec, pictures, options.quality)

    print(f"{len(pictures)} pictures, {megapixels:.2f} Mpx, {options.threads} threads, {options.device}")
    theirs = {way: times[f"anchor {way.removeprefix('fast ')}"] for way in stages}
    ratios = ", ".join(f"{way} {theirs[way] / times[way]:.1f}x" for way in stages)
    print(f"faster than bmshj2018-hyperprior q4: {ratios} (encode: effort {DEFAULT_EFFORT}, fast: {FAST})")
    print(f"bpp: {size * 8 / megapixels / 1e6:.3f}, anchor {anchor_rates[0]:.3f} + {anchor_rates[1]:.3f}")
    for way, parts in stages.items():
        print(f"{way}: {megapixels / times[way]:.2f} Mpx/s (anchor {megapixels / theirs[way]:.2f})")
        report(parts, megapixels)
    for way, parts in large.items():
        print(f"{way} of a 12 Mpx photo, from file to file: {12 / sum(parts.values()):.2f} Mpx/s")
        report(parts, 12)
    estimate = zoo.load_gradient(codec.spec.name)
    assert estimate is not None
    parts = complexity(codec.coder.network.cpu(), estimate)
    print("kMAC/px: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items()))
    fast, decode = (parts[transform] + parts["entropy networks"] for transform in ("analysis", "synthesis"))
    look = sum(parts[name] for name in ("entropy networks", "estimated gradient", "synthesis and its gradient"))
    print(f"kMAC/px: encode {fast + look:.2f}, at effort {FAST} {fast:.2f}, decode {decode:.2f}")


if __name__ == "__main__":
    main()
