"""Option types and groups of options that several commands share."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from calotype.cli.console import Settings
from calotype.models.zoo import TUNES

Function = TypeVar("Function", bound=Callable[..., Any])

METADATA = ("icc", "exif", "xmp")


# Values -----------------------------------------------------------------------------------------------------------

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmg])(i?))?b?", re.IGNORECASE)


def size(value: str) -> int:
    """A count with an optional unit: 40000, 40k (1000), 40KiB (1024), 1.5M."""
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size; write it like 40000, 40k, 40KiB or 1M.")
    number, unit, binary = match.groups()
    count = int(float(number) * (1024 if binary else 1000) ** (" kmg".index(unit.lower()) if unit else 0))
    if count == 0:
        raise click.BadParameter("a size must be positive.")
    return count


def region(value: str) -> tuple[int, int, int, int]:
    """x,y,width,height in pixels of the full picture."""
    parts = [part.strip() for part in value.split(",")]
    if len(parts) != 4 or not all(part.isascii() and part.isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r} is not a region; write it as x,y,width,height in whole pixels.")
    x, y, width, height = map(int, parts)
    if width == 0 or height == 0:
        raise click.BadParameter("the width and the height of a region must be positive.")
    return x, y, width, height


def device(value: str) -> str:
    """auto, cpu, cuda or cuda:N; whether it is there shows when it is used."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise click.BadParameter(f"{value!r} is not a device; choose auto, cpu, cuda or cuda:N.")
    return value


def jobs(value: str) -> int:
    """A positive number, or `all` for one job a processor."""
    if value == "all":
        return processors()
    if not (value.isascii() and value.isdecimal()) or int(value) == 0:
        raise click.BadParameter(f"{value!r} is not a number of jobs; write a positive number or 'all'.")
    return int(value)


def metadata(value: str) -> tuple[str, ...]:
    """all, none, or some of icc, exif, xmp with commas between them."""
    if value in ("all", "none"):
        return METADATA if value == "all" else ()
    kinds = tuple(part.strip().lower() for part in value.split(","))
    if not set(kinds) <= set(METADATA):
        raise click.BadParameter(f"{value!r}: choose all, none or some of {','.join(METADATA)}.")
    return kinds


def processors() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Groups of options ------------------------------------------------------------------------------------------------


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep a global option in the settings; one that was not given leaves what stood before the command's name."""
    settings = ctx.ensure_object(Settings)
    if value and param.name == "verbose":
        settings.verbose += value
    elif value and param.name is not None:
        setattr(settings, param.name, value)


def common_options(function: Function) -> Function:
    """-v, --quiet and --device, accepted before and after the command's name."""
    for option in (
        click.option(
            "--device",
            type=device,
            metavar="DEVICE",
            expose_value=False,
            callback=_remember,
            help="auto (the default), cpu, cuda or cuda:N.",
        ),
        click.option("--quiet", is_flag=True, expose_value=False, callback=_remember, help="Print errors only."),
        click.option(
            "-v",
            "--verbose",
            count=True,
            expose_value=False,
            callback=_remember,
            help="Say more; -vv also shows tracebacks.",
        ),
    ):
        function = option(function)
    return function


def tune_option(help: str) -> Callable[[Function], Function]:
    """--tune, of a command with pictures or weights."""
    return click.option("--tune", type=click.Choice(TUNES), help=help)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
inputs_argument = click.argument(
    "inputs", metavar="IN...", nargs=-1, required=True, type=click.Path(path_type=Path, allow_dash=True)
)


@dataclass(frozen=True)
class BatchOptions:
    """What `encode` and `decode` share about files."""

    output: str | None
    recursive: bool
    force: bool
    skip_existing: bool
    jobs: int
    fail_fast: bool
    dry_run: bool
    preserve_times: bool
    no_progress: bool
    as_json: bool


_BATCH = (
    # A string, not a Path: a trailing slash says that a folder is meant.
    click.option(
        "-o",
        "--output",
        type=click.Path(allow_dash=True),
        metavar="OUT",
        help="Output file, a folder (mirrors the tree of the inputs) or - for standard output. "
        "[default: the input's name with a new suffix, beside the input]",
    ),
    click.option("-r", "--recursive", is_flag=True, help="Take the files in subfolders of an input folder too."),
    click.option("-f", "--force", is_flag=True, help="Overwrite existing outputs."),
    click.option("-n", "--skip-existing", is_flag=True, help="Leave inputs alone whose output exists."),
    click.option(
        "-j",
        "--jobs",
        type=jobs,
        metavar="N",
        default="1",
        show_default=True,
        help="Work on this many files at a time; or 'all' processors.",
    ),
    click.option("--fail-fast", is_flag=True, help="Stop at the first file that fails."),
    click.option("--dry-run", is_flag=True, help="Only show what would be written."),
    click.option("--preserve-times", is_flag=True, help="Give outputs the modification times of their inputs."),
    click.option("--no-progress", is_flag=True, help="No progress bar (there is none without a terminal)."),
    json_option,
)


def batch_options(function: Function) -> Callable[..., Any]:
    """The options of BatchOptions, handed over as the one argument `batch`."""

    @functools.wraps(function)
    def collect(*args: Any, **kwargs: Any) -> Any:
        batch = BatchOptions(**{field.name: kwargs.pop(field.name) for field in fields(BatchOptions)})
        if batch.force and batch.skip_existing:
            raise click.UsageError("--force and --skip-existing exclude each other.")
        if batch.as_json and batch.output == "-":
            raise click.UsageError("--json and -o - both want standard output; write the picture to a file.")
        return function(*args, batch=batch, **kwargs)

    decorated: Callable[..., Any] = collect
    for option in reversed(_BATCH):
        decorated = option(decorated)
    return decorated
