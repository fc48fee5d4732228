"""`calotype encode`: pictures to .clt files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from calotype.cli.batch import STREAM, Batch, Product, Progress, Task, plan, read_bytes
from calotype.cli.codecs import Codecs
from calotype.cli.console import Settings, file_size, stage_times
from calotype.cli.options import BatchOptions, batch_options, common_options, inputs_argument, size, tune_option
from calotype.cli.options import metadata as metadata_kinds
from calotype.cli.tokens import TokenFiles, is_tokens, model_of, read_tokens, tokens_option

if TYPE_CHECKING:
    from calotype.job import EncodedPicture
    from calotype.models.zoo import Tune
    from calotype.rate import Target


_SCHEMA = "calotype.encode/1"


@click.command(short_help="Encode pictures to .clt files.")
@inputs_argument
@click.option(
    "-q",
    "--quality",
    type=click.FloatRange(0, 100),
    default=60,
    show_default=True,
    help="0 (smallest) to 100 (best). This or one of the targets. With vqgan it picks a codebook: they take equal "
    "parts of the scale, so five begin at 0, 20, 40, 60 and 80.",
)
@click.option("--target-size", type=size, metavar="SIZE", help="Largest size of each file: 40k, 40KiB, 1M or bytes.")
@click.option("--target-bpp", type=click.FloatRange(0, min_open=True), help="Most bits per pixel of each file.")
@click.option("--target-psnr", type=click.FloatRange(0, min_open=True), help="PSNR to reach, in dB.")
@click.option(
    "-m",
    "--model",
    "model_name",
    metavar="NAME",
    help="A model of `calotype models list`; hyperprior unless --tune says otherwise.",
)
@click.option(
    "--tile",
    type=click.Choice(["256", "512", "1024", "2048"]),
    default="1024",
    show_default=True,
    help="Tile side: small tiles decode in small regions, large ones are a little smaller.",
)
@click.option(
    "-e",
    "--effort",
    type=click.Choice(["3", "4", "5", "7", "9"]),
    default="5",
    show_default=True,
    help="Encoding time for smaller files at equal quality, or with vqgan for better pictures: 3 is the fastest, "
    "with 4 close to it, 7 and 9 take many times as long as 5. Decoding stays as fast.",
)
@tune_option("Make files of least error (the model hyperprior), or that look like the original (the model visual).")
@click.option(
    "--packets",
    type=click.IntRange(1, 32),
    metavar="N",
    default=1,
    show_default=True,
    help="With vqgan: parts of each tile that can be lost one by one.",
)
@tokens_option("With vqgan: also write the tokens, to an .npz file, or to a folder for several inputs.")
@click.option(
    "--metadata",
    type=metadata_kinds,
    metavar="KINDS",
    default="all",
    show_default=True,
    help="Metadata to keep: all, none or some of icc,exif,xmp.",
)
@click.option("--verify", is_flag=True, help="Decode each result and check it before it is written.")
@click.option("--max-pixels", type=size, metavar="SIZE", help="Refuse larger pictures, e.g. 100M.")
@click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Encode on many machines through Ray: ray://HOST:PORT, auto (the cluster that this machine belongs to) or "
    "local. --jobs is then the most workers; run again to resume.",
)
@batch_options
@common_options
@click.pass_context
def encode(
    ctx: click.Context,
    *,
    inputs: tuple[Path, ...],
    model_name: str | None,
    tile: str,
    effort: str,
    tune: Tune | None,
    packets: int,
    tokens: str | None,
    metadata: tuple[str, ...],
    verify: bool,
    max_pixels: int | None,
    cluster: str | None,
    batch: BatchOptions,
    quality: float,
    target_size: int | None,
    target_bpp: float | None,
    target_psnr: float | None,
) -> None:
    """Encode pictures (JPEG, PNG, WebP, TIFF, BMP, AVIF, PPM) to .clt files.

    IN is a file, a folder or - for standard input. photo.jpg becomes photo.clt beside it unless -o says otherwise. IN
    may also be an .npz file of tokens, which have a quality and a model of their own.
    """
    from calotype.api import model_for
    from calotype.container import SUFFIX
    from calotype.errors import InputError
    from calotype.job import EncodeJob
    from calotype.limits import DEFAULT_MAX_PIXELS
    from calotype.media import INPUT_SUFFIXES

    settings = ctx.ensure_object(Settings)
    target = _target(ctx, {"target_size": target_size, "target_bpp": target_bpp, "target_psnr": target_psnr})
    try:
        model = model_for(model_name, tune)
    except InputError as error:
        raise click.UsageError(str(error)) from error
    codecs = Codecs(settings.device)
    limit = max_pixels or DEFAULT_MAX_PIXELS
    job = EncodeJob(model, quality, target, int(tile), metadata, verify, limit, int(effort), packets)

    def work(task: Task, progress: Progress) -> Product:
        token_files.check(task)
        source = read_bytes(STREAM) if task.source == STREAM else task.source
        if is_tokens(source):
            given = read_tokens(source, limit)
            name = model_of(given)
            made = job.run_tokens(codecs.named(name), given)
        else:
            name, made = model, job.run(codecs.named(model), source, progress)
        return token_files.write(task, product(made, name), made.encoded.data, codecs)

    def product(made: EncodedPicture, model: str = model) -> Product:
        encoded = made.encoded
        record: dict[str, Any] = {
            "width": made.width,
            "height": made.height,
            "bytes": len(encoded.data),
            "bpp": encoded.bpp,
            "quality": encoded.quality,
            # JSON has no infinity.
            "psnr": encoded.psnr if encoded.psnr is not None and math.isfinite(encoded.psnr) else None,
            "model": model,
            "packets": packets,
            "verified": verify,
            "seconds": dict(encoded.seconds),
        }
        line = f"{file_size(len(encoded.data))}, {encoded.bpp:.3f} bpp, quality {encoded.quality:g}"
        if encoded.psnr is not None:
            line += f", {encoded.psnr:.2f} dB"
        return Product(encoded.data, record, line + stage_times(settings, encoded.seconds))

    tasks = plan(inputs, batch, suffix=SUFFIX, input_suffixes=INPUT_SUFFIXES)
    token_files = TokenFiles(tokens, inputs, tasks, batch, INPUT_SUFFIXES)
    if cluster is not None:
        if tokens is not None or any(is_tokens(task.source) for task in tasks):
            raise click.UsageError("--cluster encodes pictures only, and writes no tokens.")
        from calotype.cli.cluster import encode_on_cluster

        most = None if ctx.get_parameter_source("jobs") is ParameterSource.DEFAULT else batch.jobs
        ctx.exit(encode_on_cluster(cluster, job, tasks, batch, settings, schema=_SCHEMA, limit=most, product=product))
    # Loading first makes a missing model one error of the command, not one of each file.
    ctx.exit(Batch(tasks, batch, settings, schema=_SCHEMA).run(work, prepare=lambda: codecs.named(model)))


def _target(ctx: click.Context, values: dict[str, float | None]) -> Target | None:
    """The one target asked for, None for a plain quality. The command line outranks the environment."""
    from calotype.rate import Target

    kinds: dict[str, Literal["size", "bpp", "psnr"]] = {
        "target_size": "size",
        "target_bpp": "bpp",
        "target_psnr": "psnr",
    }
    for source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT):
        given = [name for name in ("quality", *kinds) if ctx.get_parameter_source(name) is source]
        if len(given) > 1:
            names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise click.UsageError(f"{names} exclude each other: choose one.")
        for name in given:
            value = values.get(name)
            return None if value is None else Target(kinds[name], float(value))
    return None
