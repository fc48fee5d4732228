"""What the commands share about videos: progress, the choice of an output, the text of `info`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calotype.cli.console import Settings, check_interrupt, file_size, print_json, refuse_terminal
from calotype.cli.options import BatchOptions

if TYPE_CHECKING:
    from calotype.video.export import Exported, Progress

STREAM = Path("-")
ENCODERS = {
    ".mp4": "libx264",
    ".mov": "libx264",
    ".mkv": "libx264",
    ".webm": "libvpx-vp9",
    ".y4m": "rawvideo",
}
"""Suffix of an ordinary video file, and the encoder that is taken for it."""
RAW_FORMATS = {"y4m": "yuv4mpegpipe", "rawvideo": "rawvideo"}
"""Values of --format for frames that are not encoded, and what FFmpeg calls them."""


def is_video_file(path: Path) -> bool:
    """Whether a file is a Calotype video, by its content."""
    from calotype.video.timeline import is_video, read_head

    return path.is_file() and is_video(read_head(path))


def frame_range(value: str) -> slice:
    """a:b (b not included), a:, :b or a single frame; negative numbers count from the end."""
    try:
        numbers = [int(part) if part.strip() else None for part in value.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) == 1 and numbers[0] is not None:
        return slice(numbers[0], numbers[0] + 1 or None)
    if len(numbers) == 2:
        return slice(*numbers)
    raise click.BadParameter(f"{value!r} is not a range of frames; write it as 10:20, 10:, :20 or 10.")


@contextmanager
def frame_progress(settings: Settings, *, bar: bool) -> Iterator[Progress]:
    """A bar with frames per second and the time that is left, on standard error; it also learns of interrupts."""
    if not bar or settings.quiet or not sys.stderr.isatty():
        yield lambda done, total: check_interrupt()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[fps]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, fps="")
        started = time.monotonic()

        def update(done: int, total: int | None) -> None:
            check_interrupt()
            seconds = max(time.monotonic() - started, 1e-6)
            progress.update(task, completed=done, total=total, fps=f"{done / seconds:.1f} fps")

        yield update


def warner(settings: Settings) -> Callable[[str], None]:
    """Prints a warning on standard error, unless told to be quiet."""

    def warn(text: str) -> None:
        if not settings.quiet:
            click.echo(f"calotype: warning: {text}", err=True)

    return warn


# decode -----------------------------------------------------------------------------------------------------------


def wants_video(inputs: Sequence[Path], format: str | None, output: str | None) -> bool:
    """Whether `decode` is about a video. A stream on standard input is what the wanted output says.

    Raises click.UsageError for a video among other inputs.
    """
    if inputs == (STREAM,):
        return format in RAW_FORMATS or (output is not None and Path(output).suffix.lower() in ENCODERS)
    videos = [path for path in inputs if is_video_file(path)]
    if videos and len(inputs) > 1:
        raise click.UsageError(f"{videos[0]} is a video: give it alone.")
    return bool(videos)


@dataclass(frozen=True)
class VideoDecode:
    """The options of `decode` that mean something for a video."""

    source: Path
    format: str | None
    part: slice
    allow_partial: bool
    max_pixels: int | None
    batch: BatchOptions

    def run(self, settings: Settings) -> tuple[dict[str, Any], str] | None:
        """Decode; gives the fields of the result and a line, or None if the output was there and is to be kept."""
        from calotype.video.export import export_pictures, export_video

        output = self.batch.output
        if output is None:
            raise click.UsageError("A video needs an output: -o FILE.mp4, FILE.y4m, FOLDER/ or - with --format y4m.")
        target = Path(output)
        options: dict[str, Any] = {
            "part": self.part, "allow_partial": self.allow_partial, "device": settings.device,
            **({} if self.max_pixels is None else {"max_pixels": self.max_pixels}),
        }  # fmt: skip
        pictures = output.endswith("/") or target.is_dir()
        raw = RAW_FORMATS.get(self.format or target.suffix.lower()[1:])
        encoder = "rawvideo" if raw else ENCODERS.get(target.suffix.lower())
        if output == "-":
            if raw is None:
                raise click.UsageError("Only frames go to standard output: give --format y4m or --format rawvideo.")
            refuse_terminal()
        elif pictures and raw:
            raise click.UsageError(f"--format {self.format} makes a file, and {output} is a folder.")
        elif not pictures and encoder is None:
            raise click.UsageError(
                f"No video format ends in {target.suffix!r}: use {', '.join(ENCODERS)}, or a folder/ for pictures."
            )
        elif not pictures and self.batch.skip_existing and target.exists():
            return None
        source = sys.stdin.buffer if self.source == STREAM else self.source
        with frame_progress(settings, bar=not (self.batch.no_progress or self.batch.as_json)) as progress:
            if pictures:
                suffix = self.format or "png"
                made = export_pictures(
                    source, target, format=suffix, overwrite=self.batch.force, progress=progress, **options
                )
            else:
                assert encoder is not None
                made = export_video(
                    source, sys.stdout.buffer if output == "-" else target, vcodec=encoder,
                    format=raw, overwrite=self.batch.force,
                    options={"crf": "18"} if encoder == "libx264" else {},
                    progress=progress, warn=warner(settings), **options,
                )  # fmt: skip
        return exported_record(made), exported_line(made)


def decode_video(job: VideoDecode, settings: Settings) -> int:
    """Run and report; returns the exit code."""
    names = {"input": click.format_filename(job.source), "output": job.batch.output}
    done = job.run(settings)
    record, line = done or ({}, "exists, skipped")
    if job.batch.as_json:
        status = "skipped" if done is None else "partial" if record["damaged_frames"] else "ok"
        print_json("calotype.decode/1", {"results": [{**names, "status": status, **record}], "failed": 0})
    elif not settings.quiet:
        click.echo(f"{names['input']} -> {names['output']}: {line}", err=True)
    return 0


def exported_record(made: Exported) -> dict[str, Any]:
    """The JSON fields of a decoded video."""
    return {
        "width": made.width,
        "height": made.height,
        "frames": made.frames,
        "damaged_frames": made.damaged,
        "notes": made.notes,
    }


def exported_line(made: Exported) -> str:
    """A line about a decoded video."""
    damaged = f", {len(made.damaged)} damaged" if made.damaged else ""
    return f"{made.width}x{made.height}, {made.frames} frames{damaged}"


# info -------------------------------------------------------------------------------------------------------------


def info_text(record: dict[str, Any]) -> str:
    """The text of `info` for the fields of a `VideoInfo`."""
    models = record["model"] or "not installed"
    weights = f"weights {record['weights']}"
    if record["inter_weights"]:
        models += f", {record['inter_model'] or 'not installed'}"
        weights += f", {record['inter_weights']}"
    tracks = ", ".join(
        f"{t['type']} {t['codec']}" + (f" ({t['language']})" if t["language"] else "") for t in record["tracks"]
    )
    colour = f"{record['matrix']}, {'full' if record['full_range'] else 'limited'} range"
    size = f"{record['width']}x{record['height']}{', turned' if record['turned'] else ''}"
    lost = f", {record['lost_frames']} lost" if record["lost_frames"] else ""
    return "\n".join(
        (
            f"video {size}, {record['duration']:.3f} s, {file_size(record['file_bytes'])}",
            f"  frames    {record['frames']}{lost} in {record['gops']} groups, {record['fps']:.6g} fps",
            f"  rate      {record['kbps']:.1f} kbit/s",
            f"  quality   {record['quality']:g}",
            f"  model     {models} ({weights})",
            f"  colour    {colour}",
            f"  tracks    {tracks or 'none'}",
            f"  format    {record['container']}",
        )
    )
