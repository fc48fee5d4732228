"""`calotype models`: the networks that are installed."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import click

from calotype.cli.batch import error_record
from calotype.cli.console import SOME_FAILED, Settings, exit_code, print_json, show_error
from calotype.cli.options import common_options, json_option, tune_option

if TYPE_CHECKING:
    from calotype.models.zoo import ModelSpec, Tune

_SCHEMA = "calotype.models/1"


@click.group()
def models() -> None:
    """List, show and check the installed models."""


def _record(spec: ModelSpec) -> dict[str, Any]:
    from calotype.models.zoo import TUNES

    return {
        "name": spec.name,
        "id": spec.id,
        "architecture": spec.architecture,
        "summary": spec.summary,
        "weights": str(spec.weights),
        "sha256": spec.sha256,
        "card": str(spec.card),
        "tunes": list(TUNES) if spec.visual else [spec.tune],
        "key_frames": spec.key_frames,
        "superseded_by": spec.superseded_by,
    }


@models.command("list")
@json_option
@common_options
def list_models(*, as_json: bool) -> None:
    """List the installed models, last those that are there for older files."""
    from calotype import api

    records = [_record(spec) for spec in api.models(superseded=True)]
    if as_json:
        print_json(_SCHEMA, {"models": records})
        return
    width = max((len(record["name"]) for record in records), default=0)
    for record in records:
        later = record["superseded_by"]
        click.echo(f"{record['name']:{width}}  {f'For older files: see {later}' if later else record['summary']}")


@models.command()
@click.argument("name")
@json_option
@common_options
def show(*, name: str, as_json: bool) -> None:
    """Show the facts and the card of a model."""
    from calotype import api

    record = _record(api.model(name))
    if as_json:
        print_json(_SCHEMA, {"models": [record]})
        return
    for key, value in record.items():
        if value is not None:
            click.echo(f"{key:13}  {', '.join(value) if isinstance(value, list) else value}")
    card = Path(record["card"])
    if card.is_file():
        click.echo("\n" + card.read_text(encoding="utf-8").rstrip())


@models.command()
@click.argument("name", required=False)
@json_option
@common_options
@click.pass_context
def verify(ctx: click.Context, *, name: str | None, as_json: bool) -> None:
    """Compare the weights of a model, or of all, with their registered SHA-256."""
    from calotype import api

    settings = ctx.ensure_object(Settings)
    wanted = [name] if name is not None else [spec.name for spec in api.models(superseded=True)]
    records: list[dict[str, Any]] = []
    codes: list[int] = []
    for model in wanted:
        try:
            api.verify_model(model)
        except Exception as error:
            codes.append(exit_code(error))
            records.append({"name": model, "status": "failed", "error": error_record(error)})
            show_error(error, settings, model)
        else:
            records.append({"name": model, "status": "ok"})
            if not (as_json or settings.quiet):
                click.echo(f"{model}: ok")
    if as_json:
        print_json("calotype.models.verify/1", {"results": records, "failed": len(codes)})
    if codes:
        ctx.exit(codes[0] if len(wanted) == 1 else SOME_FAILED)


@models.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("name")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to put the weights. [default: beside the installed ones]",
)
@click.option(
    "--photos",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Photographs to which codebooks (mixture) or tables (hyperprior, visual) are fitted.",
)
@click.option(
    "--clips",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Clips to which the tables of video are fitted.",
)
@click.option(
    "--keep",
    metavar="NAME",
    help="Keep the present weights under this name for the files, and key frames of videos, that they code.",
)
@click.option("--gradient", is_flag=True, help="Only what estimates gradients for the encoder of hyperprior.")
@tune_option("With visual, only a second synthesis of hyperprior.")
@json_option
@common_options
def export(
    *,
    checkpoint: Path,
    name: str,
    folder: Path | None,
    photos: Path | None,
    clips: Path | None,
    keep: str | None,
    gradient: bool,
    tune: Tune | None,
    as_json: bool,
) -> None:
    """Turn a training CHECKPOINT into shippable weights called NAME."""
    from calotype.errors import InputError, ModelNotFoundError

    if not checkpoint.is_file():
        raise InputError(f"{checkpoint}: no such file")
    from calotype.models.training.export import export_weights
    from calotype.models.zoo import WEIGHTS

    folder = folder or WEIGHTS
    try:
        written = export_weights(checkpoint, name, folder, photos, clips, tune, keep, gradient)
    except LookupError as error:
        raise ModelNotFoundError(f"{name} is not a model of the index in {folder}: add it there first") from error
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"{checkpoint} is not a checkpoint of {name}") from error
    if as_json:
        print_json("calotype.models.export/1", {"name": name, "weights": str(written)})
    else:
        click.echo(written)
