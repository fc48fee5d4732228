"""`calotype train`: run a training recipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calotype.cli.console import Settings, print_json
from calotype.cli.options import common_options, json_option

if TYPE_CHECKING:
    import torch

    from calotype.models.training.recipe import Recipe


@click.command(short_help="Train a model after a recipe.")
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a setting of the recipe.")
@click.option(
    "--resume/--no-resume", default=True, show_default=True, help="Go on from the checkpoint, if there is one."
)
@json_option
@common_options
@click.pass_context
def train(ctx: click.Context, *, recipe: str, overrides: tuple[str, ...], resume: bool, as_json: bool) -> None:
    """Train a model after RECIPE: a YAML file or the name of a recipe that comes with the program.

    Several GPUs: torchrun --nproc-per-node N -m calotype.cli train RECIPE
    """
    from calotype.errors import InputError, ModelNotFoundError
    from calotype.models.zoo import WeightsError

    path = _find(recipe)
    settings = ctx.ensure_object(Settings)
    loaded = _load(recipe, path, overrides)
    device = _device(settings.device)
    with _needs_extra():
        from calotype.models.training.trainer import Trainer

    # The trainer prints its log; the result alone goes to standard output.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            trainer = Trainer(loaded, device, resume=resume)
        except WeightsError as error:
            raise ModelNotFoundError(str(error)) from error
        except (FileNotFoundError, ValueError) as error:
            # The folders of the recipe hold no photographs, or too small ones.
            raise InputError(str(error)) from error
        result = trainer.run()
    if as_json:
        points = [{"bpp": bpp, result.measure: value} for bpp, value in result.points]
        print_json("calotype.train/1", {"output": str(loaded.output), "loss": result.loss, "points": points})


@contextlib.contextmanager
def _needs_extra() -> Iterator[None]:
    """Imports inside need packages that encoding and decoding do without."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"Training needs {error.name}: install it with  pip install 'calotype[train]'"
        ) from error


def _load(recipe: str, path: Path, overrides: tuple[str, ...]) -> Recipe:
    with _needs_extra():
        import yaml

        from calotype.models.training.recipe import load_recipe
    try:
        return load_recipe(path, overrides)
    except (ValueError, yaml.YAMLError) as error:
        raise click.UsageError(f"{recipe}: {_problems(error)}") from error


def _find(recipe: str) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    folder = Path(str(files("calotype.models.training"))) / "recipes"
    packaged = folder / f"{recipe}.yaml"
    if packaged.is_file() and packaged.parent == folder:
        return packaged
    names = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
    raise click.UsageError(f"{recipe} is neither a file nor a packaged recipe ({names}).")


def _problems(error: Exception) -> str:
    """All that is wrong with a recipe, in one line."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
    return " ".join(str(error).split())


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise click.UsageError("No CUDA device is available; use --device cpu.")
    if name == "cuda":
        # Under torchrun each process takes a GPU of its own.
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
