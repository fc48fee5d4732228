"""Tokens at the command line: archives that go in where pictures and files do, and come out beside other outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from calotype.cli.batch import Product, Task, plan, read_bytes
from calotype.cli.codecs import Codecs
from calotype.cli.options import BatchOptions

if TYPE_CHECKING:
    from calotype.tokens import Tokens

SUFFIX = ".npz"
_Function = TypeVar("_Function", bound=Callable[..., Any])


def tokens_option(help: str) -> Callable[[_Function], _Function]:
    """--tokens of `encode` and `decode`."""
    return click.option("--tokens", type=click.Path(), metavar="OUT", help=help)


def is_tokens(source: Path | bytes) -> bool:
    """Whether an input is an archive: by its name, or by its first bytes where there is none."""
    return source[:4] == b"PK\3\4" if isinstance(source, bytes) else source.suffix.lower() == SUFFIX


def read_tokens(source: Path | bytes, max_pixels: int) -> Tokens:
    """Raises InputError, LimitError."""
    from calotype.tokens import Tokens

    return Tokens.from_npz(source if isinstance(source, bytes) else read_bytes(source), max_pixels=max_pixels)


def model_of(tokens: Tokens) -> str:
    """The installed model that tokens are of. Raises ModelNotFoundError."""
    from calotype.errors import ModelNotFoundError
    from calotype.models.zoo import name_of

    name = name_of(tokens.weights)
    if name is None:
        raise ModelNotFoundError(
            f"the tokens need weights {tokens.weights.hex()}, which are not installed: use the Calotype that wrote them"
        )
    return name


class TokenFiles:
    """Where the tokens of a command's files go; nowhere if `output` is None.

    Raises click.UsageError where names clash, as `plan` does.
    """

    def __init__(
        self,
        output: str | None,
        inputs: Sequence[Path],
        tasks: Sequence[Task],
        batch: BatchOptions,
        input_suffixes: Collection[str],
    ) -> None:
        self._overwrite = batch.force
        self._targets: dict[Path, Path] = {}
        if output is None:
            return
        if output == "-":
            raise click.UsageError("--tokens takes a file or a folder, not standard output.")
        planned = plan(inputs, replace(batch, output=output), suffix=SUFFIX, input_suffixes=input_suffixes)
        self._targets = {task.source: task.target for task in planned}
        for task in tasks:
            if task.target in self._targets.values():
                raise click.UsageError(f"{task.target} would be both the output and its tokens; give them two names.")

    def check(self, task: Task) -> None:
        """Raise OutputExistsError before anything is computed in vain."""
        from calotype.publish import refuse_existing

        if task.source in self._targets:
            refuse_existing(self._targets[task.source], self._overwrite)

    def write(self, task: Task, product: Product, data: bytes, codecs: Codecs) -> Product:
        """Write the tokens in the file `data`; the product says where. Raises InputError if there are none."""
        from calotype.media import write_file

        if task.source not in self._targets:
            return product
        target = self._targets[task.source]
        write_file(target, codecs.of(data).tokens_of(data).to_npz(), overwrite=self._overwrite)
        return replace(product, record={**product.record, "tokens": click.format_filename(target)})
