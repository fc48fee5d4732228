"""One self-contained HTML page: curves, speeds, BD-rates and crops to compare; it loads nothing from elsewhere."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from calotype.errors import CalotypeError
from calotype.evaluation.bdrate import BdSummary, Range
from calotype.evaluation.clips import read_clip
from calotype.evaluation.codecs import parse_spec
from calotype.evaluation.curves import Curve
from calotype.evaluation.dataset import Dataset
from calotype.evaluation.measuring import Record, encoded_path, open_codec
from calotype.evaluation.metrics import METRICS, Medium
from calotype.evaluation.plots import colours, label
from calotype.evaluation.report import clean, summary_json, warnings
from calotype.evaluation.run import FILES, Run
from calotype.evaluation.still_codecs import StillCodec
from calotype.media import Pixels
from calotype.video import frames

Box = tuple[int, int, int, int]


def _data_url(pixels: Pixels) -> str:
    """Lossless WebP: the page must show the codecs' losses and no others."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "WEBP", lossless=True, quality=40, method=2)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def _busiest(pixels: Pixels, size: int) -> Box:
    """(top, left, height, width) of the crop with the most detail, out of a coarse grid: flat sky compares nothing."""
    height, width = pixels.shape[:2]
    h, w = min(size, height), min(size, width)
    gray = pixels.mean(2)
    detail = np.abs(np.diff(gray, axis=0))[:, :-1] + np.abs(np.diff(gray, axis=1))[:-1]
    tops = range(0, height - h + 1, max(1, size // 4))
    lefts = range(0, width - w + 1, max(1, size // 4))
    detail = np.minimum(detail, 16)  # one strong edge must not outweigh texture
    _, top, left = max((float(detail[t : t + h, x : x + w].mean()), -t, -x) for t in tops for x in lefts)
    return -top, -left, h, w


def _nearest(records: Sequence[Record], bpp: float) -> Record:
    return min(records, key=lambda record: abs(math.log(record["bpp"] / bpp)))


def _frame(found: Iterable[frames.Frame], number: int, colour: frames.Colour) -> Pixels:
    """One frame of a clip as RGB."""
    import torch

    from calotype.video.planes import frame_rgb

    rgb = frame_rgb(next(itertools.islice(found, number, None)), colour, torch.device("cpu"))
    pixels: Pixels = (rgb[0].permute(1, 2, 0) + 0.5).mul(255).round().clamp(0, 255).byte().numpy()
    return pixels


class _Shown:
    """A picture, or the frame in the middle of a clip, as it was and as codecs made it."""

    def __init__(self, run: Run, dataset: Dataset, name: str) -> None:
        self.run, self.name = run, name
        self.clip = None
        if run.medium == "video":
            self.clip = read_clip(dataset.folder / name, run.manifest["dataset"]["frames"])
            self.number = len(self.clip.frames) // 2
            self.original = _frame(self.clip.frames, self.number, self.clip.colour)
        else:
            self.original = dataset.read(name)

    def decoded(self, record: Record) -> Pixels | None:
        """From the file that the run kept; None if it kept none, or if other versions of the codec cannot read it."""
        spec = parse_spec(record["codec"])
        codec = open_codec(spec, self.run.manifest["device"], 1)
        path = encoded_path(self.run.folder / FILES, record["codec"], record["setting"], self.name, codec.suffix)
        if not path.exists():
            return None
        with contextlib.suppress(CalotypeError):
            if isinstance(codec, StillCodec):
                return codec.decode(path, (self.original.shape[0], self.original.shape[1]))[0]
            assert self.clip is not None
            return _frame(codec.decode(path), self.number, self.clip.colour)
        return None


def _rates(records: Sequence[Record], medium: Medium) -> list[float]:
    """Rates to show, in bpp: usual ones for pictures; a third and two thirds of what all codecs reach for a clip."""
    if medium == "still":
        return [0.25, 0.6]
    by_codec: dict[str, list[float]] = {}
    for record in records:
        by_codec.setdefault(record["codec"], []).append(math.log(record["bpp"]))
    if not by_codec:
        return []
    low, high = max(map(min, by_codec.values())), min(map(max, by_codec.values()))
    return [round(math.exp(low + (high - low) * part / 3), 4) for part in (1, 2)]


def viewer(run: Run, dataset: Dataset, *, pictures: int = 4, size: int = 256) -> list[dict[str, Any]]:
    """Crops for the page: for some pictures and rates, each codec's result nearest in rate, decoded from its file."""
    if pictures < 1:
        return []
    names = dataset.pictures
    places = np.linspace(0, len(names) - 1, min(pictures, len(names))).round().astype(int)
    shown = []
    for name in (names[place] for place in places):
        records = [record for record in run.records if not record.get("error") and record["picture"] == name]
        if not records:
            continue
        source = _Shown(run, dataset, name)
        top, left, height, width = _busiest(source.original, size)
        by_rate = []
        for rate in _rates(records, run.medium):
            crops = []
            for curve in run.curves:
                mine = [record for record in records if record["codec"] == curve.name]
                record = _nearest(mine, rate) if mine else None
                decoded = source.decoded(record) if record else None
                if record is None or decoded is None:
                    continue
                values = [
                    f"{METRICS[m].label.split(' (')[0]} {v:.4g}" for m, v in record["metrics"].items() if v is not None
                ]
                crops.append({
                    "codec": curve.name,
                    "image": _data_url(decoded[top : top + height, left : left + width]),
                    "text": f"{record['bpp']:.3g} bpp · {' · '.join(values)}",
                })  # fmt: skip
            if crops:
                by_rate.append({"rate": rate, "crops": crops})
        if by_rate:
            image = _data_url(source.original[top : top + height, left : left + width])
            title = name if source.clip is None else f"{name}, frame {source.number + 1}"
            shown.append({"name": title, "width": width, "height": height, "original": image, "rates": by_rate})
    return shown


def _curve_data(curve: Curve, colour: str) -> dict[str, Any]:
    return {
        "name": curve.name,
        "label": label(curve),
        "kind": curve.kind,
        "colour": colour,
        "source": curve.source,
        "points": [
            {
                "bpp": p.bpp,
                "kbps": p.kbps,
                "setting": p.setting,
                "values": {m: v for m, v in p.metrics.items() if v is not None},
                "scaled": {m: METRICS[m].scaled(v) for m, v in p.metrics.items() if v is not None},
                "encode": p.megapixels / p.encode_seconds if p.megapixels and p.encode_seconds else None,
                "decode": p.megapixels / p.decode_seconds if p.megapixels and p.decode_seconds else None,
            }
            for p in curve.points
        ],
    }


def render(
    title: str,
    curves: Sequence[Curve],
    runs: Sequence[Run],
    summaries: Sequence[BdSummary],
    bpp_range: Range | None,
    crops: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    colour = colours(curves)
    present = [name for name in METRICS if any(name in curve.metrics() for curve in curves)]
    data = {
        "title": title,
        "curves": [_curve_data(curve, colour[curve.name]) for curve in curves],
        "metrics": [{"name": name, "label": METRICS[name].label} for name in present],
        "bppRange": bpp_range,
        "bd": [summary_json(summary) for summary in summaries],
        "warnings": warnings(runs),
        "runs": [{"name": run.name, **run.manifest} for run in runs],
        "viewer": crops,
    }
    # "</" would end the script element early, whatever stands in a file's name.
    text = json.dumps(clean(data), ensure_ascii=False).replace("</", "<\\/")
    template = (resources.files("calotype.evaluation") / "page.html").read_text(encoding="utf-8")
    return template.replace("/*PLOTLY*/", get_plotlyjs().replace("</script", "<\\/script")).replace("/*DATA*/", text)
