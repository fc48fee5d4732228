"""`calotype decode`: .clt files to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calotype.cli.batch import STREAM, Batch, Product, Progress, Task, plan, read_bytes
from calotype.cli.codecs import Codecs
from calotype.cli.console import Settings, file_size, stage_times
from calotype.cli.options import (
    BatchOptions,
    batch_options,
    common_options,
    inputs_argument,
    size,
    tune_option,
)
from calotype.cli.options import (
    metadata as metadata_kinds,
)
from calotype.cli.options import (
    region as region_box,
)
from calotype.cli.tokens import TokenFiles, is_tokens, model_of, read_tokens, tokens_option
from calotype.cli.video import RAW_FORMATS, VideoDecode, decode_video, frame_range, wants_video

if TYPE_CHECKING:
    from calotype.models.zoo import Tune

_FORMATS = ("png", "jpeg", "webp", "tiff", "bmp", "ppm", "npy", "avif", *RAW_FORMATS)
_SCALES = {"1": 1, "1/2": 2, "1/4": 4, "1/8": 8}


@click.command(short_help="Decode .clt files to pictures.")
@inputs_argument
@click.option("--format", "format_", type=click.Choice(_FORMATS), help="[default: from the suffix of -o, else png]")
@click.option(
    "--region", type=region_box, metavar="X,Y,W,H", help="Only this part of the picture, in pixels of the full size."
)
@click.option("--scale", type=click.Choice(list(_SCALES)), default="1", help="Decode smaller, and faster.")
@tune_option("Draw files of the model hyperprior for least error (as it does), or a little sharper.")
@click.option("--frames", type=frame_range, metavar="A:B", help="Of a video, these frames only: 10:20, 10:, :20 or 10.")
@click.option("--allow-partial", is_flag=True, help="Decode what is intact of a damaged file.")
@click.option(
    "--simulate-loss",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    default=0.0,
    help="Drop this share of the packets, or tiles, and fill them in: 0.2 for one in five.",
)
@click.option(
    "--seed", type=int, metavar="N", default=0, show_default=True, help="Which packets --simulate-loss drops."
)
@tokens_option("Also write the tokens of each file, to an .npz file, or to a folder for several inputs.")
@click.option("--max-pixels", type=size, metavar="SIZE", help="Refuse larger pictures, e.g. 100M.")
@click.option(
    "--ignore-metadata",
    type=metadata_kinds,
    metavar="KINDS",
    default="none",
    help="Metadata to leave out: all, none or some of icc,exif,xmp.",
)
@batch_options
@common_options
@click.pass_context
def decode(
    ctx: click.Context,
    *,
    inputs: tuple[Path, ...],
    format_: str | None,
    region: tuple[int, int, int, int] | None,
    scale: str,
    tune: Tune | None,
    frames: slice | None,
    allow_partial: bool,
    simulate_loss: float,
    seed: int,
    tokens: str | None,
    max_pixels: int | None,
    ignore_metadata: tuple[str, ...],
    batch: BatchOptions,
) -> None:
    """Decode .clt files to pictures, and videos to video files or folders of pictures.

    IN is a file, a folder or - for standard input. photo.clt becomes photo.png beside it unless -o or --format say
    otherwise; for -o - the format must be given. IN may also be an .npz file of tokens. A video, which may be .clt or
    .mkv, is decoded alone and needs -o.
    """
    from calotype.api import Decoded
    from calotype.container import SUFFIX
    from calotype.errors import InputError
    from calotype.limits import DEFAULT_MAX_PIXELS
    from calotype.media import strip_metadata, write_picture

    settings = ctx.ensure_object(Settings)
    if wants_video(inputs, format_, batch.output):
        if region is not None or scale != "1" or tune is not None:
            raise click.UsageError("--region, --scale and --tune are for pictures.")
        if tokens is not None or simulate_loss:
            raise click.UsageError("--tokens and --simulate-loss are for pictures.")
        job = VideoDecode(inputs[0], format_, frames or slice(None), allow_partial, max_pixels, batch)
        ctx.exit(decode_video(job, settings))
    if format_ in RAW_FORMATS or frames is not None:
        raise click.UsageError("--format y4m, --format rawvideo and --frames are for videos, and no input is one.")
    codecs = Codecs(settings.device, tune)
    limit = max_pixels or DEFAULT_MAX_PIXELS

    def work(task: Task, progress: Progress) -> Product:
        token_files.check(task)
        data = read_bytes(task.source)
        if is_tokens(data):
            if tokens is not None or simulate_loss:
                raise InputError("it is tokens already, which have no packets: encode them first")
            given = read_tokens(data, limit)
            drawn = codecs.named(model_of(given)).draw(given, region=region, scale=_SCALES[scale])
            return product(Decoded(drawn, (), {}))
        decoded = codecs.of(data).decode(
            data,
            region=region,
            scale=_SCALES[scale],
            allow_partial=allow_partial,
            simulate_loss=simulate_loss,
            seed=seed,
            max_pixels=limit,
            progress=progress,
        )
        return token_files.write(task, product(decoded), data, codecs)

    def product(decoded: Decoded) -> Product:
        picture = strip_metadata(decoded.picture, ignore_metadata)
        output = write_picture(picture, chosen)
        record: dict[str, Any] = {
            "format": chosen,
            "width": picture.width,
            "height": picture.height,
            "bytes": len(output),
            "packets": decoded.packets,
            "damaged_tiles": list(decoded.damaged),
            "lost": list(decoded.lost),
            "seconds": dict(decoded.seconds),
        }
        parts = "tiles" if decoded.packets == 1 else "packets"
        line = f"{picture.width}x{picture.height}, {file_size(len(output))}"
        if decoded.damaged:
            line += f", {len(decoded.damaged)} damaged {parts}"
        if decoded.lost:
            line += f", {len(decoded.lost)} {parts} dropped"
        return Product(output, record, line + stage_times(settings, decoded.seconds), partial=bool(decoded.damaged))

    # The suffix of the outputs is known only when we know whether -o is a file, so the plan comes first.
    suffix = ".jpg" if format_ == "jpeg" else f".{format_ or 'png'}"
    tasks = plan(inputs, batch, suffix=suffix, input_suffixes={SUFFIX})
    token_files = TokenFiles(tokens, inputs, tasks, batch, {SUFFIX})
    chosen = _format(format_, batch.output, tasks)
    ctx.exit(Batch(tasks, batch, settings, schema="calotype.decode/1").run(work))


def _format(given: str | None, output: str | None, tasks: list[Task]) -> str:
    """The format of all outputs. Raises click.UsageError where it stays open or contradicts the name of the output."""
    from calotype.media import OUTPUT_SUFFIXES

    target = tasks[0].target
    if target == STREAM:
        if given is None:
            raise click.UsageError("Standard output has no suffix: give the --format.")
        return given
    named = OUTPUT_SUFFIXES.get(target.suffix.lower())
    if given is None and named is None:
        raise click.UsageError(f"No picture format ends in {target.suffix!r} ({output}): give the --format.")
    if given is not None and named is not None and given != named:
        raise click.UsageError(f"--format {given} contradicts the suffix of {output}.")
    return given or named or "png"
