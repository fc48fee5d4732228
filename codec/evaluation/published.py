"""Rate-quality curves that others published, for drawing beside measured ones.

Three layouts are read: one curve in CompressAI's form; a mapping of names to such curves or to lists of
[bpp, PSNR-RGB in dB, MS-SSIM or null]; and the packaged collections, which add where each curve comes from.
Published points are on other machines, often with estimated rates: context, not measurements of this project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from calotype.errors import InputError
from calotype.evaluation.curves import Curve, Point, from_compressai, read_json


def _rows(name: str, rows: Sequence[Any], source: str) -> Curve:
    points = []
    for row in rows:
        if not isinstance(row, list) or not 2 <= len(row) <= 3:
            raise InputError(f"the published curve {name} must be rows of [bpp, psnr, ms-ssim]")
        quality = (*row[1:], None)[:2]
        metrics = dict(zip(("psnr", "ms-ssim"), (None if q is None else float(q) for q in quality), strict=True))
        points.append(Point(float(row[0]), metrics))
    return Curve(name, "published", tuple(sorted(points, key=lambda point: point.bpp)), source=source)


def _curve(name: str, value: Any) -> Curve:
    if isinstance(value, list):
        return _rows(name, value, "")
    if isinstance(value, Mapping) and "points" in value:
        return _rows(name, value["points"], str(value.get("source", "")))
    if isinstance(value, Mapping):
        return from_compressai(value, "published", name)
    raise InputError(f"the published curve {name} is neither a list of points nor an object")


def collections() -> list[str]:
    """Names of the packaged collections."""
    folder = resources.files("calotype.evaluation") / "published"
    return sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json"))


def read_published(text: str) -> list[Curve]:
    """`SOURCE[:NAME+NAME...]` -> curves; SOURCE is a packaged collection or a JSON file. Raises InputError."""
    source, _, chosen = text.rpartition(":") if ":" in text and not Path(text).exists() else (text, "", "")
    packaged = source in collections()
    with resources.as_file(resources.files("calotype.evaluation") / "published" / f"{source}.json") as inside:
        data = read_json(inside if packaged else Path(source))
    if not isinstance(data, Mapping):
        raise InputError(f"{source} is not a JSON object of curves")
    curves = [from_compressai(data, "published")] if "results" in data else [_curve(name, data[name]) for name in data]
    if not chosen:
        return curves
    named = {curve.name: curve for curve in curves}
    wanted = chosen.split("+")
    for name in wanted:
        if name not in named:
            raise InputError(f"{source} has no curve {name!r}: it has {', '.join(named)}")
    return [named[name] for name in wanted]
