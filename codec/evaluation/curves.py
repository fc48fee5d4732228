"""Rate-quality curves: points out of records, means over pictures, CompressAI's JSON form."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from calotype.errors import InputError
from calotype.evaluation.metrics import METRICS

Kind = Literal["learned", "anchor", "published"]
COMPRESSAI_KEYS: Mapping[str, str] = {"psnr": "psnr-rgb", "ms-ssim": "ms-ssim-rgb"}
"""Our metric names -> CompressAI's."""


@dataclass(frozen=True)
class Point:
    """One setting: file bits per original pixel, raw metric values, seconds per picture or clip; kbit/s of clips."""

    bpp: float
    metrics: Mapping[str, float | None]
    setting: float | None = None
    encode_seconds: float | None = None
    decode_seconds: float | None = None
    megapixels: float | None = None
    kbps: float | None = None


@dataclass(frozen=True)
class Curve:
    """A codec on a data set: the mean over its pictures or clips, and the points of each (none if published)."""

    name: str
    kind: Kind
    points: tuple[Point, ...]
    pictures: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)
    source: str = ""

    def series(self, metric: str, picture: str | None = None) -> list[tuple[float, float]]:
        """(bpp, quality) rising in bpp; quality on the metric's scale (`Metric.scaled`), higher is better."""
        points = self.points if picture is None else self.pictures.get(picture, ())
        scaled = METRICS[metric].scaled
        pairs = [(point.bpp, scaled(value)) for point in points if (value := point.metrics.get(metric)) is not None]
        return sorted(pairs)

    def metrics(self) -> list[str]:
        return [name for name in METRICS if any(point.metrics.get(name) is not None for point in self.points)]


def mean(values: Iterable[float | None]) -> float | None:
    """Mean, or None if there are none or any is missing: a mean over other pictures is another number."""
    numbers = list(values)
    if not numbers or any(value is None for value in numbers):
        return None
    return math.fsum(value for value in numbers if value is not None) / len(numbers)


def _mean_point(points: Sequence[Point]) -> Point:
    names = dict.fromkeys(name for point in points for name in point.metrics)
    bpp = mean(point.bpp for point in points)
    assert bpp is not None
    return Point(
        bpp,
        {name: mean(point.metrics.get(name) for point in points) for name in names},
        points[0].setting,
        mean(point.encode_seconds for point in points),
        mean(point.decode_seconds for point in points),
        mean(point.megapixels for point in points),
        mean(point.kbps for point in points),
    )


def _by_rate(points: Iterable[Point]) -> tuple[Point, ...]:
    return tuple(sorted(points, key=lambda point: point.bpp))


def curves_of_records(records: Iterable[Mapping[str, Any]], pictures: Sequence[str]) -> list[Curve]:
    """Curves in the order of the records. A setting that failed on some picture is left out of the mean curve."""
    found: dict[str, dict[str, dict[float, Point]]] = defaultdict(lambda: defaultdict(dict))
    learned: dict[str, bool] = {}
    for record in records:
        name, picture, setting = record["codec"], record["picture"], record["setting"]
        learned[name] = record["learned"]
        if record.get("error"):
            found[name][picture].pop(setting, None)
            continue
        found[name][picture][setting] = Point(
            record["bpp"], record["metrics"], setting, record["encode_seconds"], record["decode_seconds"],
            record["width"] * record["height"] * record.get("frames", 1) / 1e6, record.get("kbps"),
        )  # fmt: skip
    curves = []
    for name, by_picture in found.items():
        settings = sorted({setting for points in by_picture.values() for setting in points})
        complete = [s for s in settings if all(s in by_picture.get(picture, {}) for picture in pictures)]
        points = [_mean_point([by_picture[picture][s] for picture in pictures]) for s in complete]
        each = {p: _by_rate(by_picture[p].values()) for p in pictures if p in by_picture}
        kind: Kind = "learned" if learned[name] else "anchor"
        curves.append(Curve(name, kind, _by_rate(points), each))
    return curves


def to_compressai(curve: Curve, description: str) -> dict[str, Any]:
    """The mean curve in the JSON form of CompressAI's `results` folder."""
    results: dict[str, list[float | None]] = {"bpp": [point.bpp for point in curve.points]}
    for metric in curve.metrics():
        results[COMPRESSAI_KEYS.get(metric, metric)] = [point.metrics.get(metric) for point in curve.points]
    if curve.points and all(point.kbps is not None for point in curve.points):
        results["kbps"] = [point.kbps for point in curve.points]
    results["encoding_time"] = [point.encode_seconds for point in curve.points]
    results["decoding_time"] = [point.decode_seconds for point in curve.points]
    return {"name": curve.name, "description": description, "results": results}


def from_compressai(data: Mapping[str, Any], kind: Kind, name: str = "") -> Curve:
    """Inverse of `to_compressai`. Raises InputError if it has no bpp or lists of different lengths."""
    results = data.get("results")
    if not isinstance(results, Mapping) or not isinstance(results.get("bpp"), list):
        raise InputError("not a result in CompressAI's form: it has no results.bpp")
    ours: dict[str, str] = {theirs: own for own, theirs in COMPRESSAI_KEYS.items()}
    bpp = results["bpp"]
    columns = {ours.get(str(key), str(key)): values for key, values in results.items() if key != "bpp"}
    for key, values in columns.items():
        if not isinstance(values, list) or len(values) != len(bpp):
            raise InputError(f"results.{key} must be a list of {len(bpp)} values")
    metrics = {key: values for key, values in columns.items() if key in METRICS}
    points = [
        Point(
            float(rate),
            {metric: None if values[i] is None else float(values[i]) for metric, values in metrics.items()},
            encode_seconds=columns["encoding_time"][i] if "encoding_time" in columns else None,
            decode_seconds=columns["decoding_time"][i] if "decoding_time" in columns else None,
            kbps=columns["kbps"][i] if "kbps" in columns else None,
        )
        for i, rate in enumerate(bpp)
    ]
    title, source = name or str(data.get("name", "unnamed")), str(data.get("description", ""))
    return Curve(title, kind, _by_rate(points), source=source)


def read_json(path: Path) -> Any:
    """Raises InputError for a file that is not there or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
