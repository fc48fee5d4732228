"""`calotype info` and `calotype verify`: what a file says about itself, and whether it is intact."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from calotype.cli.batch import error_record, read_bytes
from calotype.cli.codecs import Codecs
from calotype.cli.console import SOME_FAILED, Settings, exit_code, file_size, print_json, show_error
from calotype.cli.options import common_options, inputs_argument, json_option
from calotype.cli.video import info_text, is_video_file


@click.command(short_help="Show what .clt files say about themselves.")
@inputs_argument
@click.option("--chunks", "with_chunks", is_flag=True, help="List the chunks of each file too.")
@json_option
@common_options
@click.pass_context
def info(ctx: click.Context, *, inputs: tuple[Path, ...], with_chunks: bool, as_json: bool) -> None:
    """Show size, quality, model and metadata of .clt files. Reads headers only and needs no weights."""
    from calotype.container import chunks, probe

    def look(path: Path) -> tuple[dict[str, Any], str]:
        video, data = _content(path)
        if video is not None:
            from calotype.video.info import probe_video

            fields = probe_video(video).model_dump()
            return fields, info_text(fields)
        record = probe(data).model_dump()
        text = _info_text(record)
        if with_chunks:
            record["chunks"] = [chunk.model_dump() for chunk in chunks(data)]
            text += "".join(
                f"\n  {c['name']}  at {c['offset']}, {c['length']} bytes{'' if c['crc_ok'] else ', DAMAGED'}"
                for c in record["chunks"]
            )
        return record, text

    ctx.exit(_each(ctx, inputs, look, schema="calotype.info/1", as_json=as_json))


@click.command(short_help="Check that .clt files are intact.")
@inputs_argument
@click.option("--deep", is_flag=True, help="Also decode and compare the checksums of the decoded symbols.")
@json_option
@common_options
@click.pass_context
def verify(ctx: click.Context, *, inputs: tuple[Path, ...], deep: bool, as_json: bool) -> None:
    """Check the checksums of .clt files. Without --deep this needs no weights."""
    from calotype.container import read_still

    device = ctx.ensure_object(Settings).device
    codecs = Codecs(device)

    def check(path: Path) -> tuple[dict[str, Any], str]:
        video, data = _content(path)
        if video is not None:
            from calotype.video.info import verify_video

            count = verify_video(video, deep=deep, device=device)
            return {"bytes": len(data) or path.stat().st_size, "deep": deep, "frames": count}, "ok"
        # Nothing is decoded here, so the number of pixels is no danger.
        read_still(data, max_pixels=sys.maxsize)
        if deep:
            codecs.of(data).verify(data, deep=True)
        return {"bytes": len(data), "deep": deep}, "ok"

    ctx.exit(_each(ctx, inputs, check, schema="calotype.verify/1", as_json=as_json))


def _content(path: Path) -> tuple[Path | bytes | None, bytes]:
    """A video to read, if it is one, and the bytes of anything else and of standard input."""
    from calotype.video.timeline import is_video

    if is_video_file(path):
        return path, b""
    data = read_bytes(path)
    return (data if is_video(data) else None), data


def _each(
    ctx: click.Context,
    inputs: tuple[Path, ...],
    look: Callable[[Path], tuple[dict[str, Any], str]],
    *,
    schema: str,
    as_json: bool,
) -> int:
    """Apply `look` to each file; a bad one does not keep the others from their turn. Returns the exit code."""
    settings = ctx.ensure_object(Settings)
    records: list[dict[str, Any]] = []
    codes: list[int] = []
    for path in inputs:
        name = click.format_filename(path)
        try:
            record, text = look(path)
        except BrokenPipeError:
            raise
        except Exception as error:
            codes.append(exit_code(error))
            records.append({"input": name, "status": "failed", "error": error_record(error)})
            show_error(error, settings, name)
        else:
            records.append({"input": name, "status": "ok", **record})
            if not (as_json or settings.quiet):
                click.echo(f"{name}: {text}")
    if as_json:
        print_json(schema, {"results": records, "failed": len(codes)})
    if not codes:
        return 0
    if len(inputs) > 1:
        click.echo(f"calotype: {len(inputs)} files: {len(codes)} failed", err=True)
        return SOME_FAILED
    return codes[0]


def _info_text(record: dict[str, Any]) -> str:
    kind = {1: "gray", 3: "RGB"}[record["channels"]] + (" with alpha" if record["alpha"] else "")
    model = record["model"] or "not installed"
    metadata = ", ".join(f"{name} {file_size(record[name])}" for name in ("icc", "exif", "xmp") if record[name])
    packets = f", in {record['packets']} packets each" if record["packets"] > 1 else ""
    codebook = f", {record['codebook']} codewords" if record["codebook"] else ""
    return "\n".join(
        (
            f"{record['width']}x{record['height']} {kind}, {file_size(record['file_bytes'])}, {record['bpp']:.3f} bpp",
            f"  quality   {record['quality']:g}{codebook}",
            f"  model     {model} (weights {record['weights']})",
            f"  tiles     {record['tiles']} of {record['tile']}x{record['tile']}{packets}",
            f"  metadata  {metadata or 'none'}",
            f"  format    {record['version']}",
        )
    )
