"""The `calotype` command: options and files in, calls of the library, results and exit codes out. No codec logic."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from calotype.cli.console import Settings, guarded
from calotype.cli.options import common_options

# Command -> module that defines NAME or NAME_command. Loaded on use, so that a command pays for its own only.
_COMMANDS = {
    "encode": "encode",
    "decode": "decode",
    "info": "inspect",
    "verify": "inspect",
    "transcode": "transcode",
    "models": "models",
    "train": "train",
    "eval": "evaluate",
    "compare": "evaluate",
    "bench": "evaluate",
    "serve": "serve",
    "completion": "completion",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = _COMMANDS.get(cmd_name)
        if module is None:
            return None
        home = importlib.import_module(f"calotype.cli.{module}")
        command: click.Command = getattr(home, cmd_name, None) or getattr(home, f"{cmd_name}_command")
        return command


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import version

    click.echo(f"calotype {version('calotype')}")
    ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "CALOTYPE"},
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 input unreadable, 4 stream corrupt, 5 model missing, "
    "6 output exists, 7 target not reachable, 8 verification failed, 9 some of several files failed, 130 interrupted.",
)
# Not read from the environment: CALOTYPE_VERSION may well be set for other reasons.
@click.option(
    "-V",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    allow_from_autoenv=False,
    callback=_print_version,
    help="Show the version and exit.",
)
@common_options
def root() -> None:
    """Calotype, a neural image codec: pictures become small .clt files and come back, the same on every machine.

    Every option can also be set in the environment: CALOTYPE_DEVICE, CALOTYPE_ENCODE_QUALITY and so on.
    """


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (`sys.argv` if `args` is None) and exit with its code."""
    settings = Settings()

    def run() -> object:
        return root.main(
            None if args is None else list(args), prog_name="calotype", standalone_mode=False, obj=settings
        )

    sys.exit(guarded(run, settings))
