"""Files that appear under their names only when they are whole."""

from __future__ import annotations

import os
from pathlib import Path

from calotype.errors import InputError, OutputExistsError


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise OutputExistsError if the output is there and must not be replaced."""
    if target.exists() and not overwrite:
        raise OutputExistsError(f"{target} is there already: use --force to replace it or --skip-existing to keep it")


def publish(finished: Path, target: Path, *, overwrite: bool) -> None:
    """Give a finished file its name, all at once. Raises OutputExistsError, InputError."""
    refuse_existing(target, overwrite)
    try:
        with finished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(finished, target)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from error
