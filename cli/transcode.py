"""`calotype transcode`: ordinary videos to Calotype, and back."""

from __future__ import annotations

import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from calotype.cli.batch import STREAM
from calotype.cli.console import Settings, file_size, print_json, refuse_terminal
from calotype.cli.options import common_options, jobs, json_option, size
from calotype.cli.video import (
    ENCODERS,
    exported_line,
    exported_record,
    frame_progress,
    is_video_file,
    warner,
)

if TYPE_CHECKING:
    from calotype.video.transcode import RawVideo

_OURS = (".mkv", ".clt")
_ENCODING = {
    "quality": "--quality", "target_bitrate": "--target-bitrate", "keyint": "--keyint", "scene_cuts": "--scene-cuts",
    "start": "--start", "frames": "--frames", "raw": "--rawvideo", "resume": "--resume", "jobs_": "--jobs",
    "cluster": "--cluster",
}  # fmt: skip
"""Parameters that mean nothing when decoding."""


def _seconds(value: str) -> float:
    """Seconds, or [hours:]minutes:seconds."""
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d+)?", value):
        raise click.BadParameter(f"{value!r} is not a time; write it like 90, 90.5 or 1:30.")
    return math.fsum(float(part) * 60**place for place, part in enumerate(reversed(value.split(":"))))


def _raw_video(value: str) -> RawVideo:
    """WIDTHxHEIGHT@RATE."""
    from calotype.video.transcode import RawVideo

    match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})@(\d+(?:\.\d+)?|\d+/\d+)", value)
    if match is None:
        raise click.BadParameter(f"{value!r} does not say what the frames are; write it like 640x480@25.")
    return RawVideo(int(match[1]), int(match[2]), match[3])


@click.command(short_help="Encode videos, with their sound, and decode them to other formats.")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path, allow_dash=True), metavar="OUT",
    help="OUT.mkv; OUT.clt or - for a raw stream of the video; with --vcodec an ordinary video file.",
)  # fmt: skip
@click.option(
    "-q", "--quality", type=click.FloatRange(0, 100), default=60, show_default=True,
    help="0 (smallest) to 100 (best). This or --target-bitrate.",
)  # fmt: skip
@click.option("--target-bitrate", type=size, metavar="RATE", help="Bits per second of the video track: 800k, 2M.")
@click.option(
    "-g", "--keyint", type=click.IntRange(1, 512), default=32, show_default=True,
    help="Most frames of a group: each group starts with a key frame and can be decoded alone.",
)  # fmt: skip
@click.option("--scene-cuts/--no-scene-cuts", default=True, show_default=True, help="Start groups at scene cuts too.")
@click.option("--start", type=_seconds, default="0", metavar="TIME", help="Leave out what is before: 90, 90.5, 1:30.")
@click.option("--frames", type=click.IntRange(min=1), metavar="N", help="Take this many frames at most.")
@click.option(
    "--audio", type=click.Choice(["copy", "none"]), default="copy", show_default=True,
    help="Keep the sound, untouched, or leave it out.",
)  # fmt: skip
@click.option(
    "--rawvideo", "raw", type=_raw_video, metavar="WxH@FPS",
    help="IN has frames without any header: 8-bit 4:2:0 planes, FFmpeg's rawvideo in yuv420p.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with an encoding that was interrupted; same input and options.")
@click.option("--vcodec", metavar="ENCODER", help="Decode IN to another format by this encoder: libx264, libx265 ...")
@click.option("--crf", type=click.IntRange(0, 63), help="Constant rate factor of that encoder.")
@click.option("--allow-partial", is_flag=True, help="With --vcodec: conceal frames that are lost or damaged.")
@click.option(
    "-j", "--jobs", "jobs_", type=jobs, metavar="N", default="1", show_default=True,
    help="Encode this many groups at a time, in processes of their own; or 'all' processors.",
)  # fmt: skip
@click.option(
    "--cluster", metavar="ADDRESS",
    help="Encode groups on many machines through Ray: ray://HOST:PORT, auto (the cluster that this machine belongs to) "
    "or local. --jobs is then the most workers.",
)  # fmt: skip
@click.option("-f", "--force", is_flag=True, help="Overwrite an existing output.")
@click.option("-n", "--skip-existing", is_flag=True, help="Do nothing if the output exists.")
@click.option("--no-progress", is_flag=True, help="No progress bar (there is none without a terminal).")
@json_option
@common_options
@click.pass_context
def transcode(
    ctx: click.Context,
    *,
    source: Path,
    output: Path,
    quality: float,
    target_bitrate: int | None,
    keyint: int,
    scene_cuts: bool,
    start: float,
    frames: int | None,
    audio: str,
    raw: RawVideo | None,
    resume: bool,
    vcodec: str | None,
    crf: int | None,
    allow_partial: bool,
    jobs_: int,
    cluster: str | None,
    force: bool,
    skip_existing: bool,
    no_progress: bool,
    as_json: bool,
) -> None:
    """Encode a video: calotype transcode IN.mp4 -o OUT.mkv. Sound, subtitles, chapters, tags and times are kept.

    And back: calotype transcode OUT.mkv -o x.mp4 --vcodec libx264. IN may be - for standard input.
    """
    settings = ctx.ensure_object(Settings)
    _check(ctx, source, output, as_json=as_json, force=force, skip_existing=skip_existing)
    if skip_existing and output != STREAM and output.exists():
        if not settings.quiet:
            click.echo(f"{click.format_filename(output)}: exists, skipped", err=True)
        if as_json:
            print_json("calotype.transcode/1", {"output": str(output), "status": "skipped"})
        return
    sound = audio == "copy"
    bar = not (no_progress or as_json)
    reading = sys.stdin.buffer if source == STREAM else source
    writing = sys.stdout.buffer if output == STREAM else output
    with frame_progress(settings, bar=bar) as progress:
        if vcodec is not None:
            from calotype.video.export import export_video

            _refuse(ctx, _ENCODING)
            if output == STREAM or output.suffix.lower() not in ENCODERS:
                raise click.UsageError(f"--vcodec needs an output that ends in one of {', '.join(ENCODERS)}.")
            made = export_video(
                reading, output, vcodec=vcodec, options={} if crf is None else {"crf": str(crf)}, sound=sound,
                allow_partial=allow_partial, device=settings.device, overwrite=force, progress=progress,
                warn=warner(settings),
            )  # fmt: skip
            record, line = exported_record(made), exported_line(made)
        else:
            from calotype.video.transcode import Settings as Encoding
            from calotype.video.transcode import encode_video

            if crf is not None or allow_partial:
                raise click.UsageError("--crf and --allow-partial belong to --vcodec.")
            if output != STREAM and output.suffix.lower() not in _OURS:
                raise click.UsageError(
                    f"{output.name}: a Calotype video is .mkv or .clt; to decode one to another format give --vcodec."
                )
            if source != STREAM and is_video_file(source):
                raise click.UsageError(f"{source} is a Calotype video already: give --vcodec to decode it.")
            encoding = Encoding(quality, target_bitrate, keyint, scene_cuts, start, frames, sound, raw)
            pool = throughput = None
            if cluster is not None:
                from calotype.cluster.throughput import Throughput
                from calotype.cluster.videos import ClusterPool

                throughput = Throughput("gops", "frames", 0)
                limit = None if ctx.get_parameter_source("jobs_") is ParameterSource.DEFAULT else jobs_
                pool = partial(ClusterPool, cluster, throughput, device=settings.device, limit=limit)
            summary = encode_video(
                reading, writing, encoding, resume=resume, overwrite=force, jobs=jobs_, pool=pool,
                device=settings.device, progress=progress, warn=warner(settings),
            )  # fmt: skip
            total = output.stat().st_size if output != STREAM else summary.video_bytes
            record = {
                "width": summary.width,
                "height": summary.height,
                "frames": summary.frames,
                "gops": summary.gops,
                "seconds": summary.seconds,
                "bytes": total,
                "kbps": summary.kbps,
                "notes": summary.notes,
                **({"cluster": throughput.record()} if throughput else {}),
            }
            line = (
                f"{summary.width}x{summary.height}, {summary.frames} frames, {file_size(total)}, "
                f"{summary.kbps:.1f} kbit/s"
            )
            if throughput:
                line = "\n".join((line, *throughput.lines()))
    names = {"input": click.format_filename(source), "output": click.format_filename(output)}
    if as_json:
        status = "partial" if record.get("damaged_frames") else "ok"
        print_json("calotype.transcode/1", {**names, "status": status, **record})
    if not settings.quiet:
        click.echo(f"{names['input']} -> {names['output']}: {line}", err=True)


def _check(ctx: click.Context, source: Path, output: Path, *, as_json: bool, force: bool, skip_existing: bool) -> None:
    """Raise click.UsageError for options that exclude each other."""
    if force and skip_existing:
        raise click.UsageError("--force and --skip-existing exclude each other.")
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if {"quality", "target_bitrate"} <= given:
        raise click.UsageError("--quality and --target-bitrate exclude each other: choose one.")
    if output == STREAM:
        if as_json:
            raise click.UsageError("--json and -o - both want standard output; write the video to a file.")
        refuse_terminal()
    elif source != STREAM and output.exists() and source.exists() and output.samefile(source):
        raise click.UsageError(f"{output} is the input too; choose another output.")


def _refuse(ctx: click.Context, names: dict[str, str]) -> None:
    """Raise click.UsageError for options that mean nothing when decoding."""
    for name, option in names.items():
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option} means nothing with --vcodec, which decodes.")
