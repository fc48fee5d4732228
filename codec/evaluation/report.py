"""What is written from runs: JSON (CompressAI's form and ours), long CSV, the table of BD-rates."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from calotype.errors import InputError
from calotype.evaluation.bdrate import BdSummary, Method, Range, compare_curves
from calotype.evaluation.curves import Curve, from_compressai, read_json, to_compressai
from calotype.evaluation.metrics import METRICS
from calotype.evaluation.run import MANIFEST, Run
from calotype.media import write_file

SCHEMA = "calotype.compare/1"


def load_runs(paths: Iterable[Path]) -> tuple[list[Curve], list[Run]]:
    """Curves of run folders and of CompressAI result files. Raises InputError.

    Equal names in two runs become NAME@RUN: comparing two weights of one model is the usual reason.
    """
    runs: list[Run] = []
    loaded: list[tuple[str, Curve]] = []
    for path in paths:
        if path.is_dir() or path.name == MANIFEST:
            run = Run.load(path if path.is_dir() else path.parent)
            runs.append(run)
            loaded += [(run.name, curve) for curve in run.curves]
        else:
            loaded.append((path.stem, from_compressai(read_json(path), "anchor")))
    names = [curve.name for _, curve in loaded]
    curves = [
        replace(curve, name=f"{curve.name}@{origin}") if names.count(curve.name) > 1 else curve
        for origin, curve in loaded
    ]
    if len({curve.name for curve in curves}) < len(curves):
        raise InputError("two of the runs have the same name and the same codecs: rename one folder")
    return curves, runs


def warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader of a comparison must know."""
    texts = []
    if len({(run.manifest["dataset"]["sha256"], run.manifest["dataset"].get("frames")) for run in runs}) > 1:
        texts.append("the runs are of different pictures or frames: their curves cannot be compared")
    for run in runs:
        if run.failures:
            texts.append(f"{run.name}: {len(run.failures)} measurements failed, the first: {run.failures[0]['error']}")
        texts += [f"{run.name}: {name} skipped: {why}" for name, why in run.manifest["skipped"].items()]
    return texts


def find_curve(curves: Sequence[Curve], name: str) -> Curve:
    """By full name, by the part before an @, or by the codec's family. Raises InputError."""
    keys = (lambda c: c.name, lambda c: c.name.split("@")[0], lambda c: c.name.split(":")[0].split("@")[0])
    found = [curve for key in keys for curve in curves if key(curve) == name]
    if not found:
        raise InputError(f"there is no curve {name!r}: choose one of {', '.join(curve.name for curve in curves)}")
    return found[0]


def compare(
    curves: Sequence[Curve],
    anchors: Sequence[str],
    metrics: Sequence[str],
    method: Method = "pchip",
    bpp_range: Range | None = None,
) -> list[BdSummary]:
    """Every other curve against each anchor on each metric that both have."""
    summaries = []
    for name in anchors:
        anchor = find_curve(curves, name)
        for metric in metrics:
            for curve in curves:
                if curve.name != anchor.name and curve.series(metric) and anchor.series(metric):
                    summaries.append(compare_curves(anchor, curve, metric, method, bpp_range))
    return summaries


def clean(value: Any) -> Any:
    """For JSON: NaN and infinities become null, tuples lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


def summary_json(summary: BdSummary) -> dict[str, Any]:
    found: dict[str, Any] = clean(asdict(summary))
    return found | {"rate": clean(summary.rate), "counted": summary.counted}


def comparison_json(
    curves: Sequence[Curve], runs: Sequence[Run], summaries: Sequence[BdSummary], bpp_range: Range | None
) -> dict[str, Any]:
    """The whole comparison in our schema; each curve's `results` is in CompressAI's form."""
    return {
        "schema": SCHEMA,
        "runs": [{"name": run.name, **run.manifest} for run in runs],
        "bpp_range": list(bpp_range) if bpp_range else None,
        "warnings": warnings(runs),
        "curves": [
            to_compressai(c, c.source) | {"kind": c.kind, "settings": [p.setting for p in c.points]} for c in curves
        ],
        "bd": [summary_json(summary) for summary in summaries],
    }


def records_csv(runs: Sequence[Run]) -> str:
    """One row a picture or clip, codec and setting."""
    extra = ("frames", "fps", "kbps", "bpp_payload") if any(run.medium == "video" for run in runs) else ()
    metrics = [name for name in METRICS if any(name in run.manifest["metrics"] for run in runs)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["run", "codec", "picture", "setting", "width", "height", *extra, "bytes", "bpp", *metrics,
         "encode_seconds", "decode_seconds", "error"]
    )  # fmt: skip
    for run in runs:
        for record in run.records:
            get = record.get
            values = get("metrics") or {}
            writer.writerow(
                [run.name, record["codec"], record["picture"], f"{record['setting']:g}", get("width"), get("height"),
                 *(get(name) for name in extra), get("bytes"), get("bpp"), *(values.get(name) for name in metrics),
                 get("encode_seconds"), get("decode_seconds"), get("error", "")]
            )  # fmt: skip
    return out.getvalue()


def headline(summaries: Sequence[BdSummary], learned: Sequence[str]) -> list[BdSummary]:
    """The rows that a reader wants: the learned codecs against every anchor; without any, all against the first."""
    rows = [summary for summary in summaries if summary.test in learned]
    return rows or [summary for summary in summaries if summary.anchor == summaries[0].anchor]


def table_rows(summaries: Sequence[BdSummary]) -> list[tuple[str, ...]]:
    """Cells for people, under TABLE_HEAD."""
    rows: list[tuple[str, ...]] = []
    for s in summaries:
        interval = "" if math.isnan(s.low) else f" [{s.low:+.1f}, {s.high:+.1f}]"
        rate = f"{s.mean_rate:+.1f} %{interval}" if not math.isnan(s.mean_rate) else "–"
        curve = f"{s.curve.rate:+.1f} %" if not math.isnan(s.curve.rate) else s.curve.reason
        quality = "–" if math.isnan(s.curve.quality) else f"{s.curve.quality:+.2f}"
        rows.append((
            s.test, s.metric, s.anchor, rate, curve, quality, f"{100 * s.curve.overlap:.0f} %",
            f"{s.curve.anchor_points}/{s.curve.test_points}", f"{s.counted}/{len(s.pictures)}",
        ))  # fmt: skip
    return rows


TABLE_HEAD = (
    "codec", "metric", "against", "BD-rate, mean over the set", "of mean curves", "BD-quality", "overlap", "points",
    "counted",
)  # fmt: skip


def markdown_table(summaries: Sequence[BdSummary]) -> str:
    """The table for a README."""
    lines = [TABLE_HEAD, ("---",) * len(TABLE_HEAD), *table_rows(summaries)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def write_results(run: Run) -> None:
    """The files of a run that need no anchor: records.csv and results/CODEC.json in CompressAI's form."""
    write_file(run.folder / "records.csv", records_csv([run]).encode(), overwrite=True)
    for curve in run.curves:
        texts = list(run.manifest["codecs"].get(curve.name, {}).values())
        data = to_compressai(curve, texts[0] if texts else "") | {
            "schema": run.manifest["schema"],
            "dataset": run.manifest["dataset"],
            "settings": run.manifest["codecs"].get(curve.name, {}),
            **{key: run.manifest[key] for key in ("device", "jobs", "threads", "processor", "versions")},
            "per_image": [record for record in run.records if record["codec"] == curve.name],
        }
        path = run.folder / "results" / f"{curve.name.replace(':', '-')}.json"
        write_file(path, json.dumps(clean(data), indent=1).encode(), overwrite=True)
