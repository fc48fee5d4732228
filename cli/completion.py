"""`calotype completion`: the script that makes a shell complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_SETUP = {
    "bash": 'eval "$(calotype completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(calotype completion zsh)" in ~/.zshrc',
    "fish": "calotype completion fish > ~/.config/fish/completions/calotype.fish",
}


@click.command(epilog="Set up: " + "; ".join(_SETUP.values()) + ".")
@click.argument("shell", type=click.Choice(list(_SETUP)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"This version of click has no completion for {shell}.")
    click.echo(kind(ctx.find_root().command, {}, "calotype", "_CALOTYPE_COMPLETE").source())
