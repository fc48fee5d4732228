"""One self-contained HTML page: curves, speeds, BD-rates and crops to compare; it loads nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from calotype.evaluation.bdrate import BdSummary, Range
from calotype.evaluation.codecs import opened, parse_spec
from calotype.evaluation.curves import Curve
from calotype.evaluation.dataset import Dataset
from calotype.evaluation.metrics import METRICS
from calotype.evaluation.plots import colours, label
from calotype.evaluation.report import clean, summary_json, warnings
from calotype.evaluation.run import FILES, Record, Run, encoded_path
from calotype.media import Pixels

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


def viewer(
    run: Run, dataset: Dataset, *, pictures: int = 4, rates: Sequence[float] = (0.25, 0.6), size: int = 256
) -> list[dict[str, Any]]:
    """Crops for the page: for some pictures and rates, each codec's result nearest in rate, decoded from its file."""
    if pictures < 1:
        return []
    names = dataset.pictures
    records = [record for record in run.records if not record.get("error")]
    places = np.linspace(0, len(names) - 1, min(pictures, len(names))).round().astype(int)
    chosen = [names[place] for place in places]
    shown = []
    for name in chosen:
        original = dataset.read(name)
        top, left, height, width = _busiest(original, size)
        by_rate = []
        for rate in rates:
            crops = []
            for curve in run.curves:
                mine = [r for r in records if r["codec"] == curve.name and r["picture"] == name]
                if not mine:
                    continue
                record = _nearest(mine, rate)
                spec = parse_spec(curve.name)
                codec = opened(spec, run.manifest["device"] if spec.learned else "cpu")
                path = encoded_path(run.folder / FILES, curve.name, record["setting"], name, codec.suffix)
                if not path.exists():
                    continue
                decoded, _ = codec.decode(path, (original.shape[0], original.shape[1]))
                values = [
                    f"{METRICS[m].label.split(' (')[0]} {v:.4g}" for m, v in record["metrics"].items() if v is not None
                ]
                crops.append({
                    "codec": curve.name,
                    "image": _data_url(decoded[top : top + height, left : left + width]),
                    "text": f"{record['bpp']:.3f} bpp · {' · '.join(values)}",
                })  # fmt: skip
            if crops:
                by_rate.append({"rate": rate, "crops": crops})
        if by_rate:
            image = _data_url(original[top : top + height, left : left + width])
            shown.append({"name": name, "width": width, "height": height, "original": image, "rates": by_rate})
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
