"""`calotype eval`, `compare` and `bench`: measure codecs, set runs against each other, time them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calotype.cli.console import SOME_FAILED, Settings, print_json
from calotype.cli.options import common_options, jobs, json_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calotype.evaluation.bdrate import BdSummary, Method
    from calotype.evaluation.curves import Curve
    from calotype.evaluation.measuring import Record
    from calotype.evaluation.run import Run


_EVERYTHING = (0.0, float("inf"))


def _bpp_range(value: str) -> tuple[float, float]:
    """LOW,HIGH in bits per pixel, or `all`."""
    if value == "all":
        return _EVERYTHING
    try:
        low, high = (float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a range; write it like 0.1,1.5, or all.") from None
    if not 0 <= low < high:
        raise click.BadParameter("the range must rise.")
    return low, high


def _chosen_range(given: tuple[float, float] | None, runs: Sequence[Run]) -> tuple[float, float] | None:
    """None for all points."""
    default = _EVERYTHING if any(run.medium == "video" for run in runs) else (0.1, 1.5)
    chosen = given or default
    return None if chosen == _EVERYTHING else chosen


def _comparing(function: Any) -> Any:
    """Options that `eval` and `compare` share."""
    for option in (
        click.option("--bpp-range", type=_bpp_range, metavar="LOW,HIGH|all",
                     help="Points that count for BD-rates and are drawn, in bits per pixel.  "
                     "[default: 0.1,1.5 for pictures, all for video]"),
        click.option("--bd-method", type=click.Choice(["pchip", "akima", "cubic"]), default="pchip", show_default=True,
                     help="Interpolation of BD-rates."),
        click.option("--published", multiple=True, metavar="SOURCE[:NAME+NAME]",
                     help="Draw published curves too: `kodak` (packaged) or a JSON file; may be repeated."),
        click.option("--anchor", "anchors", multiple=True, metavar="NAME",
                     help="Curve that BD-rates are against; may be repeated.  [default: all but the learned ones]"),
    ):  # fmt: skip
        function = option(function)
    return function


def _choose_anchors(curves: Sequence[Curve], anchors: Sequence[str]) -> list[str]:
    if anchors:
        return list(anchors)
    found = [curve.name for curve in curves if curve.kind != "learned"]
    return found or [curves[0].name]


def _show(summaries: Sequence[BdSummary], notes: Sequence[str], learned: Sequence[str], settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table

    from calotype.evaluation.report import TABLE_HEAD, headline, table_rows

    for note in notes:
        click.echo(f"calotype: {note}", err=True)
    if settings.quiet or not summaries:
        return
    summaries = headline(summaries, learned)
    table = Table(box=None, header_style="bold")
    for number, head in enumerate(TABLE_HEAD):
        table.add_column(head, justify="left" if number < 3 else "right")
    for row in table_rows(summaries):
        table.add_row(*row)
    console = Console()
    # A pipe has no width: cut nothing.
    console.print(table) if console.is_terminal else Console(width=200).print(table)


def _published(sources: Sequence[str]) -> list[Curve]:
    from calotype.evaluation.published import read_published

    return [curve for source in sources for curve in read_published(source)]


def _list_registries(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from calotype.evaluation.codecs import FAMILIES
    from calotype.evaluation.metrics import METRICS, Medium, missing

    for family in FAMILIES.values():
        why = family.missing()
        state = f"  MISSING: {why}" if why else ""
        summary = f"{family.name:18} {family.medium}: {family.summary}"
        click.echo(f"{summary}; variant: {family.variants}; scale: {family.scale}{state}")
    for metric in METRICS.values():
        media: list[Medium] = [medium for medium in ("still", "video") if metric.group_for(medium)]
        why = missing(metric.name, media[0])
        state = f"  MISSING: {why}" if why else ""
        click.echo(f"{metric.name:18} {metric.label}; {' and '.join(media)}{state}")
    ctx.exit()


@click.command("eval")
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("-c", "--codecs", multiple=True, default=("calotype,jpeg,webp,avif444",), show_default=True,
              metavar="SPECS",
              help="NAME[:VARIANT][:qLOW-HIGH[:POINTS]], commas between; see --list.")  # fmt: skip
@click.option("-m", "--metrics", multiple=True, metavar="NAMES",
              help="Commas between; see --list.  [default: psnr,ms-ssim; for video psnr-yuv,ms-ssim]")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="DIR",
              help="Folder of the run.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with the run in DIR: what it has is not measured again.")
@click.option("-j", "--jobs", "job_count", type=jobs, metavar="N", default="1", show_default=True,
              help="Processes; or 'all' processors. The numbers do not depend on it, times do.")  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads a process, for learned codecs."
)
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, allow_from_autoenv=False,
              callback=_list_registries,
              help="Show the codecs and metrics, and which cannot run here.")  # fmt: skip
@click.option("--frames", type=click.IntRange(1), metavar="N", help="Only the first N frames of each clip.")
@click.option("--keyint", type=click.IntRange(1), default=32, show_default=True, metavar="N",
              help="Largest distance of key frames, for video.")  # fmt: skip
@click.option("--discard-files", is_flag=True, help="Do not keep the encoded files (no picture viewer then).")
@click.option("--viewer-pictures", type=click.IntRange(0), default=4, show_default=True, help="Pictures in the viewer.")
@_comparing
@json_option
@common_options
@click.pass_obj
def eval_command(
    settings: Settings,
    dataset: Path,
    codecs: tuple[str, ...],
    metrics: tuple[str, ...],
    output: Path,
    resume: bool,
    job_count: int,
    threads: int,
    frames: int | None,
    keyint: int,
    discard_files: bool,
    viewer_pictures: int,
    bpp_range: tuple[float, float] | None,
    bd_method: Method,
    published: tuple[str, ...],
    anchors: tuple[str, ...],
    as_json: bool,
) -> int:
    """Measure codecs on the pictures or, with codecs of video, on the clips of DATASET, a folder or a file.

    Gives rate, quality, time, BD-rates, plots and a page.
    Writes to DIR: records.jsonl (a line a measurement, at once), run.json, records.csv, results/CODEC.json in
    CompressAI's form, comparison.json, bd-rates.md, rate-quality.png and .svg, report.html.
    """
    from calotype.evaluation import codecs as registry
    from calotype.evaluation import metrics as measures
    from calotype.evaluation import run as runs

    specs = registry.parse_specs(codecs, keyint)
    if not specs:
        raise click.BadParameter("name a codec.", param_hint="--codecs")
    medium = specs[0].medium
    extra = _published(published)
    wanted = metrics or (("psnr,ms-ssim",) if medium == "still" else ("psnr-yuv,ms-ssim",))
    options = runs.Options(
        tuple(measures.parse_metrics(wanted, medium)), job_count, threads, settings.device, not discard_files, resume,
        frames if medium == "video" else None,
    )  # fmt: skip

    def progress(done: int, total: int, record: Record) -> None:
        what = f"{record['codec']} {record['setting']:g} {record['picture']}"
        if record.get("error"):
            click.echo(f"calotype: {what}: {record['error']}", err=True)
        elif not settings.quiet:
            values = ", ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items() if value is not None)
            click.echo(f"[{done}/{total}] {what}: {record['bpp']:.3f} bpp, {values}", err=True)

    finished = runs.evaluate(dataset, specs, output, options, progress)
    shown_range = _chosen_range(bpp_range, [finished])
    found = _write_run(finished, dataset, extra, anchors, bd_method, shown_range, viewer_pictures)
    if as_json:
        print_json("calotype.eval/1", {"output": str(output), "failed": len(finished.failures), "bd": found[1]})
    else:
        _show(found[0], found[2], [c.name for c in finished.curves if c.kind == "learned"], settings)
        if not settings.quiet:
            click.echo(f"{output / 'report.html'}", err=True)
    return SOME_FAILED if finished.failures else 0


def _write_run(
    run: Run,
    dataset: Path,
    extra: Sequence[Curve],
    anchors: Sequence[str],
    method: Method,
    bpp_range: tuple[float, float] | None,
    viewer_pictures: int,
) -> tuple[list[BdSummary], list[Any], list[str]]:
    from calotype.evaluation import page, report
    from calotype.evaluation.dataset import Dataset
    from calotype.evaluation.plots import plot_rate_quality
    from calotype.media import write_file

    curves = [*run.curves, *extra]
    metrics = list(run.manifest["metrics"])
    learned = [curve.name for curve in run.curves if curve.kind == "learned"]
    report.write_results(run)
    summaries = report.compare(curves, _choose_anchors(run.curves, anchors), metrics, method, bpp_range)
    data = report.comparison_json(curves, [run], summaries, bpp_range)
    what = "clips" if run.medium == "video" else "pictures"
    title = f"{run.manifest['dataset']['name']}: {len(run.manifest['dataset']['pictures'])} {what}"
    write_file(run.folder / "comparison.json", json.dumps(report.clean(data), indent=1).encode(), overwrite=True)
    write_file(
        run.folder / "bd-rates.md", report.markdown_table(report.headline(summaries, learned)).encode(), overwrite=True
    )
    if any(curve.points for curve in run.curves):
        for suffix in (".png", ".svg"):
            path = run.folder / f"rate-quality{suffix}"
            plot_rate_quality(curves, metrics, path, title=title, bpp_range=bpp_range)
        crops = page.viewer(run, Dataset.load(dataset, run.medium), pictures=viewer_pictures)
        text = page.render(title, curves, [run], summaries, bpp_range, crops)
        write_file(run.folder / "report.html", text.encode(), overwrite=True)
    return summaries, data["bd"], report.warnings([run])


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True), metavar="RUN...")
@click.option("-m", "--metrics", multiple=True, metavar="NAMES", help="Metrics to compare.  [default: all there are]")
@click.option("-c", "--curves", "chosen", multiple=True, metavar="NAME", help="Only these curves of the runs.")
@click.option("--title", default="", help="Title of plots and pages.  [default: the data set]")
@click.option("-o", "--output", "outputs", multiple=True, type=click.Path(path_type=Path, dir_okay=False),
              metavar="FILE",
              help="Write .html, .png, .svg, .json, .csv or .md; may be repeated.")  # fmt: skip
@_comparing
@json_option
@common_options
@click.pass_obj
def compare_command(
    settings: Settings,
    runs: tuple[Path, ...],
    metrics: tuple[str, ...],
    chosen: tuple[str, ...],
    title: str,
    outputs: tuple[Path, ...],
    bpp_range: tuple[float, float] | None,
    bd_method: Method,
    published: tuple[str, ...],
    anchors: tuple[str, ...],
    as_json: bool,
) -> None:
    """BD-rates and plots of RUNs: folders of `calotype eval`, or JSON files in CompressAI's form.

    BD-rate: per cent of file size at equal quality, negative is better; per picture, then mean, with a 95 % interval
    by bootstrap over pictures; beside it that of the mean curves. Nothing is given for under 4 points or no overlap.
    """
    from calotype.evaluation import page, report
    from calotype.evaluation.metrics import METRICS, parse_metrics
    from calotype.evaluation.plots import plot_rate_quality
    from calotype.media import write_file

    for path in outputs:
        if path.suffix.lower() not in (".html", ".png", ".svg", ".json", ".csv", ".md"):
            raise click.BadParameter(f"{path}: use .html, .png, .svg, .json, .csv or .md.", param_hint="--output")
    curves, loaded = report.load_runs(runs)
    if chosen:
        names = [name for text in chosen for name in text.split(",")]
        kept = {curve.name: curve for curve in (report.find_curve(curves, name) for name in names)}
        curves = list(kept.values())
    curves += _published(published)
    video = any(run.medium == "video" for run in loaded)
    bpp_range = _chosen_range(bpp_range, loaded)
    wanted = parse_metrics(metrics, "video" if video else "still") or [
        name for name in METRICS if any(name in curve.metrics() for curve in curves)
    ]
    summaries = report.compare(curves, _choose_anchors(curves, anchors), wanted, bd_method, bpp_range)
    data = report.clean(report.comparison_json(curves, loaded, summaries, bpp_range))
    heading = title or ", ".join(dict.fromkeys(run.manifest["dataset"]["name"] for run in loaded)) or "Comparison"
    learned = [curve.name for curve in curves if curve.kind == "learned"]
    for path in outputs:
        kind = path.suffix.lower()
        if kind in (".png", ".svg"):
            plot_rate_quality(curves, wanted, path, title=heading, bpp_range=bpp_range)
            continue
        text = {
            ".html": lambda: page.render(heading, curves, loaded, summaries, bpp_range),
            ".json": lambda: json.dumps(data, indent=1),
            ".csv": lambda: report.records_csv(loaded),
            ".md": lambda: report.markdown_table(report.headline(summaries, learned)),
        }[kind]()
        write_file(path, text.encode(), overwrite=True)
    if as_json:
        print_json(report.SCHEMA, {key: value for key, value in data.items() if key != "schema"})
    else:
        _show(summaries, report.warnings(loaded), learned, settings)


def _size(value: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels."""
    parts = value.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} is not a size; write it like 1920x1080.")
    return int(parts[0]), int(parts[1])


def _counts(value: str) -> tuple[int, ...]:
    """Thread counts, commas between."""
    parts = value.split(",")
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r}: write thread counts like 1,2,4.")
    return tuple(dict.fromkeys(int(part) for part in parts))


@click.command("bench")
@click.argument("picture", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("-c", "--codecs", multiple=True, default=("calotype,avif444",), show_default=True, metavar="SPECS",
              help="As in `eval`; of several settings, the one nearest to --bpp is taken.")  # fmt: skip
@click.option("--anchor", default="avif444", show_default=True, metavar="NAME", help="Codec that ratios are against.")
@click.option("--size", type=_size, metavar="WxH", default="1920x1080", show_default=True,
              help="Size that PICTURE is scaled to, or of the synthetic one.")  # fmt: skip
@click.option("--bpp", type=click.FloatRange(0, min_open=True), default=0.5, show_default=True, help="Wanted rate.")
@click.option("--reps", type=click.IntRange(1), default=10, show_default=True, help="Turns measured.")
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True, help="Turns before that.")
@click.option("--threads", type=_counts, default="1", show_default=True, metavar="N,N...", help="Thread counts to try.")
@click.option("--devices", default="", metavar="NAMES", help="Devices to try, as cpu,cuda.  [default: --device]")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write JSON too.")
@json_option
@common_options
@click.pass_obj
def bench_command(
    settings: Settings,
    picture: Path | None,
    codecs: tuple[str, ...],
    anchor: str,
    size: tuple[int, int],
    bpp: float,
    reps: int,
    warmup: int,
    threads: tuple[int, ...],
    devices: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Speed and memory of codecs on PICTURE (or a synthetic one), against an anchor in the same run.

    Codecs take turns, each in a process of its own. The anchor may be another codec, or the same one with fewer
    threads: ratios over 1 are faster than the first case of that name.
    """
    import numpy as np
    from PIL import Image

    from calotype.evaluation import bench
    from calotype.evaluation.codecs import parse_specs
    from calotype.evaluation.dataset import read_rgb
    from calotype.evaluation.run import available, resolve_device
    from calotype.media import write_file

    specs, skipped = available(parse_specs([*codecs, anchor]))
    for name, why in skipped.items():
        click.echo(f"calotype: {name} skipped: {why}", err=True)
    named = tuple(devices.split(",")) if devices else (settings.device,)
    learned_on = tuple(dict.fromkeys(resolve_device(device, specs) for device in named))
    cases = [
        bench.Case(spec, device, count)
        for spec in specs
        for device in (learned_on if spec.learned else ("cpu",))
        for count in threads
    ]
    pixels = bench.photograph(*size)
    if picture is not None:
        pixels = np.asarray(Image.fromarray(read_rgb(picture)).resize(size, Image.Resampling.LANCZOS))
    results = bench.bench(
        cases, pixels, repetitions=reps, warmup=warmup, bpp=bpp,
        progress=None if settings.quiet else lambda text: click.echo(text, err=True),
    )  # fmt: skip
    anchor_name = parse_specs([anchor])[0].name
    against = next((result for result in results if result.case.spec.name == anchor_name), results[0])
    found = bench.rows(results, against)
    data = {
        "anchor": against.case.name,
        "picture": "synthetic, 1/f" if picture is None else picture.name,
        "size": list(size),
        "machine": bench.machine(),
        "results": found,
    }
    if output is not None:
        text = json.dumps({"schema": bench.SCHEMA, **data}, indent=1)
        write_file(output, text.encode(), overwrite=True)
    if as_json:
        print_json(bench.SCHEMA, data)
    else:
        _show_bench(found, against.case.name)


def _show_bench(found: Sequence[dict[str, Any]], anchor: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", title=f"against {anchor}")
    heads = ("case", "encode ×", "decode ×", "encode Mpx/s", "decode Mpx/s", "encode ms p50/p90/p99",
             "decode ms p50/p90/p99", "peak MB", "bpp")  # fmt: skip
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)

    def milliseconds(values: dict[str, float]) -> str:
        return "/".join(f"{1000 * values[name]:.0f}" for name in ("p50", "p90", "p99"))

    for row in found:
        table.add_row(
            row["case"], f"{row['encode_ratio']:.2f}", f"{row['decode_ratio']:.2f}",
            f"{row['encode_mpx_per_second']:.2f}", f"{row['decode_mpx_per_second']:.2f}",
            milliseconds(row["encode_seconds"]), milliseconds(row["decode_seconds"]),
            f"{row['memory_peak_bytes'] / 1e6:.0f}", f"{row['bpp']:.2f}",
        )  # fmt: skip
    console = Console()
    show = console if console.is_terminal else Console(width=200)
    show.print(table)
    for row in found:
        if row["stages_seconds"]:
            stages = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in row["stages_seconds"].items())
            show.print(f"{row['case']}: {stages}", highlight=False)
