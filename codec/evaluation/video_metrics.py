"""Quality of decoded video, frame by frame and then the mean; of 8-bit 4:2:0 in the clip's own colours."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from calotype.errors import InputError
from calotype.evaluation import ffmpeg
from calotype.evaluation.clips import Clip, RawVideo
from calotype.evaluation.metrics import LIBVMAF_MEASURES, METRICS, Values
from calotype.video.frames import Frame, Plane

PSNR_LIMIT = 60.0
"""dB, libvmaf's for 8 bit: a plane that is reproduced exactly would make the mean infinite."""

PerFrame = dict[str, list[float | None]]
"""Metric -> a value a frame; None where there is none (a frame too small for MS-SSIM)."""


def plane_psnr(reference: Plane, decoded: Plane) -> float:
    from skimage.metrics import mean_squared_error

    error = float(mean_squared_error(reference, decoded))
    return PSNR_LIMIT if error == 0 else min(PSNR_LIMIT, 10 * math.log10(255**2 / error))


def _psnr(reference: Frame, decoded: Frame) -> Values:
    y, u, v = (plane_psnr(getattr(reference, name), getattr(decoded, name)) for name in "yuv")
    return {"psnr-y": y, "psnr-u": u, "psnr-v": v, "psnr-yuv-611": (6 * y + u + v) / 8}


def _ms_ssim(reference: Frame, decoded: Frame) -> Values:
    """Of luma; five scales need sides over 160 pixels."""
    import torch
    from pytorch_msssim import ms_ssim

    if min(reference.y.shape) <= 160:
        return {"ms-ssim-y": None}
    a, b = (torch.from_numpy(frame.y.copy())[None, None].float() for frame in (reference, decoded))
    with torch.inference_mode():
        return {"ms-ssim-y": float(ms_ssim(a, b, data_range=255))}


def _libvmaf(clip: Clip, decoded: RawVideo, wanted: Sequence[str]) -> PerFrame:
    """One run of libvmaf over both raw files."""
    raw = ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-video_size", f"{clip.width}x{clip.height}",
           "-framerate", str(clip.rate), "-i"]  # fmt: skip
    # settb and setpts: without a common clock the filter pairs the wrong frames.
    clock = "settb=AVTB,setpts=PTS-STARTPTS"
    log = clip.scratch("vmaf.json")
    ffmpeg.run(
        [*raw, str(decoded.path), *raw, str(clip.frames.path), "-lavfi",
         f"[0:v]{clock}[d];[1:v]{clock}[r];[d][r]libvmaf={LIBVMAF_MEASURES}:log_path={log.name}", "-f", "null", "-"],
        cwd=log.parent,
    )  # fmt: skip
    frames = json.loads(log.read_text())["frames"]
    log.unlink()
    return {name: [float(frame["metrics"][name.replace("-", "_")]) for frame in frames] for name in wanted}


_GROUPS: Mapping[str, Callable[[Frame, Frame], Values]] = {"planes": _psnr, "ms-ssim-y": _ms_ssim}


def measure(names: Iterable[str], clip: Clip, decoded: RawVideo) -> tuple[Values, PerFrame]:
    """The named metrics: means over frames, and the value of each frame. Raises InputError for lost frames."""
    wanted = list(names)
    if len(decoded) != len(clip.frames):
        raise InputError(f"{len(decoded)} frames were decoded, {len(clip.frames)} were encoded")
    each: PerFrame = {name: [] for name in wanted}
    by_libvmaf = [name for name in wanted if METRICS[name].video_group == "libvmaf"]
    by_frame = [name for name in wanted if name not in by_libvmaf]
    groups = dict.fromkeys(METRICS[name].video_group for name in by_frame)
    if groups:
        for reference, frame in zip(clip.frames, decoded, strict=True):
            values: Values = {}
            for group in groups:
                values |= _GROUPS[group](reference, frame)
            for name in by_frame:
                each[name].append(values[name])
    if by_libvmaf:
        each |= _libvmaf(clip, decoded, by_libvmaf)
    return {name: _mean(each[name]) for name in wanted}, each


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None
